"""Splits a row [q | k | v] of the QKV product: norms q and k, rotates them by position (RoPE), writes k and v to
their slot.

The pages are attention's: k [dim][slot] transposed, v [slot][dim]; of bfloat16 in pairs, k [dim / 2][slot][2] and v
[slot / 2][dim][2], rounded to nearest even.

q is normed and rotated in place, and so is k on its way (the row is scratch from then on). The norm is RMSNorm of
each head, or of all of q and all of k, the numbers that kernels/norm.py gives. Rotation is of the half-split kind:
with half = rotary / 2, the pair (x[i], x[i + half]) turns by the angle whose cosine and sine stand in columns i and i
+ half of the position's row of a table (models/rope.py makes it); dims from `rotary` on stay.

Sixteen rows whose slots are a whole aligned run of a page (a prompt's) are transposed in registers; a lone row's keys
are single stores.

Numerics: two products and one sum per rotated element, not fused, as the models were trained with. Work units are rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nanoserve.compiler.target import Target
from nanoserve.kernels.library import KernelSpec

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value

QK_NORMS = (None, "head", "row")
DTYPES = ("f32", "bf16")


def kv_write_spec(
    heads: int, kv_heads: int, head_dim: int, page_size: int, ld: int, rotary: int = 0, *, qk_norm: str | None = None,
    norm_eps: float = 0.0, dtype: str = "f32",
) -> KernelSpec:  # fmt: skip
    """Args: qkv[.][ld], (cos_sin[S][rotary], positions), (q_norm, k_norm), k, v of the layer, slots, begin, end.

    `rotary` is how many dims of a head rotate; 0 for learned positions, then cos_sin and positions are not arguments.
    With `qk_norm` "head" the norms' weights are [head_dim], with "row" [heads * head_dim] and [kv_heads * head_dim].
    `dtype` is that of the pages. Units are rows.
    """
    if min(heads, kv_heads, head_dim, page_size) < 1 or ld < (heads + 2 * kv_heads) * head_dim:
        raise ValueError(f"kv_write: {heads} + 2 * {kv_heads} heads of {head_dim} do not fit in rows of {ld}")
    if rotary % 2 or not 0 <= rotary <= head_dim:
        raise ValueError(f"kv_write: rotary={rotary} must be even and in [0, head_dim={head_dim}]")
    if qk_norm not in QK_NORMS:
        raise ValueError(f"kv_write: qk_norm {qk_norm!r} must be one of {QK_NORMS}")
    if not 0 <= norm_eps < math.inf:
        raise ValueError(f"kv_write: norm_eps={norm_eps} must be finite and at least 0")
    if dtype not in DTYPES:
        raise ValueError(f"kv_write: dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    if dtype == "bf16" and (head_dim % 2 or page_size % 2):
        raise ValueError(f"kv_write: head_dim={head_dim} and page_size={page_size} must be even for bf16")
    return KernelSpec.make(
        "kv_write", h=heads, kv=kv_heads, d=head_dim, page_size=page_size, ld=ld, rotary=rotary, qk_norm=qk_norm,
        norm_eps=float(norm_eps) if qk_norm else 0.0, dtype=dtype,
    )  # fmt: skip


def build(
    symbol: str, target: Target, *, h: int, kv: int, d: int, page_size: int, ld: int, rotary: int, qk_norm: str | None,
    norm_eps: float, dtype: str,
) -> None:  # fmt: skip
    from nanoserve.compiler.builder import (
        fma,
        htree,
        index,
        lane,
        lane_numbers,
        narrow,
        paired_lanes,
        shuffle,
        splat,
        sqrt,
        transpose,
    )
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop, over, scratch, sum_of_columns, when

    paired = dtype == "bf16"
    tile = 32 if paired else 16  # dims that sixteen rows of registers transpose
    arguments = {"qkv": array(UNBOUNDED, ld)}
    if rotary:
        arguments |= {"cos_sin": array(UNBOUNDED, rotary), "positions": array(UNBOUNDED, element="i32")}
    if qk_norm:
        widths = (d, d) if qk_norm == "head" else (h * d, kv * d)
        arguments |= {"q_norm": array(widths[0]), "k_norm": array(widths[1])}
    if paired:
        arguments["k"] = array(UNBOUNDED, kv, 2, d // 2, page_size, element="i32")
        arguments["v"] = array(UNBOUNDED, kv, 2, page_size // 2, d, 2, element="bf16")
    else:
        arguments |= {"k": array(UNBOUNDED, kv, 2, d, page_size), "v": array(UNBOUNDED, kv, 2, page_size, d)}

    @kernel(symbol, **arguments, slots=array(UNBOUNDED, element="i32"), begin="index", end="index")
    def _(qkv: Any, *rest: Any) -> None:
        k, v, slots, begin, end = rest[-5:]

        def norm(row: Value, weight: Any, first: Value | int, cols: int) -> None:
            """RMSNorm of `cols` columns of a row, in place."""

            def square(acc: Value, at: Any, width: int) -> Value:
                x = qkv.load(row, at + first, width=width)
                return fma(x, x, acc)

            scale = 1.0 / sqrt(sum_of_columns(cols, square) * (1.0 / cols) + norm_eps)

            @over(cols)
            def _(at: Any, width: int) -> None:
                x = qkv.load(row, at + first, width=width)
                qkv.store(x * scale * weight.load(at, width=width), row, at + first)

        def norms(row: Value) -> None:
            q_norm, k_norm = rest[-7:-5]
            for weight, first, heads in ((q_norm, 0, h), (k_norm, h * d, kv)):
                if qk_norm == "row":
                    norm(row, weight, first, heads * d)
                else:
                    loop(0, heads)(
                        lambda head, weight=weight, first=first: norm(row, weight, head * d + first, d)
                    )

        def rotate(row: Value) -> None:
            cos_sin, position = rest[0], index(rest[1][row])
            half = rotary // 2

            @loop(0, h + kv)
            def _(head: Value) -> None:
                first = head * d

                @over(half)
                def _(at: Any, width: int) -> None:
                    cos = cos_sin.load(position, at, width=width)
                    sin = cos_sin.load(position, at + half, width=width)
                    a = qkv.load(row, first + at, width=width)
                    b = qkv.load(row, first + at + half, width=width)
                    qkv.store(a * cos - b * sin, row, first + at)
                    qkv.store(b * cos + a * sin, row, first + at + half)

        def key(row: Value, head: Value, at: Any, width: int) -> Value:
            x: Value = qkv.load(row, head * d + h * d + at, width=width)
            return x

        def value(row: Value, head: Value, at: Any, width: int) -> Value:
            x: Value = qkv.load(row, head * d + (h + kv) * d + at, width=width)
            return x

        def write_keys(row: Value, page: Value, head: Value, offset: Value, begin: int) -> None:
            """The dims from `begin` on of one token, one by one."""
            if not paired:

                @loop(begin, d)
                def _(dim: Value) -> None:
                    k[page, head, 0, dim, offset] = lane(key(row, head, dim, 1), 0)

                return

            @over(d - begin)
            def _(at: Any, width: int) -> None:
                pairs = paired_lanes(narrow(key(row, head, at + begin, width), "bf16"))
                for i in range(width // 2):
                    k[page, head, 0, (index(at) + begin) // 2 + i, offset] = lane(pairs, i)

        def write_one(row: Value) -> None:
            slot = index(slots[row])
            page, offset = slot // page_size, slot % page_size

            @loop(0, kv)
            def _(head: Value) -> None:
                write_keys(row, page, head, offset, 0)

                @over(d)
                def _(at: Any, width: int) -> None:
                    x = value(row, head, at, width)
                    if not paired:
                        v.store(x, page, head, 0, offset, at)
                        return
                    rounded = narrow(x, "bf16")
                    for i in range(width):
                        v[page, head, 0, offset // 2, index(at) + i, offset % 2] = lane(rounded, i)

        def write_sixteen(row: Value) -> None:
            slot = index(slots[row])
            page, offset = slot // page_size, slot % page_size
            whole = d // tile * tile

            def run_of_keys(row: Value, head: Value, dim: Value) -> Any:
                """`tile` dims of one token as sixteen lanes."""
                if not paired:
                    return key(row, head, dim, 16)
                low, high = (paired_lanes(narrow(key(row, head, dim + at, 16), "bf16")) for at in (0, 16))
                return shuffle(low, high, range(16))

            @loop(0, kv)
            def _(head: Value) -> None:
                if whole:

                    @loop(0, whole, tile)
                    def _(dim: Value) -> None:
                        turned = transpose([run_of_keys(row + i, head, dim) for i in range(16)])
                        for i, lanes in enumerate(turned):
                            k.store(lanes, page, head, 0, (dim // 2 if paired else dim) + i, offset)

                if whole < d:
                    loop(0, 16)(lambda i: write_keys(row + i, page, head, offset + i, whole))

                @loop(0, 16 // (2 if paired else 1))
                def _(i: Value) -> None:
                    @over(d)
                    def _(at: Any, width: int) -> None:
                        if not paired:
                            v.store(value(row + i, head, at, width), page, head, 0, offset + i, at)
                            return
                        even, odd = (
                            narrow(value(row + i * 2 + j, head, at, width), "bf16") for j in range(2)
                        )
                        both = shuffle(even, odd, [lane for i in range(width) for lane in (i, width + i)])
                        v.store(both, page, head, 0, offset // 2 + i, at, 0)

        @loop(begin, end)
        def _(row: Value) -> None:
            if qk_norm:
                norms(row)
            if rotary:
                rotate(row)

        written = scratch(1, element="index")  # rows before this one are in their slots
        written[0] = begin

        @loop(begin, end)
        def _(row: Value) -> None:
            if page_size % 16 == 0:
                is_aligned = index(slots[row]) % 16 < 1

                @when(is_aligned & (row + 16 <= end) & (written[0] <= row))
                def _() -> None:
                    gaps = slots.load(row) - (lane_numbers() + splat(slots[row]))

                    off = htree(gaps, lambda a, b: a | b)

                    @when((off > -1) & (off < 1))
                    def _() -> None:
                        write_sixteen(row)
                        written[0] = row + 16

            @when(written[0] <= row)
            def _() -> None:
                write_one(row)
                written[0] = row + 1
