"""How models write tool calls, found by what their chat template says, and read out of the text as it comes.

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, several in a row     Qwen, Hermes, SmolLM
    mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]                           Mistral
    llama     {"name": ..., "parameters": {...}} as the whole message                        Llama 3

What looks like a call and is none stays text: nothing a model said is lost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanoserve.structured import TaggedJson

MAX_CALLS = 16  # of a message whose calls are forced


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A way to write calls.

    Attributes:
        begin: what a call begins with. end: what it ends with; empty: the end of the message.
        arguments: the key they go by.
        is_whole: only a message that begins so, without text before it, is a call.
    """

    name: str
    begin: str
    end: str
    arguments: str = "arguments"
    is_whole: bool = False


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "")
LLAMA = ToolFormat("llama", '{"name": ', "", "parameters", is_whole=True)


def tool_format(template: str) -> ToolFormat | None:
    """The one a chat template teaches; None if it knows no tools."""
    if "tools" not in template:
        return None
    if HERMES.begin in template:
        return HERMES
    if MISTRAL.begin in template:
        return MISTRAL
    if '"parameters"' in template and '"name"' in template:
        return LLAMA
    return None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call; `arguments` is JSON text of an object."""

    name: str
    arguments: str


class ToolCallParser:
    """Splits a message that comes in pieces into text and calls. Pieces of any size give the same parts."""

    def __init__(self, form: ToolFormat) -> None:
        self._form = form
        self._held = ""  # not yet known to be text, or the inside of a call
        self._space = ""  # before the call that is being read
        self._is_inside = self._said_text = self._after_call = False

    def push(self, text: str) -> list[str | ToolCall]:
        """What is certain now."""
        self._held += text
        parts: list[str | ToolCall] = []
        form = self._form
        while True:
            if self._is_inside:
                if not form.end or (at := self._held.find(form.end)) < 0:
                    return parts
                inside, self._held = self._held[:at], self._held[at + len(form.end) :]
                parts += self._end_call(inside, form.end)
                continue
            at = self._held.find(form.begin)
            if at < 0 or (form.is_whole and (self._said_text or self._held[:at].strip())):
                keep = self._undecided()
                text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                return parts + self._text(text)
            said = self._held[:at].rstrip()
            self._space = self._held[len(said) : at]
            self._held = self._held[at + len(form.begin) :]
            self._is_inside = True
            parts += self._text(said)

    def finish(self) -> list[str | ToolCall]:
        """The rest."""
        held, self._held = self._held, ""
        return self._end_call(held, "") if self._is_inside else self._text(held)

    def _undecided(self) -> int:
        """How many of the last characters may belong to a call's beginning, or to the space before one."""
        held, begin = self._held, self._form.begin
        if self._form.is_whole:
            return 0 if self._said_text or not begin.startswith(held.lstrip()) else len(held)
        start = next((n for n in range(min(len(begin) - 1, len(held)), 0, -1) if held.endswith(begin[:n])), 0)
        return len(held) - len(held[: len(held) - start].rstrip())

    def _text(self, text: str) -> list[str | ToolCall]:
        if self._after_call:
            text = text.lstrip()
        if not text:
            return []
        self._said_text, self._after_call = True, False
        return [text]

    def _end_call(self, inside: str, end: str) -> list[str | ToolCall]:
        self._is_inside = False
        form = self._form
        calls = parse_calls(form.begin + inside if form.is_whole else inside, form.arguments)
        if calls is None:
            return self._text(self._space + form.begin + inside + end)
        self._after_call = True
        return list(calls)


def parse_calls(text: str, arguments: str) -> list[ToolCall] | None:
    """The calls that a JSON text is, one or a list; None if it is not."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # an escape may be half of a surrogate pair, which is no text
    except (ValueError, RecursionError):
        return None
    calls = value if isinstance(value, list) else [value]
    made = []
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        given = call.get(arguments, {})
        if not isinstance(given, dict):
            return None
        made.append(ToolCall(call["name"], json.dumps(given, ensure_ascii=False)))
    return made or None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def forced_calls(form: ToolFormat, functions: Sequence[dict[str, Any]], several: bool) -> TaggedJson:
    """The form of a message that is a call to one of these functions, or several calls.

    Raises:
        ValueError: a schema of parameters that is not one.
    """
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                form.arguments: function.get("parameters") or {"type": "object"},
            },
            "required": ["name", form.arguments],
            "additionalProperties": False,
        }
        for function in functions
    ]
    one: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if form is MISTRAL:
        one = {"type": "array", "items": one, "minItems": 1, "maxItems": MAX_CALLS if several else 1}
    if form is LLAMA:
        return TaggedJson("", one)
    separator = "\n" if form.end else ""
    return TaggedJson(form.begin + separator, one, separator + form.end, several=several and bool(form.end))
