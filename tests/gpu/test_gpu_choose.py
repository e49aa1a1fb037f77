"""Tokens chosen by a GPU kernel against the sampler of the CPU, which computes in float64; and an embedding that takes them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest

from gpu.run_kernel import ORDERS, launch, same_in_every_order
from nanoserve.kernels.cuda.choose import MAX_COLS, choose_spec
from nanoserve.kernels.cuda.embedding import embedding_spec
from nanoserve.kernels.cuda.layout import row_stride
from nanoserve.kernels.cuda.logits import block_max_spec
from nanoserve.logits import Logits

NEAR = 1e-6  # of the whole: how near a border rounding may decide
F32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Draw:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.5


def host(values: np.ndarray, draws: list[Draw], rows: list[int], may_forbid: bool = False) -> list[int]:
    logits = Logits.of(values)
    block_max = logits.reader.block_max(values, may_forbid=True) if may_forbid else logits.block_max
    return logits.reader.sample(
        values, block_max, rows, [d.temperature for d in draws], [d.top_k for d in draws],
        [d.top_p for d in draws], [d.min_p for d in draws], [d.uniform for d in draws],
    )  # fmt: skip


def padded(values: np.ndarray) -> np.ndarray:
    """As a step leaves them: what lies behind a row is no logit."""
    rows, cols = values.shape
    wide = np.full((rows, row_stride(cols) + 8), np.nan, np.float32)
    wide[:, :cols] = values
    return wide


def arguments(values: np.ndarray, draws: list[Draw], may_forbid: bool = False) -> list[np.ndarray | int]:
    wide, (rows, cols) = padded(values), values.shape
    block_max = np.zeros((rows, -(-cols // 256)), np.float32)
    launch(block_max_spec(cols, wide.shape[1], may_forbid=may_forbid), wide, block_max, rows)
    floats = np.full((rows, 4), np.nan, np.float32)
    ints = np.full((rows, 4), -1, np.int32)
    for row, d in enumerate(draws):
        floats[row, :3] = min(1 / d.temperature, F32_MAX) if d.temperature else 0, d.top_p, d.min_p
        ints[row, :2] = d.top_k, np.array(int(d.uniform * 2**32), np.uint32).view(np.int32)
    return [wide, block_max, floats, ints, np.full(rows, -7, np.int32), rows]


def device(values: np.ndarray, draws: list[Draw], may_forbid: bool = False, order: int = 0) -> list[int]:
    args = arguments(values, draws, may_forbid)
    launch(choose_spec(values.shape[1], args[0].shape[1]), *args, order=order)
    return args[4].tolist()


def possible(values: np.ndarray, draws: list[Draw]) -> list[set[int]]:
    """For each row, the tokens that the float64 sampler chooses within NEAR of the draw and of each cut."""
    rows, near = [], []
    for row, d in enumerate(draws):
        for u, p, least in itertools.product((-NEAR, 0, NEAR), repeat=3):
            rows.append(row)
            near.append(
                replace(
                    d,
                    uniform=min(max(d.uniform + u, 0.0), 1 - 2.0**-53),
                    top_p=d.top_p if d.top_p >= 1 else min(max(d.top_p + p, 1e-30), 1.0),
                    min_p=min(d.min_p * (1 + least), 1.0),
                )
            )
    found: list[set[int]] = [set() for _ in draws]
    for row, token in zip(rows, host(values, near, rows), strict=True):
        found[row].add(token)
    return found


def check(values: np.ndarray, draws: list[Draw], most_unsure: int) -> None:
    """The same tokens, but for a few draws next to a border."""
    expected, allowed = host(values, draws, list(range(len(draws)))), possible(values, draws)
    unsure = [row for row, tokens in enumerate(allowed) if len(tokens) > 1]
    assert len(unsure) <= most_unsure, unsure
    found = device(values, draws)
    for row, token in enumerate(found):
        assert token in allowed[row], (row, draws[row], token, expected[row])


def peaked(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    values = rng.standard_normal((rows, cols)).astype(np.float32) * np.float32(2)
    for row in values:
        places = rng.choice(cols, min(50, cols), replace=False)
        row[places] += 10 - 2 * np.log(np.arange(1, len(places) + 1)).astype(np.float32)
    return values


def flat(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    return rng.standard_normal((rows, cols)).astype(np.float32) * np.float32(0.3)


def tied(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Few different logits, some below zero, and both zeros."""
    values = np.round(rng.standard_normal((rows, cols)) * 2).astype(np.float32) / np.float32(2)
    return np.where(rng.random((rows, cols)) < 0.5, values, np.copysign(values, -values))


MAKERS = {"peaked": peaked, "flat": flat, "tied": tied}


def random_draws(rng: np.random.Generator, rows: int, cols: int) -> list[Draw]:
    def pick(*values: float) -> float:
        return values[rng.integers(len(values))]

    return [
        Draw(
            temperature=pick(0, 0.3, 0.7, 1.0, 1.0, 3.0, 100.0, 1e-3),
            top_k=int(pick(0, 0, 1, 2, 20, 50, 400, cols // 2 + 1, cols, 2**30)),
            top_p=pick(1.0, 1.0, 1e-9, 0.113, 0.8003, 0.9501, 0.9991),
            min_p=pick(0.0, 0.0, 0.0, 1e-6, 0.0503, 0.3, 1.0),
            uniform=float(rng.random()),
        )
        for _ in range(rows)
    ]


@pytest.mark.parametrize("cols", [1, 5, 255, 257, 1000, 5003])
@pytest.mark.parametrize("kind", MAKERS)
def test_tokens_are_the_samplers(kind: str, cols: int) -> None:
    """Temperatures, top_k, top_p, min_p and greedy, in all combinations."""
    rng = np.random.default_rng(cols)
    rows = 60
    check(MAKERS[kind](rng, rows, cols), random_draws(rng, rows, cols), most_unsure=3)


@pytest.mark.parametrize("cols", [50_257, 151_936, MAX_COLS])
def test_large_vocabularies(cols: int) -> None:
    rng = np.random.default_rng(cols)
    draws = [
        Draw(0), Draw(0.8), Draw(1.0, uniform=0.99), Draw(0.7, top_k=50), Draw(2.0, top_k=3000, top_p=0.9003),
        Draw(1.0, top_p=0.9501), Draw(0.9, min_p=0.0507), Draw(0.6, 20, 0.9503, 0.01),
    ]  # fmt: skip
    check(peaked(rng, len(draws), cols), draws, most_unsure=1)


def test_a_row_chooses_alone_what_it_chooses_among_others() -> None:
    rng = np.random.default_rng(3)
    for kind in MAKERS.values():
        values = kind(rng, 9, 1003)
        draws = random_draws(rng, 9, 1003)
        together = device(values, draws)
        backwards = device(values[::-1].copy(), draws[::-1], order=2)[::-1]
        alone = [device(values[row : row + 1], draws[row : row + 1])[0] for row in range(9)]
        assert together == backwards == alone


@pytest.mark.parametrize("cols", [700, 20_000])
def test_the_order_of_threads_changes_nothing(cols: int) -> None:
    rng = np.random.default_rng(cols)
    values = np.concatenate([kind(rng, 4, cols) for kind in MAKERS.values()])
    args = arguments(values, random_draws(rng, 12, cols))
    same_in_every_order(choose_spec(cols, args[0].shape[1]), *args, out=4, orders=(*ORDERS, 3))


@pytest.mark.parametrize("cols", [3, 256, 1300])
def test_a_row_with_a_bad_number_has_no_token_and_disturbs_no_other(cols: int) -> None:
    rng = np.random.default_rng(cols)
    values = peaked(rng, 8, cols)
    draws = [Draw(1.0, uniform=0.3), Draw(0), Draw(1.0, 5), Draw(1.0, 0, 0.5)] * 2
    good = device(values, draws)
    values[0, cols - 1], values[1, 0], values[2, cols // 2], values[3, :] = np.nan, np.inf, -np.inf, -np.inf
    assert device(values, draws) == [-1, -1, -1, -1, *good[4:]]
    assert min(good) >= 0


def test_a_forbidden_token_is_not_chosen() -> None:
    """-inf is no bad number where the blocks' maxima say so; a row of nothing else has no token."""
    rng = np.random.default_rng(8)
    cols, rows = 1100, 24
    values = peaked(rng, rows, cols)
    values[rng.random((rows, cols)) < 0.99] = -np.inf
    values[:, 300:800] = -np.inf
    values[:, 17] = 1.0
    draws = random_draws(rng, rows, cols)
    expected = host(values, draws, list(range(rows)), may_forbid=True)
    values[7] = -np.inf
    expected[7] = -1
    found = device(values, draws, may_forbid=True)
    assert found == expected
    assert all(np.isfinite(values[row, token]) for row, token in enumerate(found) if row != 7)


def test_equal_logits() -> None:
    """Greedy takes the first, top_k all that equal the k-th, top_p the first of them; exactly, weights being equal."""
    values = np.full((1, 1000), -3.0, np.float32)
    values[0, [40, 300, 301, 999]] = 2.0
    values[0, 500] = 3.0
    values = np.repeat(values, 10, axis=0)
    last, first = 1 - 2.0**-32, 0.0
    half = 0.5 * (1 + 4 * float(np.exp(np.float32(-1))))  # of the mass of five tokens, in weights
    assert 1 + float(np.exp(-1)) > half > 1
    draws = [
        Draw(0, 3, 0.1, 0.9, uniform=0.9), Draw(1.0, 2, uniform=last), Draw(1.0, 5, uniform=first),
        Draw(1.0, 1, uniform=last), Draw(1.0, 2, 0.5, uniform=first), Draw(1.0, 2, 0.5, uniform=last),
        Draw(1.0, 2, 0.7, uniform=last), Draw(1.0, min_p=0.3, uniform=last), Draw(1.0, min_p=0.4, uniform=first),
        Draw(1.0, 0, 1e-30, uniform=last),
    ]  # fmt: skip
    expected = [500, 999, 40, 500, 40, 500, 500, 999, 500, 500]
    assert host(values, draws, list(range(10))) == expected
    assert device(values, draws) == expected
    same = np.full((1, 4096), 7.0, np.float32)
    shares = np.repeat(same, 6, axis=0)
    draws = [Draw(1.0, 0, p, uniform=last) for p in (2.0**-12, 2.0**-11, 0.25, 0.5, 0.75, 1.0)]
    assert device(shares, draws) == [0, 1, 1023, 2047, 3071, 4095]
    assert device(shares, [Draw(u, uniform=last) for u in (0, 1e-38, 1e-3, 1.0, 100.0, 0)]) == [
        0,
        *[4095] * 4,
        0,
    ]


def test_numbers_at_the_ends_of_float32() -> None:
    """Cuts are found between any two numbers: the smallest there are, the largest, and the two zeros."""
    tiny, huge = np.float32(1e-45), np.float32(F32_MAX)
    values = np.array(
        [
            [-huge, 0, tiny, 2 * tiny, -0.0, -tiny, 3 * tiny, 0],
            [-0.0, 0.0, -0.0, -1, -1, -2, -2, -2],
            [-2, -0.0, -0.0, -1, -1, -2, -0.0, -1],
            [huge, -huge, huge, 0, 0, 0, 0, 0],
            [-huge, -huge, -3e38, -2e38, -huge, -huge, -huge, -huge],
        ],
        np.float32,
    )
    last = 1 - 2.0**-32
    for top_k, expected in ((2, [6, 2, 6, 2, 3]), (3, [6, 2, 6, 2, 3]), (4, [7, 4, 7, 2, 3])):
        draws = [Draw(1.0, top_k, uniform=last)] * 5
        assert host(values, draws, list(range(5))) == expected
        assert device(values, draws) == expected
        args = arguments(values, draws)
        args[1][args[1] == 0] = -0.0  # as others may say it
        launch(choose_spec(8, args[0].shape[1]), *args)
        assert args[4].tolist() == expected
    draws = [Draw(1e-38, 0, 0.4, uniform=last)] * 5
    assert device(values, draws) == [6, 1, 2, 0, 3]


def test_blocks_that_cannot_matter_are_not_read() -> None:
    """Logits as large as the largest in them, of which their maxima do not tell, change nothing."""
    rng = np.random.default_rng(11)
    values = peaked(rng, 5, 60_000)
    draws = [
        Draw(0), Draw(2.0, 20, uniform=0.7), Draw(2.0, 20, 0.9, uniform=0.1), Draw(2.0, min_p=0.2, uniform=0.95),
        Draw(0.05),
    ]  # fmt: skip
    expected = device(values, draws)
    assert (values.argmax(axis=1)[1:4] != expected[1:4]).all()
    args = arguments(values, draws)
    wide, block_max = args[0], args[1]
    num_read = []
    for row in range(5):
        largest = np.sort(block_max[row])[::-1]
        bar = (largest[0], largest[19], largest[19], largest[0] + 2 * np.log(0.2), largest[0] - 31 * 0.05)[
            row
        ]
        unread = np.flatnonzero(block_max[row] < bar - 1e-5)
        num_read.append(block_max.shape[1] - len(unread))
        for block in unread:
            wide[row, block * 256 : block * 256 + 256] = largest[0]
    assert num_read[:3] == [1, 20, 20]
    assert max(num_read[3:]) < 100
    launch(choose_spec(60_000, wide.shape[1]), *args)
    assert args[4].tolist() == expected


def test_chosen_tokens_are_the_next_steps_ids() -> None:
    rng = np.random.default_rng(5)
    table = rng.standard_normal((50, 132)).astype(np.float32)
    pos_table = rng.standard_normal((9, 132)).astype(np.float32)
    ids = np.array([3, 999, 49, 999, 999], np.int32)  # where there is a source, none is looked up
    sources = np.array([-1, 2, -1, 0, 1], np.int32)
    tokens, positions = np.array([7, 31, -1], np.int32), np.array([0, 8, 4, 4, 1], np.int32)
    spec = embedding_spec(132, 136, positions=True, scale=2.0, chosen=True)
    x = same_in_every_order(
        spec, ids, positions, sources, tokens, table, pos_table, np.full((5, 136), 7, np.float32), 5, out=6
    )
    # A row with a bad number has no token: its next step, which nobody will read, looks up some other.
    expected = table[[3, 0, 49, 7, 31]] * np.float32(2) + pos_table[positions]
    assert x[:, :132].tobytes() == expected.tobytes()
    assert (x[:, 132:] == 7).all()


@pytest.mark.parametrize(
    ("cols", "ldl", "message"),
    [
        (0, 8, "cols=0 must be in"),
        (MAX_COLS + 1, MAX_COLS + 8, r"cols=262145 must be in \[1, 262144\]"),
        (9, 8, "ldl=8 must be a multiple of 8, at least cols=9"),
    ],
)
def test_what_does_not_fit_is_refused(cols: int, ldl: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_spec(cols, ldl)
