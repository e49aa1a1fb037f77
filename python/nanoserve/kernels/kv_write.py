"""Splits a row [q | k | v] of the QKV product: rotates q and k by position (RoPE), writes k and v into their page slot.

    k[page][head][dim][offset]   transposed: 16 tokens of a page are one vector of attention scores
    v[page][head][offset][dim]

q is rotated in place, and so is k on its way (the row is scratch from then on). Rotation is of the half-split kind: with
half = rotary / 2, the pair (x[i], x[i + half]) turns by the angle whose cosine and sine stand in columns i and i + half of
the position's row of a table (models/rope.py makes it); dims from `rotary` on stay.

Numerics: two products and one sum per element, not fused, as the models were trained with. Work units are rows.
"""

from __future__ import annotations

from typing import Any

from nanoserve.compiler.target import Target
from nanoserve.kernels.library import KernelSpec


def kv_write_spec(
    heads: int, kv_heads: int, head_dim: int, page_size: int, ld: int, rotary: int = 0, *, dtype: str = "f32"
) -> KernelSpec:
    """Args: qkv[.][ld], (cos_sin[S][rotary], positions), k, v of the layer, slots, begin, end over rows.

    `rotary` is how many dims of a head rotate; 0 for learned positions, then cos_sin and positions are not arguments.
    """
    if min(heads, kv_heads, head_dim, page_size) < 1 or ld < (heads + 2 * kv_heads) * head_dim:
        raise ValueError(f"kv_write: {heads} + 2 * {kv_heads} heads of {head_dim} do not fit in rows of {ld}")
    if rotary % 2 or not 0 <= rotary <= head_dim:
        raise ValueError(f"kv_write: rotary={rotary} must be even and in [0, head_dim={head_dim}]")
    if dtype != "f32":
        raise ValueError(f"kv_write: dtype {dtype!r} is not supported, only 'f32'")
    return KernelSpec.make(
        "kv_write", h=heads, kv=kv_heads, d=head_dim, page_size=page_size, ld=ld, rotary=rotary, dtype=dtype
    )


def build(
    symbol: str, target: Target, *, h: int, kv: int, d: int, page_size: int, ld: int, rotary: int, dtype: str
) -> None:
    from nanoserve.compiler.builder import Value, index
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop, over

    arguments = {"qkv": array(UNBOUNDED, ld)}
    if rotary:
        arguments |= {"cos_sin": array(UNBOUNDED, rotary), "positions": array(UNBOUNDED, element="i32")}
    arguments |= {"k": array(UNBOUNDED, kv, d, page_size), "v": array(UNBOUNDED, kv, page_size, d)}

    @kernel(symbol, **arguments, slots=array(UNBOUNDED, element="i32"), begin="index", end="index")
    def _(qkv: Any, *rest: Any) -> None:
        k, v, slots, begin, end = rest[-5:]

        @loop(begin, end)
        def _(row: Value) -> None:
            if rotary:
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

            slot = index(slots[row])
            page, offset = slot // page_size, slot % page_size

            @loop(0, kv)
            def _(head: Value) -> None:
                @loop(0, d)
                def _(dim: Value) -> None:
                    k[page, head, dim, offset] = qkv[row, head * d + dim + h * d]

                @over(d)
                def _(at: Any, width: int) -> None:
                    v.store(qkv.load(row, head * d + at + (h + kv) * d, width=width), page, head, offset, at)
