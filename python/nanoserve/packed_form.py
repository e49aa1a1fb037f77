"""PackedForm: one way for a weight to lie in memory, as one array or several, of sizes known before a byte is read.

What fills the arrays is code, and a cached copy of them is as old as that code: the cache's key covers the text of the
module that `fill` is defined in, and of those below that it reads through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoserve.kernels import gemm
from nanoserve.models.weights import BoundWeight

Shape = tuple[int, ...]
ArraySpec = tuple[Shape, str]  # shape and NumPy type


@dataclass(frozen=True, slots=True)
class PackedForm:
    """How a weight is packed.

    Args:
        name: tells forms apart.
        arrays: what a weight of a shape becomes; each array will be an argument of a kernel.
        fill: writes every element of those arrays, given in the same order and zeroed.
    """

    name: str
    arrays: Callable[[Shape], Sequence[ArraySpec]]
    fill: Callable[[BoundWeight, Sequence[NDArray[Any]]], None]


def rows(dtype: str) -> PackedForm:
    """As it is stored: of norms, and tables of embeddings and positions."""
    return PackedForm(f"rows {dtype}", lambda shape: [(shape, _element(dtype))], _fill_rows)


def panels(dtype: str) -> PackedForm:
    """A GEMM's weight, of the dtype it is stored in."""

    def fill(weight: BoundWeight, arrays: Sequence[NDArray[Any]]) -> None:
        gemm.pack(weight, dtype=dtype, out=arrays[0])

    return PackedForm(
        f"panels {dtype}", lambda shape: [(gemm.packed_shape(shape[0], shape[1]), _element(dtype))], fill
    )


def bias() -> PackedForm:
    """A GEMM's bias."""

    def fill(weight: BoundWeight, arrays: Sequence[NDArray[Any]]) -> None:
        arrays[0][:] = gemm.pack_bias(weight[:])

    def arrays(shape: Shape) -> Sequence[ArraySpec]:
        panel_count, _, width = gemm.packed_shape(shape[0], 1)
        return [((panel_count * width,), "float32")]

    return PackedForm("bias", arrays, fill)


def _element(dtype: str) -> str:
    return "float32" if dtype == "f32" else "uint16"


def _fill_rows(weight: BoundWeight, arrays: Sequence[NDArray[Any]], step: int = 4096) -> None:
    """Some rows at a time: converting all of them at once would take them twice."""
    (out,) = arrays
    for at in range(0, weight.shape[0], step):
        end = min(at + step, weight.shape[0])
        out[at:end] = weight.stored(at, end) if out.dtype == np.uint16 else weight[at:end]
