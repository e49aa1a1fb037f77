"""HttpProtocol: uvicorn's HTTP/1.1 connection with what it lacks.

limits on connections, headers, and the time a request may take to arrive
an answer that its client does not read ends, whole or streamed, and so does its memory
a client that goes is noticed though it sent further requests ahead (pipelining), which uvicorn waits with and stops reading for
when the connection was accepted, and when the request began
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
import time
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nanoserve.server.metrics import Metrics
from nanoserve.server.settings import ServerSettings

_REFUSED = (
    b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
)
_REFUSED_BODY = b'{"error":{"message":"%b","type":"%b","param":null,"code":"%b"}}'
MAX_AHEAD = 16  # requests sent before the answer to an earlier one
MAX_AHEAD_BYTES = 65536  # of the last one's body
LEAST_READ_BYTES = 32768  # of an answer that is longer, per stall_timeout_s
GRACE_S = 1.0  # for an answer that says that the request did not arrive in time


class HttpProtocol(HttpToolsProtocol):
    """One connection. The class's attributes are set once, before the server starts."""

    settings: ClassVar[ServerSettings] = ServerSettings()
    metrics: ClassVar[Metrics] = Metrics()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._accepted_s: float | None = time.monotonic()  # None: its first request has begun
        self._began_s: float | None = None
        self._header_bytes = self._named_bytes = 0
        self._has_headers = False
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._answering: Any = None  # uvicorn's RequestResponseCycle; `cycle` is the request that came last

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self.metrics.refused("connections")
            most = b"%d connections are open, no more are allowed" % self.settings.max_connections
            self._refuse(503, b"Service Unavailable", b"overloaded_error", b"too_many_connections", most)
            return
        self._arm_late()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_in_time()
        if self._unread is not None:
            self._unread.cancel()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._began_s is None:
            self._begin()
        if not self._has_headers:
            self._header_bytes += len(data)  # of which some may be body: a limit is kept, not an account
            if self._header_bytes > self.settings.max_header_bytes and not self._ends_in(data):
                self._refuse_headers()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._named_bytes = 0
        if self._began_s is None:
            self._begin()
        state = self.scope["state"]
        state["received_s"] = self._began_s
        state["accepted_s"] = self._began_s if self._accepted_s is None else self._accepted_s
        self._accepted_s = None  # the next request of this connection begins with its first byte

    def on_header(self, name: bytes, value: bytes) -> None:
        self._named_bytes += len(name) + len(value) + 4
        if self._named_bytes > self.settings.max_header_bytes:
            self._refuse_headers()
        else:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_headers = True
        if self.transport.is_closing():
            return
        super().on_headers_complete()
        if len(self.pipeline) > MAX_AHEAD:
            self._hang_up()
        elif self.pipeline:
            self.flow.resume_reading()  # else nobody would notice that the client goes

    def on_message_complete(self) -> None:
        self._is_in_time()
        self._began_s, self._has_headers, self._header_bytes = None, False, 0
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        if self.transport.is_closing():
            return
        super().on_body(body)
        if self.cycle is not self._answering:
            if len(self.cycle.body) > MAX_AHEAD_BYTES:
                self._hang_up()
            else:
                self.flow.resume_reading()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_unread()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        if self._answering is not None and self._answering.response_complete:
            self._watch_unread()

    # ---- an answer that is not read

    def _watch_unread(self) -> None:
        """From when nothing more is written: the answer is complete, or waits for its client."""
        size = self._unread_bytes()
        if size and self._unread is None:
            late = self.settings.stall_timeout_s
            self._unread = self.loop.call_later(late, self._look_at_unread, size, self._answering)

    def _look_at_unread(self, before: int, answering: Any) -> None:
        self._unread = None
        size = self._unread_bytes()
        if answering is self._answering and size > before - LEAST_READ_BYTES and size:
            self.metrics.refused("stalled")
            self._hang_up()
        elif self.flow.write_paused or answering.response_complete:
            self._watch_unread()

    def _unread_bytes(self) -> int:
        """The kernel's part, too: its buffer takes more in strides of a MiB, which a slow reader needs minutes for."""
        size = self.transport.get_write_buffer_size()
        peer = self.transport.get_extra_info("socket")
        if not size or peer is None:
            return size
        with contextlib.suppress(OSError):
            size += struct.unpack("i", fcntl.ioctl(peer.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        return size

    def _hang_up(self) -> None:
        """At once, with a reset: what is on its way in the kernel would otherwise be kept for a peer that takes nothing."""
        peer = self.transport.get_extra_info("socket")
        if peer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    # ---- a request that does not arrive

    def _begin(self) -> None:
        self._began_s = time.monotonic()
        self._arm_late()

    def _arm_late(self) -> None:
        self._is_in_time()
        self._late = self.loop.call_later(self.settings.read_timeout_s + GRACE_S, self._took_too_long)

    def _is_in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _took_too_long(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()

    # ---- refusals without a request

    def _ends_in(self, data: bytes) -> bool:
        """The headers end in the first bytes of this piece."""
        at = data.find(b"\r\n\r\n")
        return at >= 0 and self._header_bytes - len(data) + at <= self.settings.max_header_bytes

    def _refuse_headers(self) -> None:
        most = b"headers: larger than %d bytes" % self.settings.max_header_bytes
        self._refuse(
            431, b"Request Header Fields Too Large", b"invalid_request_error", b"headers_too_large", most
        )

    def _refuse(self, status: int, phrase: bytes, kind: bytes, code: bytes, message: bytes) -> None:
        if self.transport.is_closing():
            return
        body = _REFUSED_BODY % (message, kind, code)
        self.transport.write(_REFUSED % (status, phrase, len(body), body))
        self.transport.close()
