"""Sequences in scattered pages, the attention kernel run over them, and what must come out, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from compiler.packed_call import call
from nanoserve.compiler.target import Target
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
    **options: Any,
) -> list[np.ndarray]:
    """Attention of each sequence's last len(queries[s]) tokens; items of up to `rows` rows. Options are the spec's."""
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
    spec = attention.attention_spec(heads, kv, d, pages.page_size, ldq, ldo, rows, **options)
    flat_table, flat_items = np.array(table, dtype=np.int32), np.array(items, dtype=np.int32)
    edges = np.linspace(0, len(items), splits + 1).astype(int).tolist()
    for begin, end in pairwise(edges):
        call(spec, q_rows, pages.k, pages.v, flat_table, flat_items, out, begin, end, target=target)
    assert (out[:, row:] == 7).all(), "padding columns were written"
    result = np.split(out[:, :row].reshape(q0, heads, d), np.cumsum([len(q) for q in queries])[:-1])
    return [part.copy() for part in result]


def exact(
    keys: np.ndarray, values: np.ndarray, q: np.ndarray, *, window: int = 0, softcap: float = 0.0
) -> np.ndarray:
    """Float64 causal attention of the last len(q) tokens."""
    heads, d = q.shape[1:]
    group = heads // keys.shape[1]
    out = np.empty(q.shape)
    for t in range(len(q)):
        end = len(keys) - len(q) + t + 1
        seen = slice(max(0, end - window) if window else 0, end)
        for h in range(heads):
            scores = keys[seen, h // group].astype(np.float64) @ q[t, h].astype(np.float64) / np.sqrt(d)
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[t, h] = weights / weights.sum() @ values[seen, h // group].astype(np.float64)
    return out


def make_queries(counts: list[int], heads: int, d: int, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((count, heads, d)).astype(np.float32) for count in counts]
