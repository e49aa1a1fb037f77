"""Log-probabilities of output tokens: the model's own, exact, ranked, one for each token whatever happens on the way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from nanoserve.logprobs import TokenLogprob, token_logprob, token_logprobs
from support.fakes import System, logits_after, prefix_hashes, prompt
from support.readers import compiled


def row(vocab: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(vocab) * 4).astype(np.float32)


@pytest.mark.parametrize("vocab", [1, 2, 37, 256, 1000, 50_257])
def test_values_are_the_float64_log_softmax(vocab: int) -> None:
    """Against torch in float64 to 1e-12, at the likeliest, the unlikeliest and other tokens."""
    logits = row(vocab)
    exact = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=-1).numpy()
    for token in {0, vocab - 1, int(logits.argmax()), int(logits.argmin()), vocab // 2}:
        entry = token_logprob(logits, token, 20)
        assert entry.token == token
        assert entry.logprob == pytest.approx(exact[token], abs=1e-12)
        assert entry.rank == 1 + int((exact > exact[token]).sum())
        assert [i for i, _ in entry.top] == np.argsort(-exact, kind="stable")[:20].tolist()
        assert [value for _, value in entry.top] == pytest.approx([exact[i] for i, _ in entry.top], abs=1e-12)
        assert [type(x) for x in (entry.logprob, entry.rank, *entry.top[0])] == [float, int, int, float]


def test_equal_logits_rank_by_id() -> None:
    """A total order: rank and top agree with each other and are the same on every run."""
    logits = np.array([1, 3, 3, 1, 3], dtype=np.float32)
    entries = [token_logprob(logits, token, 4) for token in range(5)]
    assert [entry.rank for entry in entries] == [4, 1, 2, 5, 3]
    assert all([i for i, _ in entry.top] == [1, 2, 4, 0] for entry in entries)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_top_has_as_many_as_asked_for(count: int) -> None:
    """The sampled token is always told; alternatives only on request, and never more than there are tokens."""
    assert len(token_logprob(row(100), 7, count).top) == count
    assert len(token_logprob(row(3), 2, count).top) == min(count, 3)


def test_extreme_logits_stay_exact() -> None:
    """Far apart, equal and huge: no overflow, and probabilities sum to one."""
    assert token_logprob(np.array([1e30, -1e30], np.float32), 0, 2).logprob == 0.0
    assert token_logprob(np.full(1000, 3e38, np.float32), 3, 1).logprob == pytest.approx(
        -math.log(1000), rel=1e-6
    )
    entry = token_logprob(row(20), 0, 20)
    assert math.fsum(math.exp(value) for _, value in entry.top) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("vocab", [5, 256, 300, 5000])
@pytest.mark.parametrize("levels", [1, 4, 10_000])
def test_ranks_and_the_likeliest_are_those_of_a_sort(vocab: int, levels: int) -> None:
    """Few distinct values make ties everywhere; block borders, a short tail and counts beyond the blocks are all met."""
    values = np.random.default_rng(vocab + levels).integers(0, levels, vocab).astype(np.float32)
    order = np.argsort(-values, kind="stable").tolist()
    for count in (1, 2, 3, 19, 50, vocab - 1, vocab, vocab + 1):
        token = order[count % vocab]
        entry = token_logprob(values, token, count)
        assert [i for i, _ in entry.top] == order[:count]
        assert entry.rank == 1 + count % vocab


@pytest.mark.parametrize("vocab", [1, 37, 256, 300, 50_257])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 30.0])
def test_with_kernels_values_are_within_a_millionth(vocab: int, scale: float) -> None:
    """Relative to the log-probability, of likely tokens too: near certainty log(p) is tiny and must keep its digits."""
    values = np.stack([row(vocab, seed) * np.float32(scale) for seed in range(6)])
    values[3:, vocab // 2] += np.array([8, 15, 40], np.float32) * np.float32(scale)
    logits = compiled(values)
    exact = torch.log_softmax(torch.tensor(values, dtype=torch.float64), dim=-1).numpy()
    for tokens in (values.argmax(axis=1), values.argmin(axis=1), np.arange(6) * 7919 % vocab):
        entries = token_logprobs(logits, range(6), tokens.tolist(), [3] * 6)
        for index, (entry, token) in enumerate(zip(entries, tokens.tolist(), strict=True)):
            shifted = values[index].astype(np.float64) - float(values[index].max())
            rest = math.fsum(np.exp(np.delete(shifted, values[index].argmax())).tolist())
            wanted = shifted[token] - math.log1p(rest)
            assert entry.logprob == pytest.approx(wanted, rel=1e-6, abs=1e-30)
            assert entry.rank == 1 + int((exact[index] > exact[index, token]).sum())


def expected(request: Any, num_top: int) -> list[TokenLogprob]:
    known = list(request.token_ids)
    hashes = prefix_hashes(known)
    return [
        token_logprob(logits_after(hashes[at - 1]), known[at], num_top)
        for at in range(request.num_prompt_tokens, len(known))
    ]


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 1.5}, {"logit_bias": {3: 50.0}, "repetition_penalty": 2.0}, {"min_tokens": 8, "stop_token_ids": [1, 2]}],
    ids=str,
)  # fmt: skip
def test_each_output_token_has_one_entry_of_the_raw_logits(fields: dict[str, Any]) -> None:
    """Before bias, penalties, masks and temperature: what the model thought of the token that was taken."""
    system = System()
    asked = system.add("asked", prompt(9), 12, logprobs=3, **fields)
    silent = system.add("silent", prompt(9), 12, seed=asked.seed, **fields)
    system.drain()
    assert asked.logprobs == expected(asked, 3)
    assert len(asked.logprobs) == len(asked.output_tokens) > 0
    assert silent.logprobs == []
    assert silent.output_tokens == asked.output_tokens


def test_entries_survive_preemption() -> None:
    """A preempted request's known tokens are not sampled again, so nothing is told twice and nothing is lost."""
    system = System(num_pages=8, page_size=4, max_batch_size=4, cache=False)
    requests = [system.add(i, prompt(6, i), 14, logprobs=i) for i in range(4)]
    system.drain()
    assert sum(request.num_preemptions for request in requests) > 0
    for i, request in enumerate(requests):
        assert request.finish_reason == "length"
        assert request.logprobs == expected(request, i)


def test_a_failed_step_leaves_no_entry() -> None:
    """An interrupt after the forward discards the step: its token is sampled again, and told once."""
    system = System()
    request = system.add("a", prompt(5), 6, logprobs=0)

    def interrupt() -> None:
        raise KeyboardInterrupt

    for step in range(12):
        system.executor.after = interrupt if step % 2 else None
        try:
            system.step()
        except KeyboardInterrupt:
            assert len(request.logprobs) == len(request.output_tokens)
    system.executor.after = None
    system.drain()
    assert request.logprobs == expected(request, 0)
