"""The server's process: it listens when it is ready, and ends when it is told to, with nothing lost that it had accepted.

SIGTERM or SIGINT: new requests get 503 and readiness goes, those that were accepted are finished, within `drain_timeout_s`;
then the process ends with exit code 0. A second signal ends it at once, with 1. So does an engine that cannot go on, once its
clients are told: whoever looks after the process starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import resource
import signal
import socket
import time
from collections.abc import Callable

import uvicorn

from nanoserve.llm import LLM
from nanoserve.sampling import SamplingParams
from nanoserve.server.app import build_app
from nanoserve.server.engine_view import EngineView
from nanoserve.server.gateway import Gateway
from nanoserve.server.guard import Guard
from nanoserve.server.health import Health
from nanoserve.server.http_protocol import HttpProtocol
from nanoserve.server.metrics import Metrics
from nanoserve.server.service import Service
from nanoserve.server.settings import ServerSettings

_log = logging.getLogger("nanoserve.server")
WARM_UP_TOKENS = 8
BACKLOG = 1024
END_S = 2  # for answers' last bytes, after the drain's end
OWN_FILES = 256  # that are open beside connections


class Server:
    """One model behind one address.

    Args:
        llm: its engine is the server's from now on.
        on_listening: called with the URL once requests are answered.
    """

    def __init__(
        self, llm: LLM, settings: ServerSettings, on_listening: Callable[[str], None] | None = None
    ) -> None:
        self.settings = settings
        self._on_listening = on_listening
        self.metrics = Metrics()
        view = EngineView(settings.page)
        self.gateway = Gateway(llm.engine, settings, self.metrics, view)
        self.gateway.on_engine_failure = self.stop
        self.health = Health(self.gateway, view, llm.engine.device_name)
        self.metrics.gauges = self.health.gauges
        self.service = Service(llm, self.gateway, settings, settings.model_name or llm.directory.name)
        self.app: Guard = build_app(self.service, self.metrics, self.health)
        self._llm = llm
        self._stop = asyncio.Event()
        self._signals = 0

    def run(self) -> bool:
        """Serves until a signal; whether every accepted request was finished.

        Raises:
            RuntimeError: the engine failed. ValueError: it cannot listen there.
        """
        return asyncio.run(self.serve())

    async def serve(self) -> bool:
        """As `run`, in a running event loop."""
        _warm_up(self._llm)
        _allow_open_files(self.settings.max_connections)
        listener = _listen(self.settings)
        protocol = type("Protocol", (HttpProtocol,), {"settings": self.settings, "metrics": self.metrics})
        config = uvicorn.Config(
            self.app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            timeout_keep_alive=max(1, round(self.settings.keep_alive_s)), backlog=BACKLOG,
        )  # fmt: skip
        self._uvicorn = server = _Uvicorn(config)
        self.gateway.start()
        self.gateway.is_ready = True
        with self._signal_handlers():
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            host, port = listener.getsockname()[:2]
            self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            _log.info(
                "listening", extra={"fields": {"url": self.url, "device": self._llm.engine.device_name}}
            )
            if self._on_listening is not None:
                self._on_listening(self.url)
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            _log.info("draining")
            until = time.monotonic() + self.settings.drain_timeout_s
            finished = await self.gateway.drain(self.settings.drain_timeout_s)
            # What the engine made may still be on its way to a client that reads slowly.
            config.timeout_graceful_shutdown = max(END_S, math.ceil(until - time.monotonic()))
            server.should_exit = True
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            stopping.cancel()
        self.gateway.is_ready = False
        self.service.threads.close()
        ended = await asyncio.get_running_loop().run_in_executor(None, self.gateway.engine_loop.stop)
        _log.info("stopped", extra={"fields": {"finished": finished, "engine_ended": ended}})
        if self.gateway.engine_loop.failure is not None:
            raise RuntimeError("the engine failed") from self.gateway.engine_loop.failure
        return finished

    @property
    def connections(self) -> int:
        """Open ones."""
        return len(self._uvicorn.server_state.connections)

    def stop(self) -> None:
        """Begins the end, as a first signal does; from the event loop."""
        self._stop.set()

    @contextlib.contextmanager
    def _signal_handlers(self):  # type: ignore[no-untyped-def]
        loop = asyncio.get_running_loop()
        numbers: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)
        try:
            for number in numbers:
                loop.add_signal_handler(number, self._on_signal)
        except (RuntimeError, ValueError):  # not the main thread: whoever started it stops it
            numbers = ()
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals > 1:
            os._exit(1)  # without waiting for threads that may be stuck
        self.stop()


class _Uvicorn(uvicorn.Server):
    """Signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


def _warm_up(llm: LLM) -> None:
    """One short request: whatever is set up by a first one is set up before the first client."""
    engine = llm.engine
    tokens = [index % engine.config.vocab_size for index in range(WARM_UP_TOKENS)]
    (request,) = engine.generate(
        [tokens[: max(1, engine.executor.max_model_len - 2)]], SamplingParams(temperature=0.0, max_tokens=2)
    )
    if request.error is not None:
        raise RuntimeError(f"the engine fails on its first request: {request.error}")
    engine.reset_stats()


def _allow_open_files(connections: int) -> None:
    """As many as the system lets us, if that is needed: without, accepting fails, and so does everything else."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            _log.warning("%d files may be open, %d connections want %d", most, connections, wanted)


def _listen(settings: ServerSettings) -> socket.socket:
    """A socket that notices peers which vanish."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ValueError(
            f"port: {settings.host}:{settings.port} cannot be listened on: {error.strerror}"
        ) from error
    listener.listen(BACKLOG)
    return listener
