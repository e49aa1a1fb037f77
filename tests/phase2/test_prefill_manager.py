"""Phase 2: whole prompts. Which go into the next batch, under a token and a page budget."""

from __future__ import annotations

import pytest

from nanoserve.errors import RequestRefused
from nanoserve.native import KVCachePool, PageTable
from nanoserve.request import Request
from nanoserve.sampling import SamplingParams
from nanoserve.scheduling.prefill_manager import PrefillManager
from support.fakes import FakeExecutor, System, prompt, rollout


def pool_of(num_pages: int, page_size: int = 4) -> KVCachePool:
    return KVCachePool(num_pages, page_size, 1, 1, 4)


def waiting(*lengths: int) -> list[Request]:
    return [Request(i, prompt(length, i)) for i, length in enumerate(lengths)]


def test_token_budget_bounds_a_prefill_batch() -> None:
    """Prompts of 6, 5 and 4 tokens under a budget of 12: the first two go, the third waits."""
    manager = PrefillManager(pool_of(16), max_prefill_tokens=12)
    requests = waiting(6, 5, 4)
    batch = manager.schedule(requests)
    assert batch is not None
    assert ([r.req_id for r in batch.requests], batch.counts, batch.num_tokens) == ([0, 1], [6, 5], 11)
    assert batch.is_prefill
    assert requests[2].page_table is None


def test_a_budget_is_used_to_the_last_token() -> None:
    """A prompt that fits exactly goes; one token more and it does not."""
    assert PrefillManager(pool_of(16), 9).schedule(waiting(4, 5)).size == 2  # type: ignore[union-attr]
    assert PrefillManager(pool_of(16), 9).schedule(waiting(4, 6)).size == 1  # type: ignore[union-attr]


def test_memory_limits_a_prefill_batch() -> None:
    """Five pages hold prompts of 2 and 3 pages; the third gets nothing, and nothing is taken for it."""
    pool = pool_of(5)
    requests = waiting(8, 9, 1)
    batch = PrefillManager(pool).schedule(requests)
    assert batch is not None
    assert [r.req_id for r in batch.requests] == [0, 1]
    assert [r.kv_pages for r in requests] == [[0, 1], [2, 3, 4], []]
    assert pool.num_free_pages == 0


def test_nobody_is_overtaken_in_a_prefill_batch() -> None:
    """The second prompt does not fit, so the third, which would, waits behind it."""
    manager = PrefillManager(pool_of(16), max_prefill_tokens=10)
    requests = waiting(6, 8, 2)
    batch = manager.schedule(requests)
    assert batch is not None
    assert [r.req_id for r in batch.requests] == [0]
    assert (requests[1].kv_pages, requests[2].kv_pages) == ([], [])


def test_nothing_to_prefill_is_no_batch() -> None:
    """An empty queue, a head too large, or prompts that are computed already give None, not an empty batch."""
    manager = PrefillManager(pool_of(4), max_prefill_tokens=8)
    assert manager.schedule([]) is None
    assert manager.schedule(waiting(9)) is None
    requests = waiting(5)
    assert manager.schedule(requests) is not None
    assert manager.schedule(requests) is None


def test_can_schedule_tells_what_schedule_would_do() -> None:
    """It knows both limits, and the pages a request holds already count for it."""
    fits, too_many_tokens, too_many_pages = waiting(8, 11, 9)
    assert PrefillManager(pool_of(2), 11).can_schedule(fits)
    assert PrefillManager(pool_of(9), 11).can_schedule(too_many_tokens)
    assert not PrefillManager(pool_of(9), 10).can_schedule(too_many_tokens)
    assert not PrefillManager(pool_of(2), 11).can_schedule(too_many_pages)
    pool = pool_of(2)
    manager = PrefillManager(pool, max_prefill_tokens=10)
    manager.schedule([fits])
    assert not manager.can_schedule(Request("next", [1]))
    fits.append_output(1)
    fits.page_table.release()  # type: ignore[union-attr]
    assert manager.can_schedule(Request("next", [1]))


def test_a_cached_prefix_leaves_less_to_prefill() -> None:
    """A request that comes with pages for 8 of its 10 tokens takes 2 of the budget and one page."""
    pool = pool_of(4)
    request = Request("a", prompt(10))
    request.page_table = PageTable(pool)
    request.page_table.grow_to(8)
    request.cached_len = 8
    batch = PrefillManager(pool, max_prefill_tokens=2).schedule([request])
    assert batch is not None
    assert (batch.starts, batch.counts, request.kv_pages) == ([8], [2], [0, 1, 2])


def test_the_executor_gets_a_scheduled_batch() -> None:
    """Prefill by hand through the executor: one row per prompt, the row its prefix determines."""
    pool = pool_of(16)
    executor = FakeExecutor(pool)
    requests = [
        Request(i, prompt(5 + i, i), params=SamplingParams(temperature=0.0, max_tokens=1)) for i in range(3)
    ]
    batch = PrefillManager(pool).schedule(requests)
    assert batch is not None
    logits = executor.forward(batch).values
    assert logits.shape == (3, executor.vocab)
    assert [[int(row.argmax())] for row in logits] == [rollout(request) for request in requests]


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_limits_are_checked_by_name(value: object) -> None:
    """A manager that could never schedule anything is refused with the field and the value."""
    with pytest.raises(ValueError, match=f"max_prefill_tokens: {value!r}"):
        PrefillManager(pool_of(4), value)  # type: ignore[arg-type]


def test_a_batcher_with_a_plain_prefill_manager_runs_prompts_whole() -> None:
    """No prompt is ever cut: each has one piece, and several share a step under the budget."""
    system = System(prefill_mgr=PrefillManager(pool_of(64), 40), max_num_batched_tokens=64)
    requests = [system.add(i, prompt(11 + i, i)) for i in range(5)]
    system.drain()
    pieces = {
        r.req_id: [c for b in system.executor.batches for i, s, c in b if i == r.req_id and s < 11]
        for r in requests
    }
    assert pieces == {r.req_id: [r.num_prompt_tokens] for r in requests}
    assert [len(step) for step in system.executor.batches[:2]] == [3, 5]
    assert [r.output_tokens for r in requests] == [system.expected(r) for r in requests]


def test_an_unchunked_prompt_longer_than_a_batch_is_refused() -> None:
    """41 tokens can never be one piece of 40: told at the door, with both numbers."""
    system = System(prefill_mgr=PrefillManager(pool_of(64), 40))
    with pytest.raises(RequestRefused, match="41 tokens does not fit one batch of 40"):
        system.add("long", prompt(41))
    assert system.add("fits", prompt(40)).req_id == "fits"


def test_a_preempted_prompt_that_outgrew_the_batch_is_recomputed_in_two() -> None:
    """Prompt and outputs together exceed the batch the prompt alone fitted; recomputing them must not wedge."""
    system = System(prefill_mgr=PrefillManager(pool_of(9), 16), max_num_batched_tokens=16, cache=False)
    old, young = (
        system.add("old", prompt(15), max_tokens=20),
        system.add("young", prompt(14, 1), max_tokens=12),
    )
    system.drain()
    assert young.num_preemptions > 0
    assert [r.output_tokens for r in (old, young)] == [system.expected(r) for r in (old, young)]
    recomputed = [(s, c) for b in system.executor.batches for i, s, c in b if i == "young" and c > 1]
    assert recomputed[0] == (0, 14)
    assert recomputed[1] == (0, 16), recomputed
