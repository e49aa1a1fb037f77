"""The k largest of a row of logits, without sorting the row.

The k-th largest of the blocks' maxima is a lower bound of the k-th largest of all, because k maxima are k elements: what
is below it cannot be among the k. One pass for the maxima and one comparison leave a handful of candidates, whatever the
vocabulary; with fewer blocks than k the row itself is partitioned.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]

_BLOCK = 256


def at_least_kth(row: Float32Array, k: int) -> NDArray[np.intp]:
    """Ids, ascending, of the elements of float32[V] that are at least as large as its k-th largest, 1 <= k.

    More than k where the k-th place is shared. NaNs make no error and no sense.
    """
    if k >= len(row):
        return np.arange(len(row))
    whole = len(row) // _BLOCK * _BLOCK
    if k > len(row) // _BLOCK:
        return np.flatnonzero(row >= _kth(row, k))
    maxima = row[:whole].reshape(-1, _BLOCK).max(axis=1)
    candidates = np.flatnonzero(row >= _kth(maxima, k))
    values = row[candidates]
    return candidates[values >= _kth(values, k)]


def likeliest(row: Float32Array, k: int) -> NDArray[np.intp]:
    """Ids of the k largest elements (all, if there are fewer), largest first, the lowest ids among equals."""
    if k == 0:
        return np.empty(0, np.intp)
    ids = at_least_kth(row, k)
    return ids[np.argsort(-row[ids], kind="stable")][:k]


def _kth(values: Float32Array, k: int) -> np.float32:
    largest: np.float32 = np.partition(values, len(values) - k)[len(values) - k]
    return largest
