"""Sequences in scattered pages, the attention kernel run over them, and what must come out, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from compiler.packed_call import call
from nanoserve.compiler.target import Target
from nanoserve.kernels import attention
from support.bfloat16 import from_bf16, to_bf16

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


def kv_memory(pages: Pages, dtype: str = "f32") -> tuple[np.ndarray, np.ndarray]:
    """(k, v) as the kernels take them: one array [page][head][keys | values], and the same from its first values on."""
    n, kv, d, slots = pages.k.shape
    if dtype == "f32":
        memory = np.empty((n, kv, 2, d * slots), dtype=np.float32)
        memory[:, :, 0] = pages.k.reshape(n, kv, -1)
        memory[:, :, 1] = pages.v.reshape(n, kv, -1)
    else:
        memory = np.empty((n, kv, 2, d * slots), dtype=np.uint16)
        memory[:, :, 0] = to_bf16(pages.k).reshape(n, kv, d // 2, 2, slots).swapaxes(3, 4).reshape(n, kv, -1)
        memory[:, :, 1] = to_bf16(pages.v).reshape(n, kv, slots // 2, 2, d).swapaxes(3, 4).reshape(n, kv, -1)
    flat = memory.reshape(-1)
    return flat, flat[d * slots :]


def bf16(x: np.ndarray) -> np.ndarray:
    """float32 numbers rounded to bfloat16."""
    return from_bf16(to_bf16(x))


def run(
    pages: Pages,
    queries: list[np.ndarray],
    heads: int,
    rows: int,
    splits: int = 1,
    target: Target | None = None,
    *,
    tiles: int = 1,
    across: str = "rows",
    segments_each: int = 0,
    out: str = "f32",
    **options: Any,
) -> list[np.ndarray]:
    """Attention of each sequence's last len(queries[s]) tokens, in items of up to `rows` * `tiles` rows.

    Across "heads", `rows` must be the group and every query one token. `segments_each` > 0 gives that many segments to
    an item, another then merges them. Options are the spec's.
    """
    kv, d = pages.k.shape[1], pages.k.shape[2]
    group, row = heads // kv, heads * d
    tiling = attention.Tiling(rows, tiles, across)
    by_head = across == "heads"
    window = options.get("window", 0)
    table: list[int] = []
    items: list[dict[str, int]] = []
    merges: list[dict[str, int]] = []
    q0 = part = 0
    for own, keys, q in zip(pages.pages, pages.keys, queries, strict=True):
        tokens = (-(-len(keys) // 64) + 1) * 64
        entries = -(-tokens // pages.page_size)
        each = rows if by_head else rows * tiles
        assert not by_head or (len(q) == 1 and rows == group)
        for head in range(0, kv, tiles if by_head else 1):
            for r0 in range(0, len(q) * group, each):
                num_rows, num_heads = min(each, len(q) * group - r0), min(tiles, kv - head) if by_head else 1
                pos0 = len(keys) - len(q)
                first = (
                    max(0, pos0 + r0 // group - window + 1) // 64 * 64 // attention.SEGMENT if window else 0
                )
                end = (pos0 + (r0 + num_rows - 1) // group) // attention.SEGMENT + 1
                item = {
                    "table_off": len(table), "kv_head": head, "num_heads": num_heads, "q0": q0, "r0": r0,
                    "num_rows": num_rows, "pos0": pos0, "first_segment": first, "end_segment": end, "part": -1,
                }  # fmt: skip
                if not segments_each or end - first <= segments_each:
                    items.append(item)
                    continue
                used = num_heads * rows if by_head else num_rows
                stride = attention.part_floats(d, tiling, used) // 16
                cuts = [*range(first, end, segments_each), end]
                items += [
                    {**item, "first_segment": a, "end_segment": b, "part": part + (a - first) * stride, "part_stride": stride}
                    for a, b in pairwise(cuts)
                ]  # fmt: skip
                merges.append(
                    {
                        **item,
                        "end_segment": first,
                        "part": part,
                        "part_stride": stride,
                        "num_parts": end - first,
                    }
                )
                part += (end - first) * stride
        table += own + [own[-1]] * (entries - len(own))
        q0 += len(q)
    ldq, ldo = row + 5, row + 3
    q_rows = np.zeros((q0, ldq), dtype=np.float32)
    q_rows[:, :row] = np.concatenate([q.reshape(len(q), row) for q in queries])
    result = np.full((q0, ldo), 7, dtype=np.float32 if out == "f32" else np.uint16)
    parts = np.full(part * 16 + 1, np.nan, dtype=np.float32)
    spec = attention.attention_spec(heads, kv, d, pages.page_size, ldq, ldo, tiling, out=out, **options)
    flat_table = np.array(table, dtype=np.int32)
    k, v = kv_memory(pages, options.get("dtype", "f32"))
    for some in (items[::-1] if segments_each else items, merges):
        flat_items = np.zeros((len(some), 16), dtype=np.int32)
        for i, item in enumerate(some):
            flat_items[i, : len(attention.Item)] = [item.get(name, 0) for name in attention.Item]
        edges = np.linspace(0, len(some), splits + 1).astype(int).tolist()
        for begin, end in pairwise(edges):
            call(spec, q_rows, k, v, flat_table, flat_items, parts, result, begin, end, target=target)
    assert (result[:, row:] == 7).all(), "padding columns were written"
    by_sequence = np.split(result[:, :row].reshape(q0, heads, d), np.cumsum([len(q) for q in queries])[:-1])
    return [one.copy() for one in by_sequence]


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
