"""Cases of what is done to rows: norms, embeddings, activations, and keys and values on their way into pages.

Small ones are ragged; wide ones have the widths of the models in shapes.py, which have kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from tools.gpu_check.case import MOST_ROWS, WIDE_ROWS, Array, Case, Launch, poison, random, wide
from tools.gpu_check.shapes import models

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.kernels.cuda.activation import activation_spec, convert_spec
from nanoserve.kernels.cuda.embedding import embedding_spec
from nanoserve.kernels.cuda.kv_write import kv_write_spec
from nanoserve.kernels.cuda.layout import row_stride, weight_stride
from nanoserve.kernels.cuda.norm import norm_spec
from nanoserve.models.rope import Rope
from support.bfloat16 import from_bf16, to_bf16


def _widths(name: str) -> list[int]:
    """A field of the real models' configs."""
    return sorted({getattr(config, name) for config in models(False).values()})


def _rows(is_wide: bool) -> int:
    return WIDE_ROWS if is_wide else MOST_ROWS


def norm(chip: Chip) -> Iterable[Case]:
    yield _norm("rmsnorm", 1000, "bf16", gather=True)
    yield _norm("rmsnorm", 1000, "f32")
    yield _norm("layernorm", 1000, "f32")
    for cols in _widths("n_embd"):
        yield _norm("rmsnorm", cols, "bf16", is_wide=True)
        yield _norm("rmsnorm", cols, "bf16", gather=True, is_wide=True)


def _norm(kind: str, cols: int, dtype: str, *, gather: bool = False, is_wide: bool = False) -> Case:
    most, eps, has_bias = _rows(is_wide), 1e-5, kind == "layernorm"
    ld, ldo = row_stride(cols) + 8, row_stride(cols)
    x, weight, bias = random(1, most, ld), random(2, cols), random(3, cols)
    rows = np.random.default_rng(4).integers(0, most, most).astype(np.int32)
    spec = norm_spec(kind, cols, ld, ldo, eps, bias=has_bias, gather=gather, dtype=dtype)

    def run(launch: Launch, m: int) -> list[Array]:
        out = poison(m, ldo, dtype=dtype)
        launch(spec, x, *([rows[:m].copy()] if gather else []), weight, *([bias] if has_bias else []), out, m)
        return [wide(out)[:, :cols]]

    def expected(m: int) -> list[Array]:
        chosen = x[:, :cols].astype(np.float64)[rows[:m] if gather else slice(m)]
        if has_bias:
            centred = chosen - chosen.mean(1, keepdims=True)
            return [centred / np.sqrt((centred**2).mean(1, keepdims=True) + eps) * weight + bias]
        return [chosen / np.sqrt((chosen**2).mean(1, keepdims=True) + eps) * weight]

    told = f", {cols} columns{', gathered' if gather else ''}" if is_wide else ""
    return Case(
        f"{kind} to {dtype}{told}", (spec,), run, expected, 8e-3 if dtype == "bf16" else 3e-6, wide=is_wide
    )


def embedding(chip: Chip) -> Iterable[Case]:
    yield _embedding("embedding", 773, positions=True, scale=3.7)
    for cols in _widths("n_embd"):
        yield _embedding(f"embedding, {cols} columns", cols, is_wide=True)


def _embedding(
    name: str, cols: int, *, positions: bool = False, scale: float = 1.0, is_wide: bool = False
) -> Case:
    vocab, most = 50, _rows(is_wide)
    ld = row_stride(cols)
    rng = np.random.default_rng(0)
    ids, at = (rng.integers(0, vocab, most).astype(np.int32) for _ in range(2))
    table = to_bf16(random(1, vocab, weight_stride(cols, "bf16")))
    more = random(2, vocab, weight_stride(cols, "f32"))
    spec = embedding_spec(cols, ld, positions=positions, scale=scale, dtype="bf16")

    def run(launch: Launch, m: int) -> list[Array]:
        x = poison(m, ld)
        launch(spec, ids[:m].copy(), at[:m].copy(), table, *([more] if positions else []), x, m)
        return [x[:, :cols]]

    def expected(m: int) -> list[Array]:
        value = from_bf16(table)[ids[:m], :cols] * np.float32(scale)
        return [value + more[at[:m], :cols] if positions else value]

    return Case(name, (spec,), run, expected, 0, wide=is_wide)


def activation(chip: Chip) -> Iterable[Case]:
    yield _activation("silu", 771, "bf16", gated=True)
    yield _activation("gelu_erf", 771, "f32")
    yield _activation(None, 771, "bf16")
    for cols in _widths("intermediate_size"):
        yield _activation("silu", cols, "bf16", gated=True, is_wide=True)
    for cols in _widths("n_embd"):
        yield _activation(None, cols, "bf16", is_wide=True)


def _activation(
    name: str | None, cols: int, dtype: str, *, gated: bool = False, is_wide: bool = False
) -> Case:
    """Without a name, a conversion."""
    ldx, ldo = row_stride(2 * cols), row_stride(cols)
    x = random(1, _rows(is_wide), ldx) * 3
    scale, cap = (1.0, 0.0) if gated else (1.5, 2.5)  # a gate excludes them
    spec = (
        convert_spec(cols, ldx, ldo)
        if name is None
        else activation_spec(cols, ldx, ldo, activation=name, gated=gated, scale=scale, softcap=cap, dtype=dtype)
    )  # fmt: skip

    def run(launch: Launch, m: int) -> list[Array]:
        out = poison(m, ldo, dtype=dtype)
        launch(spec, x, out, m)
        return [wide(out)[:, :cols]]

    def expected(m: int) -> list[Array]:
        if name is None:
            return [from_bf16(to_bf16(x[:m, :cols]))]
        value = _act(name, x[:m, :cols])
        return [value * x[:m, cols : 2 * cols] if gated else np.tanh(value * 1.5 / 2.5) * 2.5]

    tolerance = 0 if name is None else 8e-3 if dtype == "bf16" else 3e-6
    told = f"{name or 'convert'}{f', {cols} columns' if is_wide else ''}"
    return Case(told, (spec,), run, expected, tolerance, wide=is_wide)


def _act(name: str, x: Array) -> Array:
    """In float64, by PyTorch."""
    import torch

    functions: dict[str, Callable[[Any], Any]] = {
        "silu": torch.nn.functional.silu,
        "gelu_erf": torch.nn.functional.gelu,
    }
    return np.asarray(functions[name](torch.from_numpy(x.astype(np.float64))))


def kv_write(chip: Chip) -> Iterable[Case]:
    for dtype in ("f32", "bf16"):
        yield _kv_write(f"kv_write {dtype}", 6, 2, 80, dtype)
    yield _kv_write("kv_write bf16, 128 dims", 16, 8, 128, "bf16", is_wide=True)


def _kv_write(name: str, heads: int, kv: int, dim: int, dtype: str, *, is_wide: bool = False) -> Case:
    most, page, eps = _rows(is_wide), 16, 1e-6
    row, num_pages = (heads + 2 * kv) * dim, most // page + 3
    ld = row_stride(row)
    rng = np.random.default_rng(0)
    before, table = random(1, most, ld), Rope(dim).table(500)
    slots = rng.permutation(num_pages * page)[:most].astype(np.int32)
    slots[1] = -1  # a row without a token
    positions = rng.integers(0, 500, most).astype(np.int32)
    weights = [random(2, dim), random(3, dim)]
    spec = kv_write_spec(heads, kv, dim, page, ld, dim, qk_norm="head", norm_eps=eps, dtype=dtype)

    def run(launch: Launch, m: int) -> list[Array]:
        qkv = before[:m].copy()
        k, v = (poison(num_pages, kv, page, dim, dtype=dtype) for _ in range(2))
        launch(spec, qkv, table, positions[:m].copy(), *weights, k, v, slots[:m].copy(), m)
        written = [
            np.stack([wide(cache)[slot // page, :, slot % page] if slot >= 0 else np.zeros((kv, dim), np.float32)
                      for slot in slots[:m]])
            for cache in (k, v)
        ]  # fmt: skip
        untouched = int(np.isnan(wide(k)).sum() // (kv * dim)) == num_pages * page - (slots[:m] >= 0).sum()
        return [qkv[:, : heads * dim], *written, np.full(m, float(untouched))]

    def expected(m: int) -> list[Array]:
        parts = before[:m, :row].reshape(m, heads + 2 * kv, dim).astype(np.float64)
        q, k, v = parts[:, :heads], parts[:, heads : heads + kv], parts[:, heads + kv :]
        angles = table[positions[:m], None].astype(np.float64)
        cos, sin = angles[..., : dim // 2], angles[..., dim // 2 :]
        turned = []
        for x, weight in zip((q, k), weights, strict=True):
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
            a, b = x[..., : dim // 2], x[..., dim // 2 :]
            turned.append(np.concatenate([a * cos - b * sin, b * cos + a * sin], -1))
        has = (slots[:m] >= 0)[:, None, None]
        return [turned[0].reshape(m, -1), turned[1] * has, v * has, np.ones(m)]

    return Case(name, (spec,), run, expected, 8e-3 if dtype == "bf16" else 5e-6, wide=is_wide)
