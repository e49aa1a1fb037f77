"""Phase 1: what is written into a slot is what is read from it, in every layer, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from nanoserve.cache.kv_pool import KVCachePool, PageTable
from support.bfloat16 import to_bf16

LAYERS, HEADS, DIM, PAGE = 3, 2, 4, 8


@pytest.fixture
def pool() -> KVCachePool:
    return KVCachePool(num_pages=6, page_size=PAGE, num_layers=LAYERS, num_heads=HEADS, head_dim=DIM)


def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, HEADS, DIM)).astype(np.float32)


def test_stored_kv_is_read_back_unchanged(pool: KVCachePool) -> None:
    """Bit for bit through the page layout, for slots in any order over two pages."""
    pool.allocate(2 * PAGE)
    slots = np.array([15, 0, 9, 7, 8], dtype=np.int32)
    k, v = rows(5, 1), rows(5, 2)
    pool.store_kv(k, v, slots, 0)
    k_view, v_view = pool.get_layer_cache(0)
    assert k_view.shape == v_view.shape == (6, PAGE, HEADS, DIM)
    for row, slot in enumerate(slots):
        assert np.array_equal(k_view[slot // PAGE, slot % PAGE], k[row])
        assert np.array_equal(v_view[slot // PAGE, slot % PAGE], v[row])
    untouched = [slot for slot in range(6 * PAGE) if slot not in set(slots.tolist())]
    assert not any(k_view[slot // PAGE, slot % PAGE].any() for slot in untouched)


def test_layers_are_separate(pool: KVCachePool) -> None:
    """The same slot in another layer is another place."""
    pool.allocate(1)
    values = [(rows(1, layer), rows(1, 100 + layer)) for layer in range(LAYERS)]
    for layer, (k, v) in enumerate(values):
        pool.store_kv(k, v, np.array([3], dtype=np.int32), layer)
    for layer, (k, v) in enumerate(values):
        k_view, v_view = pool.get_layer_cache(layer)
        assert np.array_equal(k_view[0, 3], k[0])
        assert np.array_equal(v_view[0, 3], v[0])


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_out_of_range_is_refused(pool: KVCachePool, layer: int) -> None:
    """The index is an offset into the arena."""
    with pytest.raises((IndexError, ValueError), match="layer"):
        pool.get_layer_cache(layer)


def test_a_sequence_crosses_page_boundaries(pool: KVCachePool) -> None:
    """20 tokens over three pages that do not follow each other: a table's slots put every token in its place."""
    blocker = pool.allocate(1)
    table = PageTable(pool)
    table.grow_to(5)
    pool.free(blocker)
    table.grow_to(20)
    assert table.pages == [1, 0, 2]
    k, v = rows(20, 5), rows(20, 6)
    for start, stop in ((0, 7), (7, 9), (9, 20)):
        pool.store_kv(k[start:stop], v[start:stop], table.slots(start, stop - start), 1)
    k_view, v_view = pool.get_layer_cache(1)
    assert np.array_equal(k_view[table.pages].reshape(-1, HEADS, DIM)[:20], k)
    assert np.array_equal(v_view[table.pages].reshape(-1, HEADS, DIM)[:20], v)


def test_views_share_the_pools_memory_and_keep_it_alive() -> None:
    """Zero copy: a later write is seen through an older view, also after the last name of the pool is gone."""
    pool = KVCachePool(num_pages=2, page_size=4, num_layers=1, num_heads=1, head_dim=4)
    pool.allocate(1)
    k_view, _ = pool.get_layer_cache(0)
    ones = np.ones((1, 1, 4), dtype=np.float32)
    pool.store_kv(ones, ones, np.array([2], dtype=np.int32), 0)
    del pool
    assert k_view[0, 2].tolist() == [[1.0, 1.0, 1.0, 1.0]]


def test_a_shared_page_cannot_be_written(pool: KVCachePool) -> None:
    """A write into a page with two holders would change the other one's past: refused with the page and its count."""
    pages = pool.allocate(1)
    pool.ref(pages)
    with pytest.raises(RuntimeError, match="page 0 has 2 references"):
        pool.store_kv(rows(1, 0), rows(1, 0), np.array([0], dtype=np.int32), 0)
    assert not pool.get_layer_cache(0)[0].any()


def test_bad_shapes_and_slots_are_refused_and_nothing_is_written(pool: KVCachePool) -> None:
    """One bad slot in a list must not leave the others half written."""
    pool.allocate(PAGE)
    with pytest.raises((ValueError, IndexError), match="slot"):
        pool.store_kv(rows(2, 1), rows(2, 1), np.array([0, 6 * PAGE], dtype=np.int32), 0)
    with pytest.raises((ValueError, IndexError, RuntimeError), match="slot"):
        pool.store_kv(rows(2, 1), rows(2, 1), np.array([0, -1], dtype=np.int32), 0)
    with pytest.raises(ValueError, match="shape"):
        pool.store_kv(rows(2, 1), rows(1, 1), np.array([0, 1], dtype=np.int32), 0)
    with pytest.raises(ValueError, match="shape"):
        pool.store_kv(rows(1, 1)[:, :1], rows(1, 1)[:, :1], np.array([0], dtype=np.int32), 0)
    assert not pool.get_layer_cache(0)[0].any()


def test_copy_on_write_copies_all_layers_and_leaves_the_original(pool: KVCachePool) -> None:
    """The writer gets its own page with the same content; whoever shares the old one sees no change."""
    table, sharer = PageTable(pool), PageTable(pool)
    table.grow_to(PAGE)
    for layer in range(LAYERS):
        pool.store_kv(rows(PAGE, layer), rows(PAGE, 50 + layer), table.slots(0, PAGE), layer)
    sharer.adopt(table.pages)
    assert sharer.make_writable(0)
    assert (table.pages, sharer.pages) == ([0], [1])
    assert not sharer.make_writable(0)
    for layer in range(LAYERS):
        k_view, v_view = pool.get_layer_cache(layer)
        assert np.array_equal(k_view[1], rows(PAGE, layer))
        assert np.array_equal(v_view[1], rows(PAGE, 50 + layer))
    pool.store_kv(rows(1, 99), rows(1, 99), sharer.slots(3, 1), 0)
    assert np.array_equal(pool.get_layer_cache(0)[0][0], rows(PAGE, 0))


def test_scrubbing_clears_keys_and_values_of_every_layer(pool: KVCachePool) -> None:
    """After a non-finite request its pages must not carry a NaN into the next one's attention."""
    pool.allocate(2 * PAGE)
    bad = np.full((2, HEADS, DIM), np.nan, dtype=np.float32)
    for layer in range(LAYERS):
        pool.store_kv(bad, bad, np.array([1, PAGE], dtype=np.int32), layer)
    pool.scrub([0])
    for layer in range(LAYERS):
        for view in pool.get_layer_cache(layer):
            assert np.isfinite(view[0]).all()
            assert np.isnan(view[1, 0]).all()


def test_a_new_arena_reads_as_zeros(pool: KVCachePool) -> None:
    """Kernels read a page's unused tail with weight zero: it must be finite from the start."""
    assert not any(view.any() for layer in range(LAYERS) for view in pool.get_layer_cache(layer))


@pytest.mark.parametrize("page_size", [2, 16, 48])
def test_bf16_pages_hold_rounded_keys_and_values(page_size: int) -> None:
    """Half the bytes; the views' axes of two are the pairs, and reading through them gives back what was stored."""
    pool = KVCachePool(6, page_size, LAYERS, HEADS, DIM, "bf16")
    wide = KVCachePool(6, page_size, LAYERS, HEADS, DIM)
    assert (pool.element, wide.element, 2 * pool.page_bytes) == ("bf16", "f32", wide.page_bytes)
    pool.allocate_pages(3)
    slots = np.random.default_rng(0).permutation(3 * page_size)[:5]
    k, v = rows(5, 1), rows(5, 2)
    pool.store_kv(k, v, slots, 1)
    k_view, v_view = pool.get_layer_cache(1)
    assert k_view.shape == (6, page_size, HEADS, DIM // 2, 2)
    assert v_view.shape == (6, page_size // 2, 2, HEADS, DIM)
    flat_k, flat_v = (view.reshape(6 * page_size, HEADS, DIM) for view in (k_view, v_view))
    assert flat_k[slots].tobytes() == to_bf16(k).tobytes()
    assert flat_v[slots].tobytes() == to_bf16(v).tobytes()
    assert np.count_nonzero(flat_k) == np.count_nonzero(flat_v) == k.size
    copy = pool.copy_page(slots[0] // page_size)
    assert np.array_equal(k_view[copy], k_view[slots[0] // page_size])
    assert np.array_equal(v_view[copy], v_view[slots[0] // page_size])
    v_view[copy, 0, 1, 0, 3] = 77
    assert pool.get_layer_cache(1)[1][copy].reshape(page_size, HEADS, DIM)[1, 0, 3] == 77
    pool.scrub([copy])
    assert not k_view[copy].any()
    assert not v_view[copy].any()
    assert flat_k.any()


def test_pairs_need_even_sizes_and_elements_are_named() -> None:
    with pytest.raises(ValueError, match="head_dim is 3, must be even"):
        KVCachePool(2, 16, 1, 1, 3, "bf16")
    with pytest.raises(ValueError, match="page_size is 5, must be even"):
        KVCachePool(2, 5, 1, 1, 4, "bf16")
    with pytest.raises(ValueError, match="element 'f16' must be f32 or bf16"):
        KVCachePool(2, 16, 1, 1, 4, "f16")
