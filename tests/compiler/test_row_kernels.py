"""Embedding and norms against NumPy; the same bits for any split; nothing written outside."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.packed_call import call, padded
from nanoserve.kernels import embedding, gemm, norm, panels

COLS = [1, 2, 3, 15, 16, 17, 31, 60, 64, 65, 72, 100, 127, 128, 191, 259]
rng = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def outside_is(out: np.ndarray, rows: int, cols: int, value: float) -> bool:
    return bool((out[rows:] == value).all() and (out[:rows, cols:] == value).all())


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("positions", [False, True])
def test_embedding(cols: int, positions: bool) -> None:
    ldx = padded(cols)
    table, pos_table = random(50, cols), random(40, cols)
    ids, pos = rng.integers(0, 50, 7).astype(np.int32), rng.integers(0, 40, 7).astype(np.int32)
    x = np.full((9, ldx), 7, dtype=np.float32)
    args = [ids, pos, table, *([pos_table] if positions else []), x]
    spec = embedding.embedding_spec(cols, ldx, positions=positions)
    call(spec, *args, 0, 3)
    assert (x[3:] == 7).all()
    call(spec, *args, 3, 7)
    expected = table[ids] + pos_table[pos] if positions else table[ids]
    assert x[:7, :cols].tobytes() == expected.tobytes()
    assert outside_is(x, 7, cols, 7)


@pytest.mark.parametrize("vocab", [16, 50, 97, 200])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.7])
def test_embedding_of_a_packed_head(vocab: int, positions: bool, scale: float) -> None:
    """Every id of a vocabulary of whole and of broken panels: bit for bit what the table of rows gives."""
    cols, ldx = 33, padded(33)
    table, pos_table = random(vocab, cols), random(40, cols)
    ids, pos = rng.permutation(vocab).astype(np.int32), rng.integers(0, 40, vocab).astype(np.int32)
    more = [pos_table] if positions else []
    expected = table[ids] * np.float32(scale) + (pos_table[pos] if positions else np.float32(0))
    for panel, weight in ((0, table), (gemm.panel_width(vocab), panels.pack(table))):
        spec = embedding.embedding_spec(cols, ldx, positions=positions, scale=scale, panel=panel)
        x = np.full((vocab + 2, ldx), 7, dtype=np.float32)
        call(spec, ids, pos, weight, *more, x, 0, 5)
        assert (x[5:] == 7).all()
        call(spec, ids, pos, weight, *more, x, 5, vocab)
        assert x[:vocab, :cols].tobytes() == expected.tobytes(), f"panel={panel}"
        assert outside_is(x, vocab, cols, 7)


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("kind", norm.KINDS)
@pytest.mark.parametrize("gather", [False, True])
def test_norm(cols: int, kind: str, gather: bool) -> None:
    bias = kind == "layernorm"
    ldx, ldo, eps = padded(cols), cols + 3, 1e-5
    x, weight, shift = random(12, ldx) + np.float32(3), random(cols), random(cols)
    rows = np.array([4, 11, 4, 0, 7], dtype=np.int32)
    out = np.full((14, ldo), 7, dtype=np.float32)
    spec = norm.norm_spec(kind, cols, ldx, ldo, eps, bias=bias, gather=gather)
    count = len(rows) if gather else 12
    args = [x, *([rows] if gather else []), weight, *([shift] if bias else []), out]
    call(spec, *args, 0, 2)
    call(spec, *args, 2, count)
    source = x[rows, :cols].astype(np.float64) if gather else x[:, :cols].astype(np.float64)
    centred = source - source.mean(axis=1, keepdims=True) if kind == "layernorm" else source
    expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps) * weight
    np.testing.assert_allclose(
        out[:count, :cols], expected + shift if bias else expected, atol=3e-5, rtol=3e-5
    )
    assert outside_is(out, count, cols, 7)
    whole = np.full_like(out, 7)
    call(spec, *args[:-1], whole, 0, count)
    assert whole.tobytes() == out.tobytes()


@pytest.mark.parametrize("cols", [1, 33, 64, 100])
@pytest.mark.parametrize("kind", norm.KINDS)
@pytest.mark.parametrize("gather", [False, True])
def test_a_residual_norm_adds_once(cols: int, kind: str, gather: bool) -> None:
    """Bit for bit out + norm: the norm is rounded before it is added."""
    ldx, ldo = padded(cols), cols + 3
    x, weight, before = random(9, ldx), random(cols), random(9, ldo)
    rows = [rng.permutation(9).astype(np.int32)] if gather else []
    plain, added = np.zeros_like(before), before.copy()
    call(norm.norm_spec(kind, cols, ldx, ldo, 1e-6, gather=gather), x, *rows, weight, plain, 0, 9)
    spec = norm.norm_spec(kind, cols, ldx, ldo, 1e-6, gather=gather, residual=True)
    call(spec, x, *rows, weight, added, 2, 9)
    assert added[:2].tobytes() == before[:2].tobytes()
    call(spec, x, *rows, weight, added, 0, 2)
    assert added[:, :cols].tobytes() == (before + plain)[:, :cols].tobytes()
    assert added[:, cols:].tobytes() == before[:, cols:].tobytes()


def test_layernorm_keeps_its_digits_at_a_large_mean() -> None:
    """mean 1000, deviation 1: one-pass variance would lose six digits."""
    x = random(4, 128) + np.float32(1000)
    out = np.empty_like(x)
    spec = norm.norm_spec("layernorm", 128, 128, 128, 1e-5, bias=True)
    call(spec, x, np.ones(128, np.float32), np.zeros(128, np.float32), out, 0, 4)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(out, centred / np.sqrt((centred**2).mean(axis=1, keepdims=True)), atol=1e-3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: embedding.embedding_spec(65, 64), "cols=65"),
        (lambda: norm.norm_spec("batchnorm", 4, 4, 4, 1e-5), "batchnorm"),
        (lambda: norm.norm_spec("rmsnorm", 5, 5, 4, 1e-5), "cols=5"),
        (lambda: embedding.embedding_spec(5, 5, scale=float("inf")), "scale=inf"),
        (lambda: embedding.embedding_spec(5, 5, panel=-1), "panel=-1"),
    ],
)
def test_refusals(make, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=said):
        make()
