"""Phase 4: the lessons' calls of the cache manager: match, allocate, insert, evict, and the numbers it reports."""

from __future__ import annotations

import pytest

from nanoserve.cache.kv_pool import KVCachePool, PoolExhausted
from nanoserve.cache.radix_manager import RadixCacheManager

A, B, C, D = [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3], [4, 4, 4, 4]


@pytest.fixture
def pool() -> KVCachePool:
    return KVCachePool(num_pages=6, page_size=4)


@pytest.fixture
def manager(pool: KVCachePool) -> RadixCacheManager:
    return RadixCacheManager(pool)


def cache(manager: RadixCacheManager, tokens: list[int]) -> list[int]:
    """Computes tokens elsewhere, shares them, and lets go of the pages: what a finished request leaves behind."""
    _, pages = manager.get_or_allocate(tokens)
    manager.insert_sequence(tokens, pages)
    manager.kv_pool.free(pages)
    return pages


def balanced(manager: RadixCacheManager, *holders: list[int]) -> bool:
    return manager.kv_pool.audit([manager.tree_pages(), *holders]) == [] and manager.audit() == []


def test_unknown_tokens_get_new_pages(manager: RadixCacheManager) -> None:
    """Nothing is cached: every page is new, owned by the caller alone, and not in the tree before it is inserted."""
    cached, pages = manager.get_or_allocate(A + B + [5])
    assert (cached, pages) == (0, [0, 1, 2])
    assert manager.match_prefix(A + B) == (0, [])
    assert balanced(manager, pages)


def test_a_cached_prefix_gives_its_pages(manager: RadixCacheManager) -> None:
    """The prefix's pages are shared, only the rest is new: two holders on the shared ones, one on the new."""
    cache(manager, A + B)
    cached, pages = manager.get_or_allocate(A + B + C)
    assert (cached, pages) == (8, [0, 1, 2])
    assert [manager.kv_pool.ref_count(page) for page in pages] == [2, 2, 1]
    assert manager.match_prefix(A + B + C) == (8, [0, 1])
    assert balanced(manager, pages)


def test_the_tree_holds_one_reference_on_each_page(manager: RadixCacheManager) -> None:
    """Inserting again, or the same tokens under other pages, takes no second reference."""
    _, pages = manager.get_or_allocate(A + B)
    assert manager.insert_sequence(A + B, pages) == 8
    assert manager.insert_sequence(A + B, pages) == 0
    _, others = RadixCacheManager(manager.kv_pool).get_or_allocate(A + B)
    assert manager.insert_sequence(A + B, others) == 0
    assert balanced(manager, pages, others)
    manager.kv_pool.free(others)
    assert manager.tree_pages() == pages


def test_cached_pages_survive_their_first_owner(manager: RadixCacheManager) -> None:
    """That is the point of the cache: the pages stay used until eviction, though nobody runs."""
    cache(manager, A + B)
    assert (manager.kv_pool.num_used_pages, manager.num_available_pages) == (2, 6)
    assert manager.peek(A + B + C) == 8


def test_a_fully_cached_prompt_still_computes_its_last_token(manager: RadixCacheManager) -> None:
    """All 8 tokens are cached: 7 count, and the page with the last is a private copy that may be written."""
    cache(manager, A + B)
    cached, pages = manager.get_or_allocate(A + B)
    assert (cached, pages) == (7, [0, 2])
    assert manager.kv_pool.ref_count(2) == 1
    assert balanced(manager, pages)


def test_eviction_is_automatic_when_pages_run_out(manager: RadixCacheManager) -> None:
    """A full pool of idle prefixes is as good as an empty one: the oldest goes, the newer stays."""
    cache(manager, A + B + C)
    cache(manager, D + C + B)
    cached, pages = manager.get_or_allocate(B + A + [9])
    assert (cached, len(pages), manager.total_evictions) == (0, 3, 3)
    assert (manager.peek(A + B + C), manager.peek(D + C + B)) == (0, 12)
    assert balanced(manager, pages)


def test_allocation_that_cannot_fit_takes_nothing_and_evicts_nothing(manager: RadixCacheManager) -> None:
    """A refused admission must not cost the others their cache."""
    _, held = manager.get_or_allocate(D + D + D)
    cache(manager, A + B)
    with pytest.raises(
        PoolExhausted, match=r"3 more pages are needed for 20 tokens \(8 cached\), 1 are free"
    ):
        manager.get_or_allocate(A + B + C + C + C)
    assert (manager.peek(A + B), manager.total_evictions, manager.kv_pool.num_free_pages) == (8, 0, 1)
    assert balanced(manager, held)


def test_the_matched_prefix_is_not_evicted_to_make_room_for_its_own_rest(manager: RadixCacheManager) -> None:
    """The prefix is the oldest entry, and the pages it needs must come from the other one."""
    cache(manager, A + B)
    cache(manager, C + D)
    manager.evict_lru(0)
    cached, pages = manager.get_or_allocate(A + B + D + D + D + D)
    assert (cached, len(pages)) == (8, 6)
    assert pages[:2] == [0, 1]
    assert manager.peek(C + D) == 0
    assert balanced(manager, pages)


def test_evicting_counts_only_pages_that_became_free(manager: RadixCacheManager) -> None:
    """A page that somebody still holds leaves the tree but not memory: counting it would promise pages twice."""
    _, held = manager.get_or_allocate(A + B)
    manager.insert_sequence(A + B, held)
    cache(manager, C)
    assert manager.num_available_pages == 4
    assert manager.evict_lru(5) == 1
    assert (manager.total_evictions, manager.kv_pool.num_free_pages) == (3, 4)
    assert balanced(manager, held)


def test_reserve_does_not_evict_when_it_cannot_succeed(manager: RadixCacheManager) -> None:
    """Idle pages that a caller still holds cannot be freed: reserve says no and leaves the cache as it is."""
    _, held = manager.get_or_allocate(A + B)
    manager.insert_sequence(A + B, held)
    cache(manager, C + D)
    assert not manager.reserve(5)
    assert (manager.peek(A + B), manager.peek(C + D), manager.total_evictions) == (8, 8, 0)
    assert manager.reserve(4)
    assert manager.kv_pool.num_free_pages == 4
    assert (manager.peek(C + D), manager.reserve(0)) == (0, True)


def test_pages_are_reused_after_eviction_for_other_tokens(manager: RadixCacheManager) -> None:
    """The old tokens must not match any more, although their page ids are in the tree again."""
    old = cache(manager, A + B)
    assert manager.evict_lru(2) == 2
    assert manager.peek(A + B) == 0
    assert cache(manager, C + D) == old
    assert manager.match_prefix(C + D) == (8, old)
    assert manager.match_prefix(A + B) == (0, [])


def test_least_recently_used_prefixes_go_first(manager: RadixCacheManager) -> None:
    """A was used again after B and C: B is the first to go, then C."""
    for tokens in (A, B, C):
        cache(manager, tokens)
    manager.match_prefix(A)
    assert manager.evict_lru(1) == 1
    assert [manager.peek(tokens) for tokens in (A, B, C)] == [4, 0, 4]
    assert manager.evict_lru(1) == 1
    assert [manager.peek(tokens) for tokens in (A, B, C)] == [4, 0, 0]


def test_hits_and_misses_count_prompt_tokens(manager: RadixCacheManager) -> None:
    """9 tokens missed, then 8 of 12 found: a rate over tokens says how much work the cache saved."""
    assert manager.cache_hit_rate == 0.0
    cache(manager, A + B + [5])
    manager.get_or_allocate(A + B + C)
    assert (manager.cache_hits, manager.cache_misses) == (8, 13)
    assert manager.cache_hit_rate == pytest.approx(8 / 21)
    manager.clear_stats()
    assert (manager.cache_hits, manager.cache_misses, manager.total_evictions, manager.cache_hit_rate) == (
        0,
        0,
        0,
        0.0,
    )


def test_clear_forgets_every_idle_prefix(manager: RadixCacheManager) -> None:
    """All memory back, and nothing matches."""
    cache(manager, A + B)
    cache(manager, A + C)
    assert manager.clear() == 3
    assert (manager.peek(A + B), manager.tree_pages(), manager.kv_pool.num_free_pages) == (0, [], 6)
    assert manager.total_evictions == 0
    assert balanced(manager)


def test_a_disabled_cache_never_shares(pool: KVCachePool) -> None:
    """Same calls, no reuse: what the comparison runs and the ablation switch need."""
    manager = RadixCacheManager(pool, enabled=False)
    cached, pages = manager.get_or_allocate(A + B)
    assert manager.insert_sequence(A + B, pages) == 0
    pool.free(pages)
    assert (cached, manager.match_prefix(A + B), manager.peek(A + B)) == (0, (0, []), 0)
    assert (pool.num_free_pages, manager.reserve(6), manager.reserve(7)) == (6, True, False)
    assert (manager.cache_hits, manager.cache_misses) == (0, 8)


def test_misuse_is_refused_before_anything_changes(manager: RadixCacheManager) -> None:
    """Free pages have no content to share, and no tokens need no pages."""
    with pytest.raises(ValueError, match="page 0 is free"):
        manager.insert_sequence(A, [0])
    with pytest.raises(ValueError, match="no tokens"):
        manager.get_or_allocate([])
    assert balanced(manager)
