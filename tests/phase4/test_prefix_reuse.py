"""Phase 4: requests and the prefix cache: acquire, commit, release, and the KV they really read."""

from __future__ import annotations

import random

import pytest

from nanoserve.cache.kv_pool import PageTable
from nanoserve.errors import InvariantViolation
from nanoserve.request import Request
from phase4.kv_worker import KVWorker

A, B, C, D = [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3], [4, 4, 4, 4]


@pytest.fixture
def worker() -> KVWorker:
    return KVWorker(num_pages=8)


def test_a_finished_prompt_is_reused_by_the_next(worker: KVWorker) -> None:
    """The second request starts behind the common pages and reads KV that is right for its own tokens."""
    worker.run(A + B + [5, 6])
    request = worker.admit(A + B + C)
    assert (request.cached_len, request.prefix_hit_len, request.extend_len) == (8, 8, 4)
    assert (request.validated_len, request.kv_pages) == (8, [0, 1])
    assert worker.compute(request)
    assert worker.problems() == []


def test_outputs_are_cached_for_the_next_turn_of_a_conversation(worker: KVWorker) -> None:
    """A chat's next prompt repeats the answer: its pages are there too."""
    worker.run([*A, 2, 2], [2, 2, 7])
    request = worker.admit(A + B + [7, 8, 9])
    assert request.cached_len == 8
    assert worker.problems() == []


def test_a_fully_cached_prompt_writes_its_last_token_into_a_copy(worker: KVWorker) -> None:
    """7 of 8 tokens are reused; the shared page is copied first, so the tree's stays as it was."""
    worker.run(A + B)
    request = worker.admit(A + B)
    assert (request.cached_len, request.extend_len, request.kv_pages) == (7, 1, [0, 2])
    assert worker.compute(request)
    request.append_output(9)
    assert worker.compute(request)
    assert worker.problems() == []
    assert worker.manager.tree_pages() == [0, 1]


def test_a_full_hit_evicts_an_idle_page_for_its_copy() -> None:
    """The pool is full of idle prefixes: one unpinned page goes, and the hit keeps its full length."""
    worker = KVWorker(num_pages=4)
    worker.run(C + D)
    worker.run(A + B)
    request = worker.admit(A + B)
    assert (request.cached_len, worker.manager.total_evictions, worker.manager.peek(C + D)) == (7, 1, 4)
    assert worker.problems() == []


def test_a_full_hit_without_room_for_a_copy_shares_one_page_less() -> None:
    """Nothing can be freed for the copy: the last page is computed again, in the very page the cache gives up."""
    worker = KVWorker(num_pages=2)
    worker.run(A + B)
    request = worker.admit(A + B)
    assert (request.cached_len, request.extend_len, request.kv_pages) == (4, 4, [0])
    assert worker.problems() == []
    assert worker.compute(request)
    assert request.kv_pages == [0, 1]
    assert worker.problems() == []


def test_pages_of_one_token_are_never_copied() -> None:
    """With page_size 1 a copy would be overwritten whole: the full hit shares all pages but the last."""
    worker = KVWorker(num_pages=8, page_size=1)
    worker.run([5, 6, 7])
    request = worker.admit([5, 6, 7])
    assert (request.cached_len, request.kv_pages) == (2, [0, 1])
    assert worker.compute(request)
    assert worker.problems() == []


def test_pinned_pages_are_never_evicted(worker: KVWorker) -> None:
    """The running request's prefix stays, however much is asked for; what is idle goes."""
    worker.run(A + B)
    worker.run(C + D)
    request = worker.admit(A + B + C)
    assert not worker.manager.reserve(7)
    assert worker.manager.reserve(6)
    assert (worker.manager.peek(A + B), worker.manager.peek(C + D)) == (8, 0)
    assert worker.problems() == []
    worker.finish(request)
    assert worker.manager.reserve(8)


def test_only_validated_pages_are_shared(worker: KVWorker) -> None:
    """Computed is not enough: until its logits were finite a page may hold garbage that the tree would spread."""
    request = worker.admit(A + B + C)
    worker.compute(request)
    request.validated_len = 7
    worker.manager.commit(request)
    assert worker.manager.peek(A + B + C) == 4
    request.validated_len = 12
    worker.manager.commit(request)
    assert worker.manager.peek(A + B + C) == 12
    assert worker.problems() == []


def test_validated_beyond_computed_is_an_invariant_violation(worker: KVWorker) -> None:
    """A page whose KV is not computed must never enter the tree: the bug is stopped at the tree's door."""
    request = worker.admit(A + B)
    request.validated_len = 8
    with pytest.raises(InvariantViolation, match="8 validated tokens, 0 computed"):
        worker.manager.commit(request)
    assert worker.manager.tree_pages() == []


def test_commit_moves_the_pin_with_the_request(worker: KVWorker) -> None:
    """After each chunk the pages so far are shared and protected; a second commit changes nothing."""
    request = worker.admit(A + B + C + D)
    for done in (4, 8, 12, 16):
        worker.compute(request, 4)
        worker.manager.commit(request)
        worker.manager.commit(request)
        assert worker.manager.peek(A + B + C + D) == done
        assert worker.manager.evict_lru(8) == 0
        assert worker.problems() == []
    assert worker.manager.tree.num_nodes == 1


def test_release_keeps_the_committed_and_frees_the_rest(worker: KVWorker) -> None:
    """The committed prefix stays cached for others; the uncommitted tail is free at once."""
    request = worker.admit(A + B + [5])
    worker.compute(request)
    worker.manager.commit(request)
    table = request.page_table
    assert table is not None
    worker.finish(request)
    assert len(table) == 0
    assert (request.cached_len, request.radix_node, request.page_table, request.validated_len) == (
        0,
        None,
        None,
        0,
    )
    assert (worker.pool.num_free_pages, worker.manager.peek(A + B), worker.manager.num_available_pages) == (
        6,
        8,
        8,
    )
    assert worker.problems() == []


def test_release_is_idempotent(worker: KVWorker) -> None:
    """Abort may meet finish: the second release must not unpin or free what is by now someone else's."""
    first = worker.run(A + B)
    holder = worker.admit(A + B + C)
    worker.manager.release(first)
    worker.manager.release(first)
    assert worker.manager.reserve(7) is False
    assert worker.problems() == []
    worker.finish(holder)


def test_a_preempted_request_finds_its_own_pages_again(worker: KVWorker) -> None:
    """Prompt and outputs were committed: resuming recomputes less than a page, and counts no new hit."""
    request = worker.admit(A + B)
    worker.compute(request)
    request.append_output(3)
    worker.compute(request)
    request.append_output(3)
    worker.manager.commit(request)
    stats = (worker.manager.cache_hits, worker.manager.cache_misses)
    request.num_preemptions += 1
    worker.finish(request)
    worker.resume(request)
    assert (request.total_len, request.cached_len, request.extend_len) == (10, 8, 2)
    assert (worker.manager.cache_hits, worker.manager.cache_misses) == stats == (0, 8)
    worker.finish(request)
    worker.resume(request)
    assert (worker.manager.cache_hits, worker.manager.cache_misses) == stats
    worker.compute(request)
    assert worker.problems() == []


def test_a_request_is_counted_once_even_when_its_admission_is_taken_back(worker: KVWorker) -> None:
    """The scheduler may acquire, find no room for the rest and release: the statistics see one admission."""
    worker.run(A + B)
    worker.manager.clear_stats()
    request = Request("r", A + B + C)
    for _ in range(3):
        worker.manager.acquire(request, PageTable(worker.pool))
        assert (worker.manager.cache_hits, worker.manager.cache_misses) == (8, 4)
        worker.manager.release(request)
        assert (worker.manager.cache_hits, worker.manager.cache_misses) == (0, 0)
    worker.resume(request)
    worker.compute(request)
    worker.finish(request)
    assert (worker.manager.cache_hits, worker.manager.cache_misses) == (8, 4)


def test_a_shared_system_prompt_gives_a_high_hit_rate() -> None:
    """40 prompts of 64 shared and 4 own tokens: all but the first find the 64, a rate above 90%."""
    worker = KVWorker(num_pages=64)
    system = list(range(100, 164))
    for i in range(40):
        worker.run([*system, 7, 7, i, i])
    hits = 39 * 64
    assert (worker.manager.cache_hits, worker.manager.cache_misses) == (hits, 40 * 68 - hits)
    assert worker.manager.cache_hit_rate > 0.9
    assert worker.problems() == []


def test_acquire_refuses_a_request_that_has_pages(worker: KVWorker) -> None:
    """Its old pages and pin would leak; so would the pages of a table in use."""
    request = worker.admit(A + B)
    with pytest.raises(InvariantViolation, match="has pages already"):
        worker.manager.acquire(request, PageTable(worker.pool))
    used = PageTable(worker.pool)
    used.grow_to(1)
    with pytest.raises(InvariantViolation, match="has pages already"):
        worker.manager.acquire(Request("other", A), used)


def test_a_failed_acquire_leaves_nothing_half_done(worker: KVWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever throws inside, the request is as before, the table empty, and no page or pin is kept."""
    worker.run(A + B)

    class Failing:
        """A table whose copy on write fails."""

        def __init__(self) -> None:
            self.table = PageTable(worker.pool)

        def __len__(self) -> int:
            return len(self.table)

        def adopt(self, pages: list[int]) -> None:
            self.table.adopt(pages)

        def make_writable(self, index: int) -> bool:
            raise MemoryError(index)

        def release(self) -> None:
            self.table.release()

    request, table = Request("r", A + B), Failing()
    with pytest.raises(MemoryError):
        worker.manager.acquire(request, table)
    assert (request.page_table, request.radix_node, request.cached_len, len(table)) == (None, None, 0, 0)
    assert worker.manager.cache_hits == 0
    assert worker.problems() == []
    assert worker.manager.num_available_pages == 8


def test_without_the_cache_requests_compute_everything() -> None:
    """The off switch: same calls, no sharing, all memory back at the end."""
    worker = KVWorker(num_pages=4, enabled=False)
    for _ in range(2):
        request = worker.run(A + B)
        assert request.prefix_hit_len == 0
    assert (worker.pool.num_free_pages, worker.manager.cache_hits, worker.manager.cache_misses) == (4, 0, 16)
    assert worker.problems() == []


def test_the_request_audit_finds_foreign_and_missing_pins(worker: KVWorker) -> None:
    """Each live request pins its own tokens and nobody else pins anything: broken on purpose, both ways."""
    worker.run(A + B)
    request = worker.admit(A + B + C)
    assert worker.manager.audit([request]) == []
    assert "node 1 has 1 pins of its own but 0 requests hold it" in worker.manager.audit([])
    table, request.page_table = request.page_table, None
    assert "request 0 pins node 1 but has no pages" in worker.manager.audit([request])
    request.page_table = table
    request.token_ids[0] = 9
    assert any("spells other tokens" in problem for problem in worker.manager.audit([request]))
    worker.pool.unref([worker.manager.tree_pages()[0]] * 2)
    assert "page 0 is in the tree but free" in worker.manager.audit([request])


def test_agentic_load_on_a_tiny_pool_stays_right() -> None:
    """Growing conversations that fork, resume and are evicted under pressure: after every step all KV is right."""
    rng, worker = random.Random(5), KVWorker(num_pages=12)
    talks: list[list[int]] = [[1, 2, 3]]
    for turn in range(300):
        talk = rng.choice(talks)[: rng.randrange(1, 60)]
        prompt = [*talk, *(rng.randrange(3) for _ in range(rng.randrange(1, 8)))][-44:]
        request = worker.run(prompt, [rng.randrange(3) for _ in range(rng.randrange(4))], req_id=turn)
        talks = [*talks[-12:], list(request.token_ids)]
        assert worker.problems() == []
    assert worker.manager.cache_hits > 0
    assert worker.manager.total_evictions > 0
