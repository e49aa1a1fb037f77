"""Splits a row [q | k | v] of the QKV product, as kernels/kv_write.py: norms q and k, rotates them by position (RoPE),
writes k and v to their slot. q is normed and rotated in place; the k and v columns stay as they are.

A block takes a row, a warp a head: lane l has dims l, l + 32, ... of the first half of what rotates, those they turn
with, and of what does not rotate. A row whose slot is negative has no token: its keys are written nowhere.

Numerics: two products and one sum per rotated element, not fused, as the models were trained with. The order of a
norm's sum depends on the sizes of heads only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nanoserve.compiler.gpu.chip import WARP, Chip
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.kernels.cuda.layout import check_stride, pages
from nanoserve.kernels.kv_write import DTYPES, QK_NORMS

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value

_MOST_WARPS = 16


def kv_write_spec(
    heads: int, kv_heads: int, head_dim: int, page_size: int, ld: int, rotary: int = 0, *, qk_norm: str | None = None,
    norm_eps: float = 0.0, dtype: str = "f32",
) -> GpuKernelSpec:  # fmt: skip
    """Args: qkv[.][ld], (cos_sin[S][rotary], positions[m]), (q_norm, k_norm), k, v of the layer, slots[m], m.

    `rotary` is how many dims of a head rotate; 0 for learned positions, then cos_sin and positions are not arguments.
    With `qk_norm` "head" the norms' weights are [head_dim], with "row" [heads * head_dim] and [kv_heads * head_dim].
    """
    if min(heads, kv_heads, head_dim, page_size) < 1:
        raise ValueError(
            f"kv_write: heads={heads}, kv_heads={kv_heads}, head_dim={head_dim}, page_size={page_size} must be positive"
        )
    check_stride("kv_write", (heads + 2 * kv_heads) * head_dim, ld=ld)
    if rotary % 2 or not 0 <= rotary <= head_dim:
        raise ValueError(f"kv_write: rotary={rotary} must be even and in [0, head_dim={head_dim}]")
    if qk_norm not in QK_NORMS:
        raise ValueError(f"kv_write: qk_norm {qk_norm!r} must be one of {QK_NORMS}")
    if not 0 <= norm_eps < math.inf:
        raise ValueError(f"kv_write: norm_eps={norm_eps} must be finite and at least 0")
    if dtype not in DTYPES:
        raise ValueError(f"kv_write: dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    arguments = {"qkv": pointer(UNBOUNDED, ld)}
    if rotary:
        arguments |= {"cos_sin": pointer(UNBOUNDED, rotary), "positions": pointer(UNBOUNDED, element="i32")}
    if qk_norm:
        sizes = (1, 1) if qk_norm == "head" else (heads, kv_heads)
        arguments |= {"q_norm": pointer(sizes[0] * head_dim), "k_norm": pointer(sizes[1] * head_dim)}
    arguments |= dict.fromkeys(("k", "v"), pages(kv_heads, page_size, head_dim, dtype))
    arguments |= {"slots": pointer(UNBOUNDED, element="i32"), "m": SCALAR}
    warps = min(_MOST_WARPS, heads)  # heads take turns, each a round trip to memory
    return GpuKernelSpec.make(
        "kv_write", arguments, (Extent("m"),), warps * WARP, 2 * 4 * warps if qk_norm == "row" else 0, h=heads,
        kv=kv_heads, d=head_dim, page_size=page_size, rotary=rotary, qk_norm=qk_norm,
        norm_eps=float(norm_eps) if qk_norm else 0.0,
    )  # fmt: skip


def build(
    spec: GpuKernelSpec, chip: Chip, *, h: int, kv: int, d: int, page_size: int, rotary: int, qk_norm: str | None,
    norm_eps: float,
) -> None:  # fmt: skip
    from nanoserve.compiler.builder import add, const, fma, imin, index, select, sqrt
    from nanoserve.compiler.control import loop, when
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.memory import SharedMemory, rounded
    from nanoserve.compiler.gpu.threads import block_id, only_where, over_block, over_warp, thread_id

    warps, half = spec.block // WARP, rotary // 2

    @device_kernel(spec, chip)
    def _(*values: Any) -> None:
        given = dict(zip(dict(spec.arguments), values, strict=True))
        qkv, row, thread = given["qkv"], block_id(), thread_id()
        warp, lane = thread // WARP, thread % WARP
        shared = SharedMemory(spec.shared_bytes) if spec.shared_bytes else None

        def lanes_of(first: int, count: int) -> list[tuple[Value, Value | None]]:
            """The dims in [first, first + count) this lane has, each with whether it is one; None for always."""
            found = []
            for at in range(0, count, WARP):
                inside = None if at + WARP <= count else lane + at < index(count)
                found.append((lane + (first + at), inside))
            return found

        # A dim beyond its head stands for the head's last one: read, and not used.
        turning, others = lanes_of(0, half), lanes_of(rotary, d - rotary)
        dims = [*turning, *((dim + half, inside) for dim, inside in turning), *others]

        def load(source: Any, at: tuple[Any, ...], first: Any) -> list[Value]:
            """This lane's elements source[*at, first + dim]."""
            return [
                source[(*at, first + (dim if inside is None else imin(dim, d - 1)))] for dim, inside in dims
            ]

        def inverse_of(squares: Value, count: int) -> Value:
            return const(1.0, "f32") / sqrt(squares * (1.0 / count) + norm_eps)

        def row_scale(first: int, count: int) -> Value:
            """1 / RMS of some columns of the row, by all threads."""
            assert shared is not None

            @loop(0, count, spec.block, carry=[const(0.0, "f32")])
            def squares(at: Value, total: list[Value]) -> list[Value]:
                column = at + thread
                x = qkv[row, imin(column, count - 1) + first]
                return [select(column < index(count), fma(x, x, total[0]), total[0])]

            return inverse_of(over_block(squares[0], add, warps, shared.array(warps, alignment=4)), count)

        def normed(x: list[Value], head: Value, weight: Any, scale: Value | None) -> list[Value]:
            if weight is None:
                return x
            if scale is None:  # of this head
                squares = const(0.0, "f32")
                for (_, inside), v in zip(dims, x, strict=True):
                    more = fma(v, v, squares)
                    squares = more if inside is None else select(inside, more, squares)
                return [
                    v * g
                    for scale in [inverse_of(over_warp(squares, add), d)]
                    for v, g in zip([v * scale for v in x], load(weight, (), index(0)), strict=True)
                ]
            return [v * scale * g for v, g in zip(x, load(weight, (), head * d), strict=True)]

        def rotated(x: list[Value]) -> list[Value]:
            if not rotary:
                return x
            count = len(turning)
            angles = [
                given["cos_sin"][index(given["positions"][row]), imin(dim, half - 1) + part]
                for part in (0, half)
                for dim, _ in turning
            ]
            pairs = list(zip(x[:count], x[count : 2 * count], angles[:count], angles[count:], strict=True))
            first = [a * cos - b * sin for a, b, cos, sin in pairs]
            return [*first, *(b * cos + a * sin for a, b, cos, sin in pairs), *x[2 * count :]]

        def store(x: list[Value], target: Any, at: tuple[Any, ...], first: Any) -> None:
            for (dim, inside), v in zip(dims, x, strict=True):

                def put(dim: Value = dim, v: Value = v) -> None:
                    target[(*at, first + dim)] = rounded(v, target.element)

                only_where(inside, put)

        q_norm, k_norm = given.get("q_norm"), given.get("k_norm")
        q_scale = row_scale(0, h * d) if qk_norm == "row" else None
        k_scale = row_scale(h * d, kv * d) if qk_norm == "row" else None

        @loop(warp, h, warps)
        def _(head: Value) -> None:
            x = load(qkv, (row,), head * d)
            store(rotated(normed(x, head, q_norm, q_scale)), qkv, (row,), head * d)

        slot_or_none = given["slots"][row]

        @when(slot_or_none > -1)
        def _() -> None:
            slot = index(slot_or_none)
            page, offset = slot // page_size, slot % page_size

            @loop(warp, kv, warps)
            def _(head: Value) -> None:
                x = load(qkv, (row,), head * d + h * d)
                v = load(qkv, (row,), head * d + (h + kv) * d)
                store(rotated(normed(x, head, k_norm, k_scale)), given["k"], (page, head, offset), index(0))
                store(v, given["v"], (page, head, offset), index(0))
