"""Long walks: the same bits whether one item walks all segments or several do; bfloat16 keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compiler.paged_inputs import bf16, exact, make_pages, make_queries, run
from nanoserve import paged_attention, write_kv
from nanoserve.compiler.target import AVX2, host
from nanoserve.kernels import attention
from nanoserve.kernels.library import load_kernels
from nanoserve.native import KVCachePool, PageTable, ThreadPool
from nanoserve.native import paged_attention as native_attention
from support.bfloat16 import to_bf16

LENGTHS = [700, 256, 257, 1, 513]
COUNTS = [20, 3, 1, 1, 300]


def rounded(pages: Any) -> Any:
    """Keys and values as a bf16 pool holds them."""
    for values in (pages.k, pages.v, *pages.keys, *pages.values):
        values[:] = bf16(values)
    return pages


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"window": 300}, {"window": 20, "softcap": 2.0}])
def test_same_bits_for_every_tiling_and_cut(dtype: str, options: dict[str, Any]) -> None:
    heads, kv, d = 6, 2, 40
    pages = make_pages(LENGTHS, kv, d, 16)
    queries = make_queries(COUNTS, heads, d)
    reference = run(pages, queries, heads, 1, dtype=dtype, **options)
    for rows, tiles, segments_each in ((1, 1, 1), (3, 1, 1), (8, 4, 0), (8, 4, 1), (8, 2, 2), (6, 1, 0)):
        got = run(
            pages, queries, heads, rows, tiles=tiles, segments_each=segments_each, dtype=dtype, **options
        )
        assert same(reference, got), f"{rows} x {tiles}, {segments_each} segments to an item"


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("group", "kv", "d", "page_size"),
    [(1, 5, 64, 16), (2, 4, 128, 32), (3, 3, 16, 64), (5, 2, 80, 16), (7, 2, 256, 128), (8, 2, 96, 48)],
)  # fmt: skip
def test_decode_across_heads_has_the_chunks_bits(
    group: int, kv: int, d: int, page_size: int, dtype: str
) -> None:
    """One token of several heads in an item, whole and cut, against the same token at the end of a chunk."""
    heads, lengths = group * kv, [600, 64, 1, 257]
    pages = make_pages(lengths, kv, d, page_size)
    chunks = make_queries([min(5, n) for n in lengths], heads, d)
    small, large = attention.tilings(group, kv, d, dtype)
    together = run(pages, chunks, heads, large.rows, tiles=large.tiles, dtype=dtype)
    last = [q[-1:] for q in chunks]
    for tiles, segments_each in ((small.tiles, 0), (kv, 1), (1, 2)):
        alone = run(
            pages, last, heads, group, tiles=tiles, across="heads", segments_each=segments_each, dtype=dtype
        )
        assert same([q[-1:] for q in together], alone), f"{tiles} heads, {segments_each} segments to an item"


@pytest.mark.parametrize(("options", "d"), [({}, 128), ({"window": 270}, 36), ({"softcap": 3.0}, 64)])
def test_long_contexts_match_float64(options: dict[str, Any], d: int) -> None:
    pages = make_pages(LENGTHS, 2, d, 16)
    queries = make_queries(COUNTS, 4, d)
    for s, got in enumerate(run(pages, queries, 4, 8, tiles=4, **options)):
        expected = exact(pages.keys[s], pages.values[s], queries[s], **options)
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("options", [{}, {"window": 100}])
@pytest.mark.parametrize("d", [20, 64, 128, 150, 256])
def test_bf16_is_as_close_as_its_roundings(d: int, options: dict[str, Any]) -> None:
    """Of keys and values as stored: what is left is the rounding of queries and weights, at most 2^-9 of each.

    A score's error is at most 2^-9 sum |q k| / sqrt(d), for N(0, 1) data about 2^-9 * 0.8 of N(0, 1)'s spread; the weights'
    is 2^-9 of themselves, and both average out over the keys. 2^-7 leaves room for the rows with a single key.
    """
    pages = rounded(make_pages(LENGTHS, 2, d, 16))
    queries = make_queries(COUNTS, 4, d)
    for s, got in enumerate(run(pages, queries, 4, 8, tiles=2, dtype="bf16", **options)):
        expected = exact(pages.keys[s], pages.values[s], queries[s], **options)
        np.testing.assert_allclose(got, expected, atol=2**-7, rtol=2**-7)


def test_a_dominant_key_loses_nothing_to_bf16() -> None:
    """Weight 1 is a bfloat16: the winner's value comes out as it is stored."""
    pages = rounded(make_pages([300], 1, 32, 16))
    pages.k[:], pages.keys[0][:] = 0, 0
    pages.k[pages.pages[0][270 // 16], 0, :, 270 % 16] = 10
    (got,) = run(pages, [np.full((1, 1, 32), 50, dtype=np.float32)], 1, 1, dtype="bf16")
    np.testing.assert_allclose(got[0, 0], pages.values[0][270, 0], rtol=1e-6)


@pytest.mark.skipif(
    host().name not in ("avx512", "avx2"), reason="the second x86 target needs an x86 CPU with AVX2"
)
def test_bf16_is_widened_exactly_where_nothing_multiplies_it() -> None:
    """The bits of float32 pages that hold the same numbers."""
    pages = rounded(make_pages(LENGTHS, 2, 40, 16))
    queries = make_queries(COUNTS, 4, 40)
    wide = run(pages, queries, 4, 6, tiles=2, target=AVX2)
    narrow = run(pages, queries, 4, 6, tiles=2, target=AVX2, dtype="bf16")
    assert same(wide, narrow)
    assert same(wide, run(pages, queries, 4, 6, tiles=2, segments_each=1, target=AVX2, dtype="bf16"))
    assert same(wide, run(pages, queries, 4, 8, tiles=2))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_results_as_bf16_are_the_rounded_float32(dtype: str) -> None:
    pages = make_pages(LENGTHS, 2, 20, 16)
    queries = make_queries(COUNTS, 4, 20)
    wide = run(pages, queries, 4, 8, tiles=2, dtype=dtype)
    narrow = run(pages, queries, 4, 8, tiles=2, dtype=dtype, out="bf16", segments_each=1)
    assert same([to_bf16(x) for x in wide], narrow)


@pytest.mark.parametrize(
    ("group", "kv_heads", "head_dim"),
    [(1, 1, 16), (2, 8, 128), (3, 5, 64), (8, 32, 256), (16, 2, 128), (7, 1, 64)],
)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_tilings_fit(group: int, kv_heads: int, head_dim: int, dtype: str) -> None:
    for target in (host(), AVX2):
        small, large = attention.tilings(group, kv_heads, head_dim, dtype, target)
        assert small.rows <= group
        assert 1 <= small.tiles <= kv_heads
        assert small.across == "heads"
        assert max(small.rows, large.rows) + 2 <= target.budget
        assert large.across == "rows"
        for tiling in (small, large):
            attention.attention_spec(
                group * kv_heads, kv_heads, head_dim, 16, 10**5, 10**5, tiling, dtype=dtype
            )


@pytest.mark.parametrize("element", ["f32", "bf16"])
def test_paged_attention_shares_long_walks(element: str) -> None:
    """Through the native pool and threads: the same bits from one thread and from many, near float64."""
    rng = np.random.default_rng(3)
    pool = KVCachePool(num_pages=128, num_layers=2, num_heads=2, head_dim=32, element=element)
    lengths, counts = [900, 700], [1, 3]
    tables = [PageTable(pool), PageTable(pool)]
    q = rng.standard_normal((4, 4, 32)).astype(np.float32)
    expected = []
    block_tables = np.full((2, 64), -1, dtype=np.int32)
    for s, table in enumerate(tables):
        table.grow_to(lengths[s])
        block_tables[s, : len(table)] = table.pages
        k, v = rng.standard_normal((2, lengths[s], 2, 32)).astype(np.float32)
        write_kv(k, v, pool, 1, table.slots(0, lengths[s]))
        own = q[:1] if s == 0 else q[1:]
        expected.append(exact(bf16(k), bf16(v), own) if element == "bf16" else exact(k, v, own))
    starts = [length - count for length, count in zip(lengths, counts, strict=True)]
    small, large = attention.tilings(2, 2, 32, element)
    specs = [
        attention.attention_spec(4, 2, 32, 16, 128, 128, tiling, dtype=element) for tiling in (small, large)
    ]
    addresses = load_kernels(specs)
    results = []
    for threads in (1, 2, 7):
        out = np.zeros_like(q)
        native_attention(
            pool, 1, q, out, block_tables, starts, counts, addresses[specs[0]], (small.rows, small.tiles),
            addresses[specs[1]], (large.rows, large.tiles), ThreadPool(threads),
        )  # fmt: skip
        results.append(out.tobytes())
    assert results == [results[0]] * 3
    got = paged_attention(q, pool, 1, block_tables, starts, counts)
    assert got.tobytes() == results[0]
    tolerance = 2e-5 if element == "f32" else 2**-7
    np.testing.assert_allclose(got, np.concatenate(expected), atol=tolerance, rtol=tolerance)
