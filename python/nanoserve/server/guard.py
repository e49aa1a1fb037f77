"""Guard: what every request passes before a route sees it, as ASGI middleware.

    a request id, given back in X-Request-Id and in errors
    the Host header is a name of this server (a page of somebody else's cannot reach it by a name of its own: DNS rebinding);
        of health checks it is not asked: whoever probes does so by address
    a key, compared in constant time, on every route but the health checks
    on some routes, that there is room for it now, whatever it is
    one line in the access log and one count when it ends

Denying is the default: a route that is added is guarded, whatever it is.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoserve.server.errors import ApiError
from nanoserve.server.event_stream import error_response
from nanoserve.server.metrics import Metrics
from nanoserve.server.settings import LOOPBACK, ServerSettings

OPEN_ROUTES = frozenset({"/health", "/health/live", "/health/ready"})
# The page itself holds nothing; what it shows it asks for with a key.
OPEN_WITH_PAGE = frozenset({"/", "/page.js", "/page.css"})
INTERNAL = ApiError(500, "internal error", "internal_error")
CLIENT_CLOSED = 499  # nobody hears it; the access log and the metrics do
access_log = logging.getLogger("nanoserve.access")
_log = logging.getLogger("nanoserve.server")


class Guard:
    """Wraps an ASGI application.

    Args:
        doors: by path, called with the key's number before the request is read; refuses by raising ApiError.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        doors: Mapping[str, Callable[[int], None]] | None = None,
    ) -> None:
        self._doors = dict(doors or {})
        self._app, self._settings, self._metrics, self._clock = app, settings, metrics, clock
        # Digests have one length, so comparing takes the same time whatever was sent.
        self._keys = [(_digest(key.secret), key.name) for key in settings.api_keys]
        self._open = OPEN_ROUTES | (OPEN_WITH_PAGE if settings.page else frozenset())
        self._hosts = {
            name if ":" not in name or name.startswith("[") else f"[{name}]"
            for name in map(str.lower, (*LOOPBACK, settings.host, *settings.allowed_hosts))
        }
        self._any_host = "*" in settings.allowed_hosts or (
            settings.host in ("0.0.0.0", "::") and not settings.allowed_hosts
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = f"req_{uuid.uuid4().hex}"
        state.setdefault("received_s", self._clock())
        state["key"], state["owner"] = 0, ""
        about: dict[str, Any] = {}
        state["about"] = about
        status, is_whole = 0, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_whole
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()), (b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff"),
                ]  # fmt: skip
            await send(message)

        try:
            try:
                self._admit(scope)
                if scope["path"] in self._doors and scope["method"] == "POST":
                    state["route"] = scope["path"]
                    self._doors[scope["path"]](state["key"])
                await self._app(scope, receive, send_with_id)
            except ApiError as error:
                if status:
                    raise
                await error_response(error, request_id)(scope, receive, send_with_id)
        except Exception:
            _log.exception("%s: a bug", request_id)
            if not status:
                await error_response(INTERNAL, request_id)(scope, receive, send_with_id)
            elif not is_whole:
                raise  # the connection ends: half an answer must not look like one
        finally:
            status = status or CLIENT_CLOSED
            self._metrics.answered(state.get("route", "other"), status)
            self._note(scope, state, status, about)

    def _admit(self, scope: Scope) -> None:
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in (b"host", b"authorization", b"content-length") and name in headers:
                raise ApiError(400, f"{name.decode()}: the header is there twice", "invalid_header")
            headers[name] = value
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = (
            host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
        )
        if not self._any_host and name not in self._hosts and scope["path"] not in OPEN_ROUTES:
            raise ApiError(
                421, "Host: this server does not go by that name; see --allowed-host", "wrong_host"
            )
        if not self._keys or scope["path"] in self._open:
            return
        scheme, _, secret = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        given = _digest(secret.strip()) if scheme.lower() == "bearer" else b""
        found = 0
        for number, (digest, _) in enumerate(self._keys, start=1):
            if hmac.compare_digest(digest, given):
                found = number
        if not found:
            raise ApiError(
                401,
                "Authorization: a valid key is needed, as Bearer",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope["state"]["key"], scope["state"]["owner"] = found, self._keys[found - 1][1]

    def _note(self, scope: Scope, state: dict[str, Any], status: int, about: dict[str, Any]) -> None:
        if scope["path"] in OPEN_ROUTES and status == 200:
            return  # a probe a second tells nothing
        client = scope.get("client")
        access_log.info(
            "request",
            extra={
                "fields": {
                    "id": state["request_id"], "method": scope["method"], "path": scope["path"][:200], "status": status,
                    "client": client[0][:64] if client else None, "key": state["owner"] or None,
                    "seconds": round(self._clock() - state["received_s"], 6), **about,
                }
            },
        )  # fmt: skip


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
