"""Server-sent events over ASGI: one event per delta, one write per wake-up, and nothing that waits for a slow client.

A response of Starlette's would cost more per event than the event; this one sends bytes as they are.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from nanoserve.server.errors import ApiError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


def event(data: Mapping[str, Any]) -> bytes:
    """One event. JSON has no raw newlines, so it is one line."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


class StreamRefused(Exception):
    """The call failed before its first event."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def error_response(error: ApiError, request_id: str) -> Response:
    return JSONResponse(error.body(request_id), error.status, headers=error.headers)


class EventStream(Response):
    """Sends what `events` yields, until it ends, or the client goes.

    Args:
        events: bytes of whole events; an ApiError it raises becomes the last one.
        ending: asked once all of them are sent: what is still to come before the end.
        request_id: for that error.
        on_close: called once, however it ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        ending: Callable[[], bytes],
        *,
        request_id: str,
        headers: Mapping[str, str],
        on_close: Callable[[], None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._events, self._ending, self._request_id, self._on_close = events, ending, request_id, on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((writer, gone), return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        except StreamRefused as refused:
            await error_response(refused.error, self._request_id)(scope, receive, send)
        finally:
            self._on_close()
            for task in (writer, gone):
                task.cancel()
            await asyncio.gather(writer, gone, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        try:
            first = await anext(self._events)
        except ApiError as error:  # nothing was sent yet: the answer is an error like any other
            raise StreamRefused(error) from None
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            last = self._ending()
        except ApiError as error:
            last = event(error.body(self._request_id))
        await send({"type": "http.response.body", "body": last + DONE, "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None, and `work` cancelled, if the client goes first."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
