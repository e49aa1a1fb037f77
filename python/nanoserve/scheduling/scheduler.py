"""What is computed in the next step. It owns no model: give its output to one, and the tokens back to `update`.

One token budget per step: a row for every decoding request, then a chunk for every unfinished prompt, round-robin, then
newly admitted requests. All of it is one mixed batch. Prompts whose log-probabilities were asked for have a second budget,
of rows of logits; who exceeds it gets a shorter chunk, or none in this step.

Progress: every step with a live request computes something, and every request ends.
  1. The door lets in only what fits the pool alone.
  2. The oldest running request is preempted by nobody else and may preempt all others (residents.py), so it gets every
     page it does not hold itself, but for pages that its own pin protects. It preempts itself at most once, where a sequence
     outgrows its rotary angles, and comes back with its seniority.
  3. Those can be too many in one case only: it pins cached pages it does not hold, because another request cached the
     same prefix under other pages first, or because it copied a shared page. By then nobody else runs. It is preempted
     itself, its pin goes, and the queue's head, by 1, fits the pool.
  4. The queue's head is not overtaken for want of pages. Its key is fixed and later arrivals' grow with time (policies.py):
     finitely many come before it, and those that go while somebody else computes its prefix (twins.py).

Between `step` and `update` nothing has advanced: an output can be discarded, a request aborted, a forward repeated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from nanoserve.batch import Batch
from nanoserve.cache.kv_pool import KVCachePool
from nanoserve.cache.radix_manager import RadixCacheManager
from nanoserve.errors import InvariantViolation, RequestRefused
from nanoserve.observe.events import EventLog, ReqId
from nanoserve.request import Request, RequestState
from nanoserve.scheduling.chunked_prefill import ChunkedPrefillManager
from nanoserve.scheduling.chunked_request import ChunkedRequest
from nanoserve.scheduling.committer import Committer, StepResults
from nanoserve.scheduling.decode_manager import DecodeManager
from nanoserve.scheduling.door import Door
from nanoserve.scheduling.policies import Policy
from nanoserve.scheduling.prefill_manager import PrefillManager
from nanoserve.scheduling.request_pool import RequestPool
from nanoserve.scheduling.residents import Residents, by_arrival
from nanoserve.scheduling.scheduler_output import SchedulerOutput
from nanoserve.scheduling.scoring import within_row_limit
from nanoserve.scheduling.stats import SchedulerStats
from nanoserve.scheduling.twins import Twins

__all__ = ["Scheduler", "SchedulerOutput"]

_Piece = tuple[Request, int]


class Scheduler:
    """Decides steps over one KV pool.

    Args:
        kv_pool: the pages.
        radix_mgr: prefix cache over the same pool; None makes one.
        prefill_mgr: PrefillManager for whole prompts; None chunks them.
        decode_mgr: its max_batch_size bounds the running requests, prefilling ones included.
        max_num_batched_tokens: most tokens in one step.
        max_model_len: longest prompt + output.
        vocab_size: to refuse token ids the model does not know.
        eos_token_ids: end a request, unless it ignores them.
        policy: order of the waiting queue.
        events: where to write what happens; None makes a log.
        switch_len: sequences longer than this have other rotary angles (Rope.switch_len); None: no such length.
    """

    def __init__(
        self,
        kv_pool: KVCachePool,
        radix_mgr: RadixCacheManager | None = None,
        prefill_mgr: PrefillManager | None = None,
        decode_mgr: DecodeManager | None = None,
        *,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        vocab_size: int | None = None,
        eos_token_ids: Collection[int] = (),
        policy: str | Policy = "fcfs",
        events: EventLog | None = None,
        switch_len: int | None = None,
    ) -> None:
        self.kv_pool = kv_pool
        self.radix_mgr = RadixCacheManager(kv_pool) if radix_mgr is None else radix_mgr
        self.prefill_mgr = ChunkedPrefillManager(kv_pool) if prefill_mgr is None else prefill_mgr
        self.decode_mgr = DecodeManager() if decode_mgr is None else decode_mgr
        for name, held in (("radix_mgr", self.radix_mgr.kv_pool), ("prefill_mgr", self.prefill_mgr.kv_pool)):
            if held is not kv_pool:
                raise ValueError(f"{name}: works on another KV pool than the scheduler")
        if max_num_batched_tokens < self.decode_mgr.max_batch_size:
            raise ValueError(
                f"max_num_batched_tokens: {max_num_batched_tokens} must be at least max_batch_size="
                f"{self.decode_mgr.max_batch_size}: every running request computes a token per step"
            )
        longest = self.prefill_mgr.max_prompt_len
        if longest is not None and longest > max_num_batched_tokens:
            raise ValueError(
                f"max_prefill_tokens: {longest} must be at most max_num_batched_tokens={max_num_batched_tokens}: "
                "whole prompts are computed in one step"
            )
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.pool = RequestPool(policy)
        self.events = EventLog() if events is None else events
        self.door = Door(kv_pool, max_model_len, vocab_size, longest)
        self.residents = Residents(
            kv_pool, self.radix_mgr, self.prefill_mgr, self.decode_mgr, self.pool, self.events, switch_len
        )
        self.in_flight: SchedulerOutput | None = None
        self.ahead: SchedulerOutput | None = None  # the step after it, if that was asked for
        # Aborted between step and update: the forward may still write their pages.
        self.gone_in_flight: list[Request] = []
        self._committer = Committer(self.residents, self.eos_token_ids, max_model_len, vocab_size)
        self._twins = Twins(self.residents)
        self._page_size: int = kv_pool.page_size

    @property
    def stats(self) -> SchedulerStats:
        return self.residents.stats

    @property
    def steps(self) -> int:
        """Steps since the start."""
        return self.residents.steps

    @property
    def has_unfinished(self) -> bool:
        return bool(self.pool.live)

    # ---- requests

    def check(self, request: Request) -> None:
        """Raises RequestRefused, with the numbers, for a request that can never be served; takes nothing."""
        try:
            self.pool.check_new(request)
            self.door.check(request)
        except RequestRefused as error:
            self.stats.refused += 1
            self.events.record(self.steps, "refused", request.req_id, why=str(error))
            raise

    def add_request(self, request: Request) -> None:
        """Queues a request; RequestRefused if it can never be served."""
        self.check(request)
        self.residents.choose_angles(request)
        self.pool.add(request, self.steps)
        self.residents.may_admit = True

    def abort(self, req_id: ReqId) -> bool:
        """Drops a live request, whatever its state; False if there is none by that id.

        Its pages are free on return, or, if it is in a batch that is being computed, on the return of `update`.
        """
        request = self.pool.live.get(req_id)
        if request is None:
            return False
        self.stats.aborted += 1
        self.events.record(self.steps, "aborted", req_id, state=request.state.value)
        self.residents.leave_managers(request)
        if self.in_flight is not None and req_id in self.in_flight.num_scheduled_tokens:
            self.gone_in_flight.append(request)
        else:
            self.residents.release(request)
        self.pool.finish(request, "abort")
        return True

    # ---- a step

    def step(self) -> SchedulerOutput | None:
        """The next batch, or None when nobody is live.

        Raises:
            RuntimeError: the previous output was neither updated nor discarded.
            InvariantViolation: somebody is live and nothing can be computed: pages are held outside of this scheduler.
        """
        if self.in_flight is not None:
            raise RuntimeError(
                f"step: the output of step {self.in_flight.step} needs update() or discard() first"
            )
        residents = self.residents
        residents.steps += 1
        residents.preempted = []
        rows = self._decode_rows()
        chunks = self._chunks(self.max_num_batched_tokens - len(rows))
        if residents.preempted:  # maybe somebody who had been given a row or a chunk
            rows = [request for request in rows if request.state is RequestState.DECODE]
            chunks = [(request, count) for request, count in chunks if request.state is RequestState.PREFILL]
        if not rows and not chunks:
            if not self.pool.live:
                return None
            chunks = self._start_over()
            if not chunks:
                return None  # whoever was left failed at admission
        batch = Batch.mixed(rows, chunks)
        self.in_flight = SchedulerOutput(residents.steps, batch, len(rows), tuple(residents.preempted))
        return self.in_flight

    def look_ahead(self) -> SchedulerOutput | None:
        """The step after the one in flight, while that is computed: a token more for everybody who decodes.

        None where more is to be decided than that: a prompt is to be computed, somebody can be admitted, a page is missing.
        Who ends in the step in flight, as the host finds out when the tokens come, is in it for nothing. `update` takes the
        outputs one after the other.
        """
        output, residents, pool = self.in_flight, self.residents, self.pool
        if output is None or self.ahead is not None or not output.batch.is_decode:
            return None
        live = [row for row, request in enumerate(output.requests) if not request.is_finished]
        can_admit = residents.may_admit and pool.num_running < self.decode_mgr.max_batch_size
        if len(live) != pool.num_running or (pool.num_waiting and can_admit):
            return None
        rows = [row for row in live if not self._committer.ends_by_length(output.requests[row])]
        if not rows or (len(rows) < len(live) and pool.num_waiting):
            return None
        for row in rows:
            request = output.requests[row]
            if residents.will_outgrow_its_angles(request) or not residents.grow(
                request, request.cached_len + 2, may_preempt=False
            ):
                return None
        self.ahead = SchedulerOutput(output.step + 1, Batch.ahead(output.batch, rows), len(rows), ())
        residents.written_ahead = self.ahead.num_scheduled_tokens
        return self.ahead

    def _decode_rows(self) -> Sequence[Request]:
        """A row for every decoding request that has, or gets, the page its next token is written to."""
        rows: Sequence[Request] = self.decode_mgr.take(self.max_num_batched_tokens)
        page_size = self._page_size
        at_boundary = [request for request in rows if not request.cached_len % page_size]
        if not at_boundary:
            return rows
        stuck = []
        rows = list(rows)
        for request in sorted(at_boundary, key=by_arrival):
            if request.state is RequestState.DECODE and not self.residents.grow(
                request, request.cached_len + 1
            ):
                stuck.append(request)
        return [request for request in rows if request not in stuck] if stuck else rows

    def _chunks(self, budget: int) -> list[_Piece]:
        """Chunks of the prompts in progress, then of requests admitted with what is left of the budget."""
        budget = min(budget, self.prefill_mgr.max_prefill_tokens)
        chosen: list[_Piece] = []
        num_served = 0
        num_active = self.prefill_mgr.num_active_requests
        if num_active:
            for chunks, count in self.prefill_mgr.take(budget):
                request = chunks.request
                count = within_row_limit(chosen, request, count)
                if not count:  # it waits for rows of logits, which newcomers may not want
                    num_served += 1
                elif request.state is RequestState.PREFILL and self.residents.grow(
                    request, request.cached_len + count
                ):
                    self._choose(chosen, chunks, count)
                    budget -= count
                    num_served += 1
        # Nobody joins while there are too few pages for those who run, or while one of them waits for budget.
        if num_served == num_active and not self.residents.preempted:
            self._admit(chosen, budget)
        return chosen

    def _admit(self, chosen: list[_Piece], budget: int) -> None:
        """Seats waiting requests while there is budget, a seat, and memory for the first of them."""
        residents, pool, twins = self.residents, self.pool, self._twins
        if not pool.num_waiting:
            return
        twins.look()
        while budget > 0 and residents.may_admit and pool.num_running < self.decode_mgr.max_batch_size:
            request = pool.head(
                self.radix_mgr.peek,
                lambda one: within_row_limit(chosen, one, 1) > 0 and not twins.holds_back(one),
            )
            if request is None:
                return
            try:
                started = residents.start(request, budget)
            except InvariantViolation:
                raise
            except Exception as error:  # this request's trouble: it ends, the queue goes on
                residents.fail(request, f"admission failed: {type(error).__name__}: {error}")
                continue
            if started is None:
                return
            twins.add(request)
            chunks, count = started
            count = within_row_limit(chosen, request, count)
            self._choose(chosen, chunks, count)
            budget -= count

    def _choose(self, chosen: list[_Piece], chunks: ChunkedRequest, count: int) -> None:
        request = chunks.request
        chosen.append((request, count))
        start, of = request.cached_len, request.total_len
        self.events.record(self.steps, "chunk", request.req_id, start=start, count=count, of=of)

    def _start_over(self) -> list[_Piece]:
        """Case 3 of the head: nobody who runs could go on. All start over, and the queue's head comes first."""
        for request in sorted(self.pool.running.values(), key=by_arrival, reverse=True):
            self.residents.preempt(request, by=request)
        self.residents.may_admit = True
        chosen: list[_Piece] = []
        self._admit(chosen, min(self.max_num_batched_tokens, self.prefill_mgr.max_prefill_tokens))
        head = self.pool.head()
        if not chosen and head is not None:
            raise InvariantViolation(
                f"nothing can be computed: request {head.req_id!r} needs {self.kv_pool.pages_needed(head.total_len)} "
                f"pages, {self.radix_mgr.num_available_pages} of {self.kv_pool.num_pages} are free or evictable, and "
                "nobody runs: the others are held outside of this scheduler"
            )
        return chosen

    # ---- its results

    def update(
        self,
        output: SchedulerOutput,
        results: StepResults | Sequence[int],
        errors: Mapping[ReqId, str] | None = None,
        finite: Sequence[bool] | None = None,
    ) -> list[Request]:
        """Commits a computed step.

        Args:
            output: what `step` returned.
            results: all of it, or the tokens alone, one per `output.sampling_requests`.
            errors, finite: as in StepResults, beside tokens.

        Returns:
            The requests that ended by themselves or by an error since the last call, not the aborted ones.
        """
        if not isinstance(results, StepResults):
            results = StepResults(results, errors or {}, finite)
        batch = output.batch
        for name, given in (("tokens", results.tokens), ("finite", results.finite)):
            if given is not None and len(given) != batch.num_sampled:
                raise ValueError(f"{name}: {len(given)} given, {batch.num_sampled} requests were sampled")
        self._land(output)
        self.stats.count(batch.size, batch.num_tokens, output.num_decode_rows)
        try:
            self._committer.commit(output, results)
        except BaseException:  # from a watcher: whoever is not committed is computed again
            self._mark_dirty(output)
            raise
        self.stats.output_tokens += len(output.new_tokens)
        output.preempted = tuple(self.residents.preempted)  # the commit may have added to them
        if self.in_flight is not None:
            self.residents.steps, self.residents.preempted = self.in_flight.step, []
        return self.take_finished()

    def take_finished(self) -> list[Request]:
        """What `update` returns, for a step that had nothing to compute."""
        finished, self.residents.ended = self.residents.ended, []
        return finished

    def discard(self, output: SchedulerOutput) -> None:
        """Forgets an output that was not computed (to the end); the same work is scheduled again."""
        self._land(output)
        self._mark_dirty(output)

    def forget_ahead(self) -> None:
        """Forgets the step after the one in flight."""
        if self.ahead is not None:
            ahead, self.ahead = self.ahead, None
            self._mark_dirty(ahead)

    def _mark_dirty(self, output: SchedulerOutput) -> None:
        for request in output.requests:
            if not request.is_finished:
                self.residents.mark_dirty(request)

    def _land(self, output: SchedulerOutput) -> None:
        """The step is over, one way or the other: nothing of it is being computed any more."""
        if output is not self.in_flight:
            raise RuntimeError(f"step {output.step} is not the one in flight")
        self.in_flight, self.ahead = self.ahead, None
        if self.in_flight is None:
            self.residents.written_ahead = ()
        for request in self.gone_in_flight:
            self.residents.release(request, trusted_len=request.validated_len)
        self.gone_in_flight.clear()
