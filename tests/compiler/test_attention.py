"""Paged attention against a float64 softmax, and the same bits for every row tile, item split, batch and chunking."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.paged_inputs import JUNK, exact, make_pages, make_queries, run
from nanoserve.compiler.target import AVX2, host
from nanoserve.kernels import attention


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
    for rows in (tiling.rows for tiling in attention.tilings(heads // kv, kv, d, target=AVX2)):
        for one, other in zip(reference, run(pages, queries, heads, rows, target=AVX2), strict=True):
            assert one.tobytes() == other.tobytes(), f"rows={rows}"


@settings(max_examples=25)
@given(
    length=st.integers(1, 180),
    data=st.data(),
    company=st.lists(st.integers(1, 100), max_size=3),
    page_size=st.sampled_from([16, 32]),
    window=st.sampled_from([0, 30, 100]),
)
def test_same_bits_for_every_chunking_and_company(
    length: int, data: st.DataObject, company: list[int], page_size: int, window: int
) -> None:
    """A prompt whole and alone, against its chunks each in a batch with others, in other pages, among other junk."""
    heads, kv, d = 4, 2, 12
    small, large = (tiling.rows for tiling in attention.tilings(heads // kv, kv, d))
    alone = make_pages([length], kv, d, 16)
    q = make_queries([length], heads, d)[0]
    (reference,) = run(alone, [q], heads, large, window=window)
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
        rows = data.draw(st.sampled_from([small, large]))
        got = run(pages, [*others, q[start:cut]], heads, rows, window=window)[own]
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


@pytest.mark.parametrize("window", [0, 10])
def test_scores_far_below_zero_are_not_taken_for_masked(window: int) -> None:
    """All scores near -10,000: a masked token's stand-in must lie below every one of them."""
    pages = make_pages([150], 1, 16, 16)
    pages.keys[0][:, 0, 0] = -400
    for t in range(150):
        pages.k[pages.pages[0][t // 16], 0, 0, t % 16] = -400
    q = make_queries([40], 1, 16)[0]
    q[:, 0, 0] = 100
    (got,) = run(pages, [q], 1, 8, window=window)
    expected = exact(pages.keys[0], pages.values[0], q, window=window)
    np.testing.assert_allclose(got, expected, atol=0.02)  # a score's last place is 0.001 here


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
        ({"tiling": attention.Tiling(17)}, r"rows=17 must be in \[1, 16\]"),
        ({"kv_heads": 3}, "4 heads over 3 of 16"),
        ({"ldq": 63}, "rows of 63"),
        ({"window": -1}, r"window=-1 must be in \[0, 2"),
        ({"window": 2**31}, "window=2147483648"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"softcap": float("nan")}, "softcap=nan"),
        ({"dtype": "f16"}, "dtype 'f16'"),
        ({"dtype": "i8"}, "dtype 'i8'"),
        ({"out": "f16"}, "out 'f16'"),
        ({"dtype": "bf16", "head_dim": 7}, "head_dim=7 must be even"),
        ({"tiling": attention.Tiling(1, 65)}, "tiles=65"),
        ({"tiling": attention.Tiling(1, 1, "pages")}, "across='pages'"),
    ],
)
def test_refusals(options: dict[str, object], said: str) -> None:
    good = {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "page_size": 16,
        "ldq": 64,
        "ldo": 64,
        "tiling": attention.Tiling(2),
    }
    with pytest.raises(ValueError, match=said):
        attention.attention_spec(**{**good, **options})  # type: ignore[arg-type]
