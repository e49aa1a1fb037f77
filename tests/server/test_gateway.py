"""Jobs between clients and engine, whatever happens in whatever order: each ends once, is told so, and leaves nothing behind.

Event loop, engine and clock are stand-ins that move only when told to, so that every interleaving can be had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoserve.outputs import RequestOutput, TextDelta, Usage
from nanoserve.request import RequestState
from nanoserve.server.errors import ApiError
from nanoserve.server.gateway import Gateway
from nanoserve.server.job import Job, JobState
from nanoserve.server.metrics import Metrics
from nanoserve.server.settings import ServerSettings

MAX_BATCH = 4


class Bug(Exception):
    """What a stand-in raises where it is told to."""


@dataclass(eq=False)
class _Timer:
    due_s: float
    call: Callable[[], None]
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class _Loop:
    """An event loop by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[_Timer] = []
        self.soon: list[Callable[[], None]] = []

    def call_later(self, delay: float, call: Callable[..., None], *args: Any) -> _Timer:
        self.timers.append(_Timer(self.now + delay, lambda: call(*args)))
        return self.timers[-1]

    def call_soon_threadsafe(self, call: Callable[..., None], *args: Any) -> None:
        self.soon.append(lambda: call(*args))

    def run_soon(self) -> None:
        while self.soon:
            self.soon.pop(0)()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for timer in [one for one in self.timers if one.due_s <= self.now]:
            self.timers.remove(timer)
            if not timer.is_cancelled:
                timer.call()

    @property
    def num_timers(self) -> int:
        return sum(not timer.is_cancelled for timer in self.timers)


@dataclass(eq=False)
class _Request:
    req_id: int
    max_tokens: int
    num_prompt_tokens: int = 3
    output_tokens: list[int] = field(default_factory=list)
    is_finished: bool = False

    @property
    def state(self) -> RequestState:
        return RequestState.DECODE if self.output_tokens else RequestState.WAITING


class _Engine:
    """One token per step for each of the first MAX_BATCH."""

    def __init__(self) -> None:
        self.live: dict[int, _Request] = {}
        self.fails: set[str] = set()  # what raises the next time
        self.batcher = SimpleNamespace(
            scheduler=SimpleNamespace(decode_mgr=SimpleNamespace(max_batch_size=MAX_BATCH))
        )

    def fail_if_told(self, what: str) -> None:
        if what in self.fails:
            self.fails.remove(what)
            raise Bug(what)

    def submit(self, request: _Request) -> None:
        self.fail_if_told("submit")
        self.live[request.req_id] = request

    def abort(self, req_id: int) -> bool:
        self.fail_if_told("abort")
        return self.live.pop(req_id, None) is not None

    @property
    def has_unfinished(self) -> bool:
        return bool(self.live)

    def step(self) -> Any:
        self.fail_if_told("step")
        output = SimpleNamespace(batch=object(), new_tokens={}, finished=[])
        for request in list(self.live.values())[:MAX_BATCH]:
            request.output_tokens.append(7)
            output.new_tokens[request.req_id] = 7
            if len(request.output_tokens) == request.max_tokens:
                request.is_finished = True
                del self.live[request.req_id]
                output.finished.append(request)
        return output

    def get_stats(self) -> dict[str, Any]:
        self.fail_if_told("snapshot")
        return {}


class _Text:
    """A prompt of n sequences: the first alone, the others once it has a token."""

    def __init__(self, engine: _Engine, first_id: int, n: int, max_tokens: int) -> None:
        self._engine = engine
        self.requests = [_Request(first_id + index, max_tokens) for index in range(n)]
        self._submitted, self._told = 0, [0] * n

    @property
    def is_finished(self) -> bool:
        return all(request.is_finished for request in self.requests)

    @property
    def is_all_submitted(self) -> bool:
        return self._submitted == len(self.requests)

    def due(self) -> list[_Request]:
        if self._submitted and not self.requests[0].output_tokens:
            return []
        end = 1 if self._submitted == 0 else len(self.requests)
        due, self._submitted = self.requests[self._submitted : end], end
        return due

    def deltas(self) -> list[TextDelta]:
        self._engine.fail_if_told("deltas")
        made = []
        for index, request in enumerate(self.requests):
            tokens = request.output_tokens[self._told[index] :]
            if tokens:
                self._told[index] += len(tokens)
                output = RequestOutput("", [], [], Usage(3, 1, 0)) if self.is_finished else None
                reason = "length" if request.is_finished else None
                made.append(TextDelta(index, "", tokens, None, reason, output))
        return made


class World:
    """A gateway with all its stand-ins."""

    def __init__(self, **limits: Any) -> None:
        self.loop, self.engine = _Loop(), _Engine()
        self.gateway = Gateway(
            self.engine,  # type: ignore[arg-type]
            ServerSettings(**{"queue_timeout_s": 50.0, "request_timeout_s": 100.0, **limits}),
            Metrics(), clock=lambda: self.loop.now,
        )  # fmt: skip
        self.gateway._loop = self.loop  # type: ignore[assignment]
        self.gateway.is_ready = True
        self._is_alive = True
        self.thread = self.gateway.engine_loop
        self.thread._thread = SimpleNamespace(is_alive=lambda: True)  # type: ignore[assignment]
        self.jobs: list[Job] = []
        self.next_id = 0

    def job(self, key: int = 0, n: int = 1, max_tokens: int = 3) -> Job:
        self.next_id += n
        text: Any = _Text(self.engine, self.next_id - n, n, max_tokens)
        return Job(text, key=key, received_s=self.loop.now, queue_timeout_s=50.0, timeout_s=100.0)

    def open(self, jobs: list[Job]) -> ApiError | None:
        try:
            self.gateway.open(jobs)
        except ApiError as error:
            assert all(job.state is JobState.NEW for job in jobs)
            return error
        self.jobs += jobs
        return None

    def turn(self) -> None:
        """What the engine's thread does next, if it has anything to do."""
        if not self.thread._commands.empty() or (self.engine.has_unfinished and not self.thread.failure):
            self.thread.turn()

    def check(self) -> None:
        """What must hold at any time."""
        gateway = self.gateway
        held = [job for job in self.jobs if job.state in (JobState.RUNNING, JobState.ENDING)]
        waiting = [job for job in self.jobs if job.state is JobState.WAITING]
        assert set(held) == gateway._with_engine
        assert gateway._sequences == sum(job.num_sequences for job in held)
        assert set(gateway._queue.jobs()) == set(waiting)
        assert gateway._queue.num_tokens == sum(job.tokens for job in waiting)
        assert sum(gateway._per_key.values()) == len(held) + len(waiting)
        assert len(gateway._queue) <= gateway.settings.max_queue_requests
        assert gateway._idle.is_set() == (not held and not waiting)

    def settle(self) -> None:
        """Until nothing moves any more, without time passing."""
        for _ in range(1000):
            self.loop.run_soon()
            self.check()
            before = (len(self.engine.live), self.thread._commands.qsize(), self.thread.steps)
            self.turn()
            after = (len(self.engine.live), self.thread._commands.qsize(), self.thread.steps)
            if before == after and not self.loop.soon:
                return
        raise AssertionError("it does not come to an end")

    def check_end(self, cancelled: set[Job]) -> None:
        self.check()
        gateway = self.gateway
        assert not gateway._with_engine
        assert not gateway._queue
        assert not gateway._per_key
        assert not self.thread._held
        assert not self.thread._jobs
        assert not self.thread._growing
        assert self.loop.num_timers == 0
        if self.thread.failure is None:
            assert not self.engine.live
        for job in self.jobs:
            assert job.state is JobState.ENDED
            assert job.is_complete or job.failure is not None or job in cancelled, "its client waits for ever"
            if job.is_complete:
                deltas = job.take()
                assert (
                    sum(len(delta.token_ids) for delta in deltas)
                    == job.output_tokens
                    == 3 * job.num_sequences
                )
        assert sum(gateway.metrics.endings.values()) >= len(self.jobs)


EVENTS = st.one_of(
    st.tuples(st.just("open"), st.integers(0, 2), st.integers(1, 6), st.integers(1, 3)),
    st.tuples(st.just("cancel"), st.integers(0, 20), st.just(0), st.just(0)),
    st.tuples(st.just("turn"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("deliver"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 60), st.just(0), st.just(0)),
    st.tuples(st.just("fail"), st.integers(0, 4), st.just(0), st.just(0)),
    st.tuples(st.just("drain"), st.just(0), st.just(0), st.just(0)),
)


@settings(max_examples=400)
@given(st.lists(EVENTS, max_size=60))
def test_every_job_ends_once_and_leaves_nothing(events: list[tuple[str, int, int, int]]) -> None:
    world = World(max_queue_requests=5, max_requests_per_key=6)
    cancelled: set[Job] = set()
    for kind, a, b, c in events:
        if kind == "open":
            world.open([world.job(a, b) for _ in range(c)])
        elif kind == "cancel" and world.jobs:
            job = world.jobs[a % len(world.jobs)]
            cancelled.add(job)
            world.gateway.cancel(job)
        elif kind == "turn":
            world.turn()
        elif kind == "deliver" and world.loop.soon:
            world.loop.soon.pop(0)()
        elif kind == "wait":
            world.loop.pass_time(a)
        elif kind == "fail":
            world.engine.fails.add(("submit", "abort", "step", "deltas", "snapshot")[a])
        elif kind == "drain":
            world.gateway.is_draining = True
        world.check()
    world.settle()
    world.check_end(cancelled)


@pytest.mark.parametrize("what", ["submit", "step", "deltas"])
def test_a_failure_ends_its_own_and_the_engine_goes_on(what: str) -> None:
    world = World()
    world.engine.fails.add(what)
    bad = world.job(max_tokens=3)
    world.open([bad])
    world.settle()
    assert bad.failure is not None
    assert bad.failure.status == 500
    assert "Bug" not in bad.failure.message
    good = world.job()
    world.open([good])
    world.settle()
    assert good.is_complete
    world.check_end(set())


def test_an_engine_that_cannot_go_on_says_so_to_all() -> None:
    told: list[bool] = []
    world = World()
    world.gateway.on_engine_failure = lambda: told.append(True)
    jobs = [world.job() for _ in range(9)]
    world.open(jobs)
    world.turn()
    world.engine.fails.add("abort")
    world.gateway.cancel(jobs[0])
    world.settle()
    assert told
    assert world.gateway.is_wedged
    assert all(job.failure is not None for job in jobs[1:])
    refused = world.open([world.job()])
    assert refused is not None
    assert refused.status == 503
    world.check_end({jobs[0]})


def test_a_call_is_let_in_whole_or_not_at_all() -> None:
    world = World(max_queue_requests=3, max_requests_per_key=8)
    assert world.open([world.job() for _ in range(MAX_BATCH + 1 + 3)]) is None
    refused = world.open([world.job(1)])
    assert refused is not None
    assert (refused.status, refused.code) == (429, "queue_full")
    world.settle()
    assert world.gateway.metrics.endings == {"length": MAX_BATCH + 1 + 3}
    assert world.gateway.metrics.refusals == {"queue_full": 1}


def test_what_could_never_be_let_in_is_the_clients_mistake() -> None:
    """Else it would come back, as Retry-After says, and be refused for ever."""
    world = World(max_queue_requests=3, max_requests_per_key=20)
    refused = world.open([world.job() for _ in range(MAX_BATCH + 1 + 3 + 1)])
    assert refused is not None
    assert refused.status == 400
    world = World(max_requests_per_key=2)
    refused = world.open([world.job() for _ in range(3)])
    assert refused is not None
    assert refused.status == 400
    assert "at most 2" in refused.message
    world.check_end(set())


def test_time_before_a_requests_first_byte_is_the_clients() -> None:
    world = World()
    world.loop.now = 500.0
    job = world.job()
    job.accepted_s = 1.0
    world.open([job])
    world.loop.pass_time(0.5)
    assert job.failure is None
    world.settle()
    assert world.gateway.metrics.ttft.total > 499
    assert world.gateway.metrics.queued.total < 1
    assert job.is_complete


def test_who_got_nothing_does_not_count_as_served() -> None:
    world = World(max_requests_per_key=100)
    world.open([world.job(max_tokens=1000) for _ in range(MAX_BATCH + 21)])
    assert world.gateway.retry_after_s() == 1
    for job in world.jobs[-10:]:
        world.gateway.cancel(job)
    assert not world.gateway._served


def test_no_progress_is_seen_though_steps_go_on() -> None:
    world = World(wedged_after_s=10.0)
    world.open([world.job(max_tokens=100)])
    world.turn()
    world.loop.now += 100.0
    world.turn()
    assert not world.gateway.is_wedged
    world.engine.step = lambda: SimpleNamespace(batch=None, new_tokens={}, finished=[])  # type: ignore[method-assign]
    for _ in range(3):
        world.loop.now += 6.0
        world.turn()
    assert world.gateway.is_wedged


def test_draining_waits_for_what_was_let_in() -> None:
    async def drained() -> bool:
        world = World()
        world.gateway._idle = asyncio.Event()
        world.open([world.job()])
        waiting = asyncio.ensure_future(world.gateway.drain(5.0))
        await asyncio.sleep(0)
        refused = world.open([world.job()])
        assert refused is not None
        assert refused.code == "shutting_down"
        assert not waiting.done()
        world.settle()
        return await waiting

    assert asyncio.run(drained())


def test_a_request_that_was_given_up_is_no_error() -> None:
    world = World()
    job = world.job(max_tokens=50)
    world.open([job])
    world.turn()
    world.gateway.cancel(job)
    world.settle()
    assert world.gateway.metrics.endings == {"abort": 1}


def test_time_to_wait_ends_when_the_engine_begins_not_when_it_is_told() -> None:
    world = World()
    jobs = [world.job(max_tokens=50) for _ in range(MAX_BATCH + 2)]
    world.open(jobs)
    world.turn()
    running, in_engine, in_queue = jobs[:MAX_BATCH], jobs[-2], jobs[-1]
    assert (in_engine.state, in_queue.state) == (JobState.RUNNING, JobState.WAITING)
    world.loop.pass_time(60.0)  # the running ones have a first token, which nobody has heard of yet
    world.settle()
    for job in (in_engine, in_queue):
        assert job.failure is not None
        assert (job.failure.status, job.failure.code) == (503, "queue_timeout")
    assert all(job.is_complete for job in running)
    assert world.gateway.metrics.refusals == {"queue_timeout": 2}
    assert world.gateway.metrics.endings == {"length": MAX_BATCH, "timeout": 2}


def test_who_looks_on_stops_nobody() -> None:
    world = World()
    world.engine.fails.add("snapshot")
    world.open([world.job()])
    world.settle()
    assert world.thread.failure is None
    world.check_end(set())
