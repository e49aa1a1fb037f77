"""A block's tile of a product by Hopper's wgmma: its shape, its products, and what is done with their sums.

The weight is the operand of 64 rows, x that of as many columns as the instruction has: what is computed is y transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nanoserve.compiler.gpu.chip import WARP
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm_tile import TILE_K, Tile

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value
    from nanoserve.compiler.gpu.memory import Array

    Output = tuple[Value, Value | None, Value]  # a sum, its other one where gated, the column

K_TILE = TILE_K["bf16"]
ROWS = 64  # of the instruction
GROUP = 128  # threads of a warpgroup
GATES = 8  # a thread has rows r and r + 8 of the weight's tile: a gate and what it multiplies
ALIGNMENT = 1024  # of tiles, for the hardware's swizzle
_AT_ONCE = 2  # runs of 8 rows of y whose outputs are finished together, 4 of each a thread's


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a block: `groups` warpgroups, `columns` rows of x (a multiple of 8 up to 256), tiles of `stages` places."""

    groups: int
    columns: int
    stages: int

    @property
    def rows(self) -> int:
        """Of the weight's tile."""
        return self.groups * ROWS

    def tiles(self, k: int) -> tuple[Tile, Tile]:
        """Of the weight and of x."""
        return (
            Tile(self.rows, k, K_TILE, "bf16", self.stages),
            Tile(self.columns, k, K_TILE, "bf16", self.stages),
        )


def multiplier(
    shape: Shape, w_shared: Array, x_shared: Array, thread: Value
) -> Callable[[Value, Value], Value]:
    """multiply(stage, sums): the sums with the products of a stage's tiles, k ascending in steps of 16."""
    from nanoserve.compiler.gpu import warpgroup

    stage_bytes = K_TILE * 2
    group_at = warpgroup.integer(thread // GROUP) * (ROWS * warpgroup.ROW_BYTES)
    w_address, x_address = warpgroup.address_of(w_shared) + group_at, warpgroup.address_of(x_shared)

    def multiply(stage: Value, sums: Value) -> Value:
        place = warpgroup.integer(stage)
        of_w = warpgroup.descriptor(w_address + place * (shape.rows * stage_bytes))
        of_x = warpgroup.descriptor(x_address + place * (shape.columns * stage_bytes))
        warpgroup.begin()
        for step in range(K_TILE // 16):
            sums = warpgroup.multiply(
                warpgroup.advanced(of_w, step), warpgroup.advanced(of_x, step), sums, shape.columns
            )
        warpgroup.finish()
        return sums

    return multiply


def store_sums(
    sums: Value, shape: Shape, epilogue: Epilogue, y: Array, bias: Array | None, n: int, m: Value,
    first_row: Value, first_column: Value, thread: Value,
) -> None:  # fmt: skip
    """Finishes a thread's sums and writes them, those inside y[m][n]; the tile's first output is named."""
    from nanoserve.compiler.builder import imin, index, splat, widen
    from nanoserve.compiler.gpu import warpgroup
    from nanoserve.compiler.gpu.threads import only_where

    parts = 1 + epilogue.gated
    warp, lane = thread // WARP, thread % WARP
    tile_row = warp * 16 + lane // 4  # of the weight's tile; gated, of the first of two runs of outputs
    column_of = tile_row if parts == 1 else warp * 8 + lane // 4

    def outputs(at: int) -> list[tuple[Value, list[Output]]]:
        """Rows of y and what a thread has of them, of the `at`-th run of 8."""
        found: list[tuple[Value, list[Output]]] = []
        for side in range(2):
            low, high = (splat(warpgroup.sum_at(sums, at + half * 2 + side), 1) for half in range(2))
            row = first_row + lane % 4 * 2 + (at // 4 * 8 + side)
            column = first_column + column_of
            both: list[Output] = [(low, None, column), (high, None, column + 8)]
            found.append((row, [(low, high, column)] if epilogue.gated else both))
        return found

    def known(row: Value, column: Value) -> Value | None:
        """What is there already; outside, something that is not used."""
        if not epilogue.residual:
            return None
        return widen(y.load(imin(row, m - 1), imin(column, n - 1), width=1))

    for begin in range(0, shape.columns // 2, 4 * _AT_ONCE):
        end = min(begin + 4 * _AT_ONCE, shape.columns // 2)
        rows = [one for at in range(begin, end, 4) for one in outputs(at)]
        # Read before any of them is written: else each would wait for memory by itself.
        before = [[known(row, column) for _, _, column in of_row] for row, of_row in rows]
        for (row, of_row), there in zip(rows, before, strict=True):

            def put(
                row: Value = row, of_row: list[Output] = of_row, there: list[Value | None] = there
            ) -> None:
                for (value, ups, column), old in zip(of_row, there, strict=True):
                    store = partial(epilogue.store, value, ups, y, bias, n, row, column, old)
                    only_where(None if n * parts % shape.rows == 0 else column < index(n), store)

            only_where(row < m, put)
