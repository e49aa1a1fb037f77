"""How a block of threads covers a row: which thread has which columns, a function of the number of columns only.

Threads take turns: piece j of thread t is the `width` columns from (j * threads + t) * width on, so that a warp reads
a run of memory. All pieces of a thread fit its registers, so that a row is read once however often it is gone over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanoserve.compiler.gpu.chip import MAX_THREADS, WARP
from nanoserve.kernels.cuda.layout import check_stride

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Operand, Value
    from nanoserve.compiler.gpu.memory import Array

MAX_COLS = 65536  # 64 registers of every thread


def check_row(kernel: str, cols: int, **strides: int) -> None:
    """Whether rows of these strides can be covered.

    Raises:
        ValueError: they cannot.
    """
    if not 1 <= cols <= MAX_COLS:
        raise ValueError(f"{kernel}: cols={cols} must be in [1, {MAX_COLS}]")
    check_stride(kernel, cols, **strides)


@dataclass(frozen=True, slots=True)
class Piece:
    """The columns [at, at + width) of a row; `inside` says whether they are any, None where they always are."""

    at: Value
    inside: Value | None


@dataclass(frozen=True, slots=True)
class RowCover:
    """A row of `cols` columns under one block."""

    cols: int

    @property
    def width(self) -> int:
        """Columns of a piece: 16 bytes of float32, or one where a row is no multiple of that."""
        return 4 if self.cols % 4 == 0 else 1

    @property
    def threads(self) -> int:
        """A power of two, four pieces each if there are so many columns."""
        threads = WARP
        while threads < MAX_THREADS and threads * 4 * self.width < self.cols:
            threads *= 2
        return threads

    def pieces(self) -> list[Piece]:
        """This thread's."""
        from nanoserve.compiler.builder import index
        from nanoserve.compiler.gpu.threads import thread_id

        turn = self.threads * self.width
        first = thread_id() * self.width
        found = []
        for start in range(0, self.cols, turn):
            at = first + start
            found.append(Piece(at, None if start + turn <= self.cols else at < index(self.cols)))
        return found

    def load(self, source: Array, row: Operand | None, piece: Piece, first: int = 0) -> Value:
        """A piece of source[row, first ...], or of a vector where row is None; the last columns where it is outside."""
        from nanoserve.compiler.builder import imin

        at = piece.at if piece.inside is None else imin(piece.at, self.cols - self.width)
        return source.load(*(() if row is None else (row,)), at + first if first else at, width=self.width)

    def store(self, value: Value, target: Array, row: Operand, piece: Piece) -> None:
        """target[row] = value where the piece is inside."""
        from nanoserve.compiler.gpu.threads import only_where

        only_where(piece.inside, lambda: target.store(value, row, piece.at))

    def sum(self, pieces: list[Piece], term: Callable[[int, Value], Value], slots: Array) -> Value:
        """In every thread: the sum over the columns of what term(i, acc) adds to acc for piece i.

        `slots`: shared memory of one float per warp, used by nothing else.
        """
        from nanoserve.compiler.builder import add, htree, select, zeros
        from nanoserve.compiler.gpu.threads import over_block

        total = zeros(self.width)
        for i, piece in enumerate(pieces):
            more = term(i, total)
            total = more if piece.inside is None else select(piece.inside, more, total)
        return over_block(htree(total, add), add, self.threads // WARP, slots)
