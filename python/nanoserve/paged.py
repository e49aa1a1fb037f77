"""Paged KV writing and attention as plain calls, for people who bring their own model.

Arrays may be NumPy arrays or CPU torch tensors (float32); results come back as the caller's kind, without a copy on the
way in. Scheduling comes from `nanoserve.Scheduler`, whose output carries the slot mapping and block tables used here.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoserve.kernels import attention
from nanoserve.kernels.library import load_kernels
from nanoserve.native import KVCachePool, ThreadPool
from nanoserve.native import paged_attention as _native_attention

_threads: ThreadPool | None = None


def write_kv(k: Any, v: Any, pool: KVCachePool, layer: int, slot_mapping: Any) -> None:
    """Store keys and values of new tokens in their pages.

    Args:
        k, v: float32[T, kv_heads, head_dim].
        pool, layer: where to.
        slot_mapping: int32[T], `SchedulerOutput.slot_mapping`: page_id * page_size + offset of each token.
    """
    pool.store_kv(_array("k", k), _array("v", v), _indices("slot_mapping", slot_mapping), layer)


def paged_attention(
    q: Any,
    pool: KVCachePool,
    layer: int,
    block_tables: Any,
    starts: Any,
    counts: Any,
    scale: float | None = None,
    *,
    window: int = 0,
    softcap: float = 0.0,
) -> Any:
    """Causal attention of new tokens over their sequences' pages, decode rows and prompt chunks in one call.

    Args:
        q: float32[T, heads, head_dim]; the sequences' new tokens end to end.
        block_tables: int32[S, max_pages], page ids of each sequence, padded with anything.
        starts: int32[S], position of each sequence's first new token (tokens already in its pages).
        counts: int32[S], new tokens of each sequence; T is their sum. Their K and V must be written already.
        scale: factor on the scores, 1/sqrt(head_dim) by default.
        window: keys a token sees, its own included; 0 for all before it.
        softcap: bound of the scores, softcap * tanh(score / softcap); 0 for none.

    Returns:
        float32[T, heads, head_dim], a torch tensor when q is one.

    Raises:
        ValueError: shapes, page ids or lengths that do not fit together.
    """
    global _threads
    queries = _array("q", q)
    if queries.ndim != 3 or queries.shape[2] != pool.head_dim or queries.shape[1] % pool.num_heads:
        raise ValueError(
            f"q: shape {queries.shape} must be [tokens, a multiple of {pool.num_heads} heads, {pool.head_dim}]"
        )
    if pool.page_size % 16:
        raise ValueError(f"pool: page_size {pool.page_size} must be a multiple of 16")
    _, heads, head_dim = queries.shape
    factor = 1.0 / math.sqrt(head_dim) if scale is None else scale
    if not math.isfinite(factor):
        raise ValueError(f"scale: {scale!r} must be finite")
    small, large = attention.tilings(heads // pool.num_heads, pool.num_heads, head_dim, pool.element)
    row = heads * head_dim
    specs = [
        attention.attention_spec(
            heads,
            pool.num_heads,
            head_dim,
            pool.page_size,
            row,
            row,
            tiling,
            scale=factor,
            window=window,
            softcap=softcap,
            dtype=pool.element,
        )
        for tiling in (small, large)
    ]
    addresses = load_kernels(specs)
    if _threads is None:
        _threads = ThreadPool()
    out = np.empty_like(queries)
    _native_attention(
        pool, layer, queries, out, _indices("block_tables", block_tables),
        _indices("starts", starts), _indices("counts", counts),
        addresses[specs[0]], (small.rows, small.tiles), addresses[specs[1]], (large.rows, large.tiles), _threads, window,
    )  # fmt: skip
    torch = sys.modules.get("torch")
    return torch.from_numpy(out) if torch is not None and isinstance(q, torch.Tensor) else out


def _indices(name: str, value: Any) -> NDArray[np.int32]:
    array = np.asarray(value)
    if array.size and (array.dtype.kind not in "iu" or array.min() < -(2**31) or array.max() >= 2**31):
        raise ValueError(f"{name}: must hold 32-bit integers, holds {array.dtype} up to {array.max()}")
    return np.ascontiguousarray(array, dtype=np.int32)


def _array(name: str, value: Any) -> NDArray[np.float32]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    array = np.asarray(value)
    if array.dtype != np.float32:
        raise ValueError(f"{name}: dtype {array.dtype} must be float32")
    return np.ascontiguousarray(array)
