"""Prompts being computed, whole: which of them, and how many tokens, go into the next batch.

Two ways to use it, one set of rules (`piece`) below both:
  - on its own: `schedule(waiting)` picks whole prompts first come first served under a token and a page budget, grants
    their pages and returns their batch, whose tokens count as computed from then on;
  - by the Scheduler: `add_request` on admission, `take(budget)` each step, `remove` when the prompt is done. Pages,
    eviction and progress are the Scheduler's there.

A whole prompt must fit one batch, so longer ones are refused at the door. One thing is cut all the same: a preempted
request starts over with its outputs, which together may exceed the batch it once fitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from nanoserve.batch import Batch
from nanoserve.cache.kv_pool import KVCachePool
from nanoserve.checks import whole_number
from nanoserve.request import Request
from nanoserve.scheduling.chunked_request import ChunkedRequest
from nanoserve.scheduling.pages import grant, missing_pages


class PrefillManager:
    """Whole prompts.

    Args:
        kv_pool: where pages come from.
        max_prefill_tokens: most prompt tokens in one batch.
    """

    def __init__(self, kv_pool: KVCachePool, max_prefill_tokens: int = 2048) -> None:
        self.kv_pool = kv_pool
        self.max_prefill_tokens = whole_number("max_prefill_tokens", max_prefill_tokens, 1)
        self.max_chunk_size = max_prefill_tokens
        self.max_prompt_len: int | None = max_prefill_tokens  # None: any length, in chunks
        self._active: deque[ChunkedRequest] = deque()

    # ---- the rules

    def piece(self, chunks: ChunkedRequest, budget: int) -> int:
        """Tokens to compute next with `budget` left: all that one batch can hold, or none."""
        wanted = chunks.peek_next_chunk_size()
        return wanted if wanted <= budget else 0

    def add_request(self, request: Request) -> ChunkedRequest:
        """Joins the round, last."""
        chunks = ChunkedRequest(request, self.max_chunk_size)
        self._active.append(chunks)
        return chunks

    def remove(self, request: Request) -> bool:
        """Leaves the round: computed, preempted or gone. False if it was not in it."""
        for chunks in self._active:
            if chunks.request is request:
                self._active.remove(chunks)
                return True
        return False

    def take(self, budget: int) -> list[tuple[ChunkedRequest, int]]:
        """One piece of each request, round-robin, while `budget` tokens last.

        Who got a piece goes to the back, so the first who did not is the first next time: with any budget every
        request gets its turn within as many calls as there are requests.
        """
        taken = []
        for _ in range(len(self._active)):
            chunks = self._active[0]
            count = self.piece(chunks, budget)
            if count == 0:
                break
            taken.append((chunks, count))
            budget -= count
            self._active.rotate(-1)
        return taken

    @property
    def num_active_requests(self) -> int:
        return len(self._active)

    @property
    def active_requests(self) -> list[Request]:
        """In the order of their next turn."""
        return [chunks.request for chunks in self._active]

    # ---- on its own

    def can_schedule(self, request: Request) -> bool:
        """Its whole prompt fits one batch and the pages that are free now."""
        fits = request.extend_len <= self.max_prefill_tokens
        return fits and missing_pages(self.kv_pool, request, request.total_len) <= self.kv_pool.num_free_pages

    def schedule(self, waiting: Sequence[Request]) -> Batch | None:
        """A batch of whole prompts from the front of `waiting`, or None if the first cannot go.

        Requests are taken in order and the first that does not fit ends the batch: nobody is overtaken. Requests that
        have nothing left to compute are passed over, so the same list may be given again.
        """
        chosen: list[tuple[Request, int]] = []
        budget = self.max_prefill_tokens
        for request in waiting:
            count = request.extend_len
            if count == 0:
                continue
            if count > budget or grant(self.kv_pool, request, request.total_len) is None:
                break
            chosen.append((request, count))
            budget -= count
        return computed_batch(chosen)


def computed_batch(chosen: list[tuple[Request, int]]) -> Batch | None:
    """The batch of these pieces, which count as computed from here on; None when there are none."""
    if not chosen:
        return None
    batch = Batch.from_chunks(chosen)
    for request, count in chosen:
        request.cached_len += count
    return batch
