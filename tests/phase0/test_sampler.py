"""Phase 0: the sampler against exact distributions and a plain reference, and its independence of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoserve.logits import Logits
from nanoserve.request import Request
from nanoserve.sampling import Sampler, SamplingParams, derive_seed
from phase0.chi_square import chi_square_z
from support.reference_sampler import filtered_distribution

VOCAB = 40


def request(seed: int = 0, position: int = 1, bad_word_ids: Any = (), **fields: Any) -> Request:
    """A request whose next token has index `position`."""
    return Request(
        seed, [0] * position, params=SamplingParams(seed=seed, **fields), bad_word_ids=bad_word_ids
    )


def rows(count: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, vocab)) * scale).astype(np.float32)


def draws(row: np.ndarray, params: SamplingParams, count: int) -> np.ndarray:
    """How often each token comes out over `count` seeds."""
    logits = np.broadcast_to(row, (500, len(row)))
    counts = np.zeros(len(row))
    for start in range(0, count, 500):
        batch = [Request(i, [1], params=params) for i in range(500)]
        for i, each in enumerate(batch):
            each.seed = derive_seed(7, start + i)
        counts += np.bincount(Sampler().sample(Logits.of(logits), batch, ()), minlength=len(row))
    return counts


def test_temperature_zero_takes_the_largest_logit_and_the_lowest_id_among_equals() -> None:
    """Greedy must be one answer on every machine, so ties need a rule."""
    logits = np.array([[1, 5, 2, 5], [7, 7, 7, 7], [-1, -3, -2, -1]], dtype=np.float32)
    batch = [request(i, temperature=0) for i in range(3)]
    assert Sampler().sample(Logits.of(logits), batch, ()) == [1, 0, 0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_softmax_at_each_temperature(temperature: float) -> None:
    """20,000 draws against exact probabilities by chi-square: a biased sampler looks fine to the eye."""
    row, params = rows(1)[0], SamplingParams(temperature=temperature)
    exact = np.array(filtered_distribution(row, params))
    assert chi_square_z(draws(row, params, 20_000), exact * 20_000) < 4


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.7, "min_p": 0.02, "temperature": 1.7},
    ],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_draws_follow_the_filtered_distribution(fields: dict[str, Any]) -> None:
    """The filters cut exactly the tokens of the reference, and what is left keeps its proportions."""
    row, params = rows(1, seed=3, scale=1.5)[0], SamplingParams(**fields)
    exact = np.array(filtered_distribution(row, params))
    counts = draws(row, params, 10_000)
    assert not counts[exact == 0].any()
    assert (counts[exact > 1e-2] > 0).all()
    assert chi_square_z(counts, exact * 10_000) < 4


def test_the_chi_square_check_can_fail() -> None:
    """Draws at temperature 1 are told apart from those of temperature 1.1: the statistic has the power it needs."""
    row = rows(1)[0]
    exact = np.array(filtered_distribution(row, SamplingParams(temperature=1.1)))
    assert chi_square_z(draws(row, SamplingParams(), 20_000), exact * 20_000) > 6


@given(
    st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    st.integers(0, 13),
    st.sampled_from([1e-300, 0.1, 0.5, 0.9, 0.999999, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([1e-3, 0.5, 1.0, 30.0]),
)
@settings(max_examples=300)
def test_filters_keep_the_tokens_of_the_reference(
    logits: list[int], top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    """Many equal logits and extreme limits: a drawn token is always one the reference keeps, and one always is."""
    row = np.array(logits, dtype=np.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    exact = filtered_distribution(row, params)
    batch = [
        request(seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p) for seed in range(20)
    ]
    tokens = Sampler().sample(Logits.of(np.broadcast_to(row, (20, len(row)))), batch, ())
    assert all(exact[token] > 0 for token in tokens)


def test_filters_on_equal_logits_follow_the_documented_rule() -> None:
    """top_k keeps everything equal to the k-th; top_p takes equal tokens lowest id first."""
    row = np.zeros((1, 4), dtype=np.float32)
    everything = {Sampler().sample(Logits.of(row), [request(seed, top_k=2)], ())[0] for seed in range(100)}
    half = {Sampler().sample(Logits.of(row), [request(seed, top_p=0.5)], ())[0] for seed in range(100)}
    assert (everything, half) == ({0, 1, 2, 3}, {0, 1})


def test_filters_that_cut_nothing_change_no_draw() -> None:
    """The draw walks the vocabulary in order with and without filters, so switching one on costs no reproducibility."""
    logits = rows(1, scale=1.0)
    for seed in range(100):
        (free,) = Sampler().sample(Logits.of(logits), [request(seed)], ())
        for fields in ({"top_k": VOCAB}, {"top_k": 2 * VOCAB}, {"top_p": 1 - 1e-12}, {"min_p": 1e-12}):
            assert Sampler().sample(Logits.of(logits), [request(seed, **fields)], ()) == [free]


field_sets = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.2, 0.7, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 0, 1, 5]),
        "top_p": st.sampled_from([1.0, 1.0, 0.3, 0.9]),
        "min_p": st.sampled_from([0.0, 0.0, 0.2]),
        "min_tokens": st.sampled_from([0, 0, 3]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.5]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "logit_bias": st.sampled_from([None, None, {0: 4.0, 1: -1.0}]),
        "bad_word_ids": st.sampled_from([(), (), ((1,),)]),
        "seed": st.integers(0, 2**64 - 1),
        "position": st.integers(1, 5),
    }
)


@given(
    st.lists(field_sets, min_size=1, max_size=9),
    st.integers(3, 70) | st.sampled_from([255, 256, 257, 700, 30_000]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=250)
def test_a_token_is_the_same_alone_and_in_any_batch(
    cases: list[dict[str, Any]], vocab: int, random: Any
) -> None:
    """Contract 2: batch mates and their order change nothing, whatever mix of paths the rows take."""
    logits = rows(len(cases), vocab, seed=vocab)
    alone = [
        Sampler().sample(Logits.of(logits[i : i + 1]), [request(**case)], (0,))[0]
        for i, case in enumerate(cases)
    ]
    order = list(range(len(cases)))
    random.shuffle(order)
    together = Sampler().sample(Logits.of(logits[order]), [request(**cases[i]) for i in order], (0,))
    assert together == [alone[i] for i in order]


def test_a_non_finite_row_does_not_disturb_the_others() -> None:
    """One poisoned request must not change, or crash, the sampling of its neighbours; the caller fails that request."""
    fields: list[dict[str, Any]] = [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}]
    batch = [request(i, **fields[i % 4]) for i in range(12)]
    clean = rows(12)
    expected = Sampler().sample(Logits.of(clean), batch, ())
    for poison in (np.nan, np.inf, -np.inf):
        dirty = clean.copy()
        dirty[4:8] = poison
        tokens = Sampler().sample(Logits.of(dirty), batch, ())
        assert tokens[:4] + tokens[8:] == expected[:4] + expected[8:]
        assert all(0 <= token < VOCAB for token in tokens)


def test_logits_are_left_as_they_were() -> None:
    """The rows belong to the executor's buffer; masking for min_tokens works on a copy."""
    logits = rows(3)
    before = logits.copy()
    logits.flags.writeable = False
    fields: list[dict[str, Any]] = [{"temperature": 0}, {}, {"top_k": 3}]
    batch = [request(i, min_tokens=2, **each) for i, each in enumerate(fields)]
    assert len(Sampler().sample(Logits.of(logits), batch, (0,))) == 3
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1.0}, {"top_p": 0.9}], ids=str)
def test_min_tokens_holds_back_eos_and_stop_ids(fields: dict[str, Any]) -> None:
    """The likeliest tokens are EOS and a stop id: neither comes out before min_tokens, both may after."""
    logits = np.full((1, VOCAB), -4.0, dtype=np.float32)
    logits[0, [3, 9]] = 20.0
    each = request(5, min_tokens=2, stop_token_ids=[9, VOCAB + 100], **fields)
    for _ in range(2):
        (token,) = Sampler().sample(Logits.of(logits), [each], (3,))
        assert token not in (3, 9)
        each.append_output(token)
    assert Sampler().sample(Logits.of(logits), [each], (3,))[0] in (3, 9)


def test_min_tokens_does_not_hold_back_an_ignored_eos() -> None:
    """With ignore_eos EOS is an ordinary token: forbidding it would change the distribution for no reason."""
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, 3] = 50.0
    assert Sampler().sample(Logits.of(logits), [request(min_tokens=5, ignore_eos=True)], (3,)) == [3]


def test_a_vocabulary_of_stops_is_refused_rather_than_sampled() -> None:
    """If min_tokens forbids every token there is no answer: the request is told so instead of getting token 0."""
    with pytest.raises(ValueError, match=r"min_tokens .*leave no token of the vocabulary"):
        Sampler().sample(Logits.of(rows(1, 2)), [request(min_tokens=1, stop_token_ids=[1, 1])], (0,))


def test_sampling_nothing_gives_nothing() -> None:
    """A step whose chunks all stop short samples no row."""
    assert Sampler().sample(Logits.of(np.zeros((0, VOCAB), dtype=np.float32)), [], ()) == []
