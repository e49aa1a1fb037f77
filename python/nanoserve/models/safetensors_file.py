"""Reads one safetensors file: header checked in full before a byte of it is believed, tensors memory-mapped.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. The header
comes from a stranger, so every number is checked against the file's real size: lengths, offsets, dtype * shape, overlap,
gaps and duplicate names. Errors name the file, the tensor, the value and the limit. (The library's own reader gives one
opaque message for all of these, copies each tensor, and cannot hand bfloat16 to NumPy; writing stays the library's job.)
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoserve.errors import CheckpointError

MAX_HEADER_BYTES = 100 * 1024 * 1024
MAX_DIMS = 8
# bfloat16 has no NumPy type: its bits are mapped as uint16 and widened by `_read`.
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip


def read_safetensors(path: str | Path) -> dict[str, NDArray[Any]]:
    """All tensors of a file by name. F32/F16/... stay memory-mapped and read-only; BF16 is widened to float32.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is inconsistent.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{file.name}: {size} bytes, a safetensors file has at least 8")
        header_bytes = int.from_bytes(prefix, "little")
        limit = min(MAX_HEADER_BYTES, size - 8)
        if not 2 <= header_bytes <= limit:
            raise CheckpointError(f"{file.name}: header length {header_bytes} must be in [2, {limit}]")
        raw = stream.read(header_bytes)
    header = _parse(file.name, raw)
    data_bytes = size - 8 - header_bytes
    entries = _checked_entries(file.name, header, data_bytes)
    if not entries:
        return {}
    data = (
        np.memmap(file, dtype=np.uint8, mode="r", offset=8 + header_bytes, shape=(data_bytes,))
        if data_bytes
        else None
    )
    return {name: _read(data, *entry) for name, entry in entries.items()}


Entry = tuple[str, tuple[int, ...], int, int]  # dtype, shape, begin, end


def _parse(file: str, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen:
                raise CheckpointError(f"{file}: header names {name!r} twice")
            seen[name] = value
        return seen

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: header is not valid JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header must be an object, is {type(header).__name__}")
    return header


def _checked_entries(file: str, header: dict[str, Any], data_bytes: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{file}: tensor {name!r} must have exactly dtype, shape and data_offsets")
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CheckpointError(
                f"{file}: tensor {name!r}: dtype {dtype!r} must be one of {', '.join(_DTYPES)}"
            )
        if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_count(d) for d in shape):
            raise CheckpointError(
                f"{file}: tensor {name!r}: shape {shape!r} must be at most {MAX_DIMS} counts >= 0"
            )
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(o) for o in offsets):
            raise CheckpointError(
                f"{file}: tensor {name!r}: data_offsets {offsets!r} must be two counts >= 0"
            )
        begin, end = offsets
        if not begin <= end <= data_bytes:
            raise CheckpointError(
                f"{file}: tensor {name!r}: data_offsets [{begin}, {end}] must lie in order within the {data_bytes} data bytes"
            )
        expected = math.prod(shape) * _DTYPES[dtype].itemsize
        if end - begin != expected:
            raise CheckpointError(
                f"{file}: tensor {name!r}: {end - begin} bytes, {dtype} {shape} takes {expected}"
            )
        if math.prod(max(size, 1) for size in shape) >= 2**62:  # empty, but too large for an array's strides
            raise CheckpointError(f"{file}: tensor {name!r}: shape {shape!r} has too many elements")
        entries[name] = (dtype, tuple(shape), begin, end)
    position, previous = 0, ""
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin < position:
            raise CheckpointError(
                f"{file}: tensor {name!r} begins at {begin}, inside {previous!r} that ends at {position}"
            )
        if begin > position:
            raise CheckpointError(
                f"{file}: bytes [{position}, {begin}) before tensor {name!r} belong to no tensor"
            )
        position, previous = end, name
    if position != data_bytes:
        raise CheckpointError(f"{file}: header describes {position} data bytes, the file holds {data_bytes}")
    return entries


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _read(
    data: NDArray[np.uint8] | None, dtype: str, shape: tuple[int, ...], begin: int, end: int
) -> NDArray[Any]:
    if data is None:
        return np.empty(shape, dtype=np.float32 if dtype == "BF16" else _DTYPES[dtype])
    raw = data[begin:end]
    if begin % _DTYPES[dtype].itemsize:  # legal in the format, useless as a view
        raw = raw.copy()
    array: NDArray[Any] = raw.view(_DTYPES[dtype]).reshape(shape)
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array
