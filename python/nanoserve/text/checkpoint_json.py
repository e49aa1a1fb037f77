"""JSON files of a checkpoint, read with a size limit; whatever is wrong with one is a CheckpointError naming the file.

The bytes are read once: what was checked is what is used. Depth is bounded by the parser's own recursion limit, which ends in
an exception here and never in a crash.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanoserve.errors import CheckpointError


def read_limited(path: Path, max_bytes: int) -> bytes | None:
    """The file's bytes; None when there is no such file.

    Raises:
        CheckpointError: larger than `max_bytes`, or it cannot be read.
    """
    try:
        if not path.is_file():
            return None
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({type(error).__name__})") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path.name}: larger than the limit of {max_bytes} bytes")
    return data


def parse_object(name: str, data: bytes) -> dict[str, Any]:
    """The JSON object in `data`; `name` is the file it came from.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deep, or not an object.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not valid JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: must be a JSON object, is {type(value).__name__}")
    return value


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no such file."""
    data = read_limited(path, max_bytes)
    return {} if data is None else parse_object(path.name, data)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def is_text(value: object) -> bool:
    """A str that is valid Unicode: JSON escapes can spell half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
