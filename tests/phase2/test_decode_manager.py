"""Phase 2: decoding. One token per request and step, and how requests get there and leave."""

from __future__ import annotations

import pytest

from nanoserve.native import KVCachePool
from nanoserve.request import Request, RequestState
from nanoserve.sampling import SamplingParams
from nanoserve.scheduling.decode_manager import DecodeManager
from nanoserve.scheduling.prefill_manager import PrefillManager
from support.fakes import FakeExecutor, System, prompt, rollout


def decoding(req_id: int, length: int = 3) -> Request:
    """A request with everything computed but its last token, without pages."""
    request = Request(req_id, prompt(length, req_id))
    request.append_output(1)
    request.cached_len = request.total_len - 1
    return request


def test_batch_limit_bounds_decode_and_turns_are_taken() -> None:
    """Five requests through three seats: three rows per step, and everybody has had one after two."""
    manager = DecodeManager(max_batch_size=3)
    requests = [decoding(i) for i in range(5)]
    for request in requests:
        manager.add_request(request)
    served: list[object] = []
    for _ in range(2):
        batch = manager.schedule()
        assert batch is not None
        assert (batch.size, batch.is_decode) == (3, True)
        served += [r.req_id for r in batch.requests]
        for request in batch.requests:
            request.append_output(2)
    assert set(served) == set(range(5))


def test_finished_requests_retire() -> None:
    """remove_finished returns the finished and keeps the others in order."""
    manager = DecodeManager()
    requests = [decoding(i) for i in range(3)]
    for request in requests:
        manager.add_request(request)
    requests[1].state = RequestState.FINISHED
    assert manager.remove_finished() == [requests[1]]
    assert manager.remove_finished() == []
    assert (manager.requests, manager.num_running, manager.has_running) == (
        [requests[0], requests[2]],
        2,
        True,
    )


def test_no_decoding_requests_is_no_batch() -> None:
    """An empty manager runs nothing."""
    manager = DecodeManager()
    assert (manager.schedule(), manager.has_running, manager.num_running) == (None, False, 0)


def test_a_request_decodes_once_per_sampled_token() -> None:
    """Scheduling twice without a new token, or before the prompt is computed, would compute garbage."""
    manager = DecodeManager()
    manager.add_request(decoding(0))
    assert manager.schedule() is not None
    with pytest.raises(ValueError, match="0 of its tokens"):
        manager.schedule()
    other = DecodeManager()
    other.add_request(Request("new", [1, 2, 3]))
    with pytest.raises(ValueError, match="'new' cannot decode: 3 of its tokens"):
        other.schedule()


def test_a_request_is_added_once() -> None:
    """Two rows of one request in a batch would write one slot twice."""
    manager = DecodeManager()
    request = decoding(0)
    manager.add_request(request)
    with pytest.raises(ValueError, match="request 0 is decoding already"):
        manager.add_request(request)
    assert manager.remove(request)
    assert not manager.remove(request)


def test_prefill_to_decode_by_hand() -> None:
    """The two managers and an executor alone generate what the model generates; pages grow at their boundaries."""
    pool = KVCachePool(16, 4, 1, 1, 4)
    executor, prefill, decode = FakeExecutor(pool), PrefillManager(pool), DecodeManager()
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    requests = [Request(i, prompt(3 + i, i), params=params) for i in range(3)]
    batch = prefill.schedule(requests)
    for _ in range(params.max_tokens):
        assert batch is not None
        for request, row in zip(batch.sampling_requests, executor.forward(batch).values, strict=True):
            request.append_output(int(row.argmax()))
            if len(request.output_tokens) == 1:
                decode.add_request(request)
        batch = decode.schedule()
    assert [r.output_tokens for r in requests] == [rollout(r) for r in requests]
    assert [len(r.kv_pages) for r in requests] == [3, 4, 4]
    assert not executor.mismatches


def test_who_lacks_a_page_sits_out_and_the_others_decode() -> None:
    """One free page for two that need one: the first gets it, the second keeps what it has and waits."""
    pool = KVCachePool(3, 4, 1, 1, 4)
    requests = [Request(i, prompt(4, i)) for i in range(2)]
    assert PrefillManager(pool).schedule(requests) is not None
    manager = DecodeManager()
    for request in requests:
        request.append_output(1)
        manager.add_request(request)
    batch = manager.schedule()
    assert batch is not None
    assert batch.requests == [requests[0]]
    assert (requests[1].kv_pages, requests[1].cached_len) == ([1], 4)


def test_a_request_moves_from_prefill_to_decode_when_its_prompt_is_computed() -> None:
    """In the engine: PREFILL until the last chunk's token is sampled, DECODE in the same update."""
    system = System(chunk_size=4)
    request = system.add("a", prompt(10), max_tokens=3)
    states = []
    while not request.is_finished:
        system.step()
        states.append((request.state.value, request.cached_len, len(request.output_tokens)))
    assert states == [
        ("prefill", 4, 0),
        ("prefill", 8, 0),
        ("decode", 10, 1),
        ("decode", 11, 2),
        ("finished", 0, 3),
    ]


def test_decode_rows_and_chunks_share_one_batch() -> None:
    """A mixed step: the decoding request's row first, then the newcomer's chunk, one forward."""
    system = System(chunk_size=8)
    system.add("old", prompt(4), max_tokens=6)
    system.step()
    system.add("new", prompt(20, 1))
    output = system.step()
    assert output.batch is not None
    assert output.scheduled == {"old": 1, "new": 8}
    assert output.batch.counts == [1, 8]
    assert (output.batch.is_prefill, output.batch.is_decode, output.batch.sample_rows.tolist()) == (
        True,
        False,
        [0],
    )
    assert system.executor.num_forwards == 2


def test_one_budget_is_shared_by_decode_rows_and_chunks() -> None:
    """Four decode rows leave 12 of 16 tokens to chunks, in every step until the prompts are done."""
    system = System(chunk_size=16, max_batch_size=8, max_num_batched_tokens=16)
    for i in range(4):
        system.add(i, prompt(3, i), max_tokens=12)
    system.step()
    system.add("long", prompt(30, 9))
    for expected in (12, 12, 6):
        output = system.step()
        assert output.batch is not None
        assert output.scheduled["long"] == expected
        assert output.batch.num_tokens <= 16
    system.drain()


def test_batch_limit_counts_every_running_request() -> None:
    """Three seats: prefilling and decoding requests together never exceed them, the rest waits."""
    system = System(max_batch_size=3, chunk_size=4)
    for i in range(7):
        system.add(i, prompt(9, i))
    most = 0
    while system.batcher.has_unfinished:
        output = system.step()
        most = max(most, len(output.scheduled))
        assert system.scheduler.pool.num_running <= 3
    assert most == 3


def test_memory_is_returned_when_requests_retire() -> None:
    """After the last request everything is free or cached; without a cache everything is free."""
    for cache in (True, False):
        system = System(cache=cache)
        for i in range(6):
            system.add(i, prompt(10, i))
        system.drain()
        system.check_nothing_is_held()
        assert bool(system.radix.tree_pages()) is cache
