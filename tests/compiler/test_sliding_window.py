"""Attention to a window of keys, and with capped scores: float64, the same bits for every tile, nothing outside matters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compiler.paged_inputs import JUNK, Pages, exact, make_pages, make_queries, run
from nanoserve import paged_attention, write_kv
from nanoserve.compiler.target import AVX2, host
from nanoserve.kernels import attention
from nanoserve.native import KVCachePool, PageTable

LENGTHS = [1, 15, 64, 65, 130, 200, 259]
COUNTS = [1, 15, 63, 1, 65, 40, 1]


def slot_of(pages: Pages, token: int) -> tuple[int, int]:
    """Page and offset of a token of sequence 0."""
    return pages.pages[0][token // pages.page_size], token % pages.page_size


@pytest.mark.parametrize(
    ("heads", "kv", "d", "page_size", "rows", "window"),
    [
        (3, 3, 48, 16, 8, 1), (3, 3, 48, 16, 1, 64), (6, 3, 80, 32, 6, 7), (6, 3, 80, 48, 2, 63),
        (4, 1, 96, 64, 8, 65), (4, 2, 96, 16, 4, 100), (5, 1, 33, 128, 16, 128), (2, 2, 64, 16, 8, 1000),
    ],
)  # fmt: skip
def test_a_window_matches_float64(
    heads: int, kv: int, d: int, page_size: int, rows: int, window: int
) -> None:
    """One key, less than a block, a block, not a multiple of it, more than the context: decode rows and chunks."""
    pages = make_pages(LENGTHS, kv, d, page_size)
    queries = make_queries(COUNTS, heads, d)
    for s, got in enumerate(run(pages, queries, heads, rows, window=window)):
        expected = exact(pages.keys[s], pages.values[s], queries[s], window=window)
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)


def test_a_window_of_one_is_the_own_value() -> None:
    pages = make_pages([150], 2, 20, 16)
    (got,) = run(pages, make_queries([150], 4, 20), 4, 8, window=1)
    np.testing.assert_allclose(got, np.repeat(pages.values[0], 2, axis=1), rtol=1e-6)


@pytest.mark.parametrize("window", [1, 5, 64, 100])
@pytest.mark.parametrize("heads", [3, 6])
def test_same_bits_for_every_tile_and_split(heads: int, window: int) -> None:
    """Rows of one item begin in different blocks: what is wholly masked for a row must leave no trace in it."""
    kv, d = 3, 20
    pages = make_pages([150, 64, 1, 199], kv, d, 16)
    queries = make_queries([150, 5, 1, 30], heads, d)
    reference = run(pages, queries, heads, 1, window=window)
    for rows in (2, 6, 8, 16):
        for splits in (1, 3):
            for one, other in zip(
                reference, run(pages, queries, heads, rows, splits, window=window), strict=True
            ):
                assert one.tobytes() == other.tobytes(), f"rows={rows}, splits={splits}"


@pytest.mark.parametrize("window", [3, 64, 90])
def test_nothing_outside_the_window_matters(window: int) -> None:
    """A row alone, all memory but its window overwritten, against eight rows to an item over honest pages."""
    heads, kv, d = 3, 3, 16
    pages = make_pages([210], kv, d, 16)
    q = make_queries([210], heads, d)[0]
    (together,) = run(pages, [q], heads, 8, window=window)
    for t in (0, 1, window - 1, window, 63, 64, 65, 127, 128, 129, 200, 209):
        alone = replace(
            pages, k=np.full_like(pages.k, JUNK), v=np.full_like(pages.v, -JUNK), pages=[pages.pages[0][: t // 16 + 1]],
            keys=[pages.keys[0][: t + 1]], values=[pages.values[0][: t + 1]],
        )  # fmt: skip
        for seen in range(max(0, t + 1 - window), t + 1):
            page, slot = slot_of(pages, seen)
            alone.k[page, :, :, slot], alone.v[page, :, slot] = pages.keys[0][seen], pages.values[0][seen]
        (got,) = run(alone, [q[t : t + 1]], heads, 1, window=window)
        assert got.tobytes() == together[t : t + 1].tobytes(), f"token {t}"


@pytest.mark.parametrize(("count", "rows"), [(1, 2), (30, 4), (30, 8)])
def test_the_walk_begins_at_the_windows_block(count: int, rows: int) -> None:
    """NaN in all blocks before: multiplied with 0 it would come out, so they are not read and cost nothing."""
    window, length = 70, 400
    pages = make_pages([length], 2, 20, 16)
    queries = make_queries([count], 4, 20)
    (honest,) = run(pages, queries, 4, rows, window=window)
    for token in range((length - count - window + 1) // 64 * 64):
        page, slot = slot_of(pages, token)
        pages.k[page, :, :, slot], pages.v[page, :, slot] = np.nan, np.nan
    (got,) = run(pages, queries, 4, rows, window=window)
    assert got.tobytes() == honest.tobytes()


@pytest.mark.parametrize("window", [200, 201, 2**31 - 1])
def test_a_window_beyond_the_context_changes_no_bit(window: int) -> None:
    pages = make_pages([200, 77], 2, 20, 16)
    queries = make_queries([90, 1], 4, 20)
    for one, other in zip(run(pages, queries, 4, 8), run(pages, queries, 4, 8, window=window), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("softcap", [1.5, 50.0])
def test_capped_scores_match_float64(softcap: float, window: int) -> None:
    """Scores up to a hundred: far into the cap, and the row's bits are those it has alone."""
    heads, kv, d = 6, 3, 48
    pages = make_pages(LENGTHS, kv, d, 16)
    queries = [q * np.float32(25) for q in make_queries(COUNTS, heads, d)]
    uncapped = run(pages, queries, heads, 8, window=window)
    reference = run(pages, queries, heads, 1, window=window, softcap=softcap)
    for s, got in enumerate(run(pages, queries, heads, 8, window=window, softcap=softcap)):
        expected = exact(pages.keys[s], pages.values[s], queries[s], window=window, softcap=softcap)
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
        assert got.tobytes() == reference[s].tobytes()
        assert LENGTHS[s] == 1 or not np.allclose(got, uncapped[s], atol=1e-2)


@pytest.mark.skipif(
    host().name not in ("avx512", "avx2"), reason="the second x86 target needs an x86 CPU with AVX2"
)
def test_the_smaller_instruction_set_gives_the_same_bits() -> None:
    pages = make_pages([200, 1, 77], 2, 20, 16)
    queries = make_queries([130, 1, 30], 4, 20)
    reference = run(pages, queries, 4, 8, window=40, softcap=3.0)
    for rows in (tiling.rows for tiling in attention.tilings(2, 2, 20, target=AVX2)):
        narrow = run(pages, queries, 4, rows, target=AVX2, window=40, softcap=3.0)
        for one, other in zip(reference, narrow, strict=True):
            assert one.tobytes() == other.tobytes(), f"rows={rows}"


def test_paged_attention_has_both() -> None:
    rng = np.random.default_rng(3)
    pool = KVCachePool(num_pages=16, num_layers=2, num_heads=2, head_dim=24)
    table = PageTable(pool)
    table.grow_to(100)
    k, v = rng.standard_normal((2, 100, 2, 24)).astype(np.float32)
    write_kv(k, v, pool, 1, table.slots(0, 100))
    q = 5 * rng.standard_normal((9, 4, 24)).astype(np.float32)
    got = paged_attention(q, pool, 1, [table.pages], [91], [9], window=20, softcap=4.0)
    np.testing.assert_allclose(got, exact(k, v, q, window=20, softcap=4.0), atol=1e-4, rtol=1e-4)
