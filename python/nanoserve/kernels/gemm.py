"""y[m, n] = cap(act(sum_k x[m, k] * w[n, k] + bias[n]) * scale) (+ y[m, n]): every matrix product of the decoder.

Three arithmetics, chosen by the types of x and of the weight:

    x f32, w f32, bf16 or f16   float32: the weight is widened, exactly, on its way into the registers; one fused
                                multiply-add per k. The bits are those of a float32 copy of the weight.
    x bf16, w bf16              bfloat16 products, float32 sums: vector_math.dot_bf16 per pair of k.
    x u8, w i8                  x = round(x / x_scale) + 128 with a scale per row, w symmetric with a scale per output; exact
                                int32 sums. (sum - 128 * w_sum) * (x_scale * w_scale) is where float32 begins.

The weight is packed once at load into panels [ceil(N/NR)][depth][NR][group] (panels.py): per step of the inner loop one row of a
panel is loaded and multiplied with `group` broadcast elements of each of up to 8 rows of x, which are read where they lie.

Numerics: one accumulator per output, k ascending; then + bias, activation, * scale, soft cap, + residual (y itself), each only
where the spec has it; a bfloat16 y is rounded to nearest even at the end. No part of that depends on m, on the row tile, or on
how units are split, so an output's bits depend on its own row only.

A gated GEMM has a weight of 2 * N rows, gate then up, and stores act(gate) * up: the bits of the two apart. Its panels
alternate, gate and up of the same columns.

Work units are (panel, block of ROW_BLOCK rows), panel-major: unit t is panel t // RB, row block t % RB, RB = ceil(m /
ROW_BLOCK). A block of few rows is one register tile, which reads the panel from memory; one of more is several, which share
pieces of the panel that stay in L1, and together bring in the next piece. Rows beyond m are neither read nor written: the last tile may compute a row twice.

Columns n >= N of y, up to the padded N, are written with what the zero padding gives (act(0) is 0, or y + that).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanoserve.compiler.target import Target, host
from nanoserve.kernels.library import KernelSpec

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value

WEIGHT_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "i8": 1}  # per element, by dtype
GROUP = {"f32": 1, "f16": 1, "bf16": 2, "i8": 4}  # k that lie side by side in a panel, by dtype
WEIGHTS_OF = {
    "f32": ("f32", "bf16", "f16"),
    "bf16": ("bf16",),
    "u8": ("i8",),
}  # what x can be multiplied with
ROW_BLOCK = 64  # rows of x that stay in L1/L2 while a panel is used
ACTIVATIONS = (None, "gelu_tanh", "gelu_erf", "silu")
MAX_INT8_K = (2**31 - 1) // (255 * 127)  # beyond, an int32 sum could overflow
_PIECE_BYTES = 16 * 1024  # of a panel: it, the piece that is next and some rows of x are in L1 at once
# How far ahead of its use a panel is asked for while it streams from memory, for tiles of up to 4 rows and of more.
_AHEAD_BYTES, _AHEAD_BYTES_MORE_ROWS = 4096, 8192


@dataclass(frozen=True, slots=True)
class RowTiles:
    """How the rows of a block are cut into register tiles.

    Attributes:
        single: rows of the tiles one of which takes a whole block of few rows, largest first, down to 1.
        large, small: rows of the tiles that a block of more rows is a mix of: as few rows as possible are computed twice.
    """

    single: tuple[int, ...]
    large: int
    small: int


def panel_width(n: int, target: Target | None = None) -> int:
    """Columns of a packed panel: two vectors where the registers hold 8 rows of them, else one.

    Three would take fewer loads per multiply-add, but loads are not what is short, and with two a tile may have 12 rows.
    """
    fits = (host() if target is None else target).budget >= (8 + 1) * 2 + 1
    return 32 if fits and n > 32 else 16


def row_tiles(width: int, target: Target) -> RowTiles:
    """Tiles that fit the registers: rows * vectors accumulators, the vectors of weights, one broadcast."""
    vectors = width // 16
    most = max(2, (target.budget - 1) // vectors - 1)
    if most >= 12:
        return RowTiles((12, 8, 4, 2, 1), 8, 6)
    return RowTiles((6, 4, 2, 1), 6, 4) if most >= 6 else RowTiles((2, 1), 2, 1)


def gemm_spec(
    n_in: int, n_out: int, ldx: int, ldy: int, *, x: str = "f32", dtype: str = "f32", y: str = "f32",
    bias: bool = False, activation: str | None = None, residual: bool = False, scale: float = 1.0,
    softcap: float = 0.0, gated: bool = False,
) -> KernelSpec:  # fmt: skip
    """Args: x[.][ldx], (x_scale[.]), w, (w_scale, w_sum), (bias), y[.][ldy], m, begin, end over units.

    Units are panels * ceil(m / ROW_BLOCK), panels = ceil(n_out / panel_width(n_out)). `x`, `dtype` and `y` are the element
    types of x, the weight and y; ldx and ldy count elements. w is panels.pack's, or for int8 pack_int8's with its w_scale and
    w_sum; bias is panels.pack_bias's. x_scale is float32 per row. The rows of x have room for n_in rounded up to whole groups
    (GROUP[dtype], ldx a multiple of it too); what lies beyond n_in does not matter.

    With `softcap` > 0, v becomes softcap * tanh(v / softcap) before the residual. With `gated` the weight and bias have
    2 * n_out rows, and y[., n_out] = activation(gate) * up.

    Raises:
        ValueError: sizes that do not fit, or an option that is not known.
    """
    if x not in WEIGHTS_OF:
        raise ValueError(f"gemm: x {x!r} must be one of {', '.join(WEIGHTS_OF)}")
    if dtype not in WEIGHTS_OF[x]:
        raise ValueError(f"gemm: dtype {dtype!r} with x {x!r} must be one of {', '.join(WEIGHTS_OF[x])}")
    if y not in ("f32", "bf16"):
        raise ValueError(f"gemm: y {y!r} must be f32 or bf16")
    group = 1 if x == "f32" else GROUP[dtype]
    padded = _round_up(n_out, panel_width(n_out)) if n_out > 0 else 0
    if n_in < 1 or n_out < 1 or ldx < _round_up(n_in, group) or ldx % group or ldy < padded:
        raise ValueError(
            f"gemm: n_in={n_in} in rows of {ldx} (a multiple of {group}), n_out={n_out} (padded {padded}) in rows of {ldy} "
            "do not fit"
        )
    if dtype == "i8" and n_in > MAX_INT8_K:
        raise ValueError(
            f"gemm: n_in={n_in} must be at most {MAX_INT8_K} for int8, or its sums could overflow"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"gemm: activation {activation!r} must be one of {ACTIVATIONS}")
    if not math.isfinite(scale):
        raise ValueError(f"gemm: scale={scale} must be finite")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"gemm: softcap={softcap} must be finite and at least 0, 0 for none")
    if gated and (activation is None or residual or scale != 1.0 or softcap):
        raise ValueError("gemm: gated needs an activation, and excludes residual, scale and softcap")
    return KernelSpec.make(
        "gemm", k=n_in, n=n_out, ldx=ldx, ldy=ldy, x=x, dtype=dtype, y=y, bias=bias, activation=activation,
        residual=residual, scale=float(scale), softcap=float(softcap), gated=gated,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a panel's part of a unit takes place, in the code being built.

    Attributes:
        panel: of the weight.
        column: of y.
        first, last: rows of the block.
        to: column of the scratch memory for sums.
    """

    panel: Value
    column: Value
    first: Value
    last: Value
    to: Value


def build(
    symbol: str, target: Target, *, k: int, n: int, ldx: int, ldy: int, x: str, dtype: str, y: str, bias: bool,
    activation: str | None, residual: bool, scale: float, softcap: float, gated: bool,
) -> None:  # fmt: skip
    from nanoserve.compiler.builder import (
        bitcast,
        ceildiv,
        fma,
        imin,
        index,
        narrow,
        splat,
        to_float,
        widen,
        zeros,
    )
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop, scratch, when
    from nanoserve.compiler.vector_math import activate, bf16_pairs, dot_bf16, dot_int8, int8_fours, soft_cap

    width = panel_width(n, target)
    vectors = range(0, width, 16)
    parts = 2 if gated else 1  # panels of one unit
    panels, padded = -(-n // width) * parts, _round_up(n, width) * parts
    tiles = row_tiles(width, target)
    group = GROUP[dtype]
    depth = -(-k // group)  # steps of the inner loop
    line = 64 // (group * WEIGHT_BYTES[dtype])  # lanes (of a group) in a cache line
    step_bytes = group * width * WEIGHT_BYTES[dtype]
    # The last step of a pair may be half a one; it is no part of the loop, and goes with the one block there is then.
    is_odd = group == 2 and k % 2 == 1
    whole = k // 2 if is_odd else depth
    piece = max(1, whole) if is_odd else _PIECE_BYTES // step_bytes  # steps
    sum_type = "i32" if dtype == "i8" else "f32"

    # Narrow elements are read as 32-bit lanes that hold a group.
    arguments = {"x": array(UNBOUNDED, ldx) if x == "f32" else array(UNBOUNDED, ldx // group, element="i32")}
    if dtype == "i8":
        arguments["x_scale"] = array(UNBOUNDED)
    arguments["w"] = array(panels, depth, width, element="i32" if group > 1 else dtype)
    if dtype == "i8":
        arguments |= {"w_scale": array(padded), "w_sum": array(padded, element="i32")}
    if bias:
        arguments["bias"] = array(padded)
    arguments["y"] = array(UNBOUNDED, ldy, element=y)
    arguments |= dict.fromkeys(("m", "begin", "end"), "index")

    @kernel(symbol, **arguments)
    def _(*values: Any) -> None:
        given = dict(zip(arguments, values, strict=True))
        rows_in, weight, out, m = given["x"], given["w"], given["y"], given["m"]
        row_blocks = ceildiv(m, ROW_BLOCK)
        # Accumulators on their way to the epilogue, or to the next piece of k; with room for rows a last tile repeats.
        sums = scratch(ROW_BLOCK + tiles.single[0], parts * width, element=sum_type)

        def operand(lanes: Value) -> Value:
            if x == "f32":
                return widen(lanes)
            return bf16_pairs(lanes, target) if x == "bf16" else int8_fours(lanes, target)

        def dot(acc: Value, a: Value, b: Value) -> Value:
            if x == "f32":
                return fma(a, b, acc)
            return (dot_bf16 if x == "bf16" else dot_int8)(acc, a, b, target)

        def multiply(
            row: list[Value], at: Value, loaded: list[Value], acc: list[Value], half: bool = False
        ) -> list[Value]:
            """Accumulators after step `at`; `half` takes the first k of a pair only."""

            def each(k_at: Value, panel_row: list[Value], acc: list[Value]) -> list[Value]:
                result = []
                for i, row_at in enumerate(row):
                    a = rows_in[row_at, k_at]
                    a = operand(splat(a & 0xFFFF if half and x == "bf16" else a))
                    result += [dot(acc[i * len(vectors) + j], a, b) for j, b in enumerate(panel_row)]
                return result

            if x == "f32" and dtype == "bf16":
                acc = each(at * 2, [bitcast(v << 16, "f32") for v in loaded], acc)
                return acc if half else each(at * 2 + 1, [bitcast(v & -65536, "f32") for v in loaded], acc)
            return each(at, [operand(v) for v in loaded], acc)

        def tile(
            rows: int, place: Place, start: Value, begin: Value, end: Value, asked_from: Value, shared: bool
        ) -> None:
            """sums = x[start : start + rows] @ panel, over the steps [begin, end); of a panel that is shared, sums += that.

            Meanwhile as many of the weight's lines are asked for as the tile reads, from that element of the panel on; of a
            shared one half as many: there are two tiles or more.
            """
            row = [imin(start + i, place.last) for i in range(rows)]

            @loop(0, rows)
            def _(i: Value) -> None:  # these rows of y will be written, and are in no near cache
                for j in range(0, width, 16 if y == "f32" else 32):
                    out.prefetch(imin(start + i, place.last), place.column + j, write=True)

            slot = start - place.first
            if shared:
                acc = [sums.load(slot + i, place.to + j) for i in range(rows) for j in vectors]
            else:
                acc = [zeros(element=sum_type) for _ in range(rows) for _ in vectors]
            unroll = next(
                u for u in ((4, 2, 1) if rows == 1 else (2, 1) if rows <= 8 else (1,)) if whole % u == 0
            )
            lines = -(-unroll * width // (line * (2 if shared else 1)))

            @loop(begin, end, unroll, carry=acc)
            def total(at: Value, acc: list[Value]) -> list[Value]:
                asked = asked_from + (at - begin) // unroll * (lines * line)
                for i in range(lines):
                    weight.prefetch(place.panel, 0, asked + i * line)
                for step in (at + i if i else at for i in range(unroll)):
                    loaded = [weight.load(place.panel, step, j) for j in vectors]
                    acc = multiply(row, step, loaded, acc)
                return acc

            if is_odd:
                loaded = [weight.load(place.panel, whole, j) for j in vectors]
                total = multiply(row, index(whole), loaded, total, half=True)
            for i in range(rows):
                for j, at in enumerate(vectors):
                    sums.store(total[i * len(vectors) + j], slot + i, place.to + at)

        def all_tiles(place: Place) -> None:
            """sums of all rows of a block."""
            count, biggest = place.last + 1 - place.first, tiles.single[0]
            # One tile uses a panel as it comes from memory, and asks for it some way ahead.
            for rows, smaller in zip(tiles.single, (*tiles.single[1:], 0), strict=True):

                @when((count > smaller) & (count <= rows))
                def _(rows: int = rows) -> None:
                    ahead = _AHEAD_BYTES if rows <= 4 else _AHEAD_BYTES_MORE_ROWS
                    tile(rows, place, place.first, index(0), index(whole), index(ahead // 64 * line), False)

            # Several take turns at a piece of it while that is in L1, and each asks for a part of the next.
            @when(count > biggest)
            def _() -> None:
                num_tiles = ceildiv(count, tiles.large)
                num_small = imin(num_tiles, (num_tiles * tiles.large - count) // (tiles.large - tiles.small))
                num_large = num_tiles - num_small
                part_of_piece = ceildiv(index(piece * width // line), num_tiles) * line

                @loop(0, num_large * tiles.large + num_small * tiles.small)
                def _(i: Value) -> None:
                    for j in vectors:
                        sums.store(zeros(element=sum_type), i, place.to + j)

                @loop(0, max(1, whole), piece)
                def _(begin: Value) -> None:
                    end = imin(begin + piece, whole)

                    def run(rows: int, low: Value, high: Value) -> None:
                        @loop(low, high)
                        def _(t: Value) -> None:
                            start = place.first + num_large * tiles.large + (t - num_large) * rows
                            tile(rows, place, start, begin, end, end * width + t * part_of_piece, True)

                    run(tiles.large, index(0), num_large)
                    run(tiles.small, num_large, num_tiles)

        def finish(row: Value, slot: Value, to: int, column: Value) -> Value:
            """The value of 16 sums before the activation."""
            value = sums.load(slot, to)
            if dtype == "i8":
                value = to_float(value - given["w_sum"].load(column) * 128)
                value = value * (given["w_scale"].load(column) * given["x_scale"][row])
            return value + given["bias"].load(column) if bias else value

        @loop(given["begin"], given["end"])
        def _(unit: Value) -> None:
            panel = unit // row_blocks
            first = unit % row_blocks * ROW_BLOCK
            stop = imin(first + ROW_BLOCK, m)

            @loop(0, parts)
            def _(part: Value) -> None:
                all_tiles(
                    Place(
                        panel=panel * parts + part,
                        column=panel * width,
                        first=first,
                        last=stop - 1,
                        to=part * width,
                    )
                )

            @loop(first, stop)
            def _(row: Value) -> None:
                slot = row - first
                for j in vectors:
                    column = panel * (parts * width) + j  # of bias and scales
                    value = activate(activation, finish(row, slot, j, column))
                    if gated:
                        value = value * finish(row, slot, width + j, column + width)
                    if scale != 1.0:
                        value = value * scale
                    if softcap:
                        value = soft_cap(value, softcap)
                    column = panel * width + j
                    if residual:
                        value = value + widen(out.load(row, column))
                    out.store(narrow(value, y), row, column)


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to
