"""The KV cache's memory: pages, slots, positions. The classes are native; this is where Python meets them.

Three numbers name a token's place and must never be mixed:

    pos      index of the token in its own sequence                       0 .. total_len
    page_id  physical page; a sequence's table maps pos // page_size -> page_id
    slot     page_id * page_size + pos % page_size: one token's row in the arena

Memory: `[layer][page][head]`, and of each head K `[head_dim][page_size]`, transposed so that 16 tokens are one vector of
scores, then V `[page_size][head_dim]`: a page is one run of memory. `get_layer_cache` shows both as
`[page, page_size, head, head_dim]` without copying. Pages of bfloat16 (`element="bf16"`) hold pairs that kernels multiply as
one, K `[head_dim / 2][page_size][2]` and V `[page_size / 2][head_dim][2]`; their views are uint16 with the pairs as an axis.

Invariant: a page is free, or its refcount equals its holders (page tables, the prefix tree); a page with more than one
holder is never written. The price of pages is waste in the last one, at most page_size - 1 tokens per sequence; the
gain is that any free page serves any sequence, so memory never fragments between them.
"""

from __future__ import annotations

from nanoserve.native import KVCachePool, PageTable, PoolExhausted

__all__ = ["KVCachePool", "PageTable", "PoolExhausted", "pages_for_budget"]


def pages_for_budget(
    budget_bytes: int,
    *,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    page_size: int = 16,
    itemsize: int = 4,
) -> int:
    """How many whole pages fit in `budget_bytes`; `num_heads` counts KV heads, `itemsize` is bytes per number.

    Raises:
        ValueError: a size below one, or a budget smaller than a single page; the message has the arithmetic.
    """
    sizes = {"num_layers": num_layers, "num_heads": num_heads, "head_dim": head_dim}
    sizes |= {"page_size": page_size, "itemsize": itemsize}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {value!r} must be an integer of at least 1")
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int):
        raise ValueError(f"kv_cache_bytes: {budget_bytes!r} must be an integer number of bytes")
    page_bytes = 2 * num_layers * num_heads * head_dim * page_size * itemsize
    if budget_bytes < page_bytes:
        raise ValueError(
            f"kv_cache_bytes: {budget_bytes} is less than one page of {page_bytes} bytes (2 for K and V x {num_layers} "
            f"layers x {num_heads} KV heads x {head_dim} head_dim x {page_size} tokens x {itemsize} bytes)"
        )
    return budget_bytes // page_bytes
