"""The same meaning as transformers' logits processors, on random logits. Theirs is the code that users know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanoserve.logits import Logits
from nanoserve.request import Request
from nanoserve.sampling import Sampler, SamplingParams

VOCAB = 700  # more than one block of everything


def rows(count: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, VOCAB)) * 3).astype(np.float32)


def request(
    prompt: list[int], output: list[int], *, bad_word_ids: Any = (), seed: int = 0, **fields: Any
) -> Request:
    made = Request(seed, prompt, params=SamplingParams(seed=seed, **fields), bad_word_ids=bad_word_ids)
    for token in output:
        made.append_output(token)
    return made


def processed(each: Request, logits: np.ndarray) -> np.ndarray:
    assert each.logits_processor is not None
    changed = logits.copy()
    each.logits_processor.apply(changed, each, ())
    return changed


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty(penalty: float) -> None:
    """Prompt and output, divided or multiplied by sign: the same float32 bits."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, 300).tolist()
    theirs = RepetitionPenaltyLogitsProcessor(penalty)
    for logits in rows(5, 1):
        ours = processed(request(tokens[:100], tokens[100:], repetition_penalty=penalty), logits)
        expected = theirs(torch.tensor([tokens]), torch.tensor(logits[None]).clone())[0].numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_bad_words() -> None:
    """Of one token and of several; theirs looks at all tokens, ours at the output, so both get the same one here."""
    rng = np.random.default_rng(2)
    seen = 0
    for trial in range(50):
        output = rng.integers(0, 5, 12).tolist()
        words = [rng.integers(0, 5, rng.integers(1, 4)).tolist() for _ in range(6)]
        logits = rows(1, trial)[0]
        ours = processed(request([600], output, bad_word_ids=words), logits)
        theirs = NoBadWordsLogitsProcessor(words, eos_token_id=699)
        expected = theirs(torch.tensor([[600, *output]]), torch.tensor(logits[None]).clone())[0].numpy()
        assert np.array_equal(ours, expected)
        seen += int(np.isneginf(ours).sum())
    assert seen > 80


def test_bias() -> None:
    """A bias on single tokens is added."""
    bias = {3: 5.0, 650: -100.0, 0: 0.125}
    theirs = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    for logits in rows(5, 3):
        ours = processed(request([1], [2], logit_bias=bias), logits)
        expected = theirs(torch.tensor([[1, 2]]), torch.tensor(logits[None]).clone())[0].numpy()
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1}, {"top_k": 2}, {"top_k": 30}, {"top_k": 699}, {"top_k": 5000}, {"top_p": 0.05}, {"top_p": 0.5},
        {"top_p": 0.99}, {"min_p": 0.001}, {"min_p": 0.3}, {"min_p": 1.0}, {"top_k": 40, "top_p": 0.8},
        {"top_k": 100, "top_p": 0.95, "min_p": 0.02}, {"top_p": 0.9, "min_p": 0.1, "temperature": 2.0},
        {"min_p": 0.01, "temperature": 0.3}, {"min_p": 0.2, "temperature": 5.0},
    ],
    ids=str,
)  # fmt: skip
def test_filters_keep_the_same_tokens(fields: dict[str, Any]) -> None:
    """A draw with the uniform number at each token's place: exactly the tokens that transformers keeps come out.

    Our seeds do not choose the uniform number, so many seeds are drawn: none may give a token that they cut, and the few
    likeliest that they keep must all appear.
    """
    temperature = fields.get("temperature", 1.0)
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    if "top_k" in fields:
        warpers.append(TopKLogitsWarper(fields["top_k"]))
    if "top_p" in fields:
        warpers.append(TopPLogitsWarper(fields["top_p"]))
    if "min_p" in fields:
        warpers.append(MinPLogitsWarper(fields["min_p"]))
    for seed, logits in enumerate(rows(3, 4)):
        scores = torch.tensor(logits[None])
        for warper in warpers:
            scores = warper(torch.tensor([[0]]), scores)
        chances = torch.softmax(scores.double(), dim=-1)[0].numpy()
        batch = [request([1], [], seed=1000 * seed + i, **fields) for i in range(400)]
        tokens = Sampler().sample(Logits.of(np.broadcast_to(logits, (400, VOCAB))), batch, ())
        drawn = set(tokens)
        assert all(chances[token] > 0 for token in drawn)
        assert {token for token in range(VOCAB) if chances[token] > 0.05} <= drawn
