"""EngineLoop: the thread that owns the engine. Jobs in, deltas out, one hand-over per step.

    submit, cancel, call    from the event loop, at any time; done between two steps
    deliver(news)           to the event loop: [(job, deltas or None or error)], once per step

A step that raises takes the requests it had with it, and nothing else: they are aborted and told so, the engine goes on.
What the thread is doing can be seen from outside without asking it: `step_began_s`, `last_step_s`, `last_token_s`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from nanoserve.nano_engine import NanoServingEngine
from nanoserve.outputs import TextDelta
from nanoserve.server.job import Job

_log = logging.getLogger("nanoserve.server")
SNAPSHOT_EVERY_S = 0.2

News = list[tuple[Job, "list[TextDelta] | Gone"]]


class Gone:
    """The engine has no more of a job: it ended, was cancelled, or failed."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class EngineLoop:
    """Runs an engine.

    Args:
        engine: nobody else may touch it from now on.
        deliver: called in the engine's thread with what is new.
        snapshot: what of the engine is of interest to others, taken in its thread now and then and kept in `snapshot`.
    """

    def __init__(
        self,
        engine: NanoServingEngine,
        deliver: Callable[[News], None],
        snapshot: Callable[[NanoServingEngine], dict[str, Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._deliver, self._clock = engine, deliver, clock
        self._take_snapshot = snapshot or (lambda engine: engine.get_stats())
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[int | str, Job] = {}  # by request
        self._growing: list[Job] = []  # with sequences that are not submitted yet
        self._stopping = False
        self.steps = self.failed_steps = 0
        self.step_began_s: float | None = None  # of the step that is running now
        self.last_step_s = self.last_token_s = clock()
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

    def call(self, function: Callable[[NanoServingEngine], None]) -> None:
        """Between two steps."""
        self._commands.put(lambda: function(self._engine))

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Ends the thread after its step; whether it did in time."""
        self._stopping = True
        self._commands.put(lambda: None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stuck_for_s(self) -> float:
        """How long the step that is running has been."""
        began = self.step_began_s
        return 0.0 if began is None else self._clock() - began

    # ---- in the thread

    def _run(self) -> None:
        while not self._stopping:
            self._do_commands()
            if self._engine.has_unfinished:
                self._step()
            self._refresh_snapshot(is_idle=not self._engine.has_unfinished)

    def _do_commands(self) -> None:
        """Those that are there; with nothing to compute, waits for one."""
        try:
            command = self._commands.get(block=not self._engine.has_unfinished)
            while True:
                try:
                    command()
                except Exception:
                    _log.exception("a command to the engine failed")
                command = self._commands.get_nowait()
        except queue.Empty:
            pass

    def _submit(self, job: Job) -> None:
        try:
            self._submit_due(job)
        except Exception as error:
            self._drop(job)
            self._deliver([(job, Gone(error))])
            return
        if not job.text.is_all_submitted:
            self._growing.append(job)

    def _submit_due(self, job: Job) -> None:
        for request in job.text.due():
            self._engine.submit(request)
            self._jobs[request.req_id] = job

    def _cancel(self, job: Job) -> None:
        if self._drop(job):
            self._deliver([(job, Gone())])

    def _drop(self, job: Job) -> bool:
        """Frees all a job has; whether the engine had anything of it."""
        held = job in self._growing
        if held:
            self._growing.remove(job)
        for request in job.text.requests:
            if self._jobs.pop(request.req_id, None) is not None:
                held = True
                self._engine.abort(request.req_id)
        return held

    def _step(self) -> None:
        self.step_began_s = self._clock()
        try:
            output = self._engine.step()
        except Exception as error:
            self._step_failed(error)
            return
        finally:
            self.step_began_s = None
            self.last_step_s = self._clock()
            self.steps += 1
        ended = [request.req_id for request in output.finished]
        touched = dict.fromkeys(
            job for req_id in (*output.new_tokens, *ended) if (job := self._jobs.get(req_id)) is not None
        )
        if output.new_tokens:
            self.last_token_s = self.last_step_s
        for req_id in ended:
            self._jobs.pop(req_id, None)
        news: News = []
        for job in list(self._growing):
            try:
                self._submit_due(job)
            except Exception as error:
                self._drop(job)
                touched.pop(job, None)
                news.append((job, Gone(error)))
                continue
            if job.text.is_all_submitted:
                self._growing.remove(job)
        for job in touched:
            deltas = job.text.deltas()
            if deltas:
                news.append((job, deltas))
            if job.text.is_finished:
                news.append((job, Gone()))
        if news:
            self._deliver(news)

    def _step_failed(self, error: Exception) -> None:
        self.failed_steps += 1
        _log.error("a step failed; its requests are aborted", exc_info=error)
        jobs = list(dict.fromkeys([*self._jobs.values(), *self._growing]))
        for job in jobs:
            self._drop(job)
        self._deliver([(job, Gone(error)) for job in jobs])

    def _refresh_snapshot(self, is_idle: bool) -> None:
        now = self._clock()
        if is_idle or now - self._snapshot_s >= SNAPSHOT_EVERY_S:
            self._snapshot_s = now
            self.snapshot = self._take_snapshot(self._engine)
