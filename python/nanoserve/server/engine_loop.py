"""EngineLoop: the thread that owns the engine. Jobs in, deltas out, one hand-over per step.

    submit, cancel, give_up    from the event loop, at any time; done between two steps
    deliver(news)              to the event loop: [(job, deltas or Gone)], at most once per step

Tokens that follow fast are told together: taking a step's tokens across, waking their clients' tasks and writing to their
sockets costs more than the tokens, and takes the time from the next step. The more streams there are, the longer tokens may
wait, up to a limit; a job's first tokens and its last never do.

Every job that was submitted gets one Gone, whatever happens. A step that raises takes the requests it had with it, and
nothing else: they are aborted and told so, the engine goes on. An engine that cannot even do that, or whose GPU is lost, is not
used again: all its jobs are told, `failure` is set, and whoever still comes is told at once.

What the thread is doing can be seen from outside without asking it: `stuck_for_s`, `last_step_s`, `last_token_s`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from nanoserve.nano_engine import NanoServingEngine
from nanoserve.native import CudaDeviceLost
from nanoserve.outputs import TextDelta
from nanoserve.request import RequestState
from nanoserve.server.job import Job

_log = logging.getLogger("nanoserve.server")
SNAPSHOT_EVERY_S = 0.2
INTERVAL_PER_JOB_S = 0.002  # telling a job something takes about a fiftieth of this

News = list[tuple[Job, "list[TextDelta] | Gone"]]


class Gone:
    """The engine has no more of a job: it ended, was cancelled or given up before it began, or failed."""

    __slots__ = ("error", "was_given_up")

    def __init__(self, error: BaseException | None = None, was_given_up: bool = False) -> None:
        self.error, self.was_given_up = error, was_given_up


class EngineLoop:
    """Runs an engine.

    Args:
        engine: nobody else may touch it from now on.
        deliver: called in the engine's thread with what is new.
        interval_s: for how long tokens may at most be kept to be told together, unless a step takes longer.
        snapshot: what of the engine is of interest to others, taken in its thread now and then and kept in `snapshot`.
    """

    def __init__(
        self,
        engine: NanoServingEngine,
        deliver: Callable[[News], None],
        snapshot: Callable[[NanoServingEngine], dict[str, Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        interval_s: float = 0.0,
    ) -> None:
        self._engine, self._deliver, self._clock, self._interval_s = engine, deliver, clock, interval_s
        self._take_snapshot = snapshot or (lambda engine: engine.get_stats())
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._held: dict[
            Job, bool
        ] = {}  # submitted and not Gone, in their order; whether tokens of it were told
        self._untold: dict[Job, None] = {}  # with tokens that are still to be told
        self._told_s = clock()
        self._jobs: dict[int | str, Job] = {}  # by live request
        self._growing: list[Job] = []  # with sequences that are not submitted yet
        self._stopping = False
        self.failure: Exception | None = None  # of the engine as a whole; nothing is computed after it
        self.steps = self.failed_steps = 0
        self.last_step_s = self.last_token_s = clock()
        self._no_progress_since_s: float | None = None  # None: there is nothing to do
        self.snapshot = self._take_snapshot(engine)
        self._snapshot_s = clock()
        self._thread = threading.Thread(target=self._run, name="nanoserve-engine", daemon=True)

    # ---- from other threads

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._commands.put(lambda: self._submit(job))

    def cancel(self, job: Job) -> None:
        """Idempotent; the job's end is delivered once."""
        self._commands.put(lambda: self._cancel(job))

    def give_up(self, job: Job) -> None:
        """Cancels a job if nothing of it has begun; else it goes on."""
        self._commands.put(lambda: self._give_up(job))

    def refresh(self) -> None:
        """A new snapshot soon, even if there is nothing to do."""
        self._commands.put(lambda: None)

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Ends the thread after its step; whether it did in time."""
        self._stopping = True
        self.refresh()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        return self.failure is None and self._thread.is_alive()

    def stuck_for_s(self) -> float:
        """How long there was something to do and nothing came of it."""
        since = self._no_progress_since_s
        return 0.0 if since is None else self._clock() - since

    # ---- in the thread

    def _run(self) -> None:
        while not self._stopping:
            self.turn()

    def turn(self) -> None:
        """Commands, a step, and what came of both; with nothing to compute, waits for a command."""
        try:
            self._turn()
        except Exception as error:
            _log.critical("the engine failed and cannot go on", exc_info=error)
            self.failure, self._no_progress_since_s = error, None
            self._jobs.clear()
            self._growing.clear()
            self._untold.clear()
            self._deliver([self._gone(job, error) for job in list(self._held)])

    def _turn(self) -> None:
        is_idle = self.failure is not None or not self._engine.has_unfinished
        if is_idle:
            self._no_progress_since_s = None
        try:
            command = self._commands.get(block=is_idle)
            if is_idle:
                self._no_progress_since_s = self._clock()
            while True:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            pass
        if self.failure is not None:
            return
        if self._engine.has_unfinished:
            self._step()
        self._refresh_snapshot(is_idle=not self._engine.has_unfinished)

    def _submit(self, job: Job) -> None:
        self._held[job] = False
        self._tell_untold()  # the step that takes this one in may be a long one
        if self.failure is not None:
            self._deliver([self._gone(job, self.failure)])
            return
        try:
            self._submit_due(job)
        except Exception as error:
            self._drop(job)
            self._deliver([self._gone(job, error)])
            return
        if not job.text.is_all_submitted:
            self._growing.append(job)

    def _submit_due(self, job: Job) -> None:
        for request in job.text.due():
            self._engine.submit(request)
            self._jobs[request.req_id] = job

    def _cancel(self, job: Job) -> None:
        if job in self._held:
            self._drop(job)
            self._deliver([self._gone(job)])

    def _give_up(self, job: Job) -> None:
        if job in self._held and all(request.state is RequestState.WAITING for request in job.text.requests):
            self._drop(job)
            self._deliver([self._gone(job, was_given_up=True)])

    def _drop(self, job: Job) -> None:
        """Frees all that the engine has of a job."""
        if job in self._growing:
            self._growing.remove(job)
        self._untold.pop(job, None)
        for request in job.text.requests:
            if self._jobs.pop(request.req_id, None) is not None:
                self._engine.abort(request.req_id)

    def _gone(
        self, job: Job, error: BaseException | None = None, was_given_up: bool = False
    ) -> tuple[Job, Gone]:
        del self._held[job]
        return job, Gone(error, was_given_up)

    def _step(self) -> None:
        begin = self._clock()
        try:
            output = self._engine.step()
        except CudaDeviceLost:
            raise
        except Exception as error:
            self._step_failed(error)
            return
        finally:
            self.last_step_s = now = self._clock()
            self.steps += 1
        if output.batch is not None or output.finished:
            self._no_progress_since_s = now
        if output.new_tokens:
            self.last_token_s = now
        ended = {self._jobs[request.req_id] for request in output.finished if request.req_id in self._jobs}
        for req_id in output.new_tokens:
            if (job := self._jobs.get(req_id)) is not None:
                self._untold[job] = None
        self._untold.update(dict.fromkeys(ended))
        for request in output.finished:
            self._jobs.pop(request.req_id, None)
        news: News = []
        # After the next step, if that takes as long as this one, they would have waited too long.
        interval = min(self._interval_s, len(self._held) * INTERVAL_PER_JOB_S)
        is_due = now - self._told_s + (now - begin) >= interval
        try:
            for job in list(self._growing):
                self._grow(job, news)
            for job in list(self._untold):
                if is_due or job in ended or not self._held[job]:
                    self._tell(job, news)
        finally:
            self._send(news)
        if is_due:
            self._told_s = now

    def _tell_untold(self) -> None:
        news: News = []
        try:
            for job in list(self._untold):
                self._tell(job, news)
        finally:
            self._send(news)

    def _send(self, news: News) -> None:
        if news:
            self._deliver(news)

    def _grow(self, job: Job, news: News) -> None:
        try:
            self._submit_due(job)
        except Exception as error:
            self._drop(job)
            news.append(self._gone(job, error))
            return
        if job.text.is_all_submitted:
            self._growing.remove(job)

    def _tell(self, job: Job, news: News) -> None:
        del self._untold[job]
        self._held[job] = True
        try:
            deltas, is_finished = job.text.deltas(), job.text.is_finished
        except Exception as error:  # its text, its trouble
            self._drop(job)
            news.append(self._gone(job, error))
            return
        if deltas:
            news.append((job, deltas))
        if is_finished:
            news.append(self._gone(job))

    def _step_failed(self, error: Exception) -> None:
        self.failed_steps += 1
        _log.error("a step failed; its requests are aborted", exc_info=error)
        jobs = list(self._held)
        for job in jobs:
            self._drop(job)
        self._deliver([self._gone(job, error) for job in jobs])

    def _refresh_snapshot(self, is_idle: bool) -> None:
        now = self._clock()
        if is_idle or now - self._snapshot_s >= SNAPSHOT_EVERY_S:
            self._snapshot_s = now
            try:
                self.snapshot = self._take_snapshot(self._engine)
            except Exception:  # who looks on must not stop anybody
                _log.exception("no snapshot")
