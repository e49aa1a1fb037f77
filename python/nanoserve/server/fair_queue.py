"""FairQueue: who is next, when many wait: keys take turns by the tokens they were served, jobs of a key by arrival.

Start-time fair queueing (Goyal, Vin, Cheng 1996) with equal weights: a key's clock advances by the tokens of each job that
leaves; the key that is furthest behind goes next. A key that had nothing waiting starts at the clock of whoever was served
last, so it can neither save up turns nor starve others.
"""

from __future__ import annotations

from collections import deque

from nanoserve.server.job import Job


class FairQueue:
    """Jobs that wait, by key."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Job]] = {}
        self._clocks: dict[int, int] = {}  # of keys that have something waiting
        self._now = 0
        self.num_jobs = self.num_tokens = 0

    def push(self, job: Job) -> None:
        jobs = self._waiting.get(job.key)
        if jobs is None:
            jobs = self._waiting[job.key] = deque()
            self._clocks[job.key] = max(self._now, self._clocks.get(job.key, 0))
        jobs.append(job)
        self.num_jobs += 1
        self.num_tokens += job.tokens

    def peek(self) -> Job | None:
        """Who is next; None when nobody waits."""
        return self._waiting[self._next_key()][0] if self._waiting else None

    def pop(self) -> Job:
        key = self._next_key()
        job = self._waiting[key][0]
        self._now = self._clocks[key]
        self._clocks[key] += job.tokens
        self.remove(job)
        return job

    def remove(self, job: Job) -> None:
        """A job that waits, wherever it stands."""
        jobs = self._waiting[job.key]
        jobs.remove(job)
        self.num_jobs -= 1
        self.num_tokens -= job.tokens
        if not jobs:
            del self._waiting[job.key]
            if self._clocks[job.key] <= self._now:
                del self._clocks[job.key]  # nothing to remember: it would start here anyway

    def jobs(self) -> list[Job]:
        return [job for jobs in self._waiting.values() for job in jobs]

    def __len__(self) -> int:
        return self.num_jobs

    def _next_key(self) -> int:
        return min(self._waiting, key=lambda key: (self._clocks[key], key))
