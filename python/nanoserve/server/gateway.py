"""Gateway: what is let in, who waits, what reaches the engine, and how everything ends. Lives in the event loop.

    check_open    before a request is read: whether any would be let in now
    open(jobs)    admits all, or says 400, 429 or 503 with the numbers; from then on each ends exactly once, in `_end`
    cancel(job)   its client is gone, or its time is up (408 where the request had set it, else 503 or 504): from every state,
                  within one step. Time to wait ends when the engine begins to compute.

The engine gets no more sequences than it runs at once, and a few to come: whoever else waits does so here, where keys take
turns and a wait can be ended without asking the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from nanoserve.nano_engine import NanoServingEngine
from nanoserve.server.engine_loop import EngineLoop, Gone, News
from nanoserve.server.errors import ApiError
from nanoserve.server.fair_queue import FairQueue
from nanoserve.server.job import Job, JobState
from nanoserve.server.metrics import Metrics
from nanoserve.server.settings import ServerSettings

_log = logging.getLogger("nanoserve.server")
MAX_RETRY_AFTER_S = 120
SERVED_S, MAX_SERVED = 60.0, 10_000  # what a job's end is remembered for


class Gateway:
    """Between HTTP and the engine.

    Args:
        engine: run by the gateway's EngineLoop from `start` on.
        snapshot: as EngineLoop's.
    """

    def __init__(
        self,
        engine: NanoServingEngine,
        settings: ServerSettings,
        metrics: Metrics,
        snapshot: Callable[[NanoServingEngine], dict[str, Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.metrics, self.clock = settings, metrics, clock
        running = engine.batcher.scheduler.decode_mgr.max_batch_size
        self._room = running + max(1, running // 8)  # sequences: what runs, and who steps in when one ends
        self._queue = FairQueue()
        self._with_engine: set[Job] = set()
        self._sequences = 0  # of those
        self._per_key: Counter[int] = Counter()
        self._served: deque[tuple[float, int]] = deque()  # (when, tokens) of jobs that ended lately
        self._served_tokens = 0  # theirs
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = self.is_ready = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.on_engine_failure: Callable[[], None] = lambda: None
        self.engine_loop = EngineLoop(engine, self._from_engine, snapshot, clock, settings.stream_interval_s)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.engine_loop.start()

    # ---- state

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._with_engine)

    @property
    def is_wedged(self) -> bool:
        """A step takes longer than any should, or the thread is gone."""
        loop = self.engine_loop
        return self.is_ready and (not loop.is_alive or loop.stuck_for_s() > self.settings.wedged_after_s)

    def retry_after_s(self) -> int:
        """When there is likely room again: when half of what waits is served, at the last minute's rate."""
        now, served = self.clock(), self._served
        self._forget_served(now)
        if not self._served_tokens:
            return 1
        seconds = SERVED_S if len(served) < MAX_SERVED else now - served[0][0]
        return max(
            1, min(MAX_RETRY_AFTER_S, math.ceil(seconds * self._queue.num_tokens / self._served_tokens / 2))
        )

    def _forget_served(self, now: float) -> None:
        served = self._served
        while served and (now - served[0][0] >= SERVED_S or len(served) > MAX_SERVED):
            self._served_tokens -= served.popleft()[1]

    # ---- jobs

    def open(self, jobs: Sequence[Job]) -> None:
        """Takes the jobs of a call in, all or none.

        Raises:
            ApiError: 503 while shutting down or wedged, 429 when the queue or the key's share is full, 400 when they could not
                be let in at any time.
        """
        self._check_room(jobs)
        assert self._loop is not None
        late, now = self._loop.call_later, self.clock()
        for job in jobs:
            job.state = JobState.WAITING
            self._per_key[job.key] += 1
            self._queue.push(job)
            spent = now - job.received_s
            job.timers = [
                late(max(0.0, job.queue_timeout_s - spent), self._queue_time_is_up, job),
                late(max(0.0, job.timeout_s - spent), self._time_is_up, job),
            ]
        self._idle.clear()
        self._feed()

    def check_open(self, key: int) -> None:
        """Refuses what could not be let in now whatever it is, before anybody reads it: refusing must cost little when there
        is most of it to do.

        Raises:
            ApiError: 503 while shutting down or wedged, 429 when the queue or the key's share is full.
        """
        settings, waiting = self.settings, self._queue
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", "shutting_down", headers=self._retry())
        if not self.is_ready or self.is_wedged:
            raise ApiError(503, "the engine is not ready", "not_ready", headers=self._retry())
        if waiting and waiting.num_jobs >= settings.max_queue_requests:
            raise self._full_of_requests()
        if waiting and waiting.num_tokens >= settings.max_queue_tokens:
            raise self._full(
                f"requests of {waiting.num_tokens} tokens wait, at most {settings.max_queue_tokens} may"
            )
        self._check_share(key, 1)

    def _check_room(self, jobs: Sequence[Job]) -> None:
        settings, waiting = self.settings, self._queue
        if len(jobs) > settings.max_requests_per_key:
            raise self._never(
                f"{len(jobs)} prompts, at most {settings.max_requests_per_key} requests of a key may wait and run"
            )
        if len(self._left_over(jobs, 0)) > settings.max_queue_requests:
            raise self._never(f"{len(jobs)} prompts, at most {settings.max_queue_requests} requests may wait")
        self.check_open(jobs[0].key)
        left = jobs if waiting else self._left_over(jobs, self._sequences)
        tokens = sum(job.tokens for job in left)
        if waiting.num_jobs + len(left) > settings.max_queue_requests:
            raise self._full_of_requests()
        if waiting and waiting.num_tokens + tokens > settings.max_queue_tokens:
            raise self._full(
                f"requests of {waiting.num_tokens} tokens wait, this one has {tokens}, at most "
                f"{settings.max_queue_tokens} may"
            )
        self._check_share(jobs[0].key, len(jobs))

    def _check_share(self, key: int, more: int) -> None:
        most = self.settings.max_requests_per_key
        if self._per_key[key] + more > most:
            self.metrics.refused("key_limit")
            why = f"requests: {self._per_key[key]} of this key are waiting or running, at most {most} may"
            raise ApiError(429, why, "concurrency_limit", headers=self._retry())

    def _full_of_requests(self) -> ApiError:
        most = self.settings.max_queue_requests
        return self._full(f"{self._queue.num_jobs} requests wait, at most {most} may")

    def _full(self, why: str) -> ApiError:
        self.metrics.refused("queue_full")
        return ApiError(429, f"queue: {why}", "queue_full", headers=self._retry())

    def _retry(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_s())}

    def _never(self, why: str) -> ApiError:
        return ApiError(400, f"prompt: {why}", "invalid_value", "prompt")

    def _left_over(self, jobs: Sequence[Job], sequences: int) -> Sequence[Job]:
        """Of jobs that come now, those for which an engine with so many sequences has no room yet."""
        for at, job in enumerate(jobs):
            if not self._has_room(job, sequences):
                return jobs[at:]
            sequences += job.num_sequences
        return ()

    def _has_room(self, job: Job, sequences: int) -> bool:
        """A job that alone has more than there is room for goes when the engine is empty."""
        return not sequences or sequences + job.num_sequences <= self._room

    def cancel(self, job: Job, failure: ApiError | None = None) -> None:
        """Ends a job in whatever state it is; what it had is freed within a step. Idempotent."""
        if job.state not in (JobState.WAITING, JobState.RUNNING):
            return
        if failure is not None:
            job.fail(failure)
        if job.state is JobState.WAITING:
            self._queue.remove(job)
            self._end(job)
        else:
            job.state = JobState.ENDING
            self.engine_loop.cancel(job)

    async def drain(self, timeout_s: float) -> bool:
        """No more jobs; waits for those there are, and cancels what is left then. Whether none was."""
        self.is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
            return True
        except TimeoutError:
            left = [*self._with_engine, *self._queue.jobs()]
            _log.warning("%d requests are cut off", len(left))
            for job in left:
                self.cancel(job, ApiError(503, "the server is shutting down", "shutting_down"))
            return False

    # ---- inside

    def _feed(self) -> None:
        """The engine gets who is next, as long as it has room."""
        while (job := self._queue.peek()) is not None and self._has_room(job, self._sequences):
            self._queue.pop()
            job.state, job.started_s = JobState.RUNNING, self.clock()
            self._with_engine.add(job)
            self._sequences += job.num_sequences
            self.metrics.started(job)
            self.engine_loop.submit(job)

    def _from_engine(self, news: News) -> None:
        """In the engine's thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(self._deliver, news)

    def _deliver(self, news: News) -> None:
        now = self.clock()
        for job, what in news:
            if isinstance(what, Gone):
                if what.error is not None:
                    _log.error("a request failed in the engine", exc_info=what.error)
                if job.state is JobState.RUNNING and what.was_given_up:
                    job.fail(self._waited_too_long(job))
                elif job.state is JobState.RUNNING:
                    # Unless it is complete, whoever waits for it must not wait for ever.
                    job.fail(ApiError(500, "the engine failed on this request", "engine_error"))
                self._end(job)
            elif job.state is JobState.RUNNING:
                self.metrics.tokens(job, [len(delta.token_ids) for delta in what], now)
                job.push(what)
        self._feed()
        if self.engine_loop.failure is not None:
            self.on_engine_failure()

    def _end(self, job: Job) -> None:
        if job.state is JobState.ENDED:
            return
        if job in self._with_engine:
            self._with_engine.remove(job)
            self._sequences -= job.num_sequences
        job.state = JobState.ENDED
        for timer in job.timers:
            timer.cancel()
        self._per_key[job.key] -= 1
        if not self._per_key[job.key]:
            del self._per_key[job.key]
        now = self.clock()
        if job.started_s is not None:
            tokens = job.tokens if job.is_complete else job.prompt_tokens + job.output_tokens
            self._served.append((now, tokens))
            self._served_tokens += tokens
            self._forget_served(now)
        self.metrics.ended(job, now)
        if not self._with_engine and not self._queue:
            self._idle.set()
        self._feed()

    def _queue_time_is_up(self, job: Job) -> None:
        if job.state is JobState.WAITING:
            self.cancel(job, self._waited_too_long(job))
        elif job.state is JobState.RUNNING and job.first_token_s is None:
            self.engine_loop.give_up(job)  # it may have been waiting there: for pages, or as the next

    def _waited_too_long(self, job: Job) -> ApiError:
        self.metrics.refused("queue_timeout")
        status = 408 if job.queue_timeout_s < self.settings.queue_timeout_s else 503
        why = f"queue_timeout: it waited {job.queue_timeout_s:g} s for the engine"
        return ApiError(status, why, "queue_timeout", headers=self._retry())

    def _time_is_up(self, job: Job) -> None:
        status = 408 if job.timeout_s < self.settings.request_timeout_s else 504
        self.cancel(
            job, ApiError(status, f"timeout: it took longer than {job.timeout_s:g} s", "deadline_exceeded")
        )
