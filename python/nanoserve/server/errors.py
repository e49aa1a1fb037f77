"""ApiError: what a client is told, in OpenAI's form. Never internals: no paths, no addresses, no traceback."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nanoserve.errors import RequestRefused

_FIELD = re.compile(r"([A-Za-z_][\w.$\[\]-]{0,127}): ")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: for people: the field, the value and the limit.
        code: for programs.
        param: the field at fault.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self, request_id: str) -> dict[str, Any]:
        """OpenAI's error object, with the id the log knows the request by."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
                "request_id": request_id,
            }
        }


class ClientGone(Exception):
    """The client hung up before its request was read: nobody is there to be told anything."""


def bad_request(error: ValueError, renamed: Mapping[str, str] | None = None) -> ApiError:
    """What the engine's own checks refuse; `renamed` says what a field, and what is inside it, is called in HTTP."""
    message = str(error)
    if isinstance(error, RequestRefused):
        message = re.sub(r"^request \S+: ", "", message)
        return ApiError(400, message, "context_length_exceeded", "prompt")
    found = _FIELD.match(message)
    param = found[1] if found else None
    for inner, outer in (renamed or {}).items():
        if param is not None and (param == inner or param.startswith((f"{inner}.", f"{inner}["))):
            param = outer + param.removeprefix(inner)
            message = f"{param}: {message.partition(': ')[2]}"
            break
    return ApiError(400, message, "invalid_value", param)
