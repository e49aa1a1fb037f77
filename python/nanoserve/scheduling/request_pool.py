"""All live requests, and the only place where a request changes state.

    WAITING ──▶ PREFILL ──▶ DECODE ──▶ FINISHED
                   │           │           ▲
                   ▼           ▼           │ (abort or error, from every state)
                PREEMPTED ◀────┘ ──▶ PREFILL

A live request is in exactly one of `waiting` (never admitted, or preempted) and `running` (prefill or decode). Anything the
table of transitions does not have raises IllegalTransition: a scheduler bug must be loud, not a lost request.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from nanoserve.errors import IllegalTransition, RequestRefused
from nanoserve.request import Request, RequestState
from nanoserve.scheduling.policies import Policy

_NEXT = {
    RequestState.WAITING: {RequestState.PREFILL, RequestState.FINISHED},
    RequestState.PREFILL: {RequestState.DECODE, RequestState.PREEMPTED, RequestState.FINISHED},
    RequestState.DECODE: {RequestState.PREEMPTED, RequestState.FINISHED},
    RequestState.PREEMPTED: {RequestState.PREFILL, RequestState.FINISHED},
    RequestState.FINISHED: set(),
}
_RECENT = 1024


class RequestPool:
    """Requests by state.

    Args:
        policy: order of the waiting queue.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy("fcfs")
        self.waiting: list[Request] = []  # sorted by self._keys
        self.running: dict[int | str, Request] = {}  # in order of admission
        self.finished: deque[Request] = deque(maxlen=_RECENT)  # the most recent ones
        self._keys: list[tuple[float, int]] = []
        self._key_of: dict[int | str, tuple[float, int]] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        """Live requests."""
        return len(self.waiting) + len(self.running)

    def get(self, req_id: int | str) -> Request | None:
        """The live request of that id."""
        request = self.running.get(req_id)
        if request is None and req_id in self._key_of:
            request = self.waiting[bisect_left(self._keys, self._key_of[req_id])]
        return request

    def add(self, request: Request, step: int = 0) -> None:
        """Take a new request in; its arrival is its seniority from now on."""
        if request.req_id in self.running or request.req_id in self._key_of:
            raise RequestRefused(f"req_id: {request.req_id!r} is in use by a live request")
        if request.state is not RequestState.WAITING or request.arrival >= 0:
            raise IllegalTransition(f"request {request.req_id!r} was added before (state {request.state.value})")
        request.arrival = self._arrivals
        self._arrivals += 1
        self._enqueue(request, self.policy.key(request, step))

    def peek_next(self) -> Request | None:
        """The request that should be admitted next."""
        return self.waiting[self.policy.choose(self.waiting)] if self.waiting else None

    def admit(self, request: Request) -> None:
        """waiting -> running."""
        self._move(request, RequestState.PREFILL)
        self._dequeue(request)
        self.running[request.req_id] = request

    def start_decode(self, request: Request) -> None:
        self._move(request, RequestState.DECODE)

    def preempt(self, request: Request) -> None:
        """running -> waiting, at the front among equals: it is older than whoever never ran."""
        self._move(request, RequestState.PREEMPTED)
        del self.running[request.req_id]
        request.num_preemptions += 1
        self._enqueue(request, (float("-inf"), request.arrival))

    def finish(self, request: Request, reason: str, error: str | None = None) -> None:
        """From any live state."""
        was_running = request.req_id in self.running
        self._move(request, RequestState.FINISHED)
        if was_running:
            del self.running[request.req_id]
        else:
            self._dequeue(request)
        request.finish_reason, request.error = reason, error
        self.finished.append(request)

    def _move(self, request: Request, to: RequestState) -> None:
        if to not in _NEXT[request.state]:
            raise IllegalTransition(f"request {request.req_id!r} cannot go from {request.state.value} to {to.value}")
        request.state = to

    def _enqueue(self, request: Request, key: tuple[float, int]) -> None:
        index = bisect_left(self._keys, key)
        insort(self._keys, key)
        self.waiting.insert(index, request)
        self._key_of[request.req_id] = key

    def _dequeue(self, request: Request) -> None:
        index = bisect_left(self._keys, self._key_of.pop(request.req_id))
        del self._keys[index]
        del self.waiting[index]
