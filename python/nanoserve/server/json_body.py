"""Bytes to a JSON object, strictly: what two parsers could read differently is refused.

Refused: anything but UTF-8, duplicate keys, NaN and Infinity, numbers beyond float64, halves of surrogate pairs, nesting
beyond a limit, very many values, and a top level that is not an object.
"""

from __future__ import annotations

import json
import math
from typing import Any

from nanoserve.checks import shown
from nanoserve.server.errors import ApiError

MAX_VALUES = 2**19  # of small ones a parsed body would take many times its bytes


def parse_json_object(body: bytes, max_depth: int) -> dict[str, Any]:
    """The object a request's body is.

    Raises:
        ApiError: 400, saying what and where.
    """
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:
        raise _refused(f"body: more than {MAX_VALUES} commas and opening brackets")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refused(f"body: byte {error.start} is not UTF-8") from error
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except RecursionError:
        raise _refused(f"body: JSON nested deeper than {max_depth}") from None
    except json.JSONDecodeError as error:
        raise _refused(f"body: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    if not isinstance(value, dict):
        raise _refused(f"body: {shown(value)} must be a JSON object")
    _check_depth(value, max_depth)
    try:
        text.encode("utf-8") if "\\u" not in text else json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _refused("body: half of a surrogate pair") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _refused(f"body: key {shown(name)} is there twice")
            seen.add(name)
    return made


def _constant(name: str) -> Any:
    raise _refused(f"body: {name} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _refused(f"body: {shown(text)} is beyond float64")
    return value


def _int(text: str) -> int:
    if len(text) > 40:
        raise _refused(f"body: an integer of {len(text)} digits, at most 40 are allowed")
    return int(text)


def _check_depth(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _refused(f"body: JSON nested deeper than {max_depth}")


def _refused(message: str) -> ApiError:
    return ApiError(400, message, "invalid_json")
