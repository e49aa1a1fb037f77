"""Bit masks over rows of logits: the native loop against NumPy, and who gets which bits."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from nanoserve.constraint import next_tokens
from nanoserve.logits import Logits
from nanoserve.request import Request
from nanoserve.sampling import Sampler, SamplingParams
from support.constraints import AllowList
from support.readers import compiled

VOCABS = (1, 31, 32, 33, 255, 256, 257, 1000, 5003)


def random_mask(rng: np.random.Generator, vocab: int) -> np.ndarray:
    """bool[V] with stretches of all, none and some, as grammars make them."""
    kinds = np.repeat(rng.integers(0, 3, -(-vocab // 64)), 64)[:vocab]
    return np.where(kinds == 2, rng.random(vocab) < 0.5, kinds == 1)


def packed(allowed: np.ndarray) -> np.ndarray:
    bits = np.zeros(-(-len(allowed) // 32) * 32, np.uint8)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.uint32)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("threads", [1, 2])
def test_forbidden_logits_are_minus_infinity_and_the_maxima_follow(vocab: int, threads: int) -> None:
    rng = np.random.default_rng(vocab)
    values = rng.standard_normal((5, vocab)).astype(np.float32)
    logits = compiled(values, threads).take(range(5))
    rows = [3, 0, 4]
    allowed = [random_mask(rng, vocab) for _ in rows]
    allowed[0][:] = True
    logits.reader.forbid(logits.values, logits.block_max, rows, np.stack([packed(one) for one in allowed]))
    expected = values.copy()
    for row, one in zip(rows, allowed, strict=True):
        expected[row, ~one] = -np.inf
    assert np.array_equal(logits.values, expected)
    assert np.array_equal(
        logits.block_max, logits.reader.block_max(expected_as(logits, expected), may_forbid=True)
    )


def expected_as(logits: Logits, values: np.ndarray) -> np.ndarray:
    rows = logits.empty_rows(len(values))
    rows[:] = values
    return rows


def test_bits_beyond_the_vocabulary_mean_nothing() -> None:
    values = np.zeros((1, 40), np.float32)
    logits = Logits.of(values.copy())
    logits.reader.forbid(logits.values, logits.block_max, [0], np.array([[0, 0xFFFFFF00]], np.uint32))
    assert np.isneginf(logits.values).all()
    assert np.isneginf(logits.block_max).all()


@pytest.mark.parametrize(
    ("rows", "masks", "why"),
    [
        ([0], np.zeros((1, 3), np.uint32), r"\[1, 2\]"),
        ([0], np.zeros((1, 2), np.int64), "uint32"),
        ([0, 1], np.zeros((1, 2), np.uint32), r"\[2, 2\]"),
        ([2], np.zeros((1, 2), np.uint32), "row is 2"),
        ([1, 1], np.zeros((2, 2), np.uint32), "more than one mask"),
    ],
)  # fmt: skip
def test_masks_of_another_shape_are_refused(rows: list[int], masks: np.ndarray, why: str) -> None:
    logits = Logits.of(np.zeros((2, 40), np.float32))
    with pytest.raises(ValueError, match=why):
        logits.reader.forbid(logits.values, logits.block_max, rows, masks)


def request(constraint: AllowList | None, outputs: int = 0, **fields: object) -> Request:
    params = SamplingParams(**{"temperature": 0.0, **fields})  # type: ignore[arg-type]
    made = Request("a", [1], params=params, constraint=constraint)
    for token in range(outputs):
        made.append_output(token)
    return made


def bits(mask: np.ndarray | None, vocab: int = 40) -> set[int]:
    assert mask is not None
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab]).tolist())


@pytest.mark.parametrize("may_end", [False, True])
@pytest.mark.parametrize("outputs", [0, 3])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_ends_are_allowed_exactly_where_the_text_may_end(
    may_end: bool, outputs: int, ignore_eos: bool
) -> None:
    """EOS 7 is in the mask as text already, EOS 39 is not; 5 and 200 are stop ids; none comes before min_tokens."""
    constraint = AllowList([{3, 5, 7, 33}] * 9, 40, may_end=may_end)
    one = request(constraint, outputs, min_tokens=2, stop_token_ids=[5, 200], ignore_eos=ignore_eos)
    ends = {5} | (set() if ignore_eos else {7, 39})
    assert bits(next_tokens(one, (7, 39), 40)) == {3, 33} | (ends if may_end and outputs >= 2 else set())
    assert bits(constraint.mask) == {3, 5, 7, 33}, "the constraint's own mask is not written to"


def test_no_mask_means_every_token_but_an_end_too_early() -> None:
    open_end, not_yet = AllowList([None], 40, may_end=True), AllowList([None], 40, may_end=False)
    assert next_tokens(request(open_end), (7,), 40) is None
    assert bits(next_tokens(request(not_yet), (7,), 40)) == set(range(40)) - {7}
    assert next_tokens(request(not_yet), (), 40) is None
    assert bits(next_tokens(request(open_end, ignore_eos=True), (7,), 40)) == set(range(40)) - {7}


def test_a_mask_for_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"uint32\[2\].*must be uint32\[4\] for 100 tokens"):
        next_tokens(request(AllowList([{1}], 40)), (), 100)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str
)
def test_the_mask_comes_before_the_filters_and_after_the_penalties(fields: dict[str, object]) -> None:
    """Only allowed tokens are ever chosen, and top_k counts among them; a token's bias does not help it."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((1, 1000)) * 3).astype(np.float32)
    allowed = set(rng.permutation(1000)[:9].tolist())
    logits = compiled(values)
    banned = int(np.argmax(values[0]))
    allowed.discard(banned)
    seen = set()
    for seed in range(300):
        one = request(
            AllowList([allowed], 1000),
            **{"temperature": 2.0, "seed": seed, "logit_bias": {banned: 50.0}, **fields},
        )
        seen.update(Sampler().sample(logits, [one], ()))
    ranked = sorted(allowed, key=lambda token: -values[0, token])
    if "top_k" in fields:
        assert seen <= set(ranked[:5])
        assert len(seen) > 2
    elif fields.get("temperature") == 0.0:
        assert seen == {ranked[0]}
    else:
        assert seen <= allowed
        assert len(seen) > 1


def test_rows_without_a_mask_keep_their_bits_and_cost_nothing() -> None:
    vocab, count = 60_000, 4
    logits = compiled(np.random.default_rng(0).standard_normal((count, vocab)).astype(np.float32))
    plain = [Request(i, [1, 2], params=SamplingParams(seed=i)) for i in range(count)]
    alone = Sampler().sample(logits, plain, ())
    mixed = [*plain]
    mixed[1] = Request(1, [1, 2], params=SamplingParams(seed=1), constraint=AllowList([{11}], vocab))
    together = Sampler().sample(logits, mixed, ())
    assert together == [alone[0], 11, alone[2], alone[3]]
    free = [
        Request(i, [1, 2], params=SamplingParams(seed=i), constraint=AllowList([None], vocab))
        for i in range(count)
    ]
    assert Sampler().sample(logits, free, ()) == alone

    def peak(requests: list[Request]) -> int:
        tracemalloc.start()
        Sampler().sample(logits, requests, ())
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(free) < vocab, "nothing of the size of a row"
    assert 4 * vocab < peak(mixed) < 1.2 * 4 * vocab, "one row is copied"
