"""Prompts being computed in chunks, so that a long one never makes the others wait for all of it.

Per call every active prompt gets at most one chunk, round-robin under one token budget; pages are granted as a prompt
advances, not when it begins. A step therefore takes bounded time whatever was asked, decode rows can join every one of
them, and a short prompt behind a long one waits for chunks, not for prompts. The price: a prompt of n chunks takes at
least n steps.

Used on its own (`add_request`, `schedule`) or by the Scheduler, as PrefillManager is and by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanoserve.batch import Batch
from nanoserve.cache.kv_pool import KVCachePool
from nanoserve.checks import whole_number
from nanoserve.request import Request
from nanoserve.scheduling.chunked_request import ChunkedRequest
from nanoserve.scheduling.pages import grant, missing_pages
from nanoserve.scheduling.prefill_manager import PrefillManager, computed_batch


class ChunkedPrefillManager(PrefillManager):
    """Chunks of prompts.

    Args:
        kv_pool: where pages come from.
        max_chunk_size: most tokens of one prompt per call.
        max_batch_tokens: most tokens of all prompts per call.
    """

    def __init__(self, kv_pool: KVCachePool, max_chunk_size: int = 256, max_batch_tokens: int = 2048) -> None:
        whole_number("max_batch_tokens", max_batch_tokens, 1)
        super().__init__(kv_pool, max_batch_tokens)
        self.max_batch_tokens = max_batch_tokens
        self.max_chunk_size = whole_number("max_chunk_size", max_chunk_size, 1)
        self.max_prompt_len = None

    def piece(self, chunks: ChunkedRequest, budget: int) -> int:
        """Tokens to compute next with `budget` left: a chunk, or what is left of the budget."""
        return min(chunks.peek_next_chunk_size(), budget)

    # ---- on its own

    def can_schedule(self, request: Request) -> bool:
        """The pages for its next chunk are free now."""
        end = request.cached_len + min(self.max_chunk_size, self.max_batch_tokens, request.extend_len)
        free: int = self.kv_pool.num_free_pages
        return missing_pages(self.kv_pool, request, end) <= free

    def schedule(self, waiting: Sequence[Request] = ()) -> Batch | None:
        """The next chunk of each active request, or None if there is none or no page for any.

        A request whose pages are not free sits out and keeps what it has; one whose last chunk is in the batch leaves.

        Args:
            waiting: more requests to add first, as PrefillManager's.
        """
        for request in waiting:
            if request.extend_len and request not in self.active_requests:
                self.add_request(request)
        chosen: list[tuple[Request, int]] = []
        for chunks, count in self.take(self.max_batch_tokens):
            request = chunks.request
            if grant(self.kv_pool, request, request.cached_len + count) is None:
                continue
            chosen.append((request, count))
        batch = computed_batch(chosen)
        for request, _ in chosen:
            if request.extend_len == 0:
                self.remove(request)
        return batch
