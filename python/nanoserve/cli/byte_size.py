"""Sizes of memory as people write them: "512MiB", "2GB", "1.5 GiB", or a number of bytes."""

from __future__ import annotations

import re
from fractions import Fraction

from nanoserve.checks import INT64_MAX, shown

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)}
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)


def parse_size(name: str, text: str) -> int:
    """Bytes, rounded down.

    Raises:
        ValueError: naming the option, the text and what would be understood. "M" alone is not: it means two things.
    """
    found = _SIZE.fullmatch(text.strip())
    factor = _UNITS.get(found[2].lower()) if found else None
    if found is None or factor is None:
        raise ValueError(
            f"{name}: {shown(text)} must be a size such as 512MiB, 2GB, or a whole number of bytes"
        )
    size = int(Fraction(found[1]) * factor)
    if not 1 <= size <= INT64_MAX:
        raise ValueError(f"{name}: {shown(text)} must be in [1, {INT64_MAX}] bytes")
    return size


def format_size(num_bytes: int) -> str:
    """Three or four digits and a binary unit: "7.35 MiB"."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{num_bytes} B" if unit == "B" else f"{value:.{2 if value < 100 else 1}f} {unit}"
