"""Opens one safetensors file: header checked in full before a byte of it is believed, tensors memory-mapped.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. The header
comes from a stranger, so every number is checked against the file's real size: lengths, offsets, dtype * shape, overlap,
gaps and duplicate names. Errors name the file, the tensor, the value and the limit. (The library's own reader gives one
opaque message for all of these, copies each tensor, and cannot hand bfloat16 to NumPy; writing stays the library's job.)
A tensor of a type that cannot be read is no error here: old checkpoints carry boolean buffers that nobody reads.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO

from nanoserve.checkpoint_json import parse_object
from nanoserve.checks import shown
from nanoserve.errors import CheckpointError
from nanoserve.models.stored_tensor import SourceFile, StoredTensor

# A third of what the format allows: some 300,000 tensors, while a hostile header of this size parses to under 1 GiB.
MAX_HEADER_BYTES = 32 * 1024 * 1024
MAX_DIMS = 8
# Every dtype of the format: the name torch and we use, and its bits.
_DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 64), "F32": ("float32", 32), "F16": ("float16", 16), "BF16": ("bfloat16", 16),
    "I64": ("int64", 64), "I32": ("int32", 32), "I16": ("int16", 16), "I8": ("int8", 8),
    "U64": ("uint64", 64), "U32": ("uint32", 32), "U16": ("uint16", 16), "U8": ("uint8", 8),
    "BOOL": ("bool", 8), "C64": ("complex64", 64), "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8), "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("float6_e2m3fn", 6), "F6_E3M2": ("float6_e3m2fn", 6), "F4": ("float4_e2m1fn", 4),
}  # fmt: skip


def read_safetensors(path: str | Path) -> dict[str, StoredTensor]:
    """All tensors of a file by name, none of them read yet.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated, or its header is inconsistent.
    """
    file = Path(path)
    try:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file")
        with file.open("rb") as stream:
            return _open(file.name, stream)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error


def _open(file: str, stream: BinaryIO) -> dict[str, StoredTensor]:
    info = os.fstat(stream.fileno())
    size = info.st_size
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{file}: {size} bytes, a safetensors file has at least 8")
    header_bytes = int.from_bytes(prefix, "little")
    limit = min(MAX_HEADER_BYTES, size - 8)
    if not 2 <= header_bytes <= limit:
        raise CheckpointError(f"{file}: header length {header_bytes} must be in [2, {limit}]")
    text = stream.read(header_bytes)
    header = parse_object(f"{file}: header", text)
    entries = _checked_entries(file, header, size - 8 - header_bytes)
    if not entries:
        return {}
    try:
        # The mapping lives as long as a tensor or a view of it does, and outlives the file's name.
        mapping = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise CheckpointError(f"{file}: became shorter than its {size} bytes while it was opened") from error
    begin_of_data = 8 + header_bytes
    source = SourceFile.of(os.path.abspath(stream.name), info, hashlib.sha256(text).hexdigest())
    return {
        name: StoredTensor(file, name, dtype, shape, end - begin, mapping, begin_of_data + begin, source)
        for name, (dtype, shape, begin, end) in entries.items()
    }


Entry = tuple[str, tuple[int, ...], int, int]  # dtype by our name, shape, begin, end


def _checked_entries(file: str, header: dict[str, Any], data_bytes: int) -> dict[str, Entry]:
    entries = {
        name: _checked_entry(f"{file}: tensor {shown(name)}", info, data_bytes)
        for name, info in header.items()
        if name != "__metadata__"
    }
    position, previous = 0, ""
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin < position:
            raise CheckpointError(
                f"{file}: tensor {shown(name)} begins at {begin}, inside {shown(previous)} that ends at {position}"
            )
        if begin > position:
            raise CheckpointError(
                f"{file}: bytes [{position}, {begin}) before tensor {shown(name)} belong to no tensor"
            )
        position, previous = end, name
    if position != data_bytes:
        raise CheckpointError(f"{file}: header describes {position} data bytes, the file holds {data_bytes}")
    return entries


def _checked_entry(tensor: str, info: object, data_bytes: int) -> Entry:
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{tensor} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{tensor}: dtype {shown(dtype)} must be one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_count(d) for d in shape):
        raise CheckpointError(f"{tensor}: shape {shown(shape)} must be at most {MAX_DIMS} counts >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(o) for o in offsets):
        raise CheckpointError(f"{tensor}: data_offsets {shown(offsets)} must be two counts >= 0")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise CheckpointError(
            f"{tensor}: data_offsets [{begin}, {end}] must lie in order within the {data_bytes} data bytes"
        )
    name, bits = _DTYPES[dtype]
    if (end - begin) * 8 != math.prod(shape) * bits:
        raise CheckpointError(
            f"{tensor}: {end - begin} bytes, {dtype} {shape} takes {shown(math.prod(shape) * bits // 8)}"
        )
    if math.prod(max(size, 1) for size in shape) >= 2**60:  # empty, but too large for an array's strides
        raise CheckpointError(f"{tensor}: shape {shape!r} has too many elements")
    return name, tuple(shape), begin, end


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
