"""Phase 3: chunks of several prompts, fairly, under token and page budgets, beside decode rows."""

from __future__ import annotations

import pytest

from nanoserve.native import KVCachePool
from nanoserve.request import Request
from nanoserve.sampling import SamplingParams
from nanoserve.scheduling.chunked_prefill import ChunkedPrefillManager
from support.fakes import FakeExecutor, System, prompt, rollout


def manager_of(num_pages: int = 64, chunk_size: int = 8, tokens: int = 32) -> ChunkedPrefillManager:
    return ChunkedPrefillManager(KVCachePool(num_pages, 4, 1, 1, 4), chunk_size, tokens)


def add(manager: ChunkedPrefillManager, *lengths: int) -> list[Request]:
    requests = [Request(i, prompt(length, i)) for i, length in enumerate(lengths)]
    for request in requests:
        manager.add_request(request)
    return requests


def pieces(manager: ChunkedPrefillManager) -> dict[object, int]:
    batch = manager.schedule()
    return {} if batch is None else {r.req_id: n for r, n in zip(batch.requests, batch.counts, strict=True)}


def test_one_chunk_per_request_and_call() -> None:
    """Three prompts advance together, a chunk each; who is done leaves."""
    manager = manager_of()
    add(manager, 20, 8, 9)
    assert manager.num_active_requests == 3
    assert pieces(manager) == {0: 8, 1: 8, 2: 8}
    assert manager.num_active_requests == 2
    assert pieces(manager) == {0: 8, 2: 1}
    assert pieces(manager) == {0: 4}
    assert pieces(manager) == {}
    assert manager.num_active_requests == 0


def test_rows_are_sampled_when_a_prompt_ends() -> None:
    """Inner chunks yield no logits; the last chunk yields one row."""
    manager = manager_of()
    add(manager, 12, 8)
    first, second = manager.schedule(), manager.schedule()
    assert first is not None
    assert second is not None
    assert ([r.req_id for r in first.sampling_requests], first.sample_rows.tolist()) == ([1], [15])
    assert ([r.req_id for r in second.sampling_requests], second.sample_rows.tolist()) == ([0], [3])


def test_token_limit_is_shared_and_never_exceeded() -> None:
    """12 tokens per call, chunks of 8: one full chunk and half of another."""
    manager = manager_of(chunk_size=8, tokens=12)
    add(manager, 20, 20, 20)
    assert pieces(manager) == {0: 8, 1: 4}
    while manager.num_active_requests:
        assert sum(pieces(manager).values()) <= 12


def test_round_robin_keeps_prompts_level() -> None:
    """With a budget for one chunk per call, four prompts take turns: nobody is two chunks ahead of anybody."""
    manager = manager_of(chunk_size=4, tokens=4)
    requests = add(manager, 40, 40, 40, 40)
    for _ in range(36):
        assert sum(pieces(manager).values()) == 4
        progress = [r.cached_len for r in requests]
        assert max(progress) - min(progress) <= 4


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """Fairness: 4 tokens behind a prompt of 200 are computed in the next call, not 25 calls later."""
    manager = manager_of(chunk_size=8, tokens=16)
    add(manager, 200)
    pieces(manager)
    short = Request("short", prompt(4, 7))
    manager.add_request(short)
    assert pieces(manager) == {0: 8, "short": 4}
    assert short.extend_len == 0


def test_pages_are_granted_as_the_prompt_advances() -> None:
    """A prompt of 32 tokens holds two pages after its first chunk of 8, not eight."""
    manager = manager_of(num_pages=8)
    (request,) = add(manager, 32)
    held = []
    while manager.num_active_requests:
        pieces(manager)
        held.append(len(request.kv_pages))
    assert held == [2, 4, 6, 8]


def test_memory_limit_lets_the_others_go_on() -> None:
    """Without pages for its chunk a prompt sits out with what it has; one that needs none, or fewer, is not held up."""
    manager = manager_of(num_pages=5)
    large, small = add(manager, 24, 11)
    assert pieces(manager) == {0: 8, 1: 8}
    assert manager.kv_pool.num_free_pages == 1
    assert not manager.can_schedule(large)
    assert manager.can_schedule(small)
    assert pieces(manager) == {1: 3}
    assert pieces(manager) == {}
    assert (large.cached_len, manager.num_active_requests) == (8, 1)
    assert small.page_table is not None
    small.page_table.release()
    assert manager.can_schedule(large)
    assert pieces(manager) == {0: 8}


def test_remove_takes_a_prompt_out_of_the_round() -> None:
    """An aborted prompt gets no more chunks."""
    manager = manager_of()
    first, _ = add(manager, 20, 20)
    pieces(manager)
    assert manager.remove(first)
    assert not manager.remove(first)
    assert pieces(manager) == {1: 8}


def test_chunks_by_hand_give_the_row_the_prompt_determines() -> None:
    """Chunks through the executor write every key where the next chunk reads it."""
    manager = manager_of(chunk_size=5, tokens=12)
    executor = FakeExecutor(manager.kv_pool)
    requests = add(manager, 23, 17, 3)
    sampled = {}
    while (batch := manager.schedule()) is not None:
        for request, row in zip(batch.sampling_requests, executor.forward(batch).values, strict=True):
            sampled[request.req_id] = int(row.argmax())
    params = SamplingParams(temperature=0.0, max_tokens=1)
    expected = {r.req_id: rollout(Request(r.req_id, r.prompt_tokens, params=params))[0] for r in requests}
    assert sampled == expected


@pytest.mark.parametrize(
    ("field", "kwargs"),
    [("max_chunk_size", {"max_chunk_size": 0}), ("max_batch_tokens", {"max_batch_tokens": -1})],
)
def test_limits_are_checked_by_name(field: str, kwargs: dict[str, int]) -> None:
    """A manager that could never schedule anything is refused with the field and the value."""
    with pytest.raises(ValueError, match=f"{field}: {next(iter(kwargs.values()))}"):
        ChunkedPrefillManager(KVCachePool(4), **kwargs)


def test_chunks_interleave_with_decode() -> None:
    """While a long prompt is computed, a decoding request gets its token in every single step."""
    system = System(chunk_size=4)
    chat = system.add("chat", prompt(4), max_tokens=20)
    system.step()
    system.add("document", prompt(48, 1))
    for step in range(12):
        output = system.step()
        assert output.scheduled == {"chat": 1, "document": 4}
        assert len(chat.output_tokens) == step + 2


def test_progress_is_visible_while_a_prompt_is_computed() -> None:
    """cached_len grows by a chunk per step, and each chunk is one event with its place in the prompt."""
    system = System(chunk_size=8)
    request = system.add("a", prompt(20))
    progress = []
    while not request.output_tokens:
        system.step()
        progress.append(request.cached_len)
    assert progress == [8, 16, 20]
    chunks = [e.detail for e in system.scheduler.events.of("a") if e.kind == "chunk"]
    assert chunks == [
        {"start": 0, "count": 8, "of": 20},
        {"start": 8, "count": 8, "of": 20},
        {"start": 16, "count": 4, "of": 20},
    ]


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 7, 8, 16, 31, 64, 1000])
def test_every_chunk_size_gives_the_same_output(chunk_size: int) -> None:
    """Chunk borders, page borders and prompt ends in all combinations change no token."""
    system = System(chunk_size=chunk_size, max_num_batched_tokens=50, num_pages=96)
    requests = [
        system.add(i, prompt(length, i), max_tokens=6) for i, length in enumerate((1, 4, 5, 16, 33, 64, 90))
    ]
    system.drain()
    assert [r.output_tokens for r in requests] == [system.expected(r) for r in requests]
