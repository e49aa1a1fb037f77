"""What rendering a chat template may cost, and the operations that could cost more, bounded.

Templates come with checkpoints and messages from users: either may be hostile. jinja's sandbox keeps a template away from
Python's internals; it does not keep it from running for hours or from building a string of gigabytes. Three meters do:

    steps   loop iterations, calls, filters, comparisons; an operation on n items counts n, on n characters n / 1024
    chars   characters of text made: by output, concatenation, replacement, joining
    time    CPU time of the rendering thread, as a backstop, looked at every few hundred steps

Invariant: an operation is charged before it allocates, so that what is refused was never made. A container is charged for
everything reachable from it when it is built (`deep`): lists of lists of lists cannot grow exponentially unnoticed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextvars import ContextVar
from typing import Any

from jinja2.filters import do_indent
from jinja2.runtime import Undefined

MAX_STEPS = 1_000_000
MAX_TEXT_CHARS = 8 * 2**20  # one string, the rendered chat included
MAX_MADE_CHARS = 256 * 2**20  # all strings together, intermediate ones included
MAX_OUTPUT_CHARS = (
    64 * 2**20
)  # text collected by {{ }}, {% set %} blocks and macros, which is alive all at once
MAX_CPU_SECONDS = 1.0
MAX_INT_BITS = 4096
MAX_RANGE = 100_000
MAX_PATTERN_CHARS = 256
_CHARS_PER_STEP = 1024
_STEPS_PER_CLOCK = 256
_PLACEHOLDER = re.compile(r"%(?:%|[sdi]|(?:\.\d)?f)")


class TooExpensive(ValueError):
    """A limit of this module."""


class Budget:
    """The meters of one rendering."""

    def __init__(self) -> None:
        self._steps = 0
        self._made = 0
        self._output = 0
        self._next_clock = _STEPS_PER_CLOCK
        self._deadline = time.thread_time() + MAX_CPU_SECONDS

    def step(self, count: int = 1) -> None:
        self._steps += count
        if self._steps > MAX_STEPS:
            raise TooExpensive(f"takes more than {MAX_STEPS} steps")
        if self._steps >= self._next_clock:
            self._next_clock = self._steps + _STEPS_PER_CLOCK
            if time.thread_time() > self._deadline:
                raise TooExpensive(f"takes more than {MAX_CPU_SECONDS:g} s")

    def make(self, chars: int) -> None:
        """A string of so many characters is about to be made."""
        if chars > MAX_TEXT_CHARS:
            raise TooExpensive(f"makes a text of {chars} characters, at most {MAX_TEXT_CHARS} are allowed")
        self._made += chars
        if self._made > MAX_MADE_CHARS:
            raise TooExpensive(f"makes more than {MAX_MADE_CHARS} characters of text")
        self.step(1 + chars // _CHARS_PER_STEP)

    def output(self, chars: int) -> None:
        """So many characters are about to be put out."""
        self._output += chars
        if self._output > MAX_OUTPUT_CHARS:
            raise TooExpensive(f"puts out more than {MAX_OUTPUT_CHARS} characters")
        self.make(chars)

    def shallow(self, value: object) -> None:
        """Something is about to look at all of a string, or at all items of a container."""
        if isinstance(value, str):
            self.step(1 + len(value) // _CHARS_PER_STEP)
        elif isinstance(value, dict | list | tuple | range):
            self.step(1 + len(value))
        else:
            self.step()

    def deep(self, value: object) -> int:
        """Something is about to look at everything reachable; returns the characters of its strings, keys included."""
        chars = 0
        waiting = [value]
        while waiting:
            item = waiting.pop()
            self.shallow(item)
            if isinstance(item, str):
                chars += len(item)
            elif isinstance(item, dict):
                waiting += item.keys()
                waiting += item.values()
            elif isinstance(item, list | tuple):
                waiting += item
            elif isinstance(item, int):
                chars += item.bit_length() // 3
            chars += 8  # quotes, separators, short constants
        return chars


current: ContextVar[Budget] = ContextVar("budget of the rendering in progress")


def counted(items: Iterable[Any]) -> Iterator[Any]:
    """The items, a step each."""
    step = current.get().step
    for item in items:
        step()
        yield item


def text_of(value: Any) -> str:
    """str(value), refused if that is too long, or if it would name an object by its address."""
    if isinstance(value, str):
        return value
    budget = current.get()
    if isinstance(value, dict | list | tuple | KeysView | ValuesView | ItemsView):
        items = value if isinstance(value, dict | list | tuple) else list(value)
        budget.make(2 * budget.deep(items))  # repr may escape
    elif isinstance(value, Iterator) or (callable(value) and not isinstance(value, Undefined)):
        raise TypeError(f"{type(value).__name__} has no text")
    return str(value)


def check_pattern(pattern: object) -> None:
    """Of an operation that takes time text x pattern."""
    if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARS:
        raise TooExpensive(
            f"searches for {len(pattern)} characters, at most {MAX_PATTERN_CHARS} are allowed here"
        )


def concat(parts: Iterable[Any]) -> str:
    return join("", parts)


def join(separator: str, parts: Iterable[Any]) -> str:
    texts = [text_of(part) for part in counted(parts)]
    current.get().make(sum(map(len, texts)) + len(separator) * max(len(texts) - 1, 0))
    return separator.join(texts)


def replace(text: str, old: str, new: str, count: int = -1) -> str:
    budget = current.get()
    budget.shallow(text)
    times = text.count(old)
    if count >= 0:
        times = min(times, count)
    budget.make(len(text) + max(times * (len(new) - len(old)), 0))
    return text.replace(old, new, count)


def indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = len(width) if isinstance(width, str) else max(int(width), 0)
    current.get().make(len(text) + (1 + len(text.splitlines())) * (margin + 1))
    indented: str = do_indent(text, width, first, blank)
    return indented


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """json.dumps with transformers' defaults: nothing is escaped for HTML."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise TooExpensive("tojson: indent must be in [0, 16]")
    if separators is not None:
        separators = tuple(separators)  # type: ignore[assignment]
        if len(separators) != 2 or not all(isinstance(part, str) and len(part) <= 16 for part in separators):
            raise TooExpensive("tojson: separators must be two strings of at most 16 characters")
    encoder = json.JSONEncoder(
        ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys)
    )
    current.get().deep(value)
    return concat(encoder.iterencode(value))


def percent_format(pattern: str, values: Any) -> str:
    """pattern % values with the plain placeholders only: a width could ask for a gigabyte."""
    if "%" in _PLACEHOLDER.sub("", pattern):
        raise TooExpensive("formats with %: only %s, %d, %i, %f, %.1f to %.9f and %% are supported")
    given = values if isinstance(values, tuple) else (values,)
    plain = tuple(value if isinstance(value, int | float) else text_of(value) for value in given)
    current.get().make(len(pattern) + sum(len(v) if isinstance(v, str) else MAX_INT_BITS for v in plain))
    text: str = pattern % plain
    return text


def multiply(left: Any, right: Any) -> Any:
    budget = current.get()
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str) and isinstance(count, int):
            budget.make(len(sequence) * max(count, 0))
        elif isinstance(sequence, list | tuple) and isinstance(count, int):
            budget.step(len(sequence) * max(count, 0))
            return _built(sequence * count)
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    return left * right


def power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(max(left.bit_length(), 1) * max(right, 1))
    return left**right


def add(left: Any, right: Any) -> Any:
    if isinstance(left, str) and isinstance(right, str):
        current.get().make(len(left) + len(right))
        return left + right
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        current.get().step(len(left) + len(right))
        return _built(left + right)  # type: ignore[operator]
    return left + right


def modulo(left: Any, right: Any) -> Any:
    return percent_format(left, right) if isinstance(left, str) else left % right


def _built(container: Any) -> Any:
    current.get().deep(container)
    return container


def _check_bits(bits: int) -> None:
    if bits > MAX_INT_BITS:
        raise TooExpensive(f"makes a number of {bits} bits, at most {MAX_INT_BITS} are allowed")
