"""ChunkedPrefillManager: prompts advance by chunks, so that a long one never stalls those who decode.

One chunk per request per call, round-robin: who was served goes to the back, so no prompt starves another, and a budget too
small for all goes to different ones in turn. Pages are granted as the prompt advances, not for its whole length; the price is
that a prompt may run out of pages halfway, which preemption resolves.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanoserve.batch import Batch
from nanoserve.cache.kv_pool import KVCachePool
from nanoserve.request import Request
from nanoserve.scheduling.chunked_request import ChunkedRequest
from nanoserve.scheduling.prefill_manager import Grant, Pieces, PrefillManager


class ChunkedPrefillManager(PrefillManager):
    """Prompts in chunks.

    Args:
        kv_pool: where pages come from.
        max_chunk_size: most tokens of one request per step.
        max_batch_tokens: most prompt tokens per step, all requests together.
    """

    def __init__(self, kv_pool: KVCachePool, max_chunk_size: int = 256, max_batch_tokens: int = 2048) -> None:
        super().__init__(kv_pool, max_batch_tokens)
        if max_chunk_size < 1:
            raise ValueError(f"max_chunk_size: {max_chunk_size} must be at least 1")
        self.max_chunk_size = max_chunk_size
        self.chunks: dict[int | str, ChunkedRequest] = {}

    @property
    def longest_prompt(self) -> int | None:
        return None

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        self.chunks[request.req_id] = ChunkedRequest(request, self.max_chunk_size)

    def remove(self, request: Request) -> None:
        super().remove(request)
        self.chunks.pop(request.req_id, None)

    def chunk_len(self, request: Request, budget: int) -> int:
        return self.chunks[request.req_id].peek_next_chunk_size(budget)

    def take(self, budget: int, grant: Grant | None = None, only: Request | None = None) -> Pieces:
        pieces = super().take(budget, grant, only)
        for request, count in pieces:
            if request.req_id in self.active:  # a later grant may have preempted it
                self.chunks[request.req_id].get_next_chunk(count)
                self.active[request.req_id] = self.active.pop(request.req_id)  # to the back
        return pieces

    def can_schedule(self, request: Request | None = None) -> bool:
        """The next chunk of `request` (or of any active one) fits in the pages free now."""
        if request is None:
            return any(self.can_schedule(one) for one in self.active.values())
        held = 0 if request.page_table is None else len(request.page_table)
        size = min(self.max_chunk_size, request.extend_len)
        return self.kv_pool.pages_needed(request.cached_len + size) - held <= self.kv_pool.num_free_pages

    def complete(self, batch: Batch) -> list[Request]:
        """For use without a scheduler: the batch was computed. Returns the requests whose prompt is finished."""
        done = []
        for request, start, count in zip(batch.requests, batch.starts, batch.counts, strict=True):
            request.cached_len = start + count
            if request.extend_len == 0:
                self.remove(request)
                done.append(request)
        return done

    def rollback(self) -> None:
        """The step in flight did not happen."""
        for chunked in self.chunks.values():
            chunked.reset()

    def schedule(self, waiting: Sequence[Request] = ()) -> Batch | None:
        """Take `waiting` in, then one chunk of each active prompt that tokens and pages allow."""
        for request in waiting:
            self.add_request(request)
        pieces = self.take(self.max_prefill_tokens)
        return Batch.from_chunks(pieces) if pieces else None
