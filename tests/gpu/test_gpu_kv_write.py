"""QK-norm, rotation and the write into pages on the GPU: NumPy's bits, the norm within rounding."""

from __future__ import annotations

import numpy as np
import pytest

from gpu.run_kernel import ORDERS, launch
from nanoserve.kernels.cuda.kv_write import kv_write_spec
from nanoserve.kernels.cuda.layout import row_stride
from nanoserve.models.rope import Rope
from support.bfloat16 import to_bf16

rng = np.random.default_rng(0)
PAGES, EPS = 6, 1e-5
SHAPES = [  # heads, kv_heads, head_dim, page_size, rotary
    (4, 2, 20, 16, 20),
    (3, 1, 7, 4, 0),
    (5, 5, 80, 16, 34),
    (6, 2, 64, 32, 64),
    (9, 3, 128, 16, 128),
]  # fmt: skip


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def rotated(parts: np.ndarray, table: np.ndarray, positions: np.ndarray, rotary: int) -> np.ndarray:
    """Bit for bit: NumPy, too, rounds each product and the sum."""
    turned, half = parts.copy(), rotary // 2
    cos, sin = table[positions, None, :half], table[positions, None, half:]
    a, b = parts[..., :half], parts[..., half:rotary]
    turned[..., :half], turned[..., half:rotary] = a * cos - b * sin, b * cos + a * sin
    return turned


def normed(parts: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """RMSNorm of each head, or of all heads as one, as long as `weight` says; in double."""
    x = parts.reshape(-1, len(weight)).astype(np.float64)
    return (x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * weight).reshape(parts.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("qk_norm", [None, "head", "row"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_kv_write(shape: tuple[int, ...], qk_norm: str | None, dtype: str) -> None:
    heads, kv, d, page_size, rotary = shape
    row, count = (heads + 2 * kv) * d, 5
    ld = row_stride(row)
    before = random(count, ld)
    slots = rng.permutation(PAGES * page_size)[:count].astype(np.int32)
    slots[2] = -1  # a row without a token
    positions = rng.integers(0, 300, count).astype(np.int32)
    table = Rope(rotary).table(300) if rotary else None
    sizes = {None: (), "head": (d, d), "row": (heads * d, kv * d)}[qk_norm]
    weights = [random(size) for size in sizes]
    element = np.uint16 if dtype == "bf16" else np.float32
    spec = kv_write_spec(heads, kv, d, page_size, ld, rotary, qk_norm=qk_norm, norm_eps=EPS, dtype=dtype)
    results = []
    for order in ORDERS:
        qkv = before.copy()
        k, v = (np.full((PAGES, kv, page_size, d), 7, element) for _ in range(2))
        rope = [table, positions] if rotary else []
        launch(spec, qkv, *rope, *weights, k, v, slots, count, order=order)
        results.append((qkv, k, v))
    for other in results[1:]:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(other, results[0], strict=True))
    qkv, k, v = results[0]

    parts = before[:, :row].reshape(count, heads + 2 * kv, d)
    q, keys, values = parts[:, :heads], parts[:, heads : heads + kv], parts[:, heads + kv :]
    if qk_norm:
        q, keys = normed(q, weights[0]), normed(keys, weights[1])
    if rotary:
        q, keys = (rotated(x, table, positions, rotary) for x in (q, keys))
    assert qkv[:, heads * d :].tobytes() == before[:, heads * d :].tobytes()
    written_k, written_v = np.full_like(k, 7), np.full_like(v, 7)
    for i in (0, 1, 3, 4):
        place = slots[i] // page_size, slice(None), slots[i] % page_size
        written_v[place] = to_bf16(values[i]) if dtype == "bf16" else values[i]
        if qk_norm:  # compared below
            found = k[place].astype(np.uint32) << 16 if dtype == "bf16" else k[place].view(np.uint32)
            tolerance = 5e-3 if dtype == "bf16" else 3e-6
            np.testing.assert_allclose(found.view(np.float32), keys[i], atol=tolerance, rtol=tolerance)
            written_k[place] = k[place]
        else:
            written_k[place] = to_bf16(keys[i]) if dtype == "bf16" else keys[i]
    assert k.tobytes() == written_k.tobytes()
    assert v.tobytes() == written_v.tobytes()
    if qk_norm:
        np.testing.assert_allclose(qkv[:, : heads * d].reshape(q.shape), q, atol=3e-6, rtol=3e-6)
    else:
        assert qkv[:, : heads * d].tobytes() == q.reshape(count, -1).tobytes()


def test_a_row_has_the_same_bits_anywhere() -> None:
    heads, kv, d, page_size = 4, 2, 20, 16
    ld = row_stride((heads + 2 * kv) * d)
    rows, weights = random(6, ld), [random(heads * d), random(kv * d)]
    table, positions = Rope(d).table(30), np.full(6, 29, np.int32)
    spec = kv_write_spec(heads, kv, d, page_size, ld, d, qk_norm="row", norm_eps=EPS)
    results = []
    for first in (0, 5):
        qkv, slots = rows[first:].copy(), np.arange(6 - first, dtype=np.int32)[::-1].copy()
        k, v = (np.zeros((1, kv, page_size, d), np.float32) for _ in range(2))
        launch(spec, qkv, table, positions, *weights, k, v, slots, 6 - first)
        results.append((qkv[-1].tobytes(), k[0, :, 0].tobytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads=0"),
        ({"ld": 24}, "ld=24 must be a multiple of 8, at least cols=64"),
        ({"rotary": 3}, r"rotary=3 must be even and in \[0, head_dim=16\]"),
        ({"qk_norm": "column"}, "qk_norm 'column' must be one of"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0"),
        ({"dtype": "f16"}, "dtype 'f16' must be one of f32, bf16"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kv_write_spec(**{"heads": 2, "kv_heads": 1, "head_dim": 16, "page_size": 16, "ld": 64, **change})
