"""The largest and the sum of each block of logits, against NumPy: any vocabulary, any split, bad numbers never hidden."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.packed_call import call
from nanoserve.kernels import logits
from nanoserve.native import LOGITS_BLOCK

VOCABULARIES = [1, 15, 37, 255, 256, 257, 300, 4096, 4097, 4400, 9000]
rng = np.random.default_rng(0)


def in_blocks(values: np.ndarray, fill: float) -> np.ndarray:
    """[rows, blocks, LOGITS_BLOCK]."""
    short = -values.shape[1] % LOGITS_BLOCK
    padded = np.pad(values, ((0, 0), (0, short)), constant_values=fill)
    return padded.reshape(len(values), -1, LOGITS_BLOCK)


def rows(count: int, vocab: int) -> np.ndarray:
    """float32[count, vocab + 7], NaN behind the vocabulary."""
    made = np.full((count, vocab + 7), np.nan, np.float32)
    made[:, :vocab] = rng.standard_normal((count, vocab)) * 5
    return made


def largest(values: np.ndarray, vocab: int, split: int = 1, **options: bool) -> np.ndarray:
    """What the kernel gives, its units cut in `split` calls; a row more must stay as it was."""
    count = len(values)
    out = np.full((count + 1, logits.num_blocks(vocab)), 7, np.float32)
    units = logits.num_ranges(vocab) * count
    for i in range(split):
        call(
            logits.block_max_spec(vocab, values.shape[1], **options), values, out, count, units * i // split,
            units * (i + 1) // split,
        )  # fmt: skip
    assert (out[count] == 7).all()
    return out[:count]


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_block_max(vocab: int) -> None:
    values = rows(5, vocab)
    values[3, :vocab] = np.finfo(np.float32).min
    expected = in_blocks(values[:, :vocab], -np.inf).max(axis=2)
    for split in (1, 2, 3):
        assert np.array_equal(largest(values, vocab, split), expected)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_with_a_bad_number_has_no_maximum(vocab: int, bad: float) -> None:
    """Wherever it is, and only that block; the largest finite numbers are not bad."""
    for column in {0, vocab - 1, vocab // 2, vocab * 2 // 3}:
        values = rows(3, vocab)
        values[:, 0] = np.finfo(np.float32).max
        values[1, column] = bad
        found = np.isnan(largest(values, vocab))
        assert found[1, column // LOGITS_BLOCK]
        assert found.sum() == 1


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_forbidden_tokens_are_no_bad_numbers(vocab: int) -> None:
    """-inf passes, alone in a block too; NaN and +inf do not."""
    values = rows(4, vocab)
    values[0, :vocab] = -np.inf
    values[1, vocab // 2] = -np.inf
    values[2, vocab - 1] = np.nan
    values[3, vocab // 3] = np.inf
    found = largest(values, vocab, may_forbid=True)
    assert np.array_equal(found[:2], in_blocks(values[:2, :vocab], -np.inf).max(axis=2))
    assert np.argwhere(np.isnan(found)).tolist() == [
        [2, (vocab - 1) // LOGITS_BLOCK],
        [3, vocab // 3 // LOGITS_BLOCK],
    ]


def sums(
    values: np.ndarray, vocab: int, which: np.ndarray, temperatures: np.ndarray, split: int = 1
) -> np.ndarray:
    block_max = in_blocks(values[:, :vocab], -np.inf).max(axis=2)
    top = block_max.max(axis=1)[which]
    out = np.full((len(which) + 1, block_max.shape[1]), 7.0)
    units = logits.num_ranges(vocab) * len(which)
    for i in range(split):
        call(
            logits.block_sums_spec(vocab, values.shape[1]), values, block_max, which.astype(np.int32), top,
            (1 / temperatures).astype(np.float32), out, units * i // split, units * (i + 1) // split,
        )  # fmt: skip
    assert (out[-1] == 7).all()
    return out[:-1]


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_block_sums(vocab: int) -> None:
    """Chosen rows, some twice, each with its own temperature: as exact as float32 exponents are, and 0 below exp(-80)."""
    values = rows(5, vocab)
    values[0, vocab // 2] = 30
    values[2, :300] = -np.inf
    values[2, vocab - 1] = 1
    which, temperatures = np.array([4, 0, 2, 0]), np.array([1.0, 0.25, 2.0, 0.7])
    found = sums(values, vocab, which, temperatures)
    shifted = in_blocks(values[which, :vocab].astype(np.float64), -np.inf)
    exponents = (shifted - shifted.max(axis=(1, 2), keepdims=True)) / temperatures[:, None, None]
    expected = np.exp(exponents).sum(axis=2)
    most = exponents.max(axis=2)
    expected[most < -80] = 0
    # Between: exp stays at 1.2e-38 where it should fall on, which such small sums feel.
    clear = (most > -70) | (most < -80.01)
    off = np.abs(found - expected)[clear] / np.maximum(expected[clear], 1e-37)
    assert (off <= 4e-7 * (1 - np.maximum(most[clear], -80))).all()
    for split in (2, 5):
        assert np.array_equal(sums(values, vocab, which, temperatures, split), found)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="vocab=10 in rows of 9 do not fit"):
        logits.block_max_spec(10, 9)
    with pytest.raises(ValueError, match="vocab=0"):
        logits.block_sums_spec(0, 9)
