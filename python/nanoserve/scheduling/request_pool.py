"""All live requests, each in exactly one place, and the only code that changes `request.state`.

    WAITING ──admit──> PREFILL ──start_decode──> DECODE ──finish──> FINISHED
                        │  ^                       │
                 preempt│  └─admit── PREEMPTED <───┘preempt          (every live state may finish: abort, error)

Invariant: a live request is in `waiting` (WAITING, PREEMPTED) or in `running` (PREFILL, DECODE), never in both; a finished
one is in neither. A request enters once: its `arrival` is its seniority for life, which a preemption does not take away.

The waiting queue is kept sorted by (policy key, preempted first, arrival) with insertions by bisection; nothing sorts it
again. Finished requests are kept for looking at, the newest ones only: a server must not grow with its history.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from operator import itemgetter

from nanoserve.errors import IllegalTransition, InvariantViolation, RequestRefused
from nanoserve.observe.events import ReqId
from nanoserve.request import Request, RequestState
from nanoserve.scheduling.policies import LPM_WINDOW, Policy, get_policy

WAITING, PREFILL, DECODE = RequestState.WAITING, RequestState.PREFILL, RequestState.DECODE
PREEMPTED, FINISHED = RequestState.PREEMPTED, RequestState.FINISHED

LEGAL: dict[RequestState, frozenset[RequestState]] = {
    WAITING: frozenset({PREFILL, FINISHED}),
    PREFILL: frozenset({DECODE, PREEMPTED, FINISHED}),
    DECODE: frozenset({PREEMPTED, FINISHED}),
    PREEMPTED: frozenset({PREFILL, FINISHED}),
    FINISHED: frozenset(),
}
KEPT_FINISHED = 1024
LOOKAHEAD = 256  # of the queue, past those who may not go: a long queue must not make a step long

_Entry = tuple[
    int, int, int, Request
]  # key, 0 if preempted else 1, arrival (unique, so requests are never compared)


class RequestPool:
    """Waiting, running and finished requests.

    Args:
        policy: name of the waiting queue's order, or a Policy.
    """

    def __init__(self, policy: str | Policy = "fcfs") -> None:
        self.policy = get_policy(policy)
        self.live: dict[ReqId, Request] = {}
        self.running: dict[ReqId, Request] = {}  # in order of admission
        self.finished: deque[Request] = deque(maxlen=KEPT_FINISHED)
        self.num_arrived = 0
        self._queue: list[_Entry] = []
        self._joined: dict[ReqId, tuple[int, int]] = {}  # (step of arrival, key)

    @property
    def waiting(self) -> list[Request]:
        """A copy of the queue, in its static order."""
        return [entry[-1] for entry in self._queue]

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_live(self) -> int:
        return len(self.live)

    def check_new(self, request: Request) -> None:
        """Refuses a request that is or was in an engine already."""
        if request.req_id in self.live:
            raise RequestRefused(f"req_id: {request.req_id!r} is in use by {self.live[request.req_id]!r}")
        if request.state is not WAITING or request.arrival >= 0 or request.page_table is not None:
            raise RequestRefused(f"request {request.req_id!r} was served before: make a new Request")

    def add(self, request: Request, step: int = 0) -> None:
        """Queues a new request, in the order of the policy."""
        self.check_new(request)
        request.arrival = self.num_arrived
        self.num_arrived += 1
        self.live[request.req_id] = request
        self._joined[request.req_id] = (step, self.policy.key(request, step))
        insort(self._queue, self._entry(request))

    def head(
        self,
        peek: Callable[[Sequence[int]], int] | None = None,
        may_go: Callable[[Request], bool] = lambda request: True,
    ) -> Request | None:
        """The waiting request that is next.

        Args:
            peek: counts cached leading tokens, for policies that ask.
            may_go: whom to pass over, among the first LOOKAHEAD. What they lack must be given to them before anybody
                else who needs it.
        """
        candidates = (entry for entry in islice(self._queue, LOOKAHEAD) if may_go(entry[-1]))
        if not self.policy.by_prefix or peek is None:
            return next((entry[-1] for entry in candidates), None)
        window = list(islice(candidates, LPM_WINDOW))
        if not window:
            return None
        ranked = [
            (key - peek(request.cache_key()), rank, arrival, request)
            for key, rank, arrival, request in window
        ]
        return min(ranked)[-1]

    def is_before(self, one: Request, other: Request) -> bool:
        """Of two live requests the one whose place in the queue's order, for life, is nearer to its head."""
        keys = self._joined
        return (keys[one.req_id][1], one.arrival) < (keys[other.req_id][1], other.arrival)

    def steps_waited(self, request: Request, step: int) -> int:
        """Steps since the request arrived."""
        return step - self._joined[request.req_id][0]

    # ---- transitions

    def admit(self, request: Request) -> None:
        """WAITING or PREEMPTED -> PREFILL."""
        self._check_move(request, PREFILL)
        self._dequeue(request)
        request.state = PREFILL
        self.running[request.req_id] = request

    def start_decode(self, request: Request) -> None:
        """PREFILL -> DECODE."""
        self._check_move(request, DECODE)
        request.state = DECODE

    def preempt(self, request: Request) -> None:
        """PREFILL or DECODE -> PREEMPTED: back to its place in the queue."""
        self._check_move(request, PREEMPTED)
        del self.running[request.req_id]
        request.state = PREEMPTED
        insort(self._queue, self._entry(request))

    def finish(self, request: Request, reason: str, error: str | None = None) -> None:
        """Any live state -> FINISHED."""
        self._check_move(request, FINISHED)
        if request.state is PREFILL or request.state is DECODE:
            del self.running[request.req_id]
        else:
            self._dequeue(request)
        request.state = FINISHED
        request.finish_reason = reason
        request.error = error
        del self.live[request.req_id]
        del self._joined[request.req_id]
        self.finished.append(request)

    # ---- the queue

    def _check_move(self, request: Request, new: RequestState) -> None:
        """Before anything changes, so that an illegal move changes nothing."""
        if new not in LEGAL[request.state]:
            raise IllegalTransition(
                f"request {request.req_id!r}: {request.state.value} -> {new.value} is not possible"
            )
        if self.live.get(request.req_id) is not request:
            raise IllegalTransition(
                f"request {request.req_id!r} cannot become {new.value}: it is not in this pool"
            )

    def _entry(self, request: Request) -> _Entry:
        key = self._joined[request.req_id][1]
        return (key, 0 if request.state is PREEMPTED else 1, request.arrival, request)

    def _dequeue(self, request: Request) -> None:
        entry = self._entry(request)
        index = bisect_left(self._queue, entry[:3], key=itemgetter(0, 1, 2))
        if index == len(self._queue) or self._queue[index][-1] is not request:
            raise InvariantViolation(f"request {request.req_id!r} is not where its key puts it in the queue")
        del self._queue[index]
