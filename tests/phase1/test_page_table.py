"""Phase 1: one sequence's pages, and the references a table holds for it."""

from __future__ import annotations

import numpy as np
import pytest

from nanoserve.cache.kv_pool import KVCachePool, PageTable, PoolExhausted


@pytest.fixture
def pool() -> KVCachePool:
    return KVCachePool(num_pages=6, page_size=4)


def test_a_table_grows_by_whole_pages(pool: KVCachePool) -> None:
    """Growing to a length it already has costs nothing, one token more a page."""
    table = PageTable(pool)
    assert (len(table), table.capacity) == (0, 0)
    assert table.grow_to(4) == [0]
    assert table.grow_to(3) == []
    assert table.grow_to(5) == [1]
    assert (table.pages, table.capacity, table[0], table[-1]) == ([0, 1], 8, 0, 1)


def test_growth_that_does_not_fit_takes_nothing(pool: KVCachePool) -> None:
    """The table is as it was, so the scheduler can preempt somebody and try again."""
    table = PageTable(pool)
    table.grow_to(8)
    with pytest.raises(PoolExhausted, match="5 pages wanted, 4 of 6 free"):
        table.grow_to(28)
    assert (table.pages, pool.num_free_pages) == ([0, 1], 4)


def test_slots_follow_the_pages(pool: KVCachePool) -> None:
    """slot = page * page_size + offset, across a page boundary, as int32."""
    pool.allocate_pages(2)
    table = PageTable(pool)
    table.grow_to(8)
    slots = table.slots(2, 4)
    assert (slots.tolist(), slots.dtype) == ([10, 11, 12, 13], np.dtype(np.int32))
    assert table.slots(8, 0).tolist() == []


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 9), (7, 2), (8, 1), (0, -1)])
def test_slots_beyond_the_pages_are_refused(pool: KVCachePool, start: int, count: int) -> None:
    """A slot past the end would be some other sequence's memory."""
    table = PageTable(pool)
    table.grow_to(8)
    with pytest.raises((IndexError, ValueError)):
        table.slots(start, count)


def test_adopted_pages_have_one_reference_per_holder(pool: KVCachePool) -> None:
    """A shared prefix belongs to both tables until the last of them lets go."""
    first, second = PageTable(pool), PageTable(pool)
    first.grow_to(8)
    second.adopt(first.pages)
    second.grow_to(12)
    assert second.pages == [0, 1, 2]
    first.release()
    assert (pool.ref_count(0), pool.num_free_pages) == (1, 3)
    assert pool.audit([]) == []


def test_release_gives_everything_back_once(pool: KVCachePool) -> None:
    """Abort and finish may both release: the second call must not free somebody else's pages."""
    table = PageTable(pool)
    table.grow_to(9)
    table.release()
    other = PageTable(pool)
    other.grow_to(9)
    table.release()
    assert (len(table), other.pages, pool.num_free_pages) == (0, [0, 1, 2], 3)


def test_a_table_that_goes_away_leaks_nothing(pool: KVCachePool) -> None:
    """Whatever happens to the request, its pages follow."""
    table = PageTable(pool)
    table.grow_to(24)
    assert pool.num_free_pages == 0
    del table
    assert (pool.num_free_pages, pool.audit([])) == (6, [])


def test_copy_on_write_needs_a_free_page_and_fails_cleanly(pool: KVCachePool) -> None:
    """Without room for the copy nothing changes: the page stays shared and unwritten."""
    table, sharer = PageTable(pool), PageTable(pool)
    table.grow_to(24)
    sharer.adopt([table[5]])
    with pytest.raises(PoolExhausted):
        sharer.make_writable(0)
    assert (sharer.pages, pool.ref_count(table[5]), pool.audit([])) == ([5], 2, [])


def test_the_audit_counts_tables_and_other_holders(pool: KVCachePool) -> None:
    """A reference without a holder and a holder without a reference are both named."""
    table = PageTable(pool)
    table.grow_to(4)
    pool.ref([0])
    assert pool.audit([[0]]) == []
    assert pool.audit([]) == ["page 0 has 2 references but 1 holders"]
