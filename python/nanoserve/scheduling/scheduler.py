"""Scheduler: decides what every step computes; knows requests, pages and tokens, but no model.

    output = scheduler.step()               what to compute: a Batch, block tables, slot mapping
    finished = scheduler.update(output, tokens)      what came out: one token per sampling request

One token budget per step: decode rows first, then chunks of admitted prompts round-robin, then new prompts.

Memory. A request gets pages as it advances. When none are free, cached prefixes are evicted; then the youngest running request,
if younger than the one in need, loses its pages and is computed again later; if there is none the one in need sits this
step out, keeping what it has. Progress: the oldest running request can take every page that is not its own, and the door
admits nobody whose prompt and output exceed the pool, so the oldest always advances, ends, and makes the next one oldest.
Nobody is overtaken for pages: when the queue's head does not fit, nobody behind it is admitted. The price is idle memory then.

Trust. `validated_len` moves only over tokens that led to finite logits. Only those enter the prefix tree, and pages computed
beyond them are zeroed before they are given back: another request's masked lanes multiply whatever lies there by zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

import numpy as np

from nanoserve.batch import Batch, Int32Array
from nanoserve.cache.kv_pool import PageTable
from nanoserve.cache.radix_manager import RadixCacheManager
from nanoserve.errors import RequestRefused
from nanoserve.observe.events import EventLog
from nanoserve.request import Request, RequestState
from nanoserve.sampling import derive_seed
from nanoserve.scheduling.chunked_prefill import ChunkedPrefillManager
from nanoserve.scheduling.decode_manager import DecodeManager
from nanoserve.scheduling.policies import Policy
from nanoserve.scheduling.prefill_manager import PrefillManager
from nanoserve.scheduling.request_pool import RequestPool
from nanoserve.scheduling.stats import SchedulerStats

ReqId = int | str


class SchedulerOutput:
    """One step's work. `batch.requests[i]` computes `batch.counts[i]` tokens from `batch.starts[i]`."""

    def __init__(self, step: int, batch: Batch, preempted: list[ReqId]) -> None:
        self.step = step
        self.batch = batch
        self.preempted = preempted

    @property
    def num_scheduled_tokens(self) -> dict[ReqId, int]:
        return {request.req_id: count for request, count in zip(self.batch.requests, self.batch.counts, strict=True)}

    @cached_property
    def block_tables(self) -> Int32Array:
        """int32[requests, most pages]: each request's pages, padded with its last one."""
        tables = [table.pages for table in self.batch.tables]
        width = max(len(pages) for pages in tables)
        return np.array([pages + pages[-1:] * (width - len(pages)) for pages in tables], dtype=np.int32)

    @property
    def slot_mapping(self) -> Int32Array:
        """int32[tokens]: where each token's keys and values go, page_id * page_size + offset."""
        return self.batch.out_loc


class Scheduler:
    """Schedules requests over a KV pool.

    Args:
        radix_mgr: the prefix cache; its pool is the scheduler's.
        prefill_mgr: whole prompts or chunks.
        decode_mgr: its max_batch_size limits the running requests.
        max_num_batched_tokens: most tokens of one step.
        max_model_len: longest prompt + output; None is any.
        vocab_size: token ids are checked against it when given.
        eos_token_ids: end a request unless it ignores them.
        policy: order of admission.
        seed: source of the seeds of requests that bring none.
    """

    def __init__(
        self,
        radix_mgr: RadixCacheManager,
        prefill_mgr: PrefillManager,
        decode_mgr: DecodeManager,
        *,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        vocab_size: int | None = None,
        eos_token_ids: Collection[int] = (),
        policy: str = "fcfs",
        seed: int = 0,
    ) -> None:
        if max_num_batched_tokens < decode_mgr.max_batch_size:
            raise ValueError(
                f"max_num_batched_tokens: {max_num_batched_tokens} must be at least max_batch_size="
                f"{decode_mgr.max_batch_size}: every running request computes a token per step"
            )
        self.radix_mgr = radix_mgr
        self.kv_pool = radix_mgr.kv_pool
        self.prefill_mgr = prefill_mgr
        self.decode_mgr = decode_mgr
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.seed = seed
        self.pool = RequestPool(Policy(policy, radix_mgr.peek))
        self.events = EventLog()
        self.stats = SchedulerStats()
        self.steps = 0  # since the start: the clock of aging and events, never reset
        self._pieces: dict[ReqId, tuple[Request, int]] = {}
        self._preempted: list[ReqId] = []
        self._pending: SchedulerOutput | None = None
        self._abort_after_step: set[ReqId] = set()
        self._unclean: set[ReqId] = set()  # a step of theirs was rolled back: their pages may hold anything

    # ---- the door

    def check(self, request: Request) -> None:
        """Whether the request could ever be served.

        Raises:
            RequestRefused: with the value and the limit. ValueError: a token id outside the vocabulary.
        """
        if self.vocab_size is not None and max(request.prompt_tokens) >= self.vocab_size:
            position, token = next((i, t) for i, t in enumerate(request.prompt_tokens) if t >= self.vocab_size)
            raise RequestRefused(f"prompt_tokens[{position}]: {token} must be in [0, {self.vocab_size})")
        asked = f"prompt of {request.num_prompt_tokens} + max_tokens of {request.max_tokens}"
        if self.max_model_len is not None and request.max_total_len > self.max_model_len:
            raise RequestRefused(f"{asked} = {request.max_total_len} tokens, the limit is max_model_len={self.max_model_len}")
        # The last token sampled is never computed, so it needs no slot.
        needed = self.kv_pool.pages_needed(request.max_total_len - 1)
        if needed > self.kv_pool.num_pages:
            raise RequestRefused(f"{asked} needs {needed} pages, the pool has {self.kv_pool.num_pages} pages")
        longest = self.prefill_mgr.longest_prompt
        # A preempted request computes its output again with its prompt, so both count.
        if longest is not None and request.max_total_len - 1 > min(longest, self.max_num_batched_tokens):
            limit = min(longest, self.max_num_batched_tokens)
            raise RequestRefused(f"{asked} may need {request.max_total_len - 1} tokens in one step, the limit is {limit}")

    def add_request(self, request: Request) -> None:
        """Queue a request; raises as `check`, or RequestRefused for an id in use."""
        try:
            self.check(request)
            self.pool.add(request, self.steps)
        except RequestRefused as refused:
            self.stats.refused += 1
            self.events.record(self.steps, "refused", request.req_id, why=str(refused))
            raise
        if request.seed is None:
            request.seed = derive_seed(self.seed, request.arrival)
        self.events.record(self.steps, "queued", request.req_id, prompt_tokens=request.num_prompt_tokens)

    def abort(self, req_id: ReqId) -> bool:
        """Drop a request in any state; False if it is not live. One that is in the step in flight goes with its update."""
        request = self.pool.get(req_id)
        if request is None or req_id in self._abort_after_step:
            return False
        if self._pending is not None and req_id in self._pieces:
            self._abort_after_step.add(req_id)
        else:
            self._end(request, "abort")
        return True

    @property
    def has_unfinished(self) -> bool:
        return len(self.pool) > 0

    # ---- a step

    def step(self) -> SchedulerOutput | None:
        """What to compute now; None when there is nothing. Must be followed by `update` or `rollback`."""
        if self._pending is not None:
            raise RuntimeError(f"step {self._pending.step} was not updated yet: call update(output, tokens) first")
        self.steps += 1
        pieces = self._pieces = {}
        self._preempted = []
        budget = self.max_num_batched_tokens
        page_size = self.kv_pool.page_size
        for request in self.decode_mgr.take(budget):
            # Only a token that opens a page can lack one.
            if request.state is RequestState.DECODE and (request.cached_len % page_size or self._grant(request, 1)):
                pieces[request.req_id] = (request, 1)
        budget -= len(pieces)
        if self.prefill_mgr.num_active_requests:
            budget -= self._add_chunks(self.prefill_mgr.take(budget, self._grant))
        while budget > 0 and self.pool.waiting and len(self.pool.running) < self.decode_mgr.max_batch_size:
            taken = self._admit_next(budget)
            if not taken:
                break
            budget -= taken
        if not pieces:
            return None
        self._pending = SchedulerOutput(self.steps, Batch(list(pieces.values())), self._preempted)
        return self._pending

    def _add_chunks(self, chunks: Sequence[tuple[Request, int]]) -> int:
        total = 0
        for request, count in chunks:
            if request.state is RequestState.PREFILL:  # a later grant may have preempted it
                self._pieces[request.req_id] = (request, count)
                total += count
                self.events.record(self.steps, "chunk", request.req_id, start=request.cached_len, tokens=count)
        return total

    def _admit_next(self, budget: int) -> int:
        """Admit the queue's head and schedule its first chunk; the tokens taken, 0 if it has to wait."""
        request = self.pool.peek_next()
        assert request is not None
        cached_pages = self.radix_mgr.peek(request.token_ids) // self.kv_pool.page_size
        if self._pages_short(request, cached_pages) > 0:
            return 0
        self.radix_mgr.acquire(request, PageTable(self.kv_pool))
        # Counted again: what it pinned is no longer evictable.
        held = len(request.page_table) if request.page_table is not None else 0
        if self._pages_short(request, held) > 0 or request.extend_len > (self.prefill_mgr.longest_prompt or request.extend_len):
            self.radix_mgr.release(request)
            return 0
        self.prefill_mgr.add_request(request)
        if not self.prefill_mgr.chunk_len(request, budget):
            self.prefill_mgr.remove(request)
            self.radix_mgr.release(request)
            return 0
        self.pool.admit(request)
        self.events.record(self.steps, "admitted", request.req_id, cached_tokens=request.cached_len)
        return self._add_chunks(self.prefill_mgr.take(budget, self._grant, only=request))

    def _pages_short(self, request: Request, held: int) -> int:
        """Pages missing for the whole request now, leaving every decoding request the one it may need next."""
        wanted = self.kv_pool.pages_needed(request.total_len) - held
        return wanted + self.decode_mgr.num_running - self.radix_mgr.num_available_pages

    def _grant(self, request: Request, count: int) -> bool:
        """Pages for the next `count` tokens: free ones, evicted ones, or a younger request's."""
        table = request.page_table
        assert table is not None
        upto = request.cached_len + count
        wanted = self.kv_pool.pages_needed(upto) - len(table)
        if wanted <= 0:
            return True
        while not self.radix_mgr.reserve(wanted):
            victim = self._youngest()
            if victim.arrival <= request.arrival:
                return False
            self._preempt(victim)
        table.grow_to(upto)
        return True

    def _youngest(self) -> Request:
        return max(self.pool.running.values(), key=lambda request: request.arrival)

    def _preempt(self, victim: Request) -> None:
        self._pieces.pop(victim.req_id, None)
        self._preempted.append(victim.req_id)
        self.decode_mgr.remove(victim)
        self.prefill_mgr.remove(victim)
        self.radix_mgr.commit(victim)
        self._release(victim)
        self.pool.preempt(victim)
        self.stats.preemptions += 1
        self.events.record(self.steps, "preempted", victim.req_id, known_tokens=victim.total_len)

    # ---- its results

    def update(
        self,
        output: SchedulerOutput,
        tokens: Sequence[int],
        errors: Mapping[ReqId, str] | None = None,
        finite: Sequence[bool] | None = None,
    ) -> list[Request]:
        """Commit a computed step.

        Args:
            output: what `step` returned.
            tokens: one per `output.batch.sampling_requests`, in their order.
            errors: requests whose computation failed, with the reason; their token is ignored.
            finite: per sampling request, False when its logits were not all finite.

        Returns:
            The requests that finished in this step, aborted ones included.
        """
        if output is not self._pending:
            raise RuntimeError("update: this output is not the step in flight")
        batch = output.batch
        if len(tokens) != len(batch.sample_rows):
            raise ValueError(f"tokens: {len(tokens)} given, {len(batch.sample_rows)} requests were sampled")
        self._pending = None
        self.stats.count(batch)
        finished: list[Request] = []
        row = -1
        for request, start, count, sampled in zip(batch.requests, batch.starts, batch.counts, batch.sampled, strict=True):
            row += sampled
            request.cached_len = start + count
            if request.req_id in self._abort_after_step:
                self._end(request, "abort")
            elif errors and request.req_id in errors:
                self._end(request, "error", errors[request.req_id])
            elif not sampled:
                continue
            elif finite is not None and not finite[row]:
                self._end(request, "error", f"logits at position {start + count - 1} are not finite")
            else:
                self._commit_token(request, int(tokens[row]))
            if request.is_finished:
                finished.append(request)
        self._abort_after_step.clear()
        return finished

    def _commit_token(self, request: Request, token: int) -> None:
        request.validated_len = request.cached_len
        request.append_output(token)
        self.stats.output_tokens += 1
        reason = self._stop_reason(request, token)
        if reason is not None:
            self.radix_mgr.commit(request)
            self._end(request, reason)
        elif request.state is RequestState.PREFILL:
            self.radix_mgr.commit(request)
            self.prefill_mgr.remove(request)
            self.decode_mgr.add_request(request)
            self.pool.start_decode(request)
            self.events.record(self.steps, "prefilled", request.req_id)

    def _stop_reason(self, request: Request, token: int) -> str | None:
        params, made = request.params, len(request.output_tokens)
        if made >= params.min_tokens and (
            token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos)
        ):
            return "stop"
        return "length" if made >= params.max_tokens else None

    def rollback(self, output: SchedulerOutput) -> None:
        """The step in flight was not computed: nothing moves. Its pages stay with their requests."""
        if output is not self._pending:
            raise RuntimeError("rollback: this output is not the step in flight")
        self._pending = None
        self._unclean.update(request.req_id for request in output.batch.requests)
        if isinstance(self.prefill_mgr, ChunkedPrefillManager):
            self.prefill_mgr.rollback()
        for req_id in list(self._abort_after_step):
            self._abort_after_step.discard(req_id)
            self.abort(req_id)

    def _end(self, request: Request, reason: str, error: str | None = None) -> None:
        self.decode_mgr.remove(request)
        self.prefill_mgr.remove(request)
        self._release(request)
        self.pool.finish(request, reason, error)
        self.stats.ended(reason)
        kind = {"abort": "aborted", "error": "error"}.get(reason, "finished")
        self.events.record(self.steps, kind, request.req_id, output_tokens=len(request.output_tokens), why=error or reason)

    def _release(self, request: Request) -> None:
        """Give everything back; what may hold values nobody validated is zeroed first."""
        table = request.page_table
        unclean = request.req_id in self._unclean
        self._unclean.discard(request.req_id)
        if table is not None and (unclean or request.cached_len > request.validated_len):
            suspect = table.pages[request.validated_len // self.kv_pool.page_size :]
            self.kv_pool.scrub([page for page in suspect if self.kv_pool.ref_count(page) == 1])
        self.radix_mgr.release(request)
