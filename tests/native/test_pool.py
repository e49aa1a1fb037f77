"""KVCachePool and PageTable from Python: views without copies, errors that name the numbers, lifetimes."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoserve.native import KVCachePool, PageTable, PoolExhausted


def small_pool(num_pages: int = 8) -> KVCachePool:
    return KVCachePool(num_pages=num_pages, page_size=4, num_layers=2, num_heads=2, head_dim=3)


def test_shape_and_defaults() -> None:
    pool = KVCachePool(3)
    assert (pool.num_pages, pool.page_size, pool.num_layers, pool.num_heads, pool.head_dim) == (
        3,
        16,
        1,
        1,
        16,
    )
    pool = small_pool()
    assert pool.page_bytes == 2 * 2 * 2 * 3 * 4 * 4
    assert pool.bytes_total >= 8 * pool.page_bytes
    assert (pool.num_free_pages, pool.num_used_pages) == (8, 0)
    assert pool.pages_needed(0) == 0
    assert pool.pages_needed(9) == 3


def test_views_share_memory_with_the_layout() -> None:
    pool = small_pool()
    table = PageTable(pool)
    table.grow_to(11)
    rows = np.arange(2 * 11 * 6, dtype=np.float32).reshape(2, 11, 2, 3)
    slots = table.slots(0, 11)
    assert slots.dtype == np.int32
    pool.store_kv(rows[0], rows[1], slots, 1)
    k, v = pool.get_layer_cache(1)
    assert k.shape == v.shape == (8, 4, 2, 3)
    assert k.dtype == v.dtype == np.float32
    # The documented layouts: K keeps a page's tokens next to each other, V keeps a token's numbers together, and a head's V
    # lies behind its K.
    assert k.strides == (192, 4, 96, 16)
    assert v.strides == (192, 12, 96, 4)
    assert v.ctypes.data - k.ctypes.data == 48
    np.testing.assert_array_equal(k.reshape(32, 2, 3)[slots], rows[0])
    np.testing.assert_array_equal(v.reshape(32, 2, 3)[slots], rows[1])
    assert not pool.get_layer_cache(0)[0].any()
    k[0, 0, 0, 0] = 77
    assert pool.get_layer_cache(1)[0][0, 0, 0, 0] == 77
    pool.scrub(table.pages)
    assert not k.any()
    assert not v.any()


def test_views_keep_the_pool_alive() -> None:
    pool = small_pool()
    alive = weakref.ref(pool)
    k, _ = pool.get_layer_cache(0)
    k[7, 3, 1, 2] = 5
    del pool, _
    gc.collect()
    assert alive() is not None
    assert k[7, 3, 1, 2] == 5
    del k
    gc.collect()
    assert alive() is None


def test_tables_keep_the_pool_alive() -> None:
    table = PageTable(small_pool())
    gc.collect()
    assert table.grow_to(5) == [0, 1]
    assert table.pool.num_free_pages == 6


def test_a_dropped_table_returns_its_pages() -> None:
    pool = small_pool()
    table = PageTable(pool)
    table.grow_to(8)
    pool.ref([0])
    del table
    gc.collect()
    assert (pool.ref_count(0), pool.ref_count(1), pool.num_free_pages) == (1, 0, 7)
    assert pool.audit([[0]]) == []
    assert pool.audit() == ["page 0 has 1 references but 0 holders"]


def test_exhaustion_is_its_own_runtime_error() -> None:
    pool = small_pool()
    table = PageTable(pool)
    table.grow_to(20)
    with pytest.raises(PoolExhausted, match=r"4 pages wanted, 3 of 8 free"):
        table.grow_to(36)
    with pytest.raises(RuntimeError):
        pool.allocate(13)
    assert (len(table), table.capacity, table.num_tokens, pool.num_free_pages) == (5, 20, 20, 3)


@pytest.mark.parametrize(
    ("pages", "error", "text"),
    [
        ([0, 0], ValueError, "page 0 is listed 2 times but has 1 references"),
        ([5], ValueError, "page 5 is free already"),
        ([0, 8], IndexError, "page 8 is out of range: the pool has pages 0 to 7"),
        ([0, -1], IndexError, "page -1 is out of range"),
        ([0, 2**40], IndexError, "page 1099511627776 is out of range"),
        ([0, 2**80], TypeError, "incompatible function arguments"),
        ([0, 1.5], TypeError, "incompatible function arguments"),
        (["a"], TypeError, "incompatible function arguments"),
    ],
)
def test_bad_lists_change_nothing(pages: list[int], error: type[Exception], text: str) -> None:
    pool = small_pool()
    pool.allocate_pages(2)
    for call in (pool.free, pool.unref):
        with pytest.raises(error, match=text):
            call(pages)
    assert pool.audit([[0], [1]]) == []


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_pages": 0}, ValueError, "num_pages is 0, must be at least 1"),
        ({"num_pages": 4, "page_size": 0}, ValueError, "page_size is 0"),
        ({"num_pages": 4, "head_dim": -1}, ValueError, "head_dim is -1"),
        ({"num_pages": 2**31, "page_size": 16}, ValueError, "num_pages . page_size is 34359738368"),
        (
            {"num_pages": 2**40, "page_size": 2**40},
            ValueError,
            "does not fit in 63 bits: num_pages=1099511627776",
        ),
        ({"num_pages": 4, "num_layers": 2**60}, ValueError, "num_layers=1152921504606846976"),
        ({"num_pages": 4, "num_layers": 2**45}, MemoryError, "the system refused [0-9]+ bytes"),
        ({"num_pages": 2.0}, TypeError, "incompatible"),
        ({"num_pages": 2**70}, TypeError, "incompatible"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, int], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        KVCachePool(**arguments)


def store_cases() -> list[tuple[str, dict[str, object], type[Exception], str]]:
    good = np.zeros((2, 2, 3), np.float32)
    return [
        ("k as float64", {"k": good.astype(np.float64)}, TypeError, "k has dtype float64, must be float32"),
        ("v as a list", {"v": good.tolist()}, TypeError, "v must be a NumPy array"),
        ("k flat", {"k": good.reshape(2, 6)}, ValueError, r"k has shape \[2, 6\], must have 3 dimensions"),
        (
            "v with other heads",
            {"v": np.zeros((2, 1, 3), np.float32)},
            ValueError,
            r"v has shape \[2, 1, 3\], must be",
        ),
        ("more slots", {"slots": [0, 1, 2]}, ValueError, r"k has shape \[2, 2, 3\], must be \[3, 2, 3\]"),
        (
            "negative slot",
            {"slots": [0, -1]},
            IndexError,
            "slot -1 is out of range: the pool has slots 0 to 31",
        ),
        ("slot past the end", {"slots": [0, 32]}, IndexError, "slot 32 is out of range"),
        ("float slots", {"slots": [0.0, 1.0]}, TypeError, "slots has dtype float64, must hold integers"),
        ("bool slots", {"slots": [True, False]}, TypeError, "slots has dtype bool"),
        ("free page", {"slots": [0, 8]}, RuntimeError, "page 2 has 0 references"),
        ("shared page", {"slots": [0, 4]}, RuntimeError, "page 1 has 2 references"),
        ("layer", {"layer": 2}, IndexError, "layer 2 is out of range: the pool has layers 0 to 1"),
    ]


@pytest.mark.parametrize(
    ("change", "error", "text"), [c[1:] for c in store_cases()], ids=[c[0] for c in store_cases()]
)
def test_store_kv_checks_everything(change: dict[str, object], error: type[Exception], text: str) -> None:
    pool = small_pool()
    pool.allocate_pages(2)
    pool.ref([1])
    ones = np.ones((2, 2, 3), np.float32)
    with pytest.raises(error, match=text):
        pool.store_kv(**({"k": ones, "v": ones, "slots": [0, 1], "layer": 0} | change))
    assert not any(view.any() for layer in (0, 1) for view in pool.get_layer_cache(layer))


def test_store_kv_takes_strided_rows_and_any_integers() -> None:
    pool = small_pool()
    pool.allocate_pages(1)
    wide = np.arange(24, dtype=np.float32).reshape(2, 2, 6)
    pool.store_kv(wide[:, :, ::2], wide[:, :, 1::2], np.array([2, 1], np.uint16), 0)
    k, v = pool.get_layer_cache(0)
    np.testing.assert_array_equal(k[0, [2, 1]], wide[:, :, ::2])
    np.testing.assert_array_equal(v[0, [2, 1]], wide[:, :, 1::2])


def test_table_reads_like_a_list() -> None:
    pool = small_pool()
    table = PageTable(pool)
    table.grow_to(9)
    assert list(table) == table.pages == [0, 1, 2]
    assert table[-1] == 2
    for index in (3, -4):
        with pytest.raises(IndexError):
            table[index]
    with pytest.raises(TypeError):
        PageTable(None)


def test_slots_are_checked() -> None:
    table = PageTable(small_pool())
    table.grow_to(8)
    assert table.slots(3, 3).tolist() == [3, 4, 5]
    assert table.slots(8, 0).shape == (0,)
    for start, count, error in [
        (7, 2, IndexError),
        (-1, 2, ValueError),
        (0, -1, ValueError),
        (2**62, 8, IndexError),
    ]:
        with pytest.raises(error):
            table.slots(start, count)


def test_copy_on_write_keeps_the_original() -> None:
    pool = small_pool()
    first, second = PageTable(pool), PageTable(pool)
    first.grow_to(4)
    pool.store_kv(*np.ones((2, 1, 2, 3), np.float32), [0], 0)
    second.adopt(first.pages)
    assert second.make_writable(-1)
    assert second.pages == [1]
    pool.store_kv(*np.full((2, 1, 2, 3), 9, np.float32), [4], 0)
    k, _ = pool.get_layer_cache(0)
    assert (k[0, 0] == 1).all()
    assert (k[1, 0] == 9).all()
    assert not second.make_writable(0)


def test_stats_name_what_they_count() -> None:
    pool = small_pool()
    table = PageTable(pool)
    table.grow_to(5)
    stats = pool.stats()
    assert stats == {
        "num_pages": 8,
        "free": 6,
        "used": 2,
        "shared": 0,
        "bytes_total": pool.bytes_total,
        "bytes_used": 2 * pool.page_bytes,
        "tokens_held": 5,
        "tokens_capacity_used": 8,
        "internal_fragmentation": 0.375,
    }


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("gasrwd"), st.integers(0, 3), st.integers(0, 40)), max_size=60))
def test_tables_never_lose_or_invent_a_page(operations: list[tuple[str, int, int]]) -> None:
    """Random growing, sharing, copying and releasing over four tables and one plain holder; audit after each."""
    pool = small_pool(12)
    tables = [PageTable(pool) for _ in range(4)]
    held: list[list[int]] = []
    for action, which, number in operations:
        table = tables[which]
        try:
            if action == "g":
                table.grow_to(number)
            elif action == "a":
                table.adopt(tables[number % 4].pages[: number % 3])
            elif action == "s" and len(table):
                table.make_writable(number % len(table))
            elif action == "r":
                table.release()
            elif action == "w" and len(table):
                pool.ref([table[0]])
                held.append([table[0]])
            elif action == "d" and held:
                pool.unref(held.pop())
        except PoolExhausted:
            assert pool.num_free_pages < 11
        assert pool.audit(held) == []
        assert all(len(t) * 4 == t.capacity >= t.num_tokens for t in tables)
    tables.clear()
    table = None
    assert pool.audit(held) == []
    assert pool.num_used_pages == len({page for pages in held for page in pages})
