"""Embedding, norms, gating and the KV write against NumPy; the same bits for any split; nothing written outside."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.packed_call import act64, call, padded
from nanoserve.kernels import embedding, gated, kv_write, norm

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


def test_layernorm_keeps_its_digits_at_a_large_mean() -> None:
    """mean 1000, deviation 1: one-pass variance would lose six digits."""
    x = random(4, 128) + np.float32(1000)
    out = np.empty_like(x)
    spec = norm.norm_spec("layernorm", 128, 128, 128, 1e-5, bias=True)
    call(spec, x, np.ones(128, np.float32), np.zeros(128, np.float32), out, 0, 4)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(out, centred / np.sqrt((centred**2).mean(axis=1, keepdims=True)), atol=1e-3)


@pytest.mark.parametrize("cols", [1, 7, 16, 45, 112, 120])
@pytest.mark.parametrize("activation", gated.ACTIVATIONS)
def test_gated(cols: int, activation: str) -> None:
    ldx, ldo = padded(2 * cols), padded(cols)
    x, out = random(9, ldx) * np.float32(3), np.full((11, ldo), 7, dtype=np.float32)
    spec = gated.gated_spec(cols, activation, ldx, ldo)
    call(spec, x, out, 0, 4)
    call(spec, x, out, 4, 9)
    expected = act64(activation, x[:, :cols]) * x[:, cols : 2 * cols]
    np.testing.assert_allclose(out[:9, :cols], expected, atol=2e-6, rtol=2e-6)
    assert outside_is(out, 9, cols, 7)


@pytest.mark.parametrize(
    ("heads", "kv", "d", "page_size", "rotary"),
    [
        (4, 4, 16, 16, 0),
        (6, 2, 20, 16, 20),
        (4, 1, 8, 32, 8),
        (3, 3, 80, 16, 32),
        (2, 1, 64, 48, 64),
        (2, 2, 6, 16, 2),
    ],
)
def test_kv_write(heads: int, kv: int, d: int, page_size: int, rotary: int) -> None:
    row = (heads + 2 * kv) * d
    ld, count = padded(row), 9
    qkv = random(count, ld)
    before = qkv.copy()
    k, v = np.full((5, kv, d, page_size), 7, np.float32), np.full((5, kv, page_size, d), 7, np.float32)
    slots = rng.permutation(5 * page_size)[:count].astype(np.int32)
    positions = rng.integers(0, 300, count).astype(np.int32)
    table = kv_write.rope_table(300, rotary, 10000.0) if rotary else np.empty(0)
    spec = kv_write.kv_write_spec(heads, kv, d, page_size, ld, rotary)
    args = [qkv, *([table, positions] if rotary else []), k, v, slots]
    call(spec, *args, 0, 5)
    call(spec, *args, 5, count)

    parts = before[:, :row].reshape(count, heads + 2 * kv, d)
    turned = parts.copy()
    if rotary:
        half = rotary // 2
        cos, sin = table[positions, None, :half], table[positions, None, half:]
        a, b = parts[:, : heads + kv, :half], parts[:, : heads + kv, half:rotary]
        turned[:, : heads + kv, :half] = a * cos - b * sin
        turned[:, : heads + kv, half:rotary] = b * cos + a * sin
    # Bit for bit: NumPy, too, rounds each product and the sum.
    assert qkv[:, : heads * d].tobytes() == turned[:, :heads].reshape(count, -1).tobytes()
    assert qkv[:, row:].tobytes() == before[:, row:].tobytes()
    expected_k, expected_v = np.full_like(k, 7), np.full_like(v, 7)
    expected_k[slots // page_size, :, :, slots % page_size] = turned[:, heads : heads + kv]
    expected_v[slots // page_size, :, slots % page_size] = turned[:, heads + kv :]
    assert k.tobytes() == expected_k.tobytes()
    assert v.tobytes() == expected_v.tobytes()


def test_rope_table_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    dim, theta = 24, 10000.0
    inverse = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    angles = torch.arange(4096).float()[:, None] * inverse
    expected = torch.cat([angles.cos(), angles.sin()], dim=1).numpy()
    assert np.abs(kv_write.rope_table(4096, dim, theta) - expected).max() < 1e-3
    assert np.abs(kv_write.rope_table(512, dim, theta) - expected[:512]).max() < 1e-4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: embedding.embedding_spec(65, 64), "cols=65"),
        (lambda: norm.norm_spec("batchnorm", 4, 4, 4, 1e-5), "batchnorm"),
        (lambda: norm.norm_spec("rmsnorm", 5, 5, 4, 1e-5), "cols=5"),
        (lambda: gated.gated_spec(5, "silu", 9, 5), "columns each in rows of 9"),
        (lambda: gated.gated_spec(5, "relu", 10, 5), "relu"),
        (lambda: kv_write.kv_write_spec(2, 1, 8, 16, 31), "rows of 31"),
        (lambda: kv_write.kv_write_spec(2, 1, 8, 16, 32, 7), "rotary=7"),
    ],
)
def test_refusals(make, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=said):
        make()
