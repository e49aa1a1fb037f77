"""Requests that hold memory: how they get in, grow, make room for their elders, and leave.

Out of pages. Who lacks a page takes it from what is free, else evicts unpinned cached prefixes, else preempts the youngest
running request that is younger than itself; if there is none it sits out this step and keeps what it has. Seniority, not
size: two requests that preempt each other for being large, or small, can do so for ever, but of any two one is the elder
for life, so of all that run the oldest is in nobody's way and always advances (the rest of the argument: scheduler.py).

Trust. `validated_len` moves only over tokens that led to finite logits, and only those are cached. Pages that may hold
anything else are zeroed before they are given back: a masked lane of attention multiplies what lies in it by zero, and
zero times NaN is NaN, so a page must be finite throughout, whoever gets it next.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter

from nanoserve.cache.kv_pool import KVCachePool, PageTable
from nanoserve.cache.radix_manager import RadixCacheManager
from nanoserve.errors import InvariantViolation
from nanoserve.observe.events import EventLog, ReqId
from nanoserve.request import Request
from nanoserve.scheduling.chunked_request import ChunkedRequest
from nanoserve.scheduling.decode_manager import DecodeManager
from nanoserve.scheduling.pages import grant, missing_pages
from nanoserve.scheduling.prefill_manager import PrefillManager
from nanoserve.scheduling.request_pool import RequestPool
from nanoserve.scheduling.stats import SchedulerStats

by_arrival = attrgetter("arrival")


class Residents:
    """The Scheduler's hands: every call leaves pool, tables, tree and queues in agreement."""

    def __init__(
        self,
        kv_pool: KVCachePool,
        radix_mgr: RadixCacheManager,
        prefill_mgr: PrefillManager,
        decode_mgr: DecodeManager,
        pool: RequestPool,
        events: EventLog,
        switch_len: int | None = None,
    ) -> None:
        self.kv_pool = kv_pool
        self.radix_mgr = radix_mgr
        self.prefill_mgr = prefill_mgr
        self.decode_mgr = decode_mgr
        self.pool = pool
        self.events = events
        self.stats = SchedulerStats()
        self._switch_len = 2**31 if switch_len is None else switch_len
        self.steps = 0  # since the start: the clock of aging and events
        self.preempted: list[ReqId] = []  # in this step
        self.ended: list[Request] = []  # by themselves or by an error, not reported yet
        self.may_admit = True  # False after the head found too few pages, until somebody gives some back
        self._page_size: int = kv_pool.page_size
        self._dirty: set[ReqId] = set()  # a forward that was discarded may have written their pages
        self.written_ahead: Collection[ReqId] = ()  # a step that was started ahead writes their pages

    # ---- in

    def choose_angles(self, request: Request) -> None:
        """Which rotary angles its KV will have: for one that holds no pages, before it is looked up in the cache."""
        request.long_context = request.total_len > self._switch_len

    def outgrew_its_angles(self, request: Request) -> bool:
        """Its next token needs other angles than the KV it has: all of it is computed anew."""
        return request.total_len > self._switch_len and not request.long_context

    def will_outgrow_its_angles(self, request: Request) -> bool:
        """The token after its next one needs other angles than the KV it has."""
        return request.total_len + 1 > self._switch_len and not request.long_context

    def start(self, request: Request, budget: int) -> tuple[ChunkedRequest, int] | None:
        """Admits a waiting request with its first piece under `budget`; None if it has to wait."""
        # What running prompts have yet to get is spoken for, and each decoding request will want a page soon. All known
        # tokens of the newcomer must fit beside that, or it would come in only to preempt or be preempted.
        spoken_for = self.decode_mgr.num_running
        for running in self.prefill_mgr.active_requests:
            spoken_for += missing_pages(self.kv_pool, running, running.total_len)
        # Rows of logits that were asked for must be computed: nothing comes from the cache then.
        self.radix_mgr.acquire(request, PageTable(self.kv_pool), find=not request.lacks_prompt_logprobs)
        chunks = ChunkedRequest(request, self.prefill_mgr.max_chunk_size)
        count = self.prefill_mgr.piece(chunks, budget)
        # Counted after the prefix is pinned: what it shares is neither missing nor evictable any more.
        missing = missing_pages(self.kv_pool, request, request.total_len)
        fits = missing + spoken_for <= self.radix_mgr.num_available_pages
        if not count or not fits:
            self.radix_mgr.release(request)
            self.may_admit = fits  # a budget is new in every step, pages are not
            return None
        waited = self.pool.steps_waited(request, self.steps)
        self.pool.admit(request)
        self.events.record(self.steps, "admitted", request.req_id, waited=waited)
        if request.cached_len:
            self.events.record(self.steps, "prefix_hit", request.req_id, tokens=request.cached_len)
        chunks = self.prefill_mgr.add_request(request)
        if not self.grow(request, request.cached_len + count):
            raise InvariantViolation(
                f"request {request.req_id!r} was admitted for {missing} pages that are not there"
            )
        return chunks, count

    def grow(self, request: Request, num_tokens: int, may_preempt: bool = True) -> bool:
        """Pages for the request's first `num_tokens` tokens, however they have to be found; False if it must sit out."""
        while True:
            missing = missing_pages(
                self.kv_pool, request, num_tokens
            )  # anew: a preemption changed who holds what
            if missing == 0:
                return True
            if self.radix_mgr.reserve(missing):
                break
            if not may_preempt:
                return False
            youngest = max(self.pool.running.values(), key=by_arrival)
            if youngest.arrival <= request.arrival:
                return False
            self.preempt(youngest, by=request)
        pages = grant(self.kv_pool, request, num_tokens)
        if pages is None:
            raise InvariantViolation(
                f"request {request.req_id!r}: {missing} pages were reserved and are not there"
            )
        self.events.record(self.steps, "pages_granted", request.req_id, pages=pages)
        return True

    def start_decode(self, request: Request) -> None:
        """Its prompt is computed: from now on one token per step."""
        self.prefill_mgr.remove(request)
        self.pool.start_decode(request)
        self.decode_mgr.add_request(request)

    # ---- out

    def preempt(self, request: Request, by: Request) -> None:
        """Back to the queue, without pages; what was validated stays cached for as long as nobody needs the room."""
        self.stats.preemptions += 1
        self.events.record(self.steps, "preempted", request.req_id, by=by.req_id)
        self.preempted.append(request.req_id)
        self.leave_managers(request)
        self.radix_mgr.commit(request)
        self.release(request)
        request.num_preemptions += 1
        self.choose_angles(request)
        self.pool.preempt(request)

    def share(self, request: Request) -> bool:
        """Caches what is validated; False if that failed, which ends the request."""
        try:
            self.radix_mgr.commit(request)
        except InvariantViolation:
            raise
        except Exception as error:  # this request's trouble, not its neighbours'
            self.fail(request, f"caching failed: {type(error).__name__}: {error}")
            return False
        self.may_admit = True  # the head may find a longer prefix now
        return True

    def finish(self, request: Request, reason: str) -> None:
        """It got all its tokens."""
        self.stats.finished += 1
        made = len(request.output_tokens)
        self.events.record(self.steps, "finished", request.req_id, reason=reason, output_tokens=made)
        self.leave_managers(request)
        self.release(request)
        self.pool.finish(request, reason)
        self.ended.append(request)

    def fail(self, request: Request, why: str) -> None:
        """It cannot go on. Nothing it computed is trusted."""
        self.stats.errors += 1
        self.events.record(self.steps, "error", request.req_id, why=why)
        self.leave_managers(request)
        self.release(request, trusted_len=0)
        self.pool.finish(request, "error", why)
        self.ended.append(request)

    def leave_managers(self, request: Request) -> None:
        self.prefill_mgr.remove(request)
        self.decode_mgr.remove(request)

    def release(self, request: Request, trusted_len: int | None = None) -> None:
        """Gives back pages and pin. Pages past the first `trusted_len` tokens are zeroed; None: past what is validated,
        if anything was computed since."""
        table = request.page_table
        if table is not None and len(table):
            if trusted_len is None:
                unsure = (
                    request.cached_len > request.validated_len
                    or request.req_id in self._dirty
                    or request.req_id in self.written_ahead
                )
                trusted_len = request.validated_len if unsure else table.capacity
            suspect = table.pages[trusted_len // self._page_size :]
            # What others hold too was trusted when it was shared, and is theirs.
            self.kv_pool.scrub([page for page in suspect if self.kv_pool.ref_count(page) == 1])
            self.events.record(self.steps, "pages_freed", request.req_id, pages=len(table))
        self._dirty.discard(request.req_id)
        self.radix_mgr.release(request)
        self.may_admit = True

    def mark_dirty(self, request: Request) -> None:
        """Its pages may have been written by a forward whose results were thrown away."""
        self._dirty.add(request.req_id)
