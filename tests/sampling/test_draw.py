"""The native draw: kept sets and chances against exact float64, with kernels and without, where rounding decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nanoserve.logits import Logits
from nanoserve.native import LOGITS_BLOCK
from phase0.chi_square import chi_square_z
from support.readers import compiled

LARGEST_BELOW_ONE = 1.0 - 2.0**-53
MAKERS: dict[str, Callable[[np.ndarray], Logits]] = {"plain": Logits.of, "compiled": compiled}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def peaked(count: int, vocab: int, seed: int) -> np.ndarray:
    """A broad tail and fifty tokens above it, as models make them."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((count, vocab)).astype(np.float32)
    for row in logits:
        places = rng.choice(vocab, min(50, vocab // 2), replace=False)
        row[places] += 8 - 2 * np.log(np.arange(1, len(places) + 1)).astype(np.float32)
    return logits


def weights(row: np.ndarray, temperature: float) -> np.ndarray:
    return np.exp((row.astype(np.float64) - row.max()) / temperature)


def draw(
    logits: Logits,
    uniform: Any,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    row: int = 0,
) -> list[int]:
    """Tokens of one row for many uniform numbers."""
    n = len(uniform)
    return logits.reader.sample(
        logits.values, logits.block_max, [row] * n, [temperature] * n, [top_k] * n, [top_p] * n, [min_p] * n, uniform
    )  # fmt: skip


@each_maker
@pytest.mark.parametrize("vocab", [1, 5, 256, 257, 5000, 50_257])
@pytest.mark.parametrize("temperature", [0.05, 0.8, 3.0])
def test_a_draw_falls_where_the_running_sum_exceeds_it(make: Any, vocab: int, temperature: float) -> None:
    """In the middle of tokens of weight, block borders and a short last block change nothing."""
    logits = make(peaked(3, vocab, vocab))
    for row, values in enumerate(logits.values):
        made = weights(values, temperature)
        cumulative = np.cumsum(made)
        tokens = np.flatnonzero(made > 1e-5 * cumulative[-1])[:200]
        middles = (cumulative[tokens] - made[tokens] / 2) / cumulative[-1]
        assert draw(logits, middles, temperature, row=row) == tokens.tolist()


@each_maker
def test_chances_are_exact_to_the_places_where_the_token_changes(make: Any) -> None:
    """Bisection finds each token's interval of uniform numbers: its length is its probability, to 3e-7 of the total."""
    logits = make(peaked(1, 3000, 4))
    made = weights(logits.values[0], 0.8)
    exact = np.concatenate([[0.0], np.cumsum(made) / made.sum()])
    tokens = np.argsort(-made)[:40]
    low, high = np.zeros(len(tokens)), np.ones(len(tokens))
    for _ in range(45):
        middle = (low + high) / 2
        reached = np.array(draw(logits, middle, 0.8)) >= tokens
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    np.testing.assert_allclose(high, exact[tokens], rtol=0, atol=3e-7)


@each_maker
@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, LARGEST_BELOW_ONE])
@pytest.mark.parametrize("fields", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str)
def test_a_token_that_is_forbidden_is_never_drawn(make: Any, u: float, fields: dict[str, Any]) -> None:
    """Not by the smallest number and not by the largest: -inf at the ends of rows, of blocks, and in whole blocks."""
    rng = np.random.default_rng(1)
    values = (rng.standard_normal((40, 6 * LOGITS_BLOCK)) * 4).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = -np.inf
    values[:, :300] = -np.inf
    values[:, -300:] = -np.inf
    values[:, 700] = 0.0
    logits = make(values)
    logits = Logits(logits.values, logits.reader.block_max(logits.values, may_forbid=True), logits.reader)
    for row in range(40):
        (token,) = draw(logits, [u], 0.7, row=row, **fields)
        assert values[row, token] > -np.inf


def kept(logits: Logits, row: int = 0, **fields: Any) -> list[int]:
    return logits.reader.kept(logits.values, logits.block_max, row, **fields)


@each_maker
@pytest.mark.parametrize("vocab", [5, 256, 300, 5000, 20_000])
@pytest.mark.parametrize("levels", [1, 4, 10_000])
def test_top_k_keeps_what_a_sort_keeps(make: Any, vocab: int, levels: int) -> None:
    """Everything equal to the k-th: block borders, a short tail, k beyond the blocks and beyond the runs are all met."""
    values = np.random.default_rng(vocab + levels).integers(0, levels, (1, vocab)).astype(np.float32)
    logits = make(values)
    for k in (1, 2, 3, 19, 50, 80, 1500, vocab - 1, vocab, vocab + 1):
        kth = np.sort(values[0])[::-1][min(k, vocab) - 1]
        assert kept(logits, top_k=k) == np.flatnonzero(values[0] >= kth).tolist()


@each_maker
@pytest.mark.parametrize("min_p", [1e-9, 0.001, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_min_p_keeps_what_weighs_enough(make: Any, min_p: float, temperature: float) -> None:
    """The same float64 comparison for every token, however few of them are looked at."""
    logits = make(peaked(2, 9000, 2))
    for row, values in enumerate(logits.values):
        wanted = np.flatnonzero(weights(values, temperature) >= min_p).tolist()
        assert kept(logits, row, temperature=temperature, min_p=min_p) == wanted


@each_maker
@pytest.mark.parametrize("spread", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1e-300, 0.01, 0.5, 0.9, 0.99, 0.999999])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_the_nucleus_is_the_shortest_ranking_with_the_mass(
    make: Any, spread: float, top_p: float, temperature: float
) -> None:
    """Flat and peaked, 5,000 tokens with equal ones among them: the set a full sort gives.

    With kernels the mass is known to 1e-7 of the total, so the last tokens may differ by so much.
    """
    rng = np.random.default_rng(int(spread * 100))
    values = np.round(rng.standard_normal((1, 5000)) * spread, 2).astype(np.float32)
    logits = make(values)
    made = weights(values[0], temperature)
    order = np.argsort(-values[0], kind="stable")
    cumulative = np.cumsum(made[order])
    slack = 0.0 if make is Logits.of else 3e-7 * cumulative[-1]
    least, most = (
        int(np.searchsorted(cumulative, top_p * cumulative[-1] + sign * slack)) + 1 for sign in (-1, 1)
    )
    found = kept(logits, temperature=temperature, top_p=top_p)
    assert least <= len(found) <= most
    assert found == sorted(order[: len(found)].tolist())


@each_maker
@pytest.mark.parametrize(
    "fields",
    [
        {}, {"temperature": 0.6}, {"top_k": 30}, {"top_p": 0.8}, {"min_p": 0.03}, {"top_k": 300, "top_p": 0.9},
        {"top_k": 200, "top_p": 0.95, "min_p": 0.01, "temperature": 1.3},
    ],
    ids=str,
)  # fmt: skip
def test_draws_of_a_large_vocabulary_follow_their_exact_distribution(
    make: Any, fields: dict[str, Any]
) -> None:
    """30,000 draws from 3,000 tokens against probabilities computed in float64, by chi-square."""
    logits = make(peaked(1, 3000, 9))
    row, temperature = logits.values[0], fields.get("temperature", 1.0)
    chances = weights(row, temperature)
    if set(fields) - {"temperature"}:
        cut = np.setdiff1d(np.arange(len(row)), kept(logits, **fields))
        chances[cut] = 0.0
    counts = np.zeros(len(row))
    uniforms = np.random.default_rng(3).random(30_000)
    for part in np.split(uniforms, 30):
        counts += np.bincount(draw(logits, part, **fields), minlength=len(row))
    assert not counts[chances == 0].any()
    assert chi_square_z(counts, chances / chances.sum() * 30_000) < 4
    off = weights(row, temperature * 1.1) * (chances > 0)
    assert chi_square_z(counts, off / off.sum() * 30_000) > 6, "the check cannot tell temperatures apart"


def test_the_work_is_split_without_a_trace() -> None:
    """Threads, batch mates and their order change no token; entries of one call may name a row twice."""
    values = peaked(12, 30_000, 7)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 12, 60).tolist()
    options = [
        rng.choice([0.0, 0.7, 1.0], 60).tolist(), rng.choice([0, 0, 20], 60).tolist(),
        rng.choice([1.0, 0.9], 60).tolist(), rng.choice([0.0, 0.1], 60).tolist(), rng.random(60).tolist(),
    ]  # fmt: skip
    results = []
    for threads in (1, 2, 5):
        logits = compiled(values, threads)
        results.append(logits.reader.sample(logits.values, logits.block_max, rows, *options))
    logits = compiled(values)
    alone = [
        logits.reader.sample(logits.values, logits.block_max, [row], *([each[i]] for each in options))[0]
        for i, row in enumerate(rows)
    ]
    assert results == [alone] * 3


def test_what_does_not_fit_is_refused() -> None:
    """Numbers reach native code: each is checked, with its name."""
    logits = compiled(peaked(2, 300, 0))
    values, block_max, sample = logits.values, logits.block_max, logits.reader.sample
    good: list[Any] = [[0], [1.0], [0], [1.0], [0.0], [0.5]]
    for at, bad, message in (
        (0, [2], r"row is 2, must be in \[0, 1\]"), (0, [-1], r"row is -1, must be in \[0, 1\]"),
        (1, [-1.0], "row 0: temperature"), (1, [float("nan")], "row 0: temperature"), (2, [-1], "top_k is -1"),
        (3, [0.0], "top_p"), (4, [1.5], "min_p"), (5, [1.0], "uniform"), (1, [1.0, 1.0], "temperature has 2 entries"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sample(values, block_max, *(bad if i == at else each for i, each in enumerate(good)))
    with pytest.raises(ValueError, match="block_max must be"):
        sample(values, block_max[:, :1].copy(), *good)
    with pytest.raises(ValueError, match=r"rows of 300 logits, 300 apart: the kernel is for 300, 320 apart"):
        sample(values.copy(), block_max, *good)
    with pytest.raises(TypeError, match="float32"):
        sample(values.astype(np.float64), block_max, *good)
    with pytest.raises(ValueError, match=r"token is 300, must be in \[0, 299\]"):
        logits.reader.score(values, block_max, [0], [300], [0])
