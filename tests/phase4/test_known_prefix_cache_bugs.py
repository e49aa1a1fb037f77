"""Phase 4: the bugs that small engines with a prefix cache keep having, one test each, named after the report."""

from __future__ import annotations

import pytest

from nanoserve.batch import Batch
from phase4.kv_worker import KVWorker

A, B, C, D = [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3], [4, 4, 4, 4]


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_full_hit_on_a_page_multiple_is_not_an_empty_prefill(pages: int) -> None:
    """nano-vllm 114, 117, 144: a prompt of exactly n pages, all cached, became a prefill of zero tokens."""
    worker = KVWorker(num_pages=16)
    prompt = (A + B + C)[: 4 * pages]
    for _ in range(3):
        request = worker.admit(prompt)
        assert request.extend_len >= 1
        batch = Batch.from_prefill([request])
        assert (batch.num_tokens, batch.sampled) == (request.extend_len, [True])
        assert worker.compute(request)
        worker.manager.commit(request)
        assert worker.problems() == []
        worker.finish(request)
    assert request.prefix_hit_len == 4 * pages - 1


def test_counts_taken_before_the_hit_are_not_used_after_it() -> None:
    """nano-vllm 207, 210, 211, 233: tokens were counted before allocation raised the cached length; a preempted
    request that hits then ran past its end. Counting again after acquire fits; the stale count is refused.
    """
    worker = KVWorker(num_pages=16)
    request = worker.admit(A + B + [5])
    worker.compute(request)
    worker.manager.commit(request)
    request.num_preemptions += 1
    worker.finish(request)
    stale = request.extend_len
    worker.resume(request)
    assert (stale, request.extend_len) == (9, 1)
    with pytest.raises(ValueError, match="has 1 tokens to compute, asked for 9"):
        Batch.from_chunks([(request, stale)])
    assert worker.compute(request)
    assert worker.problems() == []


def test_a_twin_in_the_same_step_does_not_hit_uncomputed_pages() -> None:
    """nano-vllm 208, 209: the second of two equal prompts admitted together read pages that were still empty."""
    worker = KVWorker(num_pages=16)
    first, second = worker.admit(A + B + C), worker.admit(A + B + C)
    assert (second.cached_len, set(first.kv_pages) & set(second.kv_pages)) == (0, set())
    worker.compute(first, 8)
    third = worker.admit(A + B + C)
    assert third.cached_len == 0
    worker.manager.commit(first)
    fourth = worker.admit(A + B + C)
    assert (fourth.cached_len, fourth.kv_pages) == (8, first.kv_pages[:2])
    assert worker.problems() == []


def test_a_duplicate_prefix_is_not_freed_while_it_is_mapped() -> None:
    """mini-sglang 142: the loser of two equal prompts had its own pages freed though its table still named them."""
    worker = KVWorker(num_pages=16)
    first, second = worker.admit(A + B + [5]), worker.admit(A + B + [6])
    for request in (first, second):
        worker.compute(request)
        worker.manager.commit(request)
    own = second.kv_pages
    assert not set(own) & set(first.kv_pages)
    assert [worker.pool.ref_count(page) for page in own] == [1, 1, 1]
    worker.finish(first)
    worker.run(D + D + D + D)
    assert second.kv_pages == own
    assert worker.problems() == []
    worker.finish(second)
    assert worker.manager.tree_pages()[:2] == [0, 1]
    assert worker.problems() == []


def test_duplicates_under_chunked_prefill_keep_their_pages() -> None:
    """xLLM 1898: the same with both prompts computed in alternating chunks, committed after each."""
    worker = KVWorker(num_pages=16)
    first, second = worker.admit(A + B + C + [5]), worker.admit(A + B + C + [6])
    for chunk in (3, 5, 2, 3):
        for request in (first, second):
            worker.compute(request, chunk)
            worker.manager.commit(request)
            assert worker.problems() == []
    assert not set(first.kv_pages) & set(second.kv_pages)
    worker.finish(first)
    assert worker.problems() == []
    second.append_output(7)
    assert worker.compute(second)
    worker.finish(second)
    assert worker.manager.num_available_pages == 16
    assert worker.problems() == []


def test_a_parent_is_not_evicted_from_under_its_children() -> None:
    """sglang 25068, 27865: leaf bookkeeping broke when forks of one conversation were evicted and extended in turn."""
    worker = KVWorker(num_pages=8)
    worker.run(A + B)
    worker.run(A + B + C)
    fork = worker.admit(A + B + D)
    worker.compute(fork)
    worker.manager.commit(fork)
    assert worker.manager.evict_lru(8) == 1
    assert (worker.manager.peek(A + B + C), worker.manager.peek(A + B + D)) == (8, 12)
    worker.finish(fork)
    assert worker.manager.evict_lru(1) == 1
    assert worker.manager.peek(A + B + D) == 8
    extended = worker.admit(A + B + C + C)
    assert extended.cached_len == 8
    worker.compute(extended)
    worker.manager.commit(extended)
    assert worker.problems() == []
    worker.finish(extended)
    assert worker.manager.evict_lru(8) == 4
    assert worker.manager.tree.num_nodes == 0


def test_a_lone_request_whose_pin_holds_a_duplicate_gets_on_after_giving_its_pages_back() -> None:
    """The loser of two equal prompts pins the winner's pages as well as holding its own, and nobody else is left to
    preempt: released and admitted again it shares them, and the pool that is just large enough suffices.
    """
    worker = KVWorker(num_pages=4)
    first, second = worker.admit([*A, 5]), worker.admit([*A, 5])
    for request in (first, second):
        worker.compute(request)
        worker.manager.commit(request)
    worker.finish(first)
    restarts = 0
    for token in [5, 5, 5, *B, *B]:
        second.append_output(token)
        if not worker.compute(second):
            restarts += 1
            worker.manager.commit(second)
            worker.finish(second)
            worker.resume(second)
            assert worker.compute(second)
        assert worker.problems() == []
    assert (restarts, second.total_len, second.cached_len) == (1, 16, 16)
