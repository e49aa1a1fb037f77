"""bfloat16 in NumPy, for tests: written apart from the product's own."""

from __future__ import annotations

import numpy as np


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of each float32 rounded to nearest even; no NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
