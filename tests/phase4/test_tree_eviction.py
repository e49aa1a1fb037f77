"""Phase 4: which page of the prefix tree goes next. Least recently used leaves, from their ends, at a bounded cost."""

from __future__ import annotations

import random

import pytest

from nanoserve.cache import eviction_queue
from nanoserve.cache.radix_cache import RadixCache

A, B, C, D = [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3], [4, 4, 4, 4]


@pytest.fixture
def tree() -> RadixCache:
    return RadixCache(page_size=4)


def test_eviction_takes_the_least_recently_used_leaf(tree: RadixCache) -> None:
    """Insertion order A, B, C; B and then A are used again: C goes first, then B, then A."""
    for page, tokens in enumerate((A, B, C)):
        tree.insert(tokens, [page])
    tree.match_prefix(B)
    tree.match_prefix(A)
    assert [tree.evict(1), tree.evict(1), tree.evict(1), tree.evict(1)] == [[2], [1], [0], []]


def test_inserting_counts_as_use(tree: RadixCache) -> None:
    """A new prefix is the newest, and computing a known one again refreshes it."""
    tree.insert(A, [0])
    tree.match_prefix(A)
    tree.insert(B, [1])
    tree.insert(C, [2])
    tree.insert(B, [7])
    assert [tree.evict(1), tree.evict(1), tree.evict(1)] == [[0], [2], [1]]


def test_peek_does_not_count_as_use(tree: RadixCache) -> None:
    """A policy that looks at every waiting request's match must not reorder the cache, nor split its edges."""
    tree.insert(A, [0])
    tree.insert(B + C, [1, 2])
    tree.match_prefix(B + C)
    before = ([node.pages for _, node in tree.walk()], tree.clock)
    assert [tree.peek(A), tree.peek(B), tree.peek(B + C + D), tree.peek(D)] == [4, 4, 8, 0]
    assert ([node.pages for _, node in tree.walk()], tree.clock) == before
    assert tree.evict(1) == [0]


def test_a_released_prefix_counts_as_used_until_now(tree: RadixCache) -> None:
    """A long-running request's prefix is not the oldest just because it was matched long ago."""
    old = tree.insert(A, [0]).node_id
    tree.pin(old)
    tree.insert(B, [1])
    tree.unpin(old)
    assert tree.evict(1) == [1]


def test_a_long_prefix_shrinks_from_its_end(tree: RadixCache) -> None:
    """Evicting one page of an idle conversation keeps its beginning, which is what others may share."""
    tree.insert(A + B + C, [0, 1, 2])
    assert tree.evict(1) == [2]
    assert tree.match_prefix(A + B + C).pages == [0, 1]
    assert tree.insert(A + B + D, [0, 1, 7]).new_pages == [7]
    assert tree.audit() == []


def test_a_parent_becomes_a_leaf_when_its_children_are_gone(tree: RadixCache) -> None:
    """Eviction climbs: nothing unpinned stays behind out of its reach."""
    tree.insert(A + B, [0, 1])
    tree.insert(A + C, [0, 2])
    tree.match_prefix(A + B)
    assert [tree.evict(1) for _ in range(4)] == [[2], [1], [0], []]
    assert tree.num_nodes == 0


def test_ids_of_evicted_nodes_are_used_again(tree: RadixCache) -> None:
    """The arena does not grow with the age of the server."""
    for round_ in range(100):
        tree.insert([round_] * 4, [round_])
        assert tree.evict(1) == [round_]
    assert len(tree.arena) == 2
    assert tree.audit() == []


def test_eviction_work_does_not_grow_with_the_number_of_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full cache evicts on every admission: a scan of all leaves there is a stall that grows with memory."""
    pops = 0

    def counting(heap: list[tuple[int, int]]) -> tuple[int, int]:
        nonlocal pops
        pops += 1
        return pop(heap)

    pop = eviction_queue.heapq.heappop
    monkeypatch.setattr(eviction_queue.heapq, "heappop", counting)
    tree = RadixCache(page_size=1)
    for token in range(3000):
        tree.insert([token], [token])
    rng = random.Random(1)
    for _ in range(3000):
        tree.match_prefix([rng.randrange(3000)])
    for _ in range(1000):
        assert len(tree.evict(1)) == 1
    assert pops <= 1000 + 3000  # one for each eviction, at most one more for each access since
    assert len(tree.queue.heap) == tree.num_nodes


def test_the_oldest_evictable_leaf_goes_first_in_random_use() -> None:
    """Random inserts, matches, pins and evictions against a scan of all leaves: the lazy heap is never out of order."""
    rng, tree = random.Random(2), RadixCache(page_size=2)
    pins: list[int] = []
    next_page = 0
    for _ in range(4000):
        tokens = [token for _ in range(rng.randrange(1, 6)) for token in [rng.randrange(3)] * 2]
        action = rng.random()
        if action < 0.35:
            tree.insert(tokens, range(next_page, next_page + len(tokens) // 2))
            next_page += len(tokens) // 2
        elif action < 0.6:
            tree.match_prefix(tokens)
        elif action < 0.7 and len(pins) < 6:
            pins.append(tree.match_prefix(tokens).node_id)
            tree.pin(pins[-1])
        elif action < 0.8 and pins:
            tree.unpin(pins.pop(rng.randrange(len(pins))))
        else:
            leaves = [node for _, node in tree.walk() if node.is_evictable]
            oldest = min((leaf.last_access for leaf in leaves), default=0)
            last_pages = [leaf.pages[-1] for leaf in leaves if leaf.last_access == oldest]
            assert tree.evict(1) == [] if not leaves else tree.evict(1)[0] in last_pages
        assert tree.audit() == []
