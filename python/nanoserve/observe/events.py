"""The engine's diary: one record per change of a request's fortune, in a bounded ring.

Metrics, traces, visualisers and "why was this request slow" all read this one schema. Steps are the time axis: they are
the same on every machine, so two runs with one seed have equal diaries.

Decision and price: nothing is recorded per decoded token (the batch says who got one), so a running request costs no
events between page boundaries; whoever wants token times must take them from the step outputs. The ring forgets the
oldest events first and counts how many it forgot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ReqId = int | str

KINDS = frozenset(
    {
        "held_back",  # by: who is computing the `tokens` it shares; passed over at admission until then
        "admitted",  # waited: steps in the queue
        "prefix_hit",  # tokens: found in the prefix cache at admission
        "chunk",  # start, count, of: prompt tokens [start, start + count) of `of` are in this step's batch
        "pages_granted",  # pages: new ones, the shared prefix not counted
        "pages_freed",  # pages: given up by the request; what the prefix tree keeps is not free yet
        "preempted",  # by: the older request that needed the pages
        "finished",  # reason, output_tokens
        "aborted",  # state: the one it was in
        "refused",  # why
        "error",  # why
    }
)


@dataclass(slots=True)
class Event:
    """One thing that happened to one request in one step."""

    step: int
    kind: str
    req_id: ReqId
    detail: dict[str, Any]


class EventLog:
    """The newest `capacity` events.

    Args:
        capacity: at least 0; 0 keeps nothing and still counts.
    """

    def __init__(self, capacity: int = 4096) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0:
            raise ValueError(f"capacity: {capacity!r} must be a whole number of at least 0")
        self.capacity = capacity
        self.num_recorded = 0
        self._ring: deque[Event] = deque(maxlen=capacity)

    def record(self, step: int, kind: str, req_id: ReqId, **detail: Any) -> None:
        """Append one event; a kind that is not in KINDS is a ValueError."""
        if kind not in KINDS:
            raise ValueError(f"kind: {kind!r} must be one of {', '.join(sorted(KINDS))}")
        self.num_recorded += 1
        self._ring.append(Event(step, kind, req_id, detail))

    @property
    def num_forgotten(self) -> int:
        return self.num_recorded - len(self._ring)

    def of(self, req_id: ReqId) -> list[Event]:
        """One request's remembered events, oldest first."""
        return [event for event in self._ring if event.req_id == req_id]

    def __iter__(self) -> Iterator[Event]:
        return iter(self._ring)

    def __len__(self) -> int:
        return len(self._ring)
