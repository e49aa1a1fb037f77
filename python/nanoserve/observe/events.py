"""What happened, as typed records in a bounded ring.

Every change of a request's state is one Event. Metrics, traces and "why was this slow" read this schema; nothing else has
to be asked. Recording is one append; the oldest records fall out. Nothing is recorded per decoded token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

KINDS = (
    "queued", "refused", "admitted", "chunk", "preempted", "prefilled", "finished", "aborted", "error",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """One change: at which step, of what kind, of which request, with what numbers."""

    step: int
    kind: str
    req_id: int | str
    detail: dict[str, Any]


class EventLog:
    """The latest `capacity` events, oldest first."""

    def __init__(self, capacity: int = 4096) -> None:
        self._ring: deque[Event] = deque(maxlen=capacity)

    def record(self, step: int, kind: str, req_id: int | str, **detail: Any) -> None:
        self._ring.append(Event(step, kind, req_id, detail))

    def __len__(self) -> int:
        return len(self._ring)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._ring)

    def of(self, req_id: int | str) -> list[Event]:
        """The events of one request, in order."""
        return [event for event in self._ring if event.req_id == req_id]
