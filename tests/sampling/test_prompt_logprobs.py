"""Log-probabilities of the prompt: every position once, however its prompt was cut, cached, preempted or retried."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanoserve.batch import Batch
from nanoserve.logprobs import token_logprob
from nanoserve.request import Request
from nanoserve.sampling import SamplingParams
from nanoserve.scheduling import scoring
from nanoserve.scheduling.prefill_manager import PrefillManager
from support.fakes import KVCachePool, System, logits_after, prefix_hashes, prompt


def expected(request: Request) -> list[Any]:
    hashes = prefix_hashes(request.prompt_tokens)
    num_top = request.params.prompt_logprobs or 0
    following = request.prompt_tokens[1:]
    return [
        None,
        *(token_logprob(logits_after(h), t, num_top) for h, t in zip(hashes, following, strict=False)),
    ]


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64])
@pytest.mark.parametrize("length", [1, 2, 16, 33])
def test_each_prompt_token_has_its_entry(length: int, chunk_size: int) -> None:
    """The first has none, because nothing predicts it; the rest come from the row before, in prompt order."""
    system = System(chunk_size=chunk_size)
    asked = system.add("a", prompt(length), 4, prompt_logprobs=3, logprobs=2)
    silent = system.add("b", prompt(length, 1), 4)
    system.drain()
    assert asked.prompt_logprobs == expected(asked)
    assert len(asked.prompt_logprobs or ()) == length
    assert len(asked.logprobs) == 4
    assert silent.prompt_logprobs is None
    assert (asked.output_tokens, silent.output_tokens) == (system.expected(asked), system.expected(silent))


def test_whole_prompts_have_theirs_too() -> None:
    """The manager of phase 2, one piece per prompt."""
    system = System(prefill_mgr=PrefillManager(KVCachePool(64, 4, 1, 1, 4), 64))
    requests = [system.add(i, prompt(20 + i, i), 3, prompt_logprobs=0) for i in range(3)]
    system.drain()
    assert all(request.prompt_logprobs == expected(request) for request in requests)


def test_a_cached_prompt_is_computed_again() -> None:
    """What comes from the cache has no logits: such a request takes nothing from it, and says so."""
    system = System()
    warm = system.add("warm", prompt(40), 4)
    system.drain()
    asked = system.add("asked", prompt(40), 4, prompt_logprobs=1)
    cached = system.add("cached", prompt(40), 4)
    system.drain()
    assert (asked.prompt_logprobs, asked.prefix_hit_len) == (expected(asked), 0)
    assert cached.prefix_hit_len == 39
    assert warm.output_tokens == asked.output_tokens == cached.output_tokens
    system.check_nothing_is_held()


def test_preempted_prompts_have_each_entry_once() -> None:
    """In the middle of the prompt or later: what is known stays, the rest follows."""
    system = System(num_pages=9, page_size=4, chunk_size=1)
    requests = [
        system.add(i, prompt(2 + 18 * (i % 2), i), 28 - 14 * (i % 2), prompt_logprobs=2) for i in range(4)
    ]
    cut_short = 0
    while system.batcher.has_unfinished:
        lengths = [len(request.prompt_logprobs or ()) for request in requests]
        output = system.step()
        cut_short += sum(1 < lengths[int(i)] < requests[int(i)].num_prompt_tokens for i in output.preempted)
        assert all(
            len(r.prompt_logprobs or ()) >= before for r, before in zip(requests, lengths, strict=True)
        )
    assert cut_short > 0, "nobody was preempted in the middle of its prompt"
    for request in requests:
        assert request.prompt_logprobs == expected(request)
        assert request.output_tokens == system.expected(request)


def test_a_prompt_preempted_half_way_goes_on_where_it_was() -> None:
    """Rows that are known already are not asked for again: the batch wants the missing ones only."""
    request = Request("a", list(range(10)), params=SamplingParams(prompt_logprobs=0))
    request.prompt_logprobs = [None] + [token_logprob(np.zeros(16, np.float32), t, 0) for t in range(1, 5)]
    batch = Batch([(request, 7)])
    assert list(batch.prompt_rows[0]) == [4, 5, 6]
    assert batch.sample_rows.tolist() == [4, 5, 6]
    assert (batch.sampled, batch.num_sampled, batch.sampling_requests) == ([False], 0, [])
    assert batch.token_rows is not None
    assert batch.token_rows.tolist() == []
    whole = Batch([(request, 10)])
    assert whole.sample_rows.tolist() == [4, 5, 6, 7, 8, 9]
    assert (whole.num_sampled, [] if whole.token_rows is None else whole.token_rows.tolist()) == (1, [5])


def test_a_batch_keeps_sampling_rows_apart_from_prompt_rows() -> None:
    """Rows in order of the pieces; the sampling ones are found again behind the prompt rows of their piece."""
    plain, asked, short = (
        Request("p", [1, 2]),
        Request("q", [3, 4, 5], params=SamplingParams(prompt_logprobs=1)),
        Request("r", [6, 7]),
    )
    batch = Batch([(plain, 2), (asked, 3), (short, 1)])
    assert batch.sample_rows.tolist() == [1, 2, 3, 4]
    assert {index: list(rows) for index, rows in batch.prompt_rows.items()} == {1: [0, 1]}
    assert batch.token_rows is not None
    assert batch.token_rows.tolist() == [0, 3]
    assert batch.sampling_requests == [plain, asked]
    assert Batch([(plain, 2)]).token_rows is None


def test_rows_per_step_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of logits is large, so a step has few of prompts: chunks are shortened, others are not held up for ever."""
    monkeypatch.setattr(scoring, "MAX_PROMPT_LOGPROB_ROWS", 7)
    system = System(chunk_size=16, max_num_batched_tokens=40)
    asked = [system.add(i, prompt(20, i), 3, prompt_logprobs=0) for i in range(3)]
    plain = system.add("plain", prompt(60, 9), 3)
    most = 0
    for _ in range(100):
        output = system.step()
        if output.batch is None:
            break
        rows = sum(map(len, output.batch.prompt_rows.values()))
        most = max(most, rows)
        assert rows <= 7
    assert most == 7
    assert [r.finish_reason for r in (*asked, plain)] == ["length"] * 4
    assert all(request.prompt_logprobs == expected(request) for request in asked)


def test_the_limit_holds_for_whole_prompts_and_single_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole prompt is cut rather than never admitted; one row per step still comes to an end."""
    monkeypatch.setattr(scoring, "MAX_PROMPT_LOGPROB_ROWS", 1)
    system = System(prefill_mgr=PrefillManager(KVCachePool(64, 4, 1, 1, 4), 64))
    requests = [system.add(i, prompt(12 + i, i), 2, prompt_logprobs=0) for i in range(2)]
    system.drain()
    assert all(request.prompt_logprobs == expected(request) for request in requests)


def test_a_non_finite_prompt_row_fails_its_request() -> None:
    """Its chunk samples nothing, and still it must not go on: its neighbour does."""
    system = System(chunk_size=4)
    system.executor.poisoned.add("a")
    request = system.add("a", prompt(20), 4, prompt_logprobs=0)
    other = system.add("b", prompt(20, 1), 4, prompt_logprobs=0)
    system.step()
    assert (request.finish_reason, request.error) == (
        "error",
        "the logits of positions 0 to 3 are not all finite",
    )
    system.drain()
    assert (other.finish_reason, other.prompt_logprobs) == ("length", expected(other))
    system.check_nothing_is_held()


def test_a_failing_batch_mate_costs_no_entry() -> None:
    """The batch is computed again one by one, with as many rows for each as before."""
    system = System()
    system.executor.raises.add("broken")
    first = system.add("a", prompt(12), 4, prompt_logprobs=2)
    broken = system.add("broken", prompt(9, 1), 4, prompt_logprobs=2)
    second = system.add("b", prompt(11, 2), 4, prompt_logprobs=2, logprobs=1)
    plain = system.add("c", prompt(7, 3), 4)
    system.drain()
    assert (broken.finish_reason, broken.prompt_logprobs) == ("error", [None])
    for request in (first, second):
        assert request.prompt_logprobs == expected(request)
    for request in (first, second, plain):
        assert request.output_tokens == system.expected(request)


def test_interrupted_and_transient_failures_tell_nothing_twice() -> None:
    """A discarded step is computed again: the rows it had are not kept."""
    system = System(chunk_size=5)
    requests = [system.add(i, prompt(17, i), 3, prompt_logprobs=1) for i in range(3)]

    def interrupt() -> None:
        raise KeyboardInterrupt

    for step in range(10):
        system.executor.after = interrupt if step % 3 == 1 else None
        system.executor.transient = step % 2
        if step % 3 == 1:
            with pytest.raises(KeyboardInterrupt):
                system.step()
        else:
            system.step()
    system.executor.after = None
    system.drain()
    assert all(request.prompt_logprobs == expected(request) for request in requests)


def test_an_array_instead_of_logits_is_refused_by_name() -> None:
    """Bring your own model: what it returns must say which rows are finite."""
    system = System()
    inner = system.executor

    class Bare:
        def forward(self, batch: Batch) -> np.ndarray:
            return inner.forward(batch).values

    system.batcher.executor = Bare()  # type: ignore[assignment]
    request = system.add("a", prompt(9), 3, prompt_logprobs=1)
    system.drain()
    assert request.error == "TypeError: the executor gave ndarray, must be Logits"
