"""y[m, n] = cap(act(sum_k x[m, k] * w[n, k] + bias[n]) * scale) (+ y[m, n]): every matrix product of the decoder.

The weight is packed once at load into panels [N/NR][K][NR], so that the inner loop streams it: per k one row of a panel,
multiplied with a broadcast element of each of up to 8 rows of x, accumulated in registers. x is read where it lies.

The weight may be stored as bfloat16 or float16 (`dtype`): it is widened to float32 on its way into the registers, exactly, so
the result has the bits that a float32 copy of it would give, from half the memory. bfloat16 panels of even K hold two k side by
side, [K/2][NR][2]: one load of 32-bit lanes has both, the even k by a shift, the odd one by a mask.

Numerics: one accumulator per output, k ascending, fused multiply-add; then + bias, activation, * scale, soft cap,
+ residual (y itself), each only where the spec has it. No part of that depends on m, on the row tile, or on how units are
split, so an output's bits depend on its own row only.

Work units are (panel, block of ROW_BLOCK rows), panel-major: unit t is panel t // RB, row block t % RB, RB = ceil(m /
ROW_BLOCK). In a block rows go by full tiles, then by one smaller tile; rows beyond m are neither read nor written: the
last tile may compute a row twice but stores it once.

Columns n >= N of y, up to the padded N, are written with what the zero padding gives (act(0) is 0, or y + that).
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from nanoserve.compiler.target import Target, host
from nanoserve.kernels.library import KernelSpec

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value

WEIGHT_BYTES = {"f32": 4, "bf16": 2, "f16": 2}  # per element, by dtype
ROW_BLOCK = 64  # rows of x that stay in L1/L2 while a panel is used
ACTIVATIONS = (None, "gelu_tanh", "gelu_erf", "silu")
_K_BLOCK_BYTES = 512 * 1024  # of a panel: what stays in a core's L2 beside x
_PACK_BLOCK_BYTES = 4 * 1024 * 1024  # of packed weights: enough to pay for a hand-over between threads
_PACK_THREADS = 4  # beyond these, memory is what packing waits for


def panel_width(n: int, target: Target | None = None) -> int:
    """Columns of a packed panel.

    As many as the registers allow, but at least two panels where there are two vectors' worth, so that threads share the
    work, and never so many that padding exceeds round_up(n, 64), the room every row has.
    """
    budget = (host() if target is None else target).budget
    for width in (48, 32):
        fits = 9 * width // 16 + 1 <= budget  # 8 rows of accumulators, one of weights, a broadcast
        if fits and n > width and _round_up(n, width) <= _round_up(n, 64):
            return width
    return 16


def row_tiles(width: int, target: Target) -> tuple[int, ...]:
    """Rows of a register tile, largest first: rows * vectors accumulators, the vectors of weights, one broadcast."""
    vectors = width // 16
    largest = 8 if 9 * vectors + 1 <= target.budget else 6 if 7 * vectors + 1 <= target.budget else 4
    return tuple(rows for rows in (8, 6, 4, 2, 1) if rows <= largest and (rows != 6 or largest == 6))


class Rows(Protocol):
    """A matrix that can be read a few rows at a time: a NumPy array, or a checkpoint's tensor that is still on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


class NarrowRows(Rows, Protocol):
    """A matrix whose rows can also be had as they are stored."""

    def stored(self, begin: int, end: int) -> NDArray[np.uint16]:
        """Rows [begin, end) as the 16 bits of each element."""


def is_paired(k: int, dtype: str) -> bool:
    """Whether pack lays two k side by side."""
    return dtype == "bf16" and k % 2 == 0


def packed_shape(n: int, k: int, target: Target | None = None) -> tuple[int, int, int]:
    """Of what `pack` makes of a weight[N, K]."""
    width = panel_width(n, target)
    return -(-n // width), k, width


def pack(
    weight: Rows, target: Target | None = None, dtype: str = "f32", out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """weight[N, K] -> panels[N/NR][K][NR], zero beyond N; for "bf16" and "f16" (of NarrowRows) uint16, the bits of each.

    Written into `out` where one is given: packed_shape, C-contiguous, every element of it.

    Reads a few megabytes of whole panels at a time, so that no second copy of a large weight exists, and from several
    threads: `weight[begin:end]` must be float32 or convertible to it, and safe to call concurrently.

    Raises:
        ValueError: a weight that is not a matrix.
    """
    if len(weight.shape) != 2:
        raise ValueError(f"pack: a weight of shape {weight.shape} must have 2 dimensions")
    n, k = weight.shape
    panels, _, width = packed_shape(n, k, target)
    pair = 2 if is_paired(k, dtype) else 1
    if out is None:
        out = np.empty((panels, k, width), dtype=np.float32 if dtype == "f32" else np.uint16)
    packed = out.reshape(panels, k // pair, width, pair)
    each = max(1, _PACK_BLOCK_BYTES // (4 * max(1, k) * width))

    def copy(first: int) -> None:
        block = packed[first : first + each]
        begin, end = first * width, min((first + each) * width, n)
        if dtype == "f32":
            rows: NDArray[Any] = np.asarray(weight[begin:end], dtype=np.float32)
        else:
            rows = cast(NarrowRows, weight).stored(begin, end)
        whole, left = divmod(len(rows), width)
        block[:whole] = rows[: whole * width].reshape(whole, width, k // pair, pair).transpose(0, 2, 1, 3)
        if left:
            block[whole, :, :left] = rows[whole * width :].reshape(left, k // pair, pair).transpose(1, 0, 2)
            block[whole, :, left:] = 0

    with ThreadPoolExecutor(min(_PACK_THREADS, os.cpu_count() or 1)) as threads:
        for _ in threads.map(copy, range(0, panels, each)):
            pass  # an error of a block is raised here
    return out


def pack_bias(bias: NDArray[Any], target: Target | None = None) -> NDArray[np.float32]:
    """bias[N] -> float32[N rounded up to whole panels], zero beyond N."""
    (n,) = bias.shape
    packed = np.zeros(_round_up(n, panel_width(n, target)), dtype=np.float32)
    packed[:n] = bias
    return packed


def gemm_spec(
    n_in: int, n_out: int, ldx: int, ldy: int, *, bias: bool = False, activation: str | None = None,
    residual: bool = False, scale: float = 1.0, softcap: float = 0.0, dtype: str = "f32",
) -> KernelSpec:  # fmt: skip
    """Args: x[.][ldx], pack(w), (pack_bias(b)), y[.][ldy], m, begin, end over panels * ceil(m / ROW_BLOCK) units.

    With `softcap` > 0, v becomes softcap * tanh(v / softcap) before the residual.

    Raises:
        ValueError: sizes that do not fit, or an option that is not known.
    """
    padded = _round_up(n_out, panel_width(n_out)) if n_out > 0 else 0
    if n_in < 1 or n_out < 1 or ldx < n_in or ldy < padded:
        raise ValueError(
            f"gemm: n_in={n_in} in rows of {ldx}, n_out={n_out} (padded {padded}) in rows of {ldy} do not fit"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"gemm: activation {activation!r} must be one of {ACTIVATIONS}")
    if not math.isfinite(scale):
        raise ValueError(f"gemm: scale={scale} must be finite")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"gemm: softcap={softcap} must be finite and at least 0, 0 for none")
    if dtype not in WEIGHT_BYTES:
        raise ValueError(f"gemm: dtype {dtype!r} must be one of {', '.join(WEIGHT_BYTES)}")
    return KernelSpec.make(
        "gemm", k=n_in, n=n_out, ldx=ldx, ldy=ldy, bias=bias, activation=activation, residual=residual,
        scale=float(scale), softcap=float(softcap), dtype=dtype,
    )  # fmt: skip


def build(
    symbol: str, target: Target, *, k: int, n: int, ldx: int, ldy: int, bias: bool, activation: str | None,
    residual: bool, scale: float, softcap: float, dtype: str,
) -> None:  # fmt: skip
    from nanoserve.compiler.builder import bitcast, ceildiv, fma, imin, index, select, splat, widen, zeros
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop, scratch, when
    from nanoserve.compiler.vector_math import activate, soft_cap

    width = panel_width(n, target)
    vectors = range(0, width, 16)
    tiles = row_tiles(width, target)
    k_block = max(64, _K_BLOCK_BYTES // (WEIGHT_BYTES[dtype] * width) // 64 * 64)
    paired = is_paired(k, dtype)
    stored = (
        array(-(-n // width), k // 2, width, element="i32")
        if paired
        else array(-(-n // width), k, width, element=dtype)
    )
    arguments = {"x": array(UNBOUNDED, ldx), "w": stored}
    if bias:
        arguments["b"] = array(_round_up(n, width))
    arguments["y"] = array(UNBOUNDED, ldy)

    @kernel(symbol, **arguments, m="index", begin="index", end="index")
    def _(x: Any, w: Any, *rest: Any) -> None:
        b = rest[0] if bias else None
        y, m, begin, end = rest[-4:]
        row_blocks = ceildiv(m, ROW_BLOCK)
        # What full tiles ask into L2 (smaller ones outrun nothing: they wait for memory either way). One tile: the panel
        # itself, 8 KiB ahead; several: the next panel, while this one is used again.
        depth = k // 2 if paired else k  # of a panel, in loads
        ahead = select(m <= tiles[0], index(8192 * depth // (WEIGHT_BYTES[dtype] * width * k)), depth)
        # Accumulators on their way to the epilogue, or to the next block of k; with room for rows a last tile repeats.
        acc_rows = scratch(ROW_BLOCK + tiles[0], width)

        def tile(
            rows: int, panel: Value, first: Value, start: Value, last: Value, k_begin: Value, k_end: Value
        ) -> None:
            """acc_rows[start - first ...] = (or +=, from the second k block on) x[start : start + rows] @ panel."""
            row = [imin(start + i, last) for i in range(rows)]
            if k > k_block:
                acc = [acc_rows.load(start - first + i, j) for i in range(rows) for j in vectors]
            else:
                acc = [zeros() for _ in range(rows) for _ in vectors]

            def step(kk: Value, weights: list[Value], acc: list[Value]) -> list[Value]:
                result = []
                for i in range(rows):
                    a = splat(x[row[i], kk])
                    result += [fma(a, weights[j], acc[i * len(vectors) + j]) for j in range(len(vectors))]
                return result

            @loop(k_begin // 2 if paired else k_begin, k_end // 2 if paired else k_end, carry=acc)
            def total(at: Value, acc: list[Value]) -> list[Value]:
                loaded = [w.load(panel, at, j) for j in vectors]
                for j in vectors if rows == tiles[0] else ():
                    w.prefetch(panel, at + ahead, j, locality=2)
                if not paired:
                    return step(at, [widen(v) for v in loaded], acc)
                acc = step(at * 2, [bitcast(v << 16, "f32") for v in loaded], acc)
                return step(at * 2 + 1, [bitcast(v & -65536, "f32") for v in loaded], acc)

            for i in range(rows):
                for j, at in enumerate(vectors):
                    acc_rows.store(total[i * len(vectors) + j], start - first + i, at)

        @loop(begin, end)
        def _(unit: Value) -> None:
            panel = unit // row_blocks
            first = unit % row_blocks * ROW_BLOCK
            stop = imin(first + ROW_BLOCK, m)
            last = stop - 1

            def all_tiles(k_begin: Value, k_end: Value) -> None:
                # A full tile also takes what is more than the next smaller one can.
                full = (stop - first + (tiles[0] - tiles[1] - 1)) // tiles[0]
                after = first + full * tiles[0]

                @loop(first, after, tiles[0])
                def _(start: Value) -> None:
                    tile(tiles[0], panel, first, start, last, k_begin, k_end)

                for rows, smaller in zip(tiles[1:], (*tiles[2:], 0), strict=True):
                    left = stop - after

                    @when((left > smaller) & (left <= rows))
                    def _(rows: int = rows) -> None:
                        tile(rows, panel, first, after, last, k_begin, k_end)

            if k > k_block:

                @loop(0, ROW_BLOCK)
                def _(i: Value) -> None:
                    for j in vectors:
                        acc_rows.store(zeros(), i, j)

                @loop(0, k, k_block)
                def _(k_begin: Value) -> None:
                    all_tiles(k_begin, imin(k_begin + k_block, k))
            else:
                all_tiles(index(0), index(k))

            @loop(first, stop)
            def _(row: Value) -> None:
                for j in vectors:
                    column = panel * width + j
                    value = acc_rows.load(row - first, j)
                    if b is not None:
                        value = value + b.load(column)
                    value = activate(activation, value)
                    if scale != 1.0:
                        value = value * scale
                    if softcap:
                        value = soft_cap(value, softcap)
                    if residual:
                        value = value + y.load(row, column)
                    y.store(value, row, column)


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to
