"""Giving a request the pages for its next tokens: all of them or none.

Whoever wants more than what is free at the moment (by eviction, by preemption) makes room first and then grants; a count
of missing pages is used at once, never kept across an allocation.
"""

from __future__ import annotations

from nanoserve.cache.kv_pool import KVCachePool, PageTable
from nanoserve.request import Request


def missing_pages(pool: KVCachePool, request: Request, num_tokens: int) -> int:
    """Pages the request lacks for its first `num_tokens` tokens."""
    held = 0 if request.page_table is None else len(request.page_table)
    needed: int = pool.pages_needed(num_tokens)
    return max(0, needed - held)


def grant(pool: KVCachePool, request: Request, num_tokens: int) -> list[int] | None:
    """Grows the request's table to `num_tokens` tokens: the pages added, or None, nothing taken, if too few are free."""
    if missing_pages(pool, request, num_tokens) > pool.num_free_pages:
        return None
    if request.page_table is None:
        request.page_table = PageTable(pool)
    added: list[int] = request.page_table.grow_to(num_tokens)
    return added
