"""The draw and the nucleus themselves: block sums against plain running sums, at the places where rounding decides."""

from __future__ import annotations

import numpy as np
import pytest

from nanoserve.sampler import _BLOCK, _draw, _nucleus

LARGEST_BELOW_ONE = 1.0 - 2.0**-53


def weights(rows: int, width: int, seed: int) -> np.ndarray:
    """Uneven, with many zeros, some of them at the end of rows and of blocks."""
    rng = np.random.default_rng(seed)
    made = np.exp(rng.standard_normal((rows, width)) * 4)
    made[rng.random((rows, width)) < 0.3] = 0.0
    for row in made:
        row[width - rng.integers(0, _BLOCK + 2) :] = 0.0
    made[:, rng.integers(0, width - _BLOCK - 2)] = 1.0
    return made


@pytest.mark.parametrize("blocks", [1, 2, 5, 40])
def test_a_draw_falls_where_the_running_sum_exceeds_it(blocks: int) -> None:
    """Against a plain cumulative sum, for numbers in the middle of tokens: block borders change nothing."""
    width = blocks * _BLOCK
    rng = np.random.default_rng(blocks)
    made = np.exp(rng.standard_normal((50, width)) * 3)
    made[rng.random(made.shape) < 0.5] = 0.0
    cumulative = np.cumsum(made, axis=1)
    drawn = rng.integers(0, width, 50)
    drawn = np.array(
        [row.nonzero()[0][at % np.count_nonzero(row)] for row, at in zip(made, drawn, strict=True)]
    )
    rows = np.arange(50)
    middles = (cumulative[rows, drawn] - made[rows, drawn] / 2) / cumulative[:, -1]
    assert _draw(made, middles) == drawn.tolist()


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, LARGEST_BELOW_ONE])
def test_a_token_without_weight_is_never_drawn(u: float) -> None:
    """Not by the smallest number and not by the largest, although blocks and running sums are rounded differently."""
    for seed in range(40):
        made = weights(20, 6 * _BLOCK, seed)
        tokens = _draw(made, np.full(20, u))
        assert all(row[token] > 0 for row, token in zip(made, tokens, strict=True))
        if u in (0.0, LARGEST_BELOW_ONE):
            ends = [row.nonzero()[0][0 if u == 0.0 else -1] for row in made]
            assert np.mean(np.array(ends) == tokens) > 0.6  # a last token may weigh less than what is rounded


def test_numbers_at_block_borders_stay_inside_the_block_they_fall_into() -> None:
    """u * total equal to a border, one float below, one above: the token is one that has weight, next to the border."""
    for seed in range(40):
        (row,) = weights(1, 6 * _BLOCK, seed)
        sums = row.reshape(-1, _BLOCK).sum(axis=1)
        borders = np.cumsum(sums) / np.cumsum(sums)[-1]
        for border in borders[:-1]:
            for u in (np.nextafter(border, 0.0), border, np.nextafter(border, 1.0)):
                (token,) = _draw(row[None].copy(), np.array([min(u, LARGEST_BELOW_ONE)]))
                assert row[token] > 0


@pytest.mark.parametrize("spread", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.99, 0.999999])
def test_the_nucleus_is_the_shortest_ranking_with_the_mass(spread: float, top_p: float) -> None:
    """Flat and peaked, on 5,000 tokens with equal ones among them: exactly the set a full sort gives."""
    rng = np.random.default_rng(int(spread * 100))
    logits = np.round(rng.standard_normal(5000) * spread, 2)
    made = np.exp(logits - logits.max())
    order = np.argsort(-made, kind="stable")
    count = int(np.searchsorted(np.cumsum(made[order]), top_p * made.sum())) + 1
    assert _nucleus(made, top_p).tolist() == sorted(order[:count].tolist())
