"""HttpProtocol: uvicorn's HTTP/1.1 connection with what it lacks: limits on headers and on time, and when a request began."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nanoserve.server.settings import ServerSettings

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b"
)
_TOO_LARGE_BODY = b'{"error":{"message":"headers: larger than %d bytes","type":"invalid_request_error","param":null,"code":"headers_too_large"}}'


class HttpProtocol(HttpToolsProtocol):
    """One connection. `settings` is set once, before the server starts."""

    settings: ClassVar[ServerSettings] = ServerSettings()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._began_s: float | None = None
        self._header_bytes = self._named_bytes = 0
        self._has_headers = False
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_in_time()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._began_s is None:
            self._begin()
        if not self._has_headers:
            self._header_bytes += len(data)  # of which some may be body: a limit is kept, not an account
            if self._header_bytes > self.settings.max_header_bytes and not self._ends_in(data):
                self._refuse()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._named_bytes = 0
        if self._began_s is None:
            self._begin()
        self.scope["state"]["received_s"] = self._began_s
        self.scope["state"]["hang_up"] = self._hang_up

    def on_header(self, name: bytes, value: bytes) -> None:
        self._named_bytes += len(name) + len(value) + 4
        if self._named_bytes > self.settings.max_header_bytes:
            self._refuse()
        else:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_headers = True
        if self.transport.is_closing():
            return
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_time()
        self._began_s, self._has_headers, self._header_bytes = None, False, 0
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def _hang_up(self) -> None:
        """At once, with a reset: what is on its way in the kernel would otherwise be kept for a peer that takes nothing."""
        peer = self.transport.get_extra_info("socket")
        if peer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _begin(self) -> None:
        self._began_s = time.monotonic()
        self._is_in_time()
        self._late = self.loop.call_later(self.settings.read_timeout_s, self._took_too_long)

    def _is_in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _took_too_long(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()

    def _ends_in(self, data: bytes) -> bool:
        """The headers end in the first bytes of this piece."""
        at = data.find(b"\r\n\r\n")
        return at >= 0 and self._header_bytes - len(data) + at <= self.settings.max_header_bytes

    def _refuse(self) -> None:
        if self.transport.is_closing():
            return
        body = _TOO_LARGE_BODY % self.settings.max_header_bytes
        self.transport.write(_TOO_LARGE % (len(body), body))
        self.transport.close()
