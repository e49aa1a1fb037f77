"""ContinuousBatcher: scheduler, executor and sampler in a loop; requests join and leave at every step.

One request cannot hurt another. When a forward pass raises, each request of the batch is computed again alone: those that raise
alone end with finish_reason "error", the others go on with the very same bits, because answers do not depend on the batch. The
same holds for sampling. An interrupt (Ctrl-C) rolls the step back, so the engine can go on afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nanoserve.batch import Batch
from nanoserve.cache.radix_manager import RadixCacheManager
from nanoserve.request import Request
from nanoserve.sampling import Sampler
from nanoserve.scheduling.decode_manager import DecodeManager
from nanoserve.scheduling.prefill_manager import PrefillManager
from nanoserve.scheduling.scheduler import ReqId, Scheduler
from nanoserve.scheduling.stats import SchedulerStats

Logits = NDArray[np.float32]


class Executor(Protocol):
    """What the batcher needs of a model."""

    last_finite: NDArray[np.bool_]  # per row of the latest logits: every value is finite

    def forward(self, batch: Batch) -> Logits:
        """float32[number of sampling requests, vocab]: logits in the order of `batch.sampling_requests`."""
        ...


@dataclass(slots=True)
class StepOutput:
    """What one step did."""

    batch: Batch | None = None  # None: there was nothing to do
    new_tokens: dict[ReqId, int] = field(default_factory=dict)
    finished: list[Request] = field(default_factory=list)
    preempted: list[ReqId] = field(default_factory=list)

    @property
    def scheduled(self) -> dict[ReqId, int]:
        """Tokens computed, by request."""
        if self.batch is None:
            return {}
        return {request.req_id: count for request, count in zip(self.batch.requests, self.batch.counts, strict=True)}


class ContinuousBatcher:
    """Runs requests to completion.

    Args:
        executor: computes batches.
        radix_mgr, prefill_mgr, decode_mgr: as the Scheduler's.
        eos_token_id: token(s) that end a request.
        clock: seconds, for the scheduler's share of a step.
        options: further keywords of Scheduler.
    """

    def __init__(
        self,
        executor: Executor,
        radix_mgr: RadixCacheManager,
        prefill_mgr: PrefillManager,
        decode_mgr: DecodeManager,
        eos_token_id: int | Collection[int] | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        **options: Any,
    ) -> None:
        if eos_token_id is None:
            eos_token_id = ()
        elif isinstance(eos_token_id, int):
            eos_token_id = (eos_token_id,)
        self.executor = executor
        self.sampler = Sampler()
        self.scheduler = Scheduler(radix_mgr, prefill_mgr, decode_mgr, eos_token_ids=eos_token_id, **options)
        self.radix_mgr = radix_mgr
        self._clock = clock
        self._forward_s = self._step_s = 0.0

    def add_request(self, request: Request) -> None:
        self.scheduler.add_request(request)

    def check(self, request: Request) -> None:
        self.scheduler.check(request)

    def abort(self, req_id: ReqId) -> bool:
        return self.scheduler.abort(req_id)

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def step(self) -> StepOutput:
        """Schedule, compute, sample, commit."""
        begin = self._clock()
        output = self.scheduler.step()
        if output is None:
            return StepOutput()
        batch = output.batch
        forward_s = 0.0
        try:
            before = self._clock()
            logits, finite, errors = self._forward(batch)
            forward_s = self._clock() - before
            sampling = batch.sampling_requests
            tokens = self._sample(logits, sampling, errors)
        except BaseException:
            self.scheduler.rollback(output)
            raise
        made = [len(request.output_tokens) for request in sampling]
        finished = self.scheduler.update(output, tokens, errors, finite)
        new = {
            request.req_id: request.output_tokens[-1]
            for request, before_len in zip(sampling, made, strict=True)
            if len(request.output_tokens) > before_len
        }
        self._forward_s += forward_s
        self._step_s += self._clock() - begin
        return StepOutput(batch, new, finished, output.preempted)

    def run_until_complete(self, requests: Sequence[Request]) -> list[Request]:
        """Serve requests to their end; the same requests, finished. When one is refused, none of them stays queued."""
        added: list[Request] = []
        try:
            for request in requests:
                self.add_request(request)
                added.append(request)
            while not all(request.is_finished for request in requests):
                self.step()
        except BaseException:
            for request in added:
                self.abort(request.req_id)
            raise
        return list(requests)

    def _forward(self, batch: Batch) -> tuple[Logits, Sequence[bool], dict[ReqId, str]]:
        try:
            logits = self.executor.forward(batch)
            return logits, self.executor.last_finite.tolist(), {}
        except Exception as error:
            if batch.size == 1:
                return self._failed(batch, error)
        rows: list[Logits] = []
        finite: list[bool] = []
        errors: dict[ReqId, str] = {}
        for request, count in zip(batch.requests, batch.counts, strict=True):
            logits, row_finite, failed = self._forward(Batch([(request, count)]))
            rows.append(logits)
            finite += row_finite
            errors.update(failed)
        width = max(part.shape[1] for part in rows)
        return np.concatenate([part if part.shape[1] else np.zeros((len(part), width), np.float32) for part in rows]), finite, errors

    @staticmethod
    def _failed(batch: Batch, error: Exception) -> tuple[Logits, Sequence[bool], dict[ReqId, str]]:
        rows = len(batch.sample_rows)
        why = f"{type(error).__name__}: {error}"
        return np.zeros((rows, 0), np.float32), [True] * rows, {batch.requests[0].req_id: why}

    def _sample(self, logits: Logits, requests: list[Request], errors: dict[ReqId, str]) -> list[int]:
        if not requests or not logits.shape[1]:
            return [0] * len(requests)
        eos = self.scheduler.eos_token_ids
        try:
            return self.sampler.sample(logits, requests, eos)
        except Exception:
            tokens = []
            for row, request in enumerate(requests):
                try:
                    tokens += self.sampler.sample(logits[row : row + 1], [request], eos)
                except Exception as error:
                    errors[request.req_id] = f"{type(error).__name__}: {error}"
                    tokens.append(0)
            return tokens

    def get_stats(self) -> dict[str, Any]:
        """Counters since the start or `reset_stats`, and the queues as they are now."""
        s, radix, pool = self.scheduler.stats, self.radix_mgr, self.scheduler.pool
        overhead_us = 1e6 * (self._step_s - self._forward_s)
        return {
            "steps": s.steps,
            "avg_tokens_per_step": (s.prefill_tokens + s.decode_tokens) / max(1, s.steps),
            "avg_requests_per_step": s.request_steps / max(1, s.steps),
            "prefill_tokens": s.prefill_tokens,
            "decode_tokens": s.decode_tokens,
            "output_tokens": s.output_tokens,
            "num_waiting": len(pool.waiting),
            "num_running": len(pool.running),
            "num_finished": s.finished,
            "num_aborted": s.aborted,
            "num_errors": s.errors,
            "num_refused": s.refused,
            "preemptions": s.preemptions,
            "cache_hits": radix.cache_hits,
            "cache_misses": radix.cache_misses,
            "cache_hit_rate": radix.cache_hit_rate,
            "evicted_pages": radix.total_evictions,
            "forward_s": self._forward_s,
            "scheduler_us_per_request_step": overhead_us / max(1, s.request_steps),
        }

    def reset_stats(self) -> None:
        self.scheduler.stats = SchedulerStats()
        self.radix_mgr.clear_stats()
        self._forward_s = self._step_s = 0.0
