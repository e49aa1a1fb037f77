"""JSON files of a checkpoint, which come from a stranger: size limited, names unique, nothing that is not JSON.

Python's parser takes NaN, Infinity and a name given twice (the last wins); here each is an error, because two readers of
the same file could then see two different checkpoints. Numbers of thousands of digits end in an error too, and so does
nesting: the parser would go to the recursion limit, and whoever shows the value in a message would then pass it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from nanoserve.checks import shown
from nanoserve.errors import CheckpointError

MAX_DEPTH = 32  # the deepest file of a checkpoint, tokenizer.json, has about 8


def read_limited(file: Path, max_bytes: int) -> bytes | None:
    """The file's bytes; None when there is no such file. They are read once: what was checked is what is used.

    Raises:
        CheckpointError: unreadable, or larger than `max_bytes`.
    """
    try:
        with file.open("rb") as stream:
            raw = stream.read(max_bytes + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    if len(raw) > max_bytes:
        raise CheckpointError(f"{file.name}: larger than the limit of {max_bytes} bytes")
    return raw


def read_object(file: Path, max_bytes: int, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object a file holds; an empty one if it may be missing and is.

    Raises:
        CheckpointError: missing, or as in `read_limited` and `parse_object`.
    """
    raw = read_limited(file, max_bytes)
    if raw is None:
        if optional:
            return {}
        raise CheckpointError(f"{file}: no such file")
    return parse_object(file.name, raw)


def parse_object(file: str, raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`; `file` names it in messages.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deeply, a name twice in one object, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise CheckpointError(f"{file}: names {shown(name)} twice")
            found[name] = value
        return found

    def refuse(constant: str) -> NoReturn:
        raise CheckpointError(f"{file}: not valid JSON ({constant} is no JSON number)")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold an object, is {type(value).__name__}")
    if _is_deeper(value, MAX_DEPTH):
        raise CheckpointError(f"{file}: nested deeper than {MAX_DEPTH} levels")
    return value


def _is_deeper(value: dict[str, Any], limit: int) -> bool:
    """Level by level: no recursion of its own."""
    level: list[Any] = [value]
    for _ in range(limit):
        inner = (
            held for holder in level for held in (holder.values() if isinstance(holder, dict) else holder)
        )
        level = [held for held in inner if isinstance(held, dict | list)]
    return bool(level)


def is_text(value: object) -> bool:
    """A str that is valid Unicode: JSON escapes can spell half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
