"""Phase 1: pages are created, allocated, shared, freed and counted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nanoserve.cache.kv_pool import KVCachePool, PageTable, PoolExhausted, pages_for_budget


def test_a_new_pool_has_all_its_pages_free() -> None:
    """Creation keeps the sizes asked for and hands nothing out; bytes count K and V of every layer in float32."""
    pool = KVCachePool(num_pages=8, page_size=16, num_layers=3, num_heads=2, head_dim=4)
    assert (pool.num_pages, pool.page_size, pool.num_layers, pool.num_heads, pool.head_dim) == (
        8,
        16,
        3,
        2,
        4,
    )
    assert (pool.num_free_pages, pool.num_used_pages) == (8, 0)
    assert pool.page_bytes == 2 * 3 * 2 * 4 * 16 * 4
    assert pool.bytes_total >= 8 * pool.page_bytes
    assert pool.audit([]) == []


def test_a_pool_can_have_all_its_memory_at_once() -> None:
    """Untouched pages cost nothing until `populate` takes them; their numbers stay zero."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    pool = KVCachePool(num_pages=64, page_size=16, num_layers=4, num_heads=8, head_dim=256)
    before = resident()
    if not pool.populate():
        pytest.skip("this system cannot populate memory")
    assert resident() - before >= 0.9 * pool.bytes_total
    assert not pool.get_layer_cache(3)[1].any()


@pytest.mark.parametrize("name", ["num_pages", "page_size", "num_layers", "num_heads", "head_dim"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_pool_of_no_size_is_refused(name: str, value: int) -> None:
    """Sizes are multiplied into an allocation: each is checked first, and named."""
    sizes = {"num_pages": 4, "page_size": 4, "num_layers": 1, "num_heads": 1, "head_dim": 4}
    with pytest.raises(ValueError, match=name):
        KVCachePool(**(sizes | {name: value}))


def test_a_pool_too_large_to_address_is_refused() -> None:
    """The product of the sizes must not wrap around into a small allocation."""
    with pytest.raises((ValueError, OverflowError, MemoryError), match="num_pages"):
        KVCachePool(num_pages=2**40, page_size=2**20, num_layers=2**10, num_heads=2**10, head_dim=2**10)


def test_allocation_rounds_up_and_takes_the_lowest_ids() -> None:
    """Lowest first keeps runs reproducible and a lightly used arena untouched."""
    pool = KVCachePool(num_pages=8, page_size=4)
    assert pool.allocate(1) == [0]
    assert pool.allocate(9) == [1, 2, 3]
    pool.free([1, 0])
    assert pool.allocate(8) == [0, 1]
    assert pool.num_free_pages == 4


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_pages_needed_at_page_boundaries(tokens: int, pages: int) -> None:
    """One token past a full page costs a page, one before does not."""
    pool = KVCachePool(num_pages=4, page_size=16)
    assert pool.pages_needed(tokens) == pages
    assert len(pool.allocate(tokens)) == pages


def test_can_allocate_agrees_with_allocate() -> None:
    """The scheduler asks first: the answer must be exact at the edge."""
    pool = KVCachePool(num_pages=3, page_size=4)
    assert pool.can_allocate(12)
    assert not pool.can_allocate(13)
    pool.allocate(5)
    assert pool.can_allocate(4)
    assert not pool.can_allocate(5)


def test_freed_pages_are_free_again() -> None:
    """Freeing gives every page back, and the pool balances."""
    pool = KVCachePool(num_pages=6, page_size=4)
    first, second = pool.allocate(8), pool.allocate(8)
    pool.free(first)
    assert pool.num_free_pages == 4
    pool.free(second)
    assert (pool.num_free_pages, pool.audit([])) == (6, [])


def test_exhaustion_takes_nothing_and_says_how_much_was_missing() -> None:
    """A failed allocation must leave the pool as it was, or a retry leaks."""
    pool = KVCachePool(num_pages=4, page_size=4)
    held = pool.allocate(8)
    with pytest.raises(PoolExhausted, match="3 pages wanted, 2 of 4 free") as caught:
        pool.allocate(12)
    assert isinstance(caught.value, RuntimeError)
    assert pool.num_free_pages == 2
    assert pool.allocate(8) == [2, 3]
    assert held == [0, 1]


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([1], "page 1 is free already"),
        ([4], "page 4 is out of range"),
        ([-1], "page -1"),
        ([0, 0], "page 0 is listed 2"),
    ],
)
def test_bad_and_double_frees_are_errors_that_change_nothing(pages: list[int], message: str) -> None:
    """A double free hands one page to two requests: it must be loud, and leave the rest of the list alone."""
    pool = KVCachePool(num_pages=4, page_size=4)
    pool.allocate(1)
    with pytest.raises((ValueError, IndexError), match=message):
        pool.free(pages)
    assert (pool.ref_count(0), pool.num_free_pages, pool.audit([[0]])) == (1, 3, [])


def test_a_shared_page_is_free_after_its_last_holder_lets_go() -> None:
    """unref names the pages that really became free: nobody may count the others."""
    pool = KVCachePool(num_pages=4, page_size=4)
    pages = pool.allocate(8)
    pool.ref(pages)
    assert [pool.ref_count(page) for page in range(4)] == [2, 2, 0, 0]
    assert pool.unref(pages) == []
    assert pool.num_free_pages == 2
    assert sorted(pool.unref(pages)) == pages
    with pytest.raises(ValueError, match="free"):
        pool.ref([0])


def test_many_random_allocations_and_frees_balance() -> None:
    """Ten thousand operations against a plain model of sets, audited throughout: no page is lost or given twice."""
    pool, rng = KVCachePool(num_pages=50, page_size=4), random.Random(0)
    held: list[list[int]] = []
    for step in range(10_000):
        tokens = rng.randrange(0, 60)
        free = set(range(50)) - {page for pages in held for page in pages}
        if rng.random() < 0.55 and pool.can_allocate(tokens):
            pages = pool.allocate(tokens)
            assert pages == sorted(free)[: -(-tokens // 4)]
            held.append(pages)
        elif held:
            pool.free(held.pop(rng.randrange(len(held))))
        if step % 500 == 0:
            assert pool.audit(held) == []
    assert pool.num_used_pages == sum(map(len, held))


def test_the_audit_finds_a_leak_and_a_stolen_page() -> None:
    """A check that cannot fail is none: one unknown holder and one missing holder are both reported."""
    pool = KVCachePool(num_pages=4, page_size=4)
    pool.allocate(8)
    assert pool.audit([[0, 1]]) == []
    assert "page 1 has 1 references but 0 holders" in pool.audit([[0]])
    assert any("page 3" in problem for problem in pool.audit([[0, 1], [3]]))


def test_statistics_count_bytes_tokens_and_waste() -> None:
    """Fragmentation is the share of held memory without tokens: 3 tokens in a page of 4 waste a quarter."""
    pool = KVCachePool(num_pages=8, page_size=4, num_layers=2)
    table = PageTable(pool)
    table.grow_to(3)
    stats = pool.stats()
    assert (stats["num_pages"], stats["free"], stats["used"], stats["shared"]) == (8, 7, 1, 0)
    assert (stats["tokens_held"], stats["tokens_capacity_used"]) == (3, 4)
    assert stats["internal_fragmentation"] == pytest.approx(0.25)
    assert stats["bytes_used"] == pool.page_bytes
    pool.ref(table.pages)
    assert pool.stats()["shared"] == 1


def test_pages_for_a_budget() -> None:
    """Whole pages only; the pool built from the answer fits the budget."""
    page_bytes = 2 * 2 * 3 * 8 * 16 * 4
    assert pages_for_budget(10 * page_bytes + 1, num_layers=2, num_heads=3, head_dim=8) == 10
    assert pages_for_budget(page_bytes, num_layers=2, num_heads=3, head_dim=8) == 1
    assert pages_for_budget(page_bytes, num_layers=2, num_heads=3, head_dim=8, page_size=8, itemsize=2) == 4
    assert (
        KVCachePool(num_pages=1, page_size=16, num_layers=2, num_heads=3, head_dim=8).page_bytes == page_bytes
    )


@pytest.mark.parametrize(
    ("budget", "sizes", "message"),
    [
        (100, {}, "kv_cache_bytes: 100 is less than one page of 6144 bytes"),
        (-1, {}, "kv_cache_bytes: -1"),
        (1e6, {}, "kv_cache_bytes: 1000000.0 must be an integer"),
        (True, {}, "kv_cache_bytes: True must be an integer"),
        (10**6, {"num_layers": 0}, "num_layers: 0"),
        (10**6, {"page_size": -16}, "page_size: -16"),
        (10**6, {"head_dim": 8.0}, "head_dim: 8.0"),
    ],
)
def test_a_budget_that_cannot_work_is_refused_with_the_arithmetic(
    budget: int, sizes: dict[str, Any], message: str
) -> None:
    """The user sees which number to change."""
    with pytest.raises(ValueError, match=message):
        pages_for_budget(budget, **({"num_layers": 2, "num_heads": 3, "head_dim": 8} | sizes))
