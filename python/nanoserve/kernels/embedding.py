"""x[row] = table[ids[row]] * scale (+ pos_table[positions[row]]): the first operation of a forward pass.

Numerics: a copy (of a quantised table: code * scale); a product and a sum per element where there are any, not fused. Ids and positions must be in range; the
caller checks them, because a wrong one would read foreign memory here. Work units are rows.

A tied model keeps one copy of its table, the one panels.pack made for the head: row `id` is then a column of a panel, and
each of its elements lies on a cache line of its own. Price: some microseconds per token, against hundreds of megabytes.
"""

from __future__ import annotations

import math
from typing import Any

from nanoserve.compiler.target import Target
from nanoserve.kernels.gemm import GROUP
from nanoserve.kernels.library import KernelSpec


def embedding_spec(
    cols: int, ldx: int, *, positions: bool = False, scale: float = 1.0, panel: int = 0, dtype: str = "f32"
) -> KernelSpec:
    """Args: ids, positions, table[V][cols], (scale_of[V]), (pos_table[S][cols]), x[.][ldx], begin, end over rows.

    `dtype` is the table's: "bf16" and "f16" are widened exactly. With `panel` > 0 the table is panels.pack's, or for "i8"
    pack_int8's with its scales; panel is gemm.panel_width(V).
    """
    if not 1 <= cols <= ldx:
        raise ValueError(f"embedding: cols={cols} must be in [1, ldx={ldx}]")
    if not math.isfinite(scale):
        raise ValueError(f"embedding: scale={scale} must be finite")
    if panel < 0:
        raise ValueError(f"embedding: panel={panel} must be at least 0, 0 for a table of rows")
    if dtype not in GROUP:
        raise ValueError(f"embedding: dtype {dtype!r} must be one of {', '.join(GROUP)}")
    if dtype == "i8" and not panel:
        raise ValueError("embedding: dtype 'i8' is for the table of a packed head, panel=0 says rows")
    return KernelSpec.make(
        "embedding", c=cols, ldx=ldx, positions=positions, scale=float(scale), panel=panel,
        group=GROUP[dtype] if panel else 1, dtype=dtype,
    )  # fmt: skip


def build(
    symbol: str, target: Target, *, c: int, ldx: int, positions: bool, scale: float, panel: int, group: int,
    dtype: str,
) -> None:  # fmt: skip
    from nanoserve.compiler.builder import LANES, index, to_float, widen
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop, over

    shape = (-(-c // group), panel, group) if panel else (c,)
    arguments = {
        "ids": array(UNBOUNDED, element="i32"),
        "positions": array(UNBOUNDED, element="i32"),
        "table": array(UNBOUNDED, *shape, element=dtype),
    }
    if dtype == "i8":
        arguments["scale_of"] = array(UNBOUNDED)
    if positions:
        arguments["pos_table"] = array(UNBOUNDED, c)

    @kernel(symbol, **arguments, x=array(UNBOUNDED, ldx), begin="index", end="index")
    def _(ids: Any, position_of: Any, table: Any, *rest: Any) -> None:
        x, begin, end = rest[-3:]
        pos_table = rest[-4] if positions else None

        @loop(begin, end)
        def _(row: Any) -> None:
            token = index(ids[row])
            position = index(position_of[row])

            @over(c, 1 if panel else LANES)
            def _(at: Any, width: int) -> None:
                place = (token // panel, at // group, token % panel, at % group) if panel else (token, at)
                stored = table.load(*place, width=width)
                value = to_float(stored) * rest[0][token] if dtype == "i8" else widen(stored)
                if scale != 1.0:
                    value = value * scale
                if pos_table is not None:
                    value = value + pos_table.load(position, at, width=width)
                x.store(value, row, at)
