"""Bodies of requests: read with limits on each and on all together, and large ones parsed away from the event loop.

An event loop that parses 8 MiB does nothing else for a second: nobody's tokens, and no health check. And what is sent by
many at once must not be more than there is memory for: beyond the first FREE_BYTES of each body, so that small requests
always get in, bodies share `max_pending_bytes` until their request is prepared.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from nanoserve.server.errors import ApiError, ClientGone
from nanoserve.server.json_body import parse_json_object
from nanoserve.server.parameters import parse_parameters
from nanoserve.server.settings import ServerSettings
from nanoserve.server.text_threads import TextThreads

FREE_BYTES = 16 * 2**10
M = TypeVar("M", bound=BaseModel)


class RequestBodies:
    """Reads them."""

    def __init__(self, settings: ServerSettings, threads: TextThreads) -> None:
        self._settings, self._threads = settings, threads
        self.pending_bytes = 0

    @contextlib.asynccontextmanager
    async def parameters(self, request: Request, model: type[M]) -> AsyncIterator[tuple[M, list[str]]]:
        """The checked request and the names of what was ignored; its bytes count as long as the context lasts.

        Raises:
            ApiError: 400, 408, 413, 415, or 503 when bodies are too large together. ClientGone.
        """
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415, f"Content-Type: {kind[:80]!r} must be application/json", "unsupported_media_type"
            )
        body = bytearray()
        try:
            await self._read(request, body)

            def parse() -> tuple[M, list[str]]:
                content = parse_json_object(bytes(body), self._settings.max_json_depth)
                return parse_parameters(model, content, self._settings)

            yield parse() if len(body) <= FREE_BYTES else await self._threads.run(parse, request.state.key)
        finally:
            self.pending_bytes -= _counted(body)

    async def _read(self, request: Request, body: bytearray) -> None:
        most, all_most = self._settings.max_body_bytes, self._settings.max_pending_bytes
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced[:20]) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(self._settings.read_timeout_s):
                async for part in request.stream():
                    if len(body) + len(part) > most:
                        raise _too_large(most)
                    before = _counted(body)
                    body += part
                    self.pending_bytes += _counted(body) - before
                    if self.pending_bytes > all_most:
                        raise ApiError(
                            503, f"body: requests being read have more than {all_most} bytes together", "too_many_bodies",
                            headers={"Retry-After": "1", "Connection": "close"},
                        )  # fmt: skip
        except TimeoutError:
            seconds = self._settings.read_timeout_s
            raise ApiError(
                408,
                f"body: not there after {seconds:g} s",
                "read_timeout",
                headers={"Connection": "close"},
            ) from None
        except ClientDisconnect:
            raise ClientGone from None


def _counted(body: bytearray) -> int:
    return max(0, len(body) - FREE_BYTES)


def _too_large(most: int) -> ApiError:
    return ApiError(
        413, f"body: at most {most} bytes are allowed", "body_too_large", headers={"Connection": "close"}
    )
