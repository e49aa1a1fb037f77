"""Safetensors files byte by byte, right or wrong on purpose."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header (bytes as they are, anything else as JSON) and this data; `length` is a lie about the header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """A tensor in a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
