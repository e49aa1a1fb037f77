"""A kernel's launches with random operands, and what must come out.

Outputs are poisoned with NaN before; row i of every output is a function of row i of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nanoserve.compiler.gpu.spec import GpuKernelSpec
from support.bfloat16 import from_bf16

Array = np.ndarray[Any, Any]
MOST_ROWS, WIDE_ROWS = 300, 65


class Launch(Protocol):
    """Gpu.launch, or the emulator's: arrays are changed in place."""

    def __call__(self, spec: GpuKernelSpec, *args: Array | int, order: int = 0, chip: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel with operands.

    Attributes:
        specs: kernels it may launch.
        run: outputs for so many rows: numbers, widened to float32, or integers.
        expected: of that many rows, in float64, or exact.
        tolerance: of |out - expected| relative to 1 + |expected|; 0: the same bits.
        row_by_row: rows do not depend on their number.
        wide: of a real model's width, with at most WIDE_ROWS rows; the others have MOST_ROWS. Too much for the emulator and
            for sanitizers.
    """

    name: str
    specs: tuple[GpuKernelSpec, ...]
    run: Callable[[Launch, int], Sequence[Array]]
    expected: Callable[[int], Sequence[Array]]
    tolerance: float
    row_by_row: bool = True
    wide: bool = False

    @property
    def most(self) -> int:
        return WIDE_ROWS if self.wide else MOST_ROWS


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def poison(*shape: int, dtype: str = "f32") -> Array:
    if dtype == "bf16":
        return np.full(shape, 0x7FC1, np.uint16)
    return np.full(shape, np.nan, np.float32)


def wide(array: Array) -> Array:
    """bfloat16 as float32."""
    return from_bf16(array) if array.dtype == np.uint16 else array
