"""What form an output must have: JSON by a schema, any JSON object, a regular expression, or one of some texts.

A request's own business is checked here, when it is written down; what it takes to obey it is text/grammar.py's part.
A grammar in the compiler's own language is not offered: that would make its private dialect ours, and its operators on
regular expressions have no bound on what they cost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoserve.checks import shown, truth
from nanoserve.json_schema import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, check_depth, check_regex, check_schema

MAX_CHOICES = 1024
MAX_CHOICES_BYTES = 64 * 1024

MAX_TAG = 64  # characters

_FORMS = ("json", "json_object", "regex", "choice", "tagged")


@dataclass(frozen=True, slots=True)
class TaggedJson:
    """JSON values between two texts, as models write tool calls.

    Args:
        begin, end: what each value stands between; empty texts are left out.
        json: the values' schema, as an object or as text. Stored as text.
        several: one value or more, a new line between two, instead of exactly one.

    Raises:
        ValueError: naming the field, its value and its limit.
    """

    begin: str
    json: str | Mapping[str, Any]
    end: str = ""
    several: bool = False

    def __post_init__(self) -> None:
        for name in ("begin", "end"):
            text, field = getattr(self, name), f"structured_outputs.tagged.{name}"
            if not isinstance(text, str) or len(text) > MAX_TAG:
                raise ValueError(f"{field}: {shown(text)} must be a text of at most {MAX_TAG} characters")
            _utf8(field, text)
        truth("structured_outputs.tagged.several", self.several)
        object.__setattr__(self, "json", _schema_text("structured_outputs.tagged.json", self.json))


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """Exactly one of:

    Args:
        json: a JSON schema, as an object or as text; the output is a JSON value that it describes. Properties come in
            the schema's order. Stored as text.
        json_object: the output is a JSON object, any.
        regex: the whole output matches; the syntax is that of Rust's regex crate, without look-around.
        choice: the output is one of these texts. Stored as a tuple.
        tagged: JSON values between two texts.

    Raises:
        ValueError: naming the field, its value and its limit.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    tagged: TaggedJson | None = None

    def __post_init__(self) -> None:
        truth("structured_outputs.json_object", self.json_object)
        given = [name for name in _FORMS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs: {', '.join(given) if given else 'nothing'} is given, must be exactly one of "
                f"{', '.join(_FORMS)}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text("structured_outputs.json", self.json))
        if self.regex is not None:
            check_regex("structured_outputs.regex", self.regex)
            _utf8("structured_outputs.regex", self.regex)
        if self.choice is not None:
            self._check_choice("structured_outputs.choice", self.choice)
        if self.tagged is not None and not isinstance(self.tagged, TaggedJson):
            raise ValueError(f"structured_outputs.tagged: {shown(self.tagged)} must be TaggedJson")

    @property
    def form(self) -> str:
        """Which one it is: json, json_object, regex, choice or tagged."""
        return next(name for name in _FORMS if getattr(self, name) not in (None, False))

    @property
    def num_bytes(self) -> int:
        """Of what was asked for."""
        schema = self.json if self.tagged is None else self.tagged.json
        texts = self.choice or [schema if isinstance(schema, str) else self.regex or ""]
        return sum(len(text.encode()) for text in texts)

    def _check_choice(self, field: str, choice: Any) -> None:
        if isinstance(choice, str) or not isinstance(choice, Sequence) or not choice:
            raise ValueError(f"{field}: {shown(choice)} must be a sequence of texts that is not empty")
        if len(choice) > MAX_CHOICES:
            raise ValueError(f"{field}: {len(choice)} texts, at most {MAX_CHOICES} are allowed")
        for i, text in enumerate(choice):
            if not isinstance(text, str) or not text:
                raise ValueError(f"{field}[{i}]: {shown(text)} must be a text that is not empty")
        size = sum(_utf8(f"{field}[{i}]", text) for i, text in enumerate(choice))
        if size > MAX_CHOICES_BYTES:
            raise ValueError(f"{field}: {size} bytes, at most {MAX_CHOICES_BYTES} are allowed")
        object.__setattr__(self, "choice", tuple(choice))


def _schema_text(field: str, given: Any) -> str:
    """The schema as compact JSON, keys in their order."""
    if isinstance(given, str):
        size = _utf8(field, given)
        if size > 4 * MAX_SCHEMA_BYTES:  # blanks do not count, within reason
            raise ValueError(f"{field}: {size} bytes, at most {MAX_SCHEMA_BYTES} are allowed")
        schema = _parsed(field, given)
    else:
        schema = given
    check_schema(field, schema)
    try:
        text = json.dumps(
            schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=False
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field}: {shown(given)} must be JSON: {error}") from error
    size = _utf8(field, text)
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"{field}: {size} bytes, at most {MAX_SCHEMA_BYTES} are allowed")
    return text


def _parsed(field: str, text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            raise ValueError("a key is there twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError as error:
        raise ValueError(f"{field}: nested deeper than {MAX_SCHEMA_DEPTH} levels") from error
    except ValueError as error:
        raise ValueError(f"{field}: {shown(text)} is not a JSON schema: {error}") from error
    check_depth(field, value)
    return value


def _utf8(field: str, text: str) -> int:
    """The text's size as UTF-8."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{field}: {shown(text)} has half of a surrogate pair") from error
