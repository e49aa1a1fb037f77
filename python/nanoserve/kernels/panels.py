"""Weights in the layout of the GEMM: panels [ceil(N/NR)][depth][NR][group], each a run of memory that the inner loop streams.

NR is gemm.panel_width; `group` k lie side by side (gemm.GROUP: the 2 bfloat16 or 4 bytes of a 32-bit lane), depth = ceil(K /
group), zero where K or N ends. A gated weight [gate; up] has the panels of both by turns, each half filled up to whole panels.

Packing reads a few megabytes of whole panels at a time, so that no second copy of a large weight exists, and from several
threads: `weight[begin:end]` must be float32 or convertible to it, and safe to call concurrently.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from nanoserve.compiler.target import Target
from nanoserve.kernels.gemm import GROUP, panel_width
from nanoserve.quantization_error import QuantizationError

_BLOCK_BYTES = 4 * 1024 * 1024  # of a weight as float32: enough to pay for a hand-over between threads
_THREADS = 4  # beyond these, memory is what packing waits for
STORED = {"f32": np.float32, "bf16": np.uint16, "f16": np.uint16, "i8": np.int8}  # NumPy types, by dtype


class Rows(Protocol):
    """A matrix that can be read a few rows at a time: a NumPy array, or a checkpoint's tensor that is still on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


class NarrowRows(Rows, Protocol):
    """A matrix whose rows can also be had as they are stored."""

    def stored(self, begin: int, end: int) -> NDArray[np.uint16]:
        """Rows [begin, end) as the 16 bits of each element."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight of the int8 arithmetic: w[n, k] is about codes[n, k] * scale[n].

    Attributes:
        panels: the codes, int8 in [-127, 127].
        scale: float32 per output, in the panels' order and padded as they are; absmax / 127.
        sums: int32, the sum of each output's codes.
        error: how far that is from the weight.
    """

    panels: NDArray[np.int8]
    scale: NDArray[np.float32]
    sums: NDArray[np.int32]
    error: QuantizationError

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + self.scale.nbytes + self.sums.nbytes


def to_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The bits of float32 numbers rounded to bfloat16, to nearest, ties to even; a NaN stays one."""
    wide = np.ascontiguousarray(values, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(wide), np.uint32(0x7FC0), rounded).astype(np.uint16)


class RoundedRows:
    """Any rows as bfloat16."""

    def __init__(self, weight: Rows) -> None:
        self._weight = weight
        self.shape = weight.shape

    def __getitem__(self, rows: slice) -> Any:
        return self._weight[rows]

    def stored(self, begin: int, end: int) -> NDArray[np.uint16]:
        return to_bfloat16(self._weight[begin:end])


def packed_shape(
    n: int, k: int, dtype: str, target: Target | None = None, *, gated: bool = False
) -> tuple[int, ...]:
    """Of the panels that a weight[N, K] becomes."""
    parts, group = _parts(n, gated), GROUP[dtype]
    width = panel_width(n // parts, target)
    panels, depth = -(-(n // parts) // width), -(-k // group)
    return (panels * parts, depth, width, *([group] if group > 1 else []))


def num_outputs(n: int, target: Target | None = None, *, gated: bool = False) -> int:
    """How many values per output lie beside the panels: as many as they have columns."""
    panels, _, width = packed_shape(n, 1, "f32", target, gated=gated)
    return panels * width


def pack(
    weight: Rows, target: Target | None = None, dtype: str = "f32", *, gated: bool = False,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:  # fmt: skip
    """weight[N, K] -> panels[.][depth][NR] of float32, or for "f16" and "bf16" (of NarrowRows) of uint16, the bits of each;
    [.][depth][NR][2] for "bf16".

    Args:
        out: where they go, C-contiguous; every element of it is written. None makes one.

    Raises:
        ValueError: a weight that is not a matrix, or one of odd height as a gated one.
    """

    def read(begin: int, end: int) -> NDArray[Any]:
        if dtype == "f32":
            return np.asarray(weight[begin:end], dtype=np.float32)
        return cast(NarrowRows, weight).stored(begin, end)

    return _pack(weight.shape, dtype, target, gated, read, out)


def pack_int8(
    weight: Rows, target: Target | None = None, *, gated: bool = False, out: NDArray[Any] | None = None
) -> Int8Weight:
    """weight[N, K] -> its codes, scales and sums.

    An output of zeros has scale 0, and so has one whose scale would be subnormal (all below 1.5e-36): its products are lost in
    any sum. One with a NaN or an infinity has scale NaN, so that whoever multiplies with it sees that.

    Raises:
        ValueError: as pack.
    """
    n = weight.shape[0] if weight.shape else 0
    scale, sums = np.zeros(n, np.float32), np.zeros(n, np.int32)
    error, norm = np.zeros(n), np.zeros(n)  # squared; 0 of an output that is not finite

    def read(begin: int, end: int) -> NDArray[np.int8]:
        rows = np.asarray(weight[begin:end], dtype=np.float32)
        codes = np.empty(rows.shape, np.int8)
        scale[begin:end], error[begin:end], norm[begin:end] = _quantise(rows, codes)
        sums[begin:end] = codes.sum(axis=1, dtype=np.int32)
        return codes

    panels = _pack(weight.shape, "i8", target, gated, read, out)
    worst = np.sqrt(np.divide(error, norm, out=np.zeros(n), where=norm > 0).max(initial=0))
    measured = QuantizationError(float(error.sum()), float(norm.sum()), float(worst))
    return Int8Weight(
        panels, _pack_outputs(scale, target, gated), _pack_outputs(sums, target, gated), measured
    )


def _quantise(rows: NDArray[np.float32], codes: NDArray[np.int8]) -> tuple[NDArray[Any], ...]:
    """Fills the codes of some outputs.

    Returns:
        (scales, ||w - w_q||^2, ||w||^2) per output, the squares float64 and 0 where the scale is NaN.
    """
    largest = np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0))  # NaN wins in both
    bad = ~np.isfinite(largest)
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = (largest / np.float32(127)).astype(np.float32)
        steps[steps < np.finfo(np.float32).tiny] = 0
        inverse = np.where((steps > 0) & ~bad, 1 / steps, 0).astype(np.float32)
        scaled = rows * inverse[:, None]
    if bad.any():
        scaled[bad] = 0
        steps[bad] = 0
    # In [-127, 127]: what 1 / steps and the product round is far less than a half.
    np.rint(scaled, out=codes, casting="unsafe")
    # Measured in steps, where float32 is exact enough: what it rounds of a difference is below 2^-16 of a step.
    squared_steps = steps.astype(np.float64) ** 2
    norm = np.einsum("nk,nk->n", scaled, scaled) * squared_steps
    scaled -= codes
    error = np.einsum("nk,nk->n", scaled, scaled) * squared_steps
    zeroed = (steps == 0) & ~bad
    error[zeroed] = norm[zeroed] = (rows[zeroed].astype(np.float64) ** 2).sum(axis=1)
    steps[bad] = np.nan
    return steps, error, norm


def pack_bias(
    bias: NDArray[Any], target: Target | None = None, *, gated: bool = False
) -> NDArray[np.float32]:
    """bias[N] -> float32 in the panels' order, N rounded up to whole panels, zero beyond N."""
    return _pack_outputs(np.asarray(bias, dtype=np.float32), target, gated)


def _pack(
    shape: tuple[int, ...], dtype: str, target: Target | None, gated: bool,
    read: Callable[[int, int], NDArray[Any]], out: NDArray[Any] | None,
) -> NDArray[Any]:  # fmt: skip
    """Panels of the rows that `read(begin, end)` gives in the stored type."""
    if len(shape) != 2:
        raise ValueError(f"pack: a weight of shape {shape} must have 2 dimensions")
    parts = _parts(shape[0], gated)
    n, k = shape[0] // parts, shape[1]
    width, group = panel_width(n, target), GROUP[dtype]
    panels, depth = -(-n // width), -(-k // group)
    if out is None:
        out = np.empty(packed_shape(shape[0], k, dtype, target, gated=gated), dtype=STORED[dtype])
    # A group moves as the 32-bit lane that it is: element by element would take twice as long.
    lane = np.uint32 if group > 1 else STORED[dtype]
    packed = out.reshape(panels, parts, depth, width, group).view(lane)[..., 0]
    each = max(1, _BLOCK_BYTES // (4 * max(1, k) * width))

    def copy(job: tuple[int, int]) -> None:
        part, first = job
        block = packed[first : first + each, part]
        begin, end = first * width, min((first + each) * width, n)
        rows = read(part * n + begin, part * n + end)
        if k % group:
            rows = np.pad(rows, ((0, 0), (0, -k % group)))
        whole, left = divmod(len(rows), width)
        lanes = np.ascontiguousarray(rows).view(lane) if group > 1 else rows
        block[:whole] = lanes[: whole * width].reshape(whole, width, depth).transpose(0, 2, 1)
        if left:
            block[whole, :, :left] = lanes[whole * width :].T
            block[whole, :, left:] = 0

    jobs = [(part, first) for first in range(0, panels, each) for part in range(parts)]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        for _ in threads.map(copy, jobs):
            pass  # an error of a block is raised here
    return out


def _pack_outputs(values: NDArray[Any], target: Target | None, gated: bool) -> NDArray[Any]:
    """One value per output, in the panels' order."""
    (total,) = values.shape
    parts = _parts(total, gated)
    n = total // parts
    width = panel_width(n, target)
    padded = np.zeros((parts, -(-n // width) * width), dtype=values.dtype)
    padded[:, :n] = values.reshape(parts, n)
    return padded.reshape(parts, -1, width).transpose(1, 0, 2).reshape(-1)


def _parts(n: int, gated: bool) -> int:
    if gated and n % 2:
        raise ValueError(f"pack: a gated weight of {n} rows must have as many rows of gate as of up")
    return 2 if gated else 1
