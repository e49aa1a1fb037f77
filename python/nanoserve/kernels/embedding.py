"""x[row] = table[ids[row]] (+ pos_table[positions[row]]): the first operation of a forward pass.

Numerics: a copy, or one addition per element. Ids and positions must be in range; the caller checks them, because a wrong
one would read foreign memory here. Work units are rows.
"""

from __future__ import annotations

from typing import Any

from nanoserve.compiler.target import Target
from nanoserve.kernels.library import KernelSpec


def embedding_spec(cols: int, ldx: int, *, positions: bool = False, dtype: str = "f32") -> KernelSpec:
    """Args: ids, positions, table[V][cols], (pos_table[S][cols]), x[.][ldx], begin, end over rows."""
    if not 1 <= cols <= ldx:
        raise ValueError(f"embedding: cols={cols} must be in [1, ldx={ldx}]")
    if dtype != "f32":
        raise ValueError(f"embedding: dtype {dtype!r} is not supported, only 'f32'")
    return KernelSpec.make("embedding", c=cols, ldx=ldx, positions=positions, dtype=dtype)


def build(symbol: str, target: Target, *, c: int, ldx: int, positions: bool, dtype: str) -> None:
    from nanoserve.compiler.builder import index
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop, over

    arguments = {
        "ids": array(UNBOUNDED, element="i32"),
        "positions": array(UNBOUNDED, element="i32"),
        "table": array(UNBOUNDED, c),
    }
    if positions:
        arguments["pos_table"] = array(UNBOUNDED, c)

    @kernel(symbol, **arguments, x=array(UNBOUNDED, ldx), begin="index", end="index")
    def _(ids: Any, position_of: Any, table: Any, *rest: Any) -> None:
        x, begin, end = rest[-3:]

        @loop(begin, end)
        def _(row: Any) -> None:
            token = index(ids[row])
            position = index(position_of[row]) if positions else None

            @over(c)
            def _(at: Any, width: int) -> None:
                value = table.load(token, at, width=width)
                if position is not None:
                    value = value + rest[0].load(position, at, width=width)
                x.store(value, row, at)
