"""PrefillManager: which prompts compute how many tokens in a step, and the pages they need for it.

The scheduler and the lessons use the same two pieces: `chunk_len`, how many tokens a request may compute now, and a `grant`
that gets it the pages or says no. The default grant takes free pages only; the scheduler brings one that evicts and preempts.

This class runs prompts whole: a prompt longer than the step's budget waits for a step of its own, and one longer than
`max_prefill_tokens` can never run, so the scheduler refuses it at the door. ChunkedPrefillManager lifts both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nanoserve.batch import Batch
from nanoserve.cache.kv_pool import KVCachePool, PageTable
from nanoserve.request import Request

Grant = Callable[[Request, int], bool]
Pieces = list[tuple[Request, int]]


class PrefillManager:
    """Whole prompts, first come first served.

    Args:
        kv_pool: where pages come from.
        max_prefill_tokens: most prompt tokens per step.
    """

    def __init__(self, kv_pool: KVCachePool, max_prefill_tokens: int = 2048) -> None:
        if max_prefill_tokens < 1:
            raise ValueError(f"max_prefill_tokens: {max_prefill_tokens} must be at least 1")
        self.kv_pool = kv_pool
        self.max_prefill_tokens = max_prefill_tokens
        self.active: dict[int | str, Request] = {}  # admitted, prompt not finished; in the order they get their turn

    @property
    def longest_prompt(self) -> int | None:
        """The most tokens a request may have to compute at once; None is any number."""
        return self.max_prefill_tokens

    @property
    def num_active_requests(self) -> int:
        return len(self.active)

    def add_request(self, request: Request) -> None:
        self.active[request.req_id] = request

    def remove(self, request: Request) -> None:
        """Forget a request; nothing happens when it is not there."""
        self.active.pop(request.req_id, None)

    def chunk_len(self, request: Request, budget: int) -> int:
        """Tokens the request may compute now, 0 for none."""
        left = request.extend_len
        return left if left <= budget else 0

    def take(self, budget: int, grant: Grant | None = None, only: Request | None = None) -> Pieces:
        """This step's share of the active requests (or of `only` one), whose turn it is first.

        `grant` may remove requests on the way, also some that have their share already.
        """
        pieces: Pieces = []
        budget = min(budget, self.max_prefill_tokens)
        for request in list(self.active.values()) if only is None else [only]:
            if request.req_id not in self.active:
                continue
            count = self.chunk_len(request, budget)
            if count and (grant or self.grant)(request, count):
                pieces.append((request, count))
                budget -= count
        return pieces

    def grant(self, request: Request, count: int) -> bool:
        """Pages for the next `count` tokens out of the free ones, or nothing."""
        if request.page_table is None:
            request.page_table = PageTable(self.kv_pool)
        wanted = self.kv_pool.pages_needed(request.cached_len + count) - len(request.page_table)
        if wanted > self.kv_pool.num_free_pages:
            return False
        request.page_table.grow_to(request.cached_len + count)
        return True

    def can_schedule(self, request: Request) -> bool:
        """The whole remaining prompt fits in an empty step and in the pages free now."""
        held = 0 if request.page_table is None else len(request.page_table)
        wanted = self.kv_pool.pages_needed(request.total_len) - held
        return request.extend_len <= self.max_prefill_tokens and wanted <= self.kv_pool.num_free_pages

    def schedule(self, waiting: Sequence[Request]) -> Batch | None:
        """A batch of the first prompts that fit in tokens and pages; stops at the first that does not, so none is overtaken."""
        pieces: Pieces = []
        budget = self.max_prefill_tokens
        for request in waiting:
            count = self.chunk_len(request, budget)
            if not count or not self.grant(request, count):
                break
            pieces.append((request, count))
            budget -= count
        return Batch.from_chunks(pieces) if pieces else None
