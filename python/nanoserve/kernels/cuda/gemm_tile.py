"""Tiles of x and of the weight in shared memory, and the pipeline that keeps several on their way.

A tile is so many rows of as many k, in lines of 16 bytes. Line c of row r lies at place c ^ (r % 8) (of a row of 8
lines; of 4, at c ^ (r / 2 % 4)), so that 8 rows' lines of the same k are in 8 different banks: reading a column of
lines has no conflicts.

k beyond the matrix is zeros, whatever lies in memory. Rows beyond it repeat the last one: their sums are not stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

from nanoserve.kernels.cuda.layout import ELEMENT_BYTES, weight_stride

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Operand, Value
    from nanoserve.compiler.gpu.memory import Array, SharedMemory

Cut = TypeVar("Cut", int, "Value")
LINE = 16  # bytes
EARLY_BYTES = 64 * 1024  # of a block's rows of a weight, asked for before the kernel in front has ended
TILE_K = {"f32": 32, "bf16": 64}  # k of a tile, by the type of x: 128 bytes of it


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of a matrix, `k_tile` columns at a time, in `stages` places of shared memory.

    Args:
        rows: of the tile.
        k: columns of the matrix.
        dtype: of its elements.
    """

    rows: int
    k: int
    k_tile: int
    dtype: str
    stages: int

    @property
    def line(self) -> int:
        """Elements in 16 bytes."""
        return LINE // ELEMENT_BYTES[self.dtype]

    @property
    def lines(self) -> int:
        """Of a row: 8, or 4."""
        return self.k_tile // self.line

    @property
    def bytes(self) -> int:
        return self.stages * self.rows * self.k_tile * ELEMENT_BYTES[self.dtype]

    def place(self, row: Value, line: Value) -> Value:
        """Where a line of a row lies in it."""
        return line ^ (row % 8 if self.lines == 8 else row // 2 % 4)

    def allocate(self, shared: SharedMemory, alignment: int = 128) -> Array:
        return shared.array(self.stages, self.rows, self.k_tile, element=self.dtype, alignment=alignment)

    def read(self, memory: Array, stage: Value, row: Value, line: Operand) -> Value:
        """16 bytes: line `line` of a row."""
        from nanoserve.compiler.builder import index

        return memory.load(stage, row, self.place(row, index(line)) * self.line, width=self.line)

    def copier(
        self, source: Array, source_row: Callable[[Value], Value], target: Array, thread: Value, threads: int
    ) -> Callable[[Value, Value], None]:
        """copy(k0, stage) begins to bring columns [k0, k0 + k_tile) of the tile's rows, by all threads of the block.

        Args:
            source_row: row of the matrix for a row of the tile.
        """
        from nanoserve.compiler.builder import imax, imin, index
        from nanoserve.compiler.gpu.memory import copy_async
        from nanoserve.compiler.gpu.threads import only_where

        total = self.rows * self.lines
        moves = []
        for start in range(0, total, threads):
            number = thread + start
            inside = None if start + threads <= total else number < index(total)
            row, line = number // self.lines, number % self.lines
            moves.append((source_row(row), line * self.line, row, self.place(row, line) * self.line, inside))

        def copy(k0: Value, stage: Value) -> None:
            for from_row, column, row, to, inside in moves:

                def move(
                    from_row: Value = from_row, column: Value = column, row: Value = row, to: Value = to
                ) -> None:
                    at = k0 + column
                    if self.k % self.k_tile == 0:
                        copy_async(source, (from_row, at), target, (stage, row, to))
                        return
                    # Of a line beyond the row nothing is read, wherever it lies.
                    valid = imin(imax(index(self.k) - at, 0), self.line)
                    copy_async(source, (from_row, at), target, (stage, row, to), valid=valid)

                only_where(inside, move)

        return copy


def cut(at: Cut, k: int, k_tile: int, cuts: int) -> Cut:
    """The first tile of part `at`, of `cuts` along k; of part `cuts`, one behind the last. No bit depends on anything else."""
    return at * -(-k // k_tile) // cuts


def prefetch_weight(
    tile: Tile, source: Array, source_row: Callable[[Value], Value], thread: Value, groups: int = 1
) -> None:
    """Asks for the beginning of the tile's rows to be brought to the L2 cache, one row a thread: no kernel writes weights.

    Args:
        source_row: row of the weight for a row of the tile.
        groups: of warps that take a part of k each: the beginning of each part.
    """
    from nanoserve.compiler.builder import index
    from nanoserve.compiler.control import when
    from nanoserve.compiler.gpu.early_start import prefetch

    size = ELEMENT_BYTES[tile.dtype]
    firsts = [cut(part, tile.k, tile.k_tile, groups) * tile.k_tile for part in range(groups)]
    least = min(end - begin for begin, end in pairwise([*firsts, tile.k]))
    num_bytes = min(EARLY_BYTES // (tile.rows * groups), least * size) // LINE * LINE
    if num_bytes == 0:
        return

    @when(thread < index(tile.rows * groups))
    def _() -> None:
        begin = cut(thread // tile.rows, tile.k, tile.k_tile, groups) * (tile.k_tile * size)
        prefetch(
            source, source_row(thread % tile.rows), weight_stride(tile.k, tile.dtype) * size, num_bytes, begin
        )


def pipeline(
    k: int, k_tile: int, stages: int, copy: Callable[[Value, Value], None],
    multiply: Callable[[Value, list[Value]], list[Value]], sums: list[Value],
    *, cuts: int = 1, part: Value | None = None, wait_for_all: Callable[[], None] | None = None,
) -> list[Value]:  # fmt: skip
    """Sums after all tiles along k, in their order: copy(k0, stage) and sums = multiply(stage, sums) for each.

    While a tile is multiplied, stages - 1 others are on their way. The one barrier of a turn says both that the tile
    has come, for every thread's part, and that everybody is done with the last one, whose place the next copy takes.

    Args:
        sums: what sums begin with, zeros.
        cuts: parts of k whose sums are made by themselves, and added up in their order, as `total` does.
        part: this one alone. wait_for_all: a barrier of those who take it; None: of the block.
    """
    from nanoserve.compiler.builder import index, select
    from nanoserve.compiler.control import loop, when
    from nanoserve.compiler.gpu.memory import commit, wait_until
    from nanoserve.compiler.gpu.threads import barrier

    turns, ahead = -(-k // k_tile), stages - 1
    first, last = index(0), index(turns)
    if part is not None:
        first, last = cut(part, k, k_tile, cuts), cut(part + 1, k, k_tile, cuts)
    group = None
    for i in range(ahead):

        def begin(i: int = i) -> None:
            copy((first + i) * k_tile, index(i))

        if part is not None:
            when(first + i < last)(begin)
        elif i < turns:
            begin()
        group = commit()  # maybe of nothing: the groups are counted

    def next_stage(stage: Value) -> Value:
        return select(stage < index(ahead), stage + 1, index(0))

    def take_turn(turn: Value, carried: list[Value]) -> list[Value]:
        stage, free, *sums = carried
        wait_until(ahead - 1, group)
        (wait_for_all or barrier)()

        @when(turn + ahead < last)
        def _() -> None:
            copy((turn + ahead) * k_tile, free)

        commit()
        return [next_stage(stage), next_stage(free), *multiply(stage, sums)]

    def take_part(number: Value, carried: list[Value]) -> list[Value]:
        stage, free, *totals = carried
        bounds = cut(number, k, k_tile, cuts), cut(number + 1, k, k_tile, cuts)
        stage, free, *more = loop(*bounds, carry=[stage, free, *sums])(take_turn)
        return [stage, free, *total(totals, more)]

    places = [index(0), index(ahead)]
    if part is None and cuts > 1:
        return list(loop(0, cuts, carry=[*places, *sums])(take_part)[2:])
    return list(loop(first, last, carry=[*places, *sums])(take_turn)[2:])


def total(sums: list[Value], more: list[Value]) -> list[Value]:
    """Sums of the parts before, zeros at first, and those of the next."""
    return [a + b for a, b in zip(sums, more, strict=True)]


def weight_row(row: Value, first: Value, unit: int, n: int, gated: bool) -> Value:
    """Row of the weight for a row of its tile, whose first output is `first`.

    Gated, the tile has runs of `unit` gates, then the `unit` others of the same outputs, in turns: who has a gate's
    sums has those it is multiplied with.
    """
    from nanoserve.compiler.builder import imin

    if not gated:
        return imin(first + row, n - 1)
    run = row // unit
    return imin(first + run // 2 * unit + row % unit, n - 1) + run % 2 * n
