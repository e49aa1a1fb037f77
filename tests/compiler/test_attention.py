"""Paged attention against a float64 softmax, and the same bits for every row tile, item split, batch and chunking."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler.packed_call import call
from nanoserve.compiler.target import AVX2, Target, host
from nanoserve.kernels import attention

JUNK = np.float32(1e30)  # finite, and ruinous if a masked token had any weight


@dataclass
class Pages:
    """Sequences in shuffled pages; every slot that holds no token holds junk."""

    k: np.ndarray
    v: np.ndarray
    pages: list[list[int]]
    keys: list[np.ndarray]  # per sequence float32[length, Hkv, D]
    values: list[np.ndarray]
    page_size: int


def make_pages(lengths: list[int], kv: int, d: int, page_size: int, seed: int = 0) -> Pages:
    rng = np.random.default_rng(seed)
    counts = [-(-length // page_size) for length in lengths]
    ids = rng.permutation(sum(counts) + 2).tolist()
    k = np.full((len(ids), kv, d, page_size), JUNK, dtype=np.float32)
    v = np.full((len(ids), kv, page_size, d), -JUNK, dtype=np.float32)
    pages, keys, values = [], [], []
    for length, count in zip(lengths, counts, strict=True):
        own, ids = ids[:count], ids[count:]
        pages.append(own)
        keys.append(rng.standard_normal((length, kv, d)).astype(np.float32))
        values.append(rng.standard_normal((length, kv, d)).astype(np.float32))
        for t in range(length):
            k[own[t // page_size], :, :, t % page_size] = keys[-1][t]
            v[own[t // page_size], :, t % page_size] = values[-1][t]
    return Pages(k, v, pages, keys, values, page_size)


def run(
    pages: Pages,
    queries: list[np.ndarray],
    heads: int,
    rows: int,
    splits: int = 1,
    target: Target | None = None,
) -> list[np.ndarray]:
    """Attention of each sequence's last len(queries[s]) tokens; items of up to `rows` rows."""
    kv, d = pages.k.shape[1], pages.k.shape[2]
    group, row = heads // kv, heads * d
    table: list[int] = []
    items = []
    q0 = 0
    for own, keys, q in zip(pages.pages, pages.keys, queries, strict=True):
        tokens = (-(-len(keys) // 64) + 1) * 64
        entries = -(-tokens // pages.page_size)
        for head in range(kv):
            for r0 in range(0, len(q) * group, rows):
                items.append(
                    [len(table), head, q0, r0, min(rows, len(q) * group - r0), len(keys) - len(q), 0, 0]
                )
        table += own + [own[-1]] * (entries - len(own))
        q0 += len(q)
    ldq, ldo = row + 5, row + 3
    q_rows = np.zeros((q0, ldq), dtype=np.float32)
    q_rows[:, :row] = np.concatenate([q.reshape(len(q), row) for q in queries])
    out = np.full((q0, ldo), 7, dtype=np.float32)
    spec = attention.attention_spec(heads, kv, d, pages.page_size, ldq, ldo, rows)
    flat_table, flat_items = np.array(table, dtype=np.int32), np.array(items, dtype=np.int32)
    edges = np.linspace(0, len(items), splits + 1).astype(int).tolist()
    for begin, end in pairwise(edges):
        call(spec, q_rows, pages.k, pages.v, flat_table, flat_items, out, begin, end, target=target)
    assert (out[:, row:] == 7).all(), "padding columns were written"
    result = np.split(out[:, :row].reshape(q0, heads, d), np.cumsum([len(q) for q in queries])[:-1])
    return [part.copy() for part in result]


def exact(keys: np.ndarray, values: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Float64 causal attention of the last len(q) tokens."""
    heads, d = q.shape[1:]
    group = heads // keys.shape[1]
    out = np.empty(q.shape)
    for t in range(len(q)):
        seen = len(keys) - len(q) + t + 1
        for h in range(heads):
            scores = keys[:seen, h // group].astype(np.float64) @ q[t, h].astype(np.float64) / np.sqrt(d)
            weights = np.exp(scores - scores.max())
            out[t, h] = weights / weights.sum() @ values[:seen, h // group].astype(np.float64)
    return out


def make_queries(counts: list[int], heads: int, d: int, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((count, heads, d)).astype(np.float32) for count in counts]


@pytest.mark.parametrize(
    ("heads", "kv", "d", "page_size", "rows"),
    [(4, 4, 16, 16, 1), (4, 2, 8, 16, 2), (6, 2, 20, 16, 6), (5, 1, 80, 32, 8), (2, 2, 64, 48, 6), (8, 1, 24, 64, 3), (3, 3, 33, 128, 6)],
)  # fmt: skip
def test_matches_float64(heads: int, kv: int, d: int, page_size: int, rows: int) -> None:
    """Decode rows, whole prompts and chunks in one batch, lengths around every border."""
    lengths = [1, 15, 16, 17, 63, 64, 65, 130, 200]
    counts = [1, 15, 1, 9, 63, 1, 65, 40, 1]
    pages = make_pages(lengths, kv, d, page_size)
    queries = make_queries(counts, heads, d)
    for s, got in enumerate(run(pages, queries, heads, rows)):
        np.testing.assert_allclose(
            got, exact(pages.keys[s], pages.values[s], queries[s]), atol=2e-5, rtol=2e-5
        )


def test_same_bits_for_every_tile_and_split() -> None:
    heads, kv, d = 6, 2, 20
    pages = make_pages([130, 64, 1, 77], kv, d, 16)
    queries = make_queries([130, 5, 1, 30], heads, d)
    reference = run(pages, queries, heads, 1)
    for rows in (2, 3, 4, 6, 8, 12, 16):
        for splits in (1, 3):
            for one, other in zip(reference, run(pages, queries, heads, rows, splits), strict=True):
                assert one.tobytes() == other.tobytes(), f"rows={rows}, splits={splits}"


@pytest.mark.skipif(
    host().name not in ("avx512", "avx2"), reason="the second x86 target needs an x86 CPU with AVX2"
)
def test_the_smaller_instruction_set_gives_the_same_bits() -> None:
    heads, kv, d = 4, 2, 20
    pages = make_pages([130, 1, 77], kv, d, 16)
    queries = make_queries([130, 1, 30], heads, d)
    reference = run(pages, queries, heads, 8)
    for rows in attention.row_tiles(heads // kv, AVX2):
        for one, other in zip(reference, run(pages, queries, heads, rows, target=AVX2), strict=True):
            assert one.tobytes() == other.tobytes(), f"rows={rows}"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    length=st.integers(1, 180),
    data=st.data(),
    company=st.lists(st.integers(1, 100), max_size=3),
    page_size=st.sampled_from([16, 32]),
)
def test_same_bits_for_every_chunking_and_company(
    length: int, data: st.DataObject, company: list[int], page_size: int
) -> None:
    """A prompt whole and alone, against its chunks each in a batch with others, in other pages, among other junk."""
    heads, kv, d = 4, 2, 12
    small, large = attention.row_tiles(heads // kv)
    alone = make_pages([length], kv, d, 16)
    q = make_queries([length], heads, d)[0]
    (reference,) = run(alone, [q], heads, large)
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=4)) | {length})
    start = 0
    for cut in cuts:
        pages = make_pages([*company, cut], kv, d, page_size, seed=cut)
        own = len(company)
        pages.keys[own], pages.values[own] = alone.keys[0][:cut], alone.values[0][:cut]
        for t in range(cut):
            page, slot = pages.pages[own][t // page_size], t % page_size
            pages.k[page, :, :, slot], pages.v[page, :, slot] = alone.keys[0][t], alone.values[0][t]
        others = make_queries([1] * own, heads, d, seed=5)
        got = run(pages, [*others, q[start:cut]], heads, data.draw(st.sampled_from([small, large])))[own]
        assert got.tobytes() == reference[start:cut].tobytes(), f"tokens {start}..{cut}"
        start = cut


def test_masked_zeros_do_not_choose_the_sign_of_zero() -> None:
    """A sum that underflowed to -0, and 0 times whatever stale data lies behind the mask: the same +0 comes out."""
    smallest = np.finfo(np.float32).smallest_subnormal
    for stale in (JUNK, -JUNK):
        pages = make_pages([3], 1, 16, 16)
        page = pages.pages[0][0]
        pages.v[:] = stale
        pages.v[page, 0, 0] = 0  # the token with weight 1
        pages.v[page, 0, 1:3] = -smallest  # times a weight below a half, this rounds to -0
        pages.k[page, 0, :, 0] = 1
        pages.k[page, 0, :, 1:3] = 0
        (got,) = run(pages, [np.ones((1, 1, 16), dtype=np.float32)], 1, 1)
        assert got.tobytes() == np.zeros_like(got).tobytes()


def test_far_scores_underflow_quietly() -> None:
    """Score differences of hundreds: the smaller ones vanish, the result stays the winner's value."""
    pages = make_pages([100], 1, 16, 16)
    pages.keys[0][:] = 0
    pages.k[:] = 0
    winner = 70
    pages.keys[0][winner, 0] = 10
    pages.k[pages.pages[0][winner // 16], 0, :, winner % 16] = 10
    q = np.full((1, 1, 16), 50, dtype=np.float32)
    (got,) = run(pages, [q], 1, 1)
    np.testing.assert_allclose(got[0, 0], pages.values[0][winner, 0], rtol=1e-6)


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_comes_out(where: str) -> None:
    """A NaN must reach the logits, where the request fails; a clamp or a maximum could hide it."""
    pages = make_pages([70], 1, 16, 16)
    q = make_queries([70], 1, 16)[0]
    page, slot = pages.pages[0][0], 5
    if where == "query":
        q[5, 0, 3] = np.nan
    elif where == "key":
        pages.k[page, 0, 3, slot] = np.nan
    else:
        pages.v[page, 0, slot, 3] = np.nan
    (got,) = run(pages, [q], 1, 6)
    bad = ~np.isfinite(got).all(axis=(1, 2))
    expected = {"query": [5], "key": list(range(5, 70)), "value": list(range(5, 70))}[where]
    # Value rows before the NaN's token in the same group of 16 multiply it by 0: they may be bad too, later
    # ones must be.
    assert set(expected) <= set(np.flatnonzero(bad).tolist())
    assert not bad[:5].any() or where == "value"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"page_size": 24}, "page_size=24 must be a multiple of 16"),
        ({"rows": 17}, r"rows=17 must be in \[1, 16\]"),
        ({"kv_heads": 3}, "4 heads over 3 of 16"),
        ({"ldq": 63}, "rows of 63"),
        ({"dtype": "f16"}, "dtype 'f16'"),
    ],
)
def test_refusals(options: dict[str, object], said: str) -> None:
    good = {"heads": 4, "kv_heads": 2, "head_dim": 16, "page_size": 16, "ldq": 64, "ldo": 64, "rows": 2}
    with pytest.raises(ValueError, match=said):
        attention.attention_spec(**{**good, **options})  # type: ignore[arg-type]
