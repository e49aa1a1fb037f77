"""The loop: schedule, compute, sample, commit. Requests join and leave at every step.

One request cannot hurt another. If the forward pass raises, each request of the batch is computed again alone: who raises
alone ends with finish_reason "error", the others go on with the very same bits, because nothing in a batch changes its
rows' results. The same holds for sampling. Logits that are not finite end their request alone. An interrupt (Ctrl-C)
during the forward pass or sampling discards the step; while requests change state it waits until they are done. Either
way the engine can go on after it. Only a lost device ends everything: `step` raises CudaDeviceLost, now and ever after.

It decides nothing about order or memory (Scheduler) and nothing about values (executor, sampler).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from nanoserve.batch import Batch
from nanoserve.cache.radix_manager import RadixCacheManager
from nanoserve.checks import whole_number
from nanoserve.logits import Logits
from nanoserve.logprobs import TokenLogprob
from nanoserve.native import CudaDeviceLost
from nanoserve.observe.events import EventLog, ReqId
from nanoserve.request import Request
from nanoserve.sampling import Sampler, derive_seed
from nanoserve.scheduling.committer import StepResults
from nanoserve.scheduling.decode_manager import DecodeManager
from nanoserve.scheduling.interrupts import InterruptGate
from nanoserve.scheduling.policies import Policy
from nanoserve.scheduling.prefill_manager import PrefillManager
from nanoserve.scheduling.run_ahead import RunAhead, RunningStep
from nanoserve.scheduling.scheduler import Scheduler
from nanoserve.scheduling.scoring import score_prompts, score_tokens

if TYPE_CHECKING:
    from nanoserve.draws import AheadExecutor


class Executor(Protocol):
    """What the batcher needs of a model."""

    def forward(self, batch: Batch) -> Logits:
        """A row for each of `batch.sample_rows`, in their order; `Logits.of` makes them of an array."""
        ...


@dataclass(slots=True)
class StepOutput:
    """What one step did."""

    batch: Batch | None = None  # None: nobody is live
    new_tokens: dict[ReqId, int] = field(default_factory=dict)
    finished: list[Request] = field(default_factory=list)  # by themselves or by an error; not the aborted
    preempted: tuple[ReqId, ...] = ()

    @property
    def scheduled(self) -> dict[ReqId, int]:
        """Tokens computed, by request."""
        return {} if self.batch is None else self.batch.tokens_by_request


class ContinuousBatcher:
    """Serves requests with one model.

    Args:
        executor: computes batches.
        radix_mgr, prefill_mgr, decode_mgr: as Scheduler's, over one KV pool. A plain PrefillManager runs prompts whole.
        eos_token_id: token(s) that end a request.
        max_num_batched_tokens, max_model_len, vocab_size, policy, events, switch_len: as Scheduler's.
        seed: source of the seeds of requests that bring none.
        clock: seconds; measures the scheduler's share of a step.
    """

    def __init__(
        self,
        executor: Executor,
        radix_mgr: RadixCacheManager,
        prefill_mgr: PrefillManager,
        decode_mgr: DecodeManager,
        eos_token_id: int | Iterable[int] | None = None,
        *,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        vocab_size: int | None = None,
        policy: str | Policy = "fcfs",
        seed: int = 0,
        sampler: Sampler | None = None,
        clock: Callable[[], float] = time.perf_counter,
        events: EventLog | None = None,
        switch_len: int | None = None,
    ) -> None:
        if eos_token_id is None:
            eos_token_id = ()
        elif not isinstance(eos_token_id, Iterable):
            eos_token_id = (eos_token_id,)
        self.executor = executor
        self.sampler = Sampler() if sampler is None else sampler
        self.radix_mgr = radix_mgr
        self.seed = whole_number("seed", seed, 0, 2**64 - 1)
        self.scheduler = Scheduler(
            radix_mgr.kv_pool,
            radix_mgr,
            prefill_mgr,
            decode_mgr,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            eos_token_ids=frozenset(eos_token_id),
            policy=policy,
            events=events,
            switch_len=switch_len,
        )
        self._clock = clock
        self._gate = InterruptGate()
        self._scheduler_s = self._forward_s = self._sampler_s = 0.0
        # Whoever brings a sampler of their own gets logits.
        can_start = getattr(executor, "chooses_tokens", False) and type(self.sampler) is Sampler
        self._run_ahead = RunAhead(self.scheduler, cast("AheadExecutor", executor) if can_start else None)

    # ---- requests

    def check(self, request: Request) -> None:
        """Raises RequestRefused for a request that can never be served; takes nothing."""
        self.scheduler.check(request)

    def add_request(self, request: Request) -> None:
        """Queues a request; RequestRefused if it can never be served."""
        self.scheduler.add_request(request)
        if request.seed is None:
            request.seed = derive_seed(self.seed, request.arrival)

    def abort(self, req_id: ReqId) -> bool:
        """Drops a live request, whatever its state; False if there is none by that id."""
        is_dropped = self.scheduler.abort(req_id)
        self._run_ahead.forget_if_nobodys()
        return is_dropped

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def run_until_complete(self, requests: Sequence[Request]) -> list[Request]:
        """Serves requests to their end; the same requests, in the same order.

        If one is refused, or the run is interrupted, none of them stays behind.
        """
        try:
            with self._gate:
                for request in requests:
                    self.add_request(request)
                while not all(request.is_finished for request in requests):
                    self.step()
        except BaseException:
            for request in requests:
                if self.scheduler.pool.live.get(request.req_id) is request:
                    self.abort(request.req_id)
            raise
        return list(requests)

    # ---- a step

    def step(self) -> StepOutput:
        """Computes one mixed batch and commits what it produced."""
        clock = self._clock
        running: RunningStep | None = None
        times = [clock()]
        with self._gate as gate:
            try:
                gate.close()
                running = self._run_ahead.take()
                if running is None:
                    output = self.scheduler.step()
                    if output is None:
                        gate.open()
                        return StepOutput(finished=self.scheduler.take_finished())
                    running = self._run_ahead.start(output)
                output = running.output
                self._run_ahead.look(running)
                gate.open()
                times.append(clock())
                results = self._device_results(running)
                if results is not None:  # tokens came with it
                    times += [clock()] * 2
                else:
                    errors: dict[ReqId, str] = {}
                    logits = self._forward(output.batch, errors)
                    times.append(clock())
                    results = self._results(output.batch, logits, errors)
                    times.append(clock())
                gate.close()
                finished = self.scheduler.update(output, results)
                self._run_ahead.forget_if_nobodys()
                gate.open()
            except BaseException:
                gate.close()
                if running is not None:
                    running.wait()
                self._run_ahead.forget()
                self.scheduler.forget_ahead()
                if self.scheduler.in_flight is not None:
                    self.scheduler.discard(self.scheduler.in_flight)
                raise
        times.append(clock())
        begin, scheduled, computed, sampled, end = times
        self._scheduler_s += scheduled - begin + end - sampled
        self._forward_s += computed - scheduled
        self._sampler_s += sampled - computed
        return StepOutput(output.batch, output.new_tokens, finished, output.preempted)

    def _device_results(self, running: RunningStep) -> StepResults | None:
        """What the executor chose, and the rest by the host from those rows' logits; None: it has to be computed otherwise."""
        started, draws = running.started, running.draws
        if started is None or draws is None:
            return None
        errors: dict[ReqId, str] = {}
        logprobs: dict[ReqId, TokenLogprob] = {}
        try:
            tokens = started.tokens()
            finite = [token >= 0 for token in tokens]
            if draws.on_host:
                logits = started.logits(draws.on_host)
                requests = running.output.sampling_requests
                asking = [requests[row] for row in draws.on_host]
                theirs: list[bool] = logits.finite.tolist()
                chosen = self._sample(logits, asking, theirs, errors)
                logprobs = score_tokens(asking, logits, chosen, theirs, errors)
                for row, token in zip(draws.on_host, chosen, strict=True):
                    tokens[row] = token
        except CudaDeviceLost:
            raise
        except Exception:
            self._run_ahead.forget()
            return None
        return StepResults([max(token, 0) for token in tokens], errors, finite, logprobs)

    def _forward(self, batch: Batch, errors: dict[ReqId, str]) -> Logits:
        """Logits of the sample rows; what a request raises alone goes into `errors`, and its rows are not finite."""
        try:
            return self._run(batch)
        except CudaDeviceLost:
            raise  # nobody's fault who is in this batch, and nobody else's chance
        except Exception as error:
            if batch.size == 1:
                errors[batch.requests[0].req_id] = _text(error)
                return Logits.of(np.full((len(batch.sample_rows), 1), np.nan, np.float32))
        return _joined(
            [
                self._forward(Batch([piece]), errors)
                for piece in zip(batch.requests, batch.counts, strict=True)
            ]
        )

    def _run(self, batch: Batch) -> Logits:
        logits = self.executor.forward(batch)
        rows = len(batch.sample_rows)
        if not isinstance(logits, Logits):
            raise TypeError(f"the executor gave {type(logits).__name__}, must be Logits")
        if len(logits) != rows:
            raise ValueError(f"the executor gave logits of shape {logits.values.shape} for {rows} rows")
        return logits

    def _results(self, batch: Batch, logits: Logits, errors: dict[ReqId, str]) -> StepResults:
        """Tokens, and the log-probabilities that were asked for."""
        finite: list[bool] = logits.finite.tolist()
        prompt_logprobs: dict[ReqId, list[TokenLogprob]] = {}
        if batch.token_rows is not None:
            prompt_logprobs = score_prompts(batch, logits, finite, errors)
            rows = batch.token_rows.tolist()
            logits, finite = logits.take(rows), [finite[row] for row in rows]
        requests = batch.sampling_requests
        tokens = self._sample(logits, requests, finite, errors)
        logprobs = score_tokens(requests, logits, tokens, finite, errors)
        return StepResults(tokens, errors, finite, logprobs, prompt_logprobs)

    def _sample(
        self, logits: Logits, requests: list[Request], finite: list[bool], errors: dict[ReqId, str]
    ) -> list[int]:
        """A token for each row; rows that cannot be sampled get 0 and are told apart by `finite` and `errors`."""
        eos = self.scheduler.eos_token_ids
        if not errors:
            try:
                sampled = self.sampler.sample(logits, requests, eos)
                if len(sampled) == len(requests):
                    return [int(token) for token in sampled]
            except Exception:  # find out below whose fault it is
                pass
        tokens = [0] * len(requests)
        for row, request in enumerate(requests):
            if finite[row] and request.req_id not in errors:
                try:
                    (token,) = self.sampler.sample(logits.take([row]), [request], eos)
                    tokens[row] = int(token)
                except Exception as error:
                    errors[request.req_id] = _text(error)
        return tokens

    # ---- statistics

    def get_stats(self) -> dict[str, Any]:
        """Counters since the start or `reset_stats`, and the queues as they are now."""
        stats, pool, radix = self.scheduler.stats, self.scheduler.pool, self.radix_mgr
        steps = max(1, stats.steps)
        return {
            "steps": stats.steps,
            "avg_tokens_per_step": (stats.prefill_tokens + stats.decode_tokens) / steps,
            "avg_requests_per_step": stats.request_steps / steps,
            "prefill_tokens": stats.prefill_tokens,
            "decode_tokens": stats.decode_tokens,
            "output_tokens": stats.output_tokens,
            "num_waiting": pool.num_waiting,
            "num_running": pool.num_running,
            "num_finished": stats.finished,
            "num_aborted": stats.aborted,
            "num_errors": stats.errors,
            "num_refused": stats.refused,
            "preemptions": stats.preemptions,
            "num_held_back": stats.held_back,
            "steps_ahead": self._run_ahead.num_ahead,
            "cache_hits": radix.cache_hits,
            "cache_misses": radix.cache_misses,
            "cache_hit_rate": radix.cache_hit_rate,
            "evicted_pages": radix.total_evictions,
            "forward_s": self._forward_s,
            "scheduler_us_per_request_step": 1e6 * self._scheduler_s / max(1, stats.request_steps),
            "sampler_us_per_request_step": 1e6 * self._sampler_s / max(1, stats.request_steps),
        }

    def reset_stats(self) -> None:
        """Counters back to zero; queues, cache and requests stay."""
        self.scheduler.stats.reset()
        self.radix_mgr.clear_stats()
        self._run_ahead.num_ahead = 0
        self._scheduler_s = self._forward_s = self._sampler_s = 0.0


def _joined(parts: Sequence[Logits]) -> Logits:
    """The logits of a batch that was computed request by request; those of a request that raised are one column wide."""
    widest = max(parts, key=lambda part: part.values.shape[1])
    values = widest.empty_rows(sum(map(len, parts)))
    block_max = np.full((len(values), widest.block_max.shape[1]), np.nan, np.float32)
    begin = 0
    for part in parts:
        end = begin + len(part)
        if part.values.shape[1] == values.shape[1]:
            values[begin:end], block_max[begin:end] = part.values, part.block_max
        else:
            values[begin:end] = 0.0
        begin = end
    return Logits(values, block_max, widest.reader)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
