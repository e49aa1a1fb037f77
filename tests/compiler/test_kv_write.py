"""QK-norm, rotation and the write into pages, in one kernel: bit for bit what NumPy and the norm kernel give."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from compiler.packed_call import call, padded
from compiler.paged_inputs import Pages, kv_memory
from nanoserve.compiler.target import AVX2, Target, host
from nanoserve.kernels import kv_write, norm
from nanoserve.models.rope import Rope

rng = np.random.default_rng(0)
PAGES = 8
SLOTS = {
    "scattered": rng.permutation(PAGES * 16)[:9],
    "a prompt": np.arange(35) + 32,
    "a chunk from inside a page": np.arange(60) + 21,
    "decode rows among chunks": np.concatenate([[5], np.arange(20) + 32, [100], np.arange(16) + 64, [7, 31]]),
    "not a run": np.concatenate([[32], np.arange(14) + 50, [47], np.arange(16)[::-1] + 80]),
}  # fmt: skip


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def rotated(parts: np.ndarray, table: np.ndarray, positions: np.ndarray, rotary: int) -> np.ndarray:
    """Bit for bit: NumPy, too, rounds each product and the sum."""
    turned, half = parts.copy(), rotary // 2
    cos, sin = table[positions, None, :half], table[positions, None, half:]
    a, b = parts[..., :half], parts[..., half:rotary]
    turned[..., :half], turned[..., half:rotary] = a * cos - b * sin, b * cos + a * sin
    return turned


def normed(parts: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """What the norm kernel gives for each head, or for all heads as one, as long as `weight` says."""
    count, heads, d = parts.shape
    groups = heads * d // len(weight)
    x = np.ascontiguousarray(parts.reshape(count * groups, len(weight)))
    call(
        norm.norm_spec("rmsnorm", len(weight), len(weight), len(weight), eps), x, weight, x, 0, count * groups
    )
    return x.reshape(parts.shape)


def check(
    heads: int, kv: int, d: int, page_size: int, rotary: int, slots: np.ndarray, *, qk_norm: str | None = None,
    dtype: str = "f32", cuts: tuple[int, ...] = (), target: Target | None = None,
) -> None:  # fmt: skip
    slots = slots.astype(np.int32)
    row, count, eps = (heads + 2 * kv) * d, len(slots), 1e-5
    ld = padded(row)
    qkv = random(count, ld)
    before = qkv.copy()
    num_pages = PAGES * 16 // page_size
    shape = (num_pages, kv, d, page_size), (num_pages, kv, page_size, d)
    pages = Pages(np.full(shape[0], 7, np.float32), np.full(shape[1], 7, np.float32), [], [], [], page_size)
    k, v = kv_memory(pages, dtype)
    positions = rng.integers(0, 300, count).astype(np.int32)
    table = Rope(rotary).table(300) if rotary else np.empty(0)
    weights = []
    if qk_norm:
        weights = [random(d), random(d)] if qk_norm == "head" else [random(heads * d), random(kv * d)]
    spec = kv_write.kv_write_spec(
        heads, kv, d, page_size, ld, rotary, qk_norm=qk_norm, norm_eps=eps, dtype=dtype
    )
    args = [qkv, *([table, positions] if rotary else []), *weights, k, v, slots]
    for begin, end in pairwise((0, *cuts, count)):
        call(spec, *args, begin, end, target=target)

    parts = before[:, :row].reshape(count, heads + 2 * kv, d).copy()
    both = slice(0, heads + kv)
    if qk_norm:
        parts[:, :heads] = normed(parts[:, :heads], weights[0], eps)
        parts[:, heads : heads + kv] = normed(parts[:, heads : heads + kv], weights[1], eps)
    if rotary:
        parts[:, both] = rotated(parts[:, both], table, positions, rotary)
    assert qkv[:, : heads * d].tobytes() == parts[:, :heads].reshape(count, -1).tobytes()
    assert qkv[:, row:].tobytes() == before[:, row:].tobytes()
    pages.k[slots // page_size, :, :, slots % page_size] = parts[:, heads : heads + kv]
    pages.v[slots // page_size, :, slots % page_size] = parts[:, heads + kv :]
    assert k.tobytes() == kv_memory(pages, dtype)[0].tobytes()


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("heads", "kv", "d", "page_size", "rotary"),
    [(4, 2, 20, 16, 20), (2, 2, 64, 32, 0), (1, 1, 80, 16, 34), (2, 1, 6, 16, 2), (2, 1, 128, 16, 128)],
)
def test_pages_hold_what_numpy_gives(
    heads: int, kv: int, d: int, page_size: int, rotary: int, dtype: str, slots: str
) -> None:
    """Lone rows, sixteen at once, runs that begin inside a page, runs that only look like one; cut anywhere."""
    check(heads, kv, d, page_size, rotary, SLOTS[slots], dtype=dtype)
    check(heads, kv, d, page_size, rotary, SLOTS[slots], dtype=dtype, cuts=(1, 5))


@pytest.mark.parametrize(("d", "page_size"), [(7, 16), (20, 8), (33, 5)])
def test_odd_sizes(d: int, page_size: int) -> None:
    slots = np.arange(40) if page_size == 16 else rng.permutation(PAGES * 16 // page_size * page_size)[:40]
    check(2, 1, d, page_size, 0, slots)


@pytest.mark.parametrize("qk_norm", ["head", "row"])
@pytest.mark.parametrize(("d", "rotary"), [(20, 20), (64, 64), (128, 64), (80, 0)])
def test_norms_have_the_norm_kernels_bits(qk_norm: str, d: int, rotary: int) -> None:
    check(6, 2, d, 16, rotary, SLOTS["decode rows among chunks"], qk_norm=qk_norm)
    check(6, 2, d, 16, rotary, SLOTS["a prompt"], qk_norm=qk_norm, dtype="bf16")


@pytest.mark.skipif(
    host().name not in ("avx512", "avx2"), reason="the second x86 target needs an x86 CPU with AVX2"
)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_smaller_instruction_set_gives_the_same_bits(dtype: str) -> None:
    slots = SLOTS["decode rows among chunks"]
    check(4, 2, 48, 16, 20, slots, qk_norm="head", dtype=dtype, target=AVX2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ld": 31}, "rows of 31"),
        ({"rotary": 7}, "rotary=7"),
        ({"qk_norm": "heads"}, "qk_norm 'heads'"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0"),
        ({"dtype": "f16"}, "dtype 'f16'"),
        ({"head_dim": 7, "dtype": "bf16"}, "head_dim=7"),
    ],
)
def test_refusals(options: dict[str, object], said: str) -> None:
    good = {"heads": 2, "kv_heads": 1, "head_dim": 8, "page_size": 16, "ld": 32}
    with pytest.raises(ValueError, match=said):
        kv_write.kv_write_spec(**{**good, **options})  # type: ignore[arg-type]
