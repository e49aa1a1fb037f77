"""Logits as every executor returns them: rows of numbers, the largest of each block of them, and who can read both.

A row of a large vocabulary is 600 KB of which a token needs a few blocks, so no step walks it in Python, or twice. Executors
with compiled kernels leave `block_max` behind in the pass that checks the numbers; `Logits.of` computes it for arrays that
come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoserve.native import LOGITS_BLOCK, LogitsReader

Float32Array = NDArray[np.float32]

_PLAIN = LogitsReader()


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """R rows over a vocabulary of V.

    Attributes:
        values: float32[R, V]; rows are contiguous, and lie wherever the executor put them.
        block_max: float32[R, blocks]: the largest of each LOGITS_BLOCK logits, NaN where one of them is not finite.
        reader: chooses tokens from such rows, with what the executor has for it: kernels and threads.

    Raises:
        ValueError: shapes that do not belong together.
    """

    values: Float32Array
    block_max: Float32Array
    reader: LogitsReader = _PLAIN

    def __post_init__(self) -> None:
        _check_shape(self.values)
        blocks = -(-self.values.shape[1] // LOGITS_BLOCK)
        if self.block_max.shape != (len(self.values), blocks):
            raise ValueError(
                f"block_max of shape {self.block_max.shape} for logits of shape {self.values.shape}, "
                f"must be {(len(self.values), blocks)}"
            )

    @classmethod
    def of(cls, values: Float32Array) -> Logits:
        """Of an array, without kernels: everything in float64, and slow for a large vocabulary."""
        values = np.asarray(values, dtype=np.float32)
        _check_shape(values)
        return cls(values, _PLAIN.block_max(values))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def finite(self) -> NDArray[np.bool_]:
        """bool[R]: every logit of the row is."""
        return np.asarray(np.isfinite(self.block_max).all(axis=1))

    def take(self, rows: Sequence[int]) -> Logits:
        """A copy of these rows."""
        values = self.empty_rows(len(rows))
        for copy, row in zip(values, rows, strict=True):
            copy[:] = self.values[row]
        return Logits(values, self.block_max[rows], self.reader)

    def empty_rows(self, count: int) -> Float32Array:
        """Memory for rows like these, laid out for `reader`."""
        vocab = self.values.shape[1]
        return np.empty((count, max(self.values.strides[0] // 4, vocab)), np.float32)[:, :vocab]


def _check_shape(values: Float32Array) -> None:
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"logits of shape {values.shape}, must be [rows, vocabulary]")
