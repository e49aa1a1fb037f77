"""Chat messages as plain, bounded JSON data: what a template may see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanoserve.checks import shown
from nanoserve.text.input_text import MAX_TEXT_BYTES, utf8_of

MAX_MESSAGES = 4096
MAX_ROLE_CHARS = 64
MAX_DEPTH = 32
MAX_VALUES = 100_000
# Names under which reasoning is passed; templates read the first, gpt-oss's reads the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def checked_messages(messages: object, *, keep_parts: bool) -> list[dict[str, Any]]:
    """Copies of the messages without their None fields.

    Args:
        keep_parts: leave content given as parts a list; otherwise its texts are joined with newlines.

    Raises:
        ValueError: naming messages[i].field, its value and its limit.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages: {shown(messages)} must be a list of messages")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise ValueError(f"messages: {len(messages)} messages, must be in [1, {MAX_MESSAGES}]")
    room = _Room()
    checked = []
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{name}: {shown(message)} must be an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or not 0 < len(role) <= MAX_ROLE_CHARS:
            raise ValueError(
                f"{name}.role: {shown(role)} must be a string of 1 to {MAX_ROLE_CHARS} characters"
            )
        _check_content(f"{name}.content", message.get("content"))
        if not isinstance(message.get("tool_calls"), list | tuple | None):
            raise ValueError(f"{name}.tool_calls: {shown(message['tool_calls'])} must be a list")
        plain = {key: value for key, value in room.plain(name, message).items() if value is not None}
        if isinstance(plain.get("content"), list) and not keep_parts:
            plain["content"] = "\n".join(part["text"] for part in plain["content"])
        reasoning = next((plain[key] for key in _REASONING if key in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        checked.append(plain)
    return checked


def plain_data(name: str, value: object) -> Any:
    """A copy out of None, bool, int, float, str, list and dict with string keys.

    Raises:
        ValueError: naming the path inside `name`: another type, half of a surrogate pair, or too deep or large.
    """
    return _Room().plain(name, value)


class _Room:
    """What is left for the data of one call."""

    def __init__(self) -> None:
        self._values = MAX_VALUES
        self._bytes = MAX_TEXT_BYTES

    def plain(self, name: str, value: object, depth: int = 0) -> Any:
        self._values -= 1
        if self._values < 0:
            raise ValueError(f"{name}: more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise ValueError(f"{name}: nested deeper than {MAX_DEPTH}")
        if value is None or isinstance(value, bool | float):
            return value if type(value) in (type(None), bool, float) else float(value)  # type: ignore[arg-type]
        if isinstance(value, int):
            if value.bit_length() > 64:
                raise ValueError(f"{name}: {shown(value)} must fit in 64 bits")
            return int(value)
        if isinstance(value, str):
            return self._text(name, value)
        if isinstance(value, Mapping):
            out = {}
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"{name}: key {shown(key)} must be a string")
                out[self._text(name, key)] = self.plain(f"{name}.{key[:32]}", item, depth + 1)
            return out
        if isinstance(value, list | tuple):
            return [self.plain(f"{name}[{i}]", item, depth + 1) for i, item in enumerate(value)]
        raise ValueError(f"{name}: {type(value).__name__} is not JSON data")

    def _text(self, name: str, text: str) -> str:
        self._bytes -= len(utf8_of(name, text))
        if self._bytes < 0:
            raise ValueError(f"{name}: more than {MAX_TEXT_BYTES} bytes of text in all")
        return str.__str__(text)


def _check_content(name: str, content: object) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        raise ValueError(f"{name}: {shown(content)} must be a string, a list of text parts, or None")
    for i, part in enumerate(content):
        if not isinstance(part, Mapping):
            raise ValueError(f"{name}[{i}]: {shown(part)} must be an object")
        if part.get("type") != "text":
            raise ValueError(f"{name}[{i}].type: {shown(part.get('type'))} must be 'text'")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{name}[{i}].text: {shown(part.get('text'))} must be a string")
