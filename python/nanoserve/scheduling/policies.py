"""Who is admitted first: the order of the waiting queue.

A policy gives every request a key once, when it enters the queue; smaller goes first. Aging is part of the key: at time t a
request's urgency is size - AGING * (t - entered), and between two requests waiting at the same t the order of that is the
order of size + AGING * entered, which does not change with t. So the queue stays sorted without ever being re-sorted, and
nobody starves: a request entered n steps later must be n * AGING smaller to overtake.

Longest-prefix-match is the exception: what is cached changes, so it looks at the first WINDOW requests of the queue (fcfs
order) each time one is admitted, with the same aging among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nanoserve.request import Request

AGING_TOKENS = 8.0  # a step of waiting is worth this many tokens of size, or of cached prefix
AGING_PRIORITY = 1 / 64  # and this much priority
WINDOW = 32

Key = Callable[[Request, int], float]

_KEYS: dict[str, Key] = {
    "fcfs": lambda request, step: 0.0,  # ties go by arrival
    "sjf": lambda request, step: request.max_total_len + AGING_TOKENS * step,
    "ljf": lambda request, step: -request.max_total_len + AGING_TOKENS * step,
    "priority": lambda request, step: request.priority + AGING_PRIORITY * step,
    "lpm": lambda request, step: 0.0,
}
_LONG_NAMES = {
    "first-come-first-served": "fcfs",
    "shortest-job-first": "sjf",
    "longest-job-first": "ljf",
    "longest-prefix-match": "lpm",
}


class Policy:
    """An admission order by name.

    Raises:
        ValueError: a name that is not known.
    """

    def __init__(self, name: str, peek: Callable[[Sequence[int]], int] | None = None) -> None:
        self.name = _LONG_NAMES.get(name, name)
        if self.name not in _KEYS:
            raise ValueError(f"policy: {name!r} must be one of {', '.join([*_KEYS, *_LONG_NAMES])}")
        self._key = _KEYS[self.name]
        self._peek = peek

    def key(self, request: Request, step: int) -> tuple[float, int]:
        """Sort key of a request entering the queue at `step`; arrival breaks ties, so preempted requests keep their place."""
        return (self._key(request, step), request.arrival)

    def choose(self, queue: Sequence[Request]) -> int:
        """Index of the next request to admit."""
        if self.name != "lpm" or self._peek is None or len(queue) < 2:
            return 0
        window = queue[:WINDOW]
        newest = max(request.arrival for request in window)
        peek = self._peek
        # Arrival distance stands for waiting time; a request at the queue's head cannot be overtaken for long.
        scores = [peek(request.token_ids) + AGING_TOKENS * (newest - request.arrival) for request in window]
        return scores.index(max(scores))
