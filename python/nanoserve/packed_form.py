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

from nanoserve.kernels import panels as packing
from nanoserve.models.weights import BoundWeight
from nanoserve.quantization_error import QuantizationError

Shape = tuple[int, ...]
ArraySpec = tuple[Shape, str]  # shape and NumPy type


@dataclass(frozen=True, slots=True)
class PackedForm:
    """How a weight is packed.

    Args:
        name: tells forms apart.
        arrays: what a weight of a shape becomes; each array will be an argument of a kernel.
        fill: writes every element of those arrays, given in the same order and zeroed; returns what that cost, where it is
            measured.
        is_measured: whether it is.
    """

    name: str
    arrays: Callable[[Shape], Sequence[ArraySpec]]
    fill: Callable[[BoundWeight, Sequence[NDArray[Any]]], QuantizationError | None]
    is_measured: bool = False


def rows(dtype: str) -> PackedForm:
    """As it is stored: of norms, and tables of embeddings and positions."""
    return PackedForm(f"rows {dtype}", lambda shape: [(shape, _element(dtype))], _fill_rows)


def panels(dtype: str, *, gated: bool = False) -> PackedForm:
    """A GEMM's weight: "f32" and "f16" of one that is stored so, "bf16" of any, rounded; "i8" with its scales and sums."""

    def arrays(shape: Shape) -> Sequence[ArraySpec]:
        specs: list[ArraySpec] = [
            (packing.packed_shape(shape[0], shape[1], dtype, gated=gated), _element(dtype))
        ]
        if dtype == "i8":
            outputs = (packing.num_outputs(shape[0], gated=gated),)
            specs += [(outputs, "float32"), (outputs, "int32")]
        return specs

    def fill(weight: BoundWeight, arrays: Sequence[NDArray[Any]]) -> QuantizationError | None:
        if dtype == "i8":
            packed = packing.pack_int8(weight, gated=gated, out=arrays[0])
            arrays[1][:], arrays[2][:] = packed.scale, packed.sums
            return packed.error
        as_stored = dtype in ("f32", weight.dtype)
        rows = weight if as_stored else packing.RoundedRows(weight)
        packing.pack(rows, dtype=dtype, gated=gated, out=arrays[0])
        return None

    return PackedForm(f"panels {dtype}{' gated' if gated else ''}", arrays, fill, is_measured=dtype == "i8")


def bias(*, gated: bool = False) -> PackedForm:
    """A GEMM's bias."""

    def fill(weight: BoundWeight, arrays: Sequence[NDArray[Any]]) -> None:
        arrays[0][:] = packing.pack_bias(weight[:], gated=gated)

    def arrays(shape: Shape) -> Sequence[ArraySpec]:
        return [((packing.num_outputs(shape[0], gated=gated),), "float32")]

    return PackedForm(f"bias{' gated' if gated else ''}", arrays, fill)


def _element(dtype: str) -> str:
    return np.dtype(packing.STORED[dtype]).name


def _fill_rows(weight: BoundWeight, arrays: Sequence[NDArray[Any]], step: int = 4096) -> None:
    """Some rows at a time: converting all of them at once would take them twice."""
    (out,) = arrays
    for at in range(0, weight.shape[0], step):
        end = min(at + step, weight.shape[0])
        out[at:end] = weight.stored(at, end) if out.dtype == np.uint16 else weight[at:end]
