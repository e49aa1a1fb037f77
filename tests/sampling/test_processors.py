"""Bias, bad words, min_tokens and penalties against exact distributions, alone and together with the filters."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoserve.logits import Logits
from nanoserve.request import Request
from nanoserve.sampling import Sampler, SamplingParams, child_seed, derive_seed
from phase0.chi_square import chi_square_z
from support.reference_sampler import changed_logits, distribution

VOCAB, EOS = 40, (7,)
PROMPT, OUTPUT = [1, 2, 3, 3, 30], [5, 6, 5, 31, 5]
DRAWS = 10_000

CASES: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "negative": {"presence_penalty": -0.7, "frequency_penalty": -0.4},
    "repetition": {"repetition_penalty": 1.8},
    "repetition-below-one": {"repetition_penalty": 0.6},
    "bias": {"logit_bias": {5: 1.5, 0: -100.0, 30: -2.0}},
    "bad-words": {"bad_word_ids": [(4,), (31, 5, 8), (5, 9), (6, 5, 10), (31, 11)]},
    "min-tokens": {"min_tokens": 6, "stop_token_ids": [8, 9]},
    "penalties-and-temperature": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3, "temperature": 1.7},
    "bias-and-filters": {"logit_bias": {5: 3.0, 6: 2.0}, "top_k": 12, "top_p": 0.8, "min_p": 0.02},
    "everything": {
        "logit_bias": {3: 2.0, 6: 1.0}, "bad_word_ids": [(4,), (5, 9)], "min_tokens": 6, "presence_penalty": 0.4,
        "frequency_penalty": 0.3, "repetition_penalty": 1.2, "temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.01,
    },
}  # fmt: skip


def row(seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(vocab) * 1.5).astype(np.float32)


def request(
    seed: int = 0,
    *,
    prompt: list[int] = PROMPT,
    output: list[int] = OUTPUT,
    bad_word_ids: Any = (),
    **fields: Any,
) -> Request:
    made = Request(seed, prompt, params=SamplingParams(seed=seed, **fields), bad_word_ids=bad_word_ids)
    for token in output:
        made.append_output(token)
    return made


def applied(each: Request, logits: np.ndarray, eos: Any = ()) -> np.ndarray:
    """A copy of the logits as the request changes it."""
    assert each.logits_processor is not None
    changed = logits.copy()
    each.logits_processor.apply(changed, each, eos)
    return changed


def draws(logits: np.ndarray, fields: dict[str, Any]) -> np.ndarray:
    """How often each token comes out over DRAWS seeds."""
    counts = np.zeros(len(logits))
    for start in range(0, DRAWS, 500):
        batch = [request(derive_seed(3, start + i), **fields) for i in range(500)]
        tokens = Sampler().sample(Logits.of(np.broadcast_to(logits, (500, len(logits)))), batch, EOS)
        counts += np.bincount(tokens, minlength=len(logits))
    return counts


@functools.cache
def plain_draws(temperature: float) -> np.ndarray:
    return draws(row(), {"temperature": temperature})


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    """10,000 draws by chi-square against a float64 reference; what is forbidden never comes out."""
    exact = distribution(row(), request(**CASES[name]), EOS)
    counts = draws(row(), CASES[name])
    assert not counts[exact == 0].any()
    assert chi_square_z(counts, exact * DRAWS) < 4


@pytest.mark.parametrize("name", CASES)
def test_the_distributions_are_told_apart_from_doing_nothing(name: str) -> None:
    """The cases mean something: draws of the plain distribution do not pass for theirs."""
    exact = distribution(row(), request(**CASES[name]), EOS)
    plain = plain_draws(CASES[name].get("temperature", 1.0))
    assert plain[exact == 0].any() or chi_square_z(plain, exact * DRAWS) > 6


@given(st.data())
@settings(max_examples=200)
def test_processed_logits_are_the_references(data: st.DataObject) -> None:
    """Any mix of fields on any tokens: the processor's float32 row is the float64 reference's, -inf for -inf."""
    vocab = data.draw(st.integers(2, 12))
    token = st.integers(0, vocab - 1)
    tokens = st.lists(token, max_size=12)
    penalty = st.sampled_from([0.0, 0.0, 0.5, -1.25, 2.0])
    each = request(
        prompt=data.draw(st.lists(token, min_size=1, max_size=6)),
        output=data.draw(tokens),
        bad_word_ids=data.draw(st.lists(st.lists(token, min_size=1, max_size=3), max_size=4)),
        logit_bias=data.draw(st.none() | st.dictionaries(token, st.sampled_from([-100.0, -1.0, 0.25, 7.0]))),
        presence_penalty=data.draw(penalty),
        frequency_penalty=data.draw(penalty),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.0, 0.5, 3.0])),
        min_tokens=data.draw(st.sampled_from([0, 0, 4])),
        stop_token_ids=data.draw(tokens),
        ignore_eos=data.draw(st.booleans()),
    )
    eos = data.draw(tokens)
    logits = row(vocab, vocab)
    expected = np.array(changed_logits(logits, each, eos))
    processor = each.logits_processor
    if processor is None:
        assert np.array_equal(expected, logits)
    elif np.isneginf(expected).all():
        with pytest.raises(ValueError, match="leave no token of the vocabulary to choose"):
            Sampler().sample(Logits.of(logits[None]), [each], eos)
    else:
        np.testing.assert_allclose(applied(each, logits, eos), expected, rtol=2e-6, atol=2e-5)


def test_the_order_is_bias_then_repetition_then_the_additive_penalties() -> None:
    """Each step sees what the one before left: a bias that changes the sign changes what repetition does."""
    logits = np.zeros(4, dtype=np.float32)
    logits[1] = -1.0
    each = request(
        prompt=[1], output=[1, 1], logit_bias={1: 3.0}, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5
    )  # fmt: skip
    assert applied(each, logits).tolist() == [
        0.0,
        (-1 + 3) / 2 - 0.25 - 2 * 0.5,
        0.0,
        0.0,
    ]


def test_repetition_looks_at_the_prompt_and_the_others_do_not() -> None:
    """The prompt is the user's: repeating it is discouraged only by the penalty that says so."""
    logits = np.ones(VOCAB, dtype=np.float32)
    for fields, changed in (
        ({"repetition_penalty": 2.0}, {*PROMPT, *OUTPUT}),
        ({"presence_penalty": 1.0}, set(OUTPUT)),
        ({"frequency_penalty": 1.0}, set(OUTPUT)),
    ):
        each = request(**fields)
        assert set(np.flatnonzero(applied(each, logits) != 1.0).tolist()) == changed


def test_a_bad_word_is_forbidden_only_where_it_would_be_completed() -> None:
    """(5, 9) forbids 9 after 5 and nothing else; a word begun in the prompt may go on."""
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, 9] = 50.0
    for prompt, output, forbidden in (
        ([1], [5], True),
        ([1], [5, 6], False),
        ([5], [], False),
        ([1], [], False),
    ):
        each = request(temperature=0.0, prompt=prompt, output=output, bad_word_ids=[(5, 9)])
        assert (Sampler().sample(Logits.of(logits), [each], ())[0] != 9) is forbidden
    never = request(temperature=0.0, output=[], bad_word_ids=[(9,)])
    assert Sampler().sample(Logits.of(logits), [never], ())[0] != 9


def test_a_bias_of_minus_100_is_a_number() -> None:
    """vLLM's and OpenAI's meaning: it moves a logit by 100, so a token that is 200 above the rest still wins."""
    logits = np.zeros((1, 4), dtype=np.float32)
    logits[0, 2] = 200.0
    assert Sampler().sample(Logits.of(logits), [request(temperature=0.0, logit_bias={2: -100.0})], ()) == [2]


def test_a_row_with_nothing_left_fails_and_names_the_cause() -> None:
    """All forbidden, or infinite: an error of this request, never an arbitrary token."""
    with pytest.raises(ValueError, match=r"bad_words, min_tokens and logit_bias leave no token"):
        Sampler().sample(
            Logits.of(np.zeros((1, 2), np.float32)),
            [request(prompt=[0], output=[], bad_word_ids=[(0,), (1,)])],
            (),
        )
    huge = np.full((1, 4), 3e38, dtype=np.float32)
    with pytest.raises(ValueError, match="made a logit infinite"):
        Sampler().sample(Logits.of(huge), [request(prompt=[0], output=[], repetition_penalty=0.01)], ())


@pytest.mark.parametrize(
    "fields", [{"logit_bias": {40: 1.0}}, {"bad_word_ids": [(40,)]}, {"bad_word_ids": [(5, 40)]}], ids=str
)
def test_an_id_outside_the_vocabulary_is_an_error_with_its_name(fields: dict[str, Any]) -> None:
    """Where nobody knew the vocabulary at the door, NumPy's wrap-around and IndexError are not the answer."""
    name = "logit_bias" if "logit_bias" in fields else "bad_words"
    with pytest.raises(ValueError, match=rf"^{name}: token id 40 must be in \[0, 40\)"):
        Sampler().sample(Logits.of(row()[None]), [request(**fields)], ())


def test_recomputed_tokens_give_the_same_logits() -> None:
    """Nothing is remembered between steps: a request rebuilt from its tokens samples what the first one did."""
    fields = CASES["everything"]
    grown, tokens = request(9, output=[], **fields), []
    for step in range(30):
        (token,) = Sampler().sample(Logits.of(row(step)[None]), [grown], EOS)
        rebuilt = request(9, output=tokens, **fields)
        assert Sampler().sample(Logits.of(row(step)[None]), [rebuilt], EOS) == [token]
        tokens.append(token)
        grown.append_output(token)
    assert len(set(tokens)) > 5


def test_children_have_streams_of_their_own() -> None:
    """n sequences of one prompt: the first is the prompt's own, the others are neither its nor each other's."""
    assert [child_seed(5, 0), child_seed(2**64 - 1, 0)] == [5, 2**64 - 1]
    seeds = [child_seed(seed, index) for seed in range(50) for index in range(1, 128)]
    derived = [derive_seed(seed, index) for seed in range(50) for index in range(1, 128)]
    assert len({*seeds, *derived, *range(50)}) == 2 * len(seeds) + 50
    assert child_seed(5, 3) == child_seed(5, 3)
    assert all(0 <= seed < 2**64 for seed in seeds)
    uniform_logits = np.zeros((4, 1000), dtype=np.float32)
    params = SamplingParams()
    for position in range(1, 20):
        children = [
            Request(i, [0] * position, params=dataclasses.replace(params, seed=child_seed(1, i)))
            for i in range(4)
        ]
        assert len(set(Sampler().sample(Logits.of(uniform_logits), children, ()))) >= 3
