"""Job: one prompt between the event loop, where its client waits, and the engine's thread, which computes it.

It belongs to the event loop. The engine's thread touches `text` only, and hands what came of it over through `Gateway`.
A client that reads slowly lets deltas pile up here, the engine never waits for it.
"""

from __future__ import annotations

import asyncio
from enum import Enum

from nanoserve.outputs import TextDelta
from nanoserve.server.errors import ApiError
from nanoserve.text_request import TextRequest


class JobState(Enum):
    NEW = "new"
    WAITING = "waiting"  # in the fair queue
    RUNNING = "running"  # with the engine
    ENDING = "ending"  # nobody wants it any more, the engine still has it
    ENDED = "ended"


class Job:
    """A prompt that was accepted, or is about to be.

    Args:
        text: what the engine runs.
        key: number of the API key it counts against. owner: that key's name.
        accepted_s, received_s: when its connection was accepted, and when its request's first byte came, by the gateway's clock:
            they differ for the first request of a connection, and what the client did in between is not held against it.
        queue_timeout_s, timeout_s: how long it may wait, and how long it may take in all.
        news: set when there is something to take, or it failed; jobs of one call share it.
    """

    def __init__(
        self,
        text: TextRequest,
        *,
        key: int = 0,
        owner: str = "",
        received_s: float = 0.0,
        accepted_s: float | None = None,
        queue_timeout_s: float = 60.0,
        timeout_s: float = 600.0,
        news: asyncio.Event | None = None,
    ) -> None:
        self.text = text
        self.key, self.owner = key, owner
        self.num_sequences = len(text.requests)
        self.prompt_tokens = text.requests[0].num_prompt_tokens
        self.tokens = self.prompt_tokens + sum(request.max_tokens for request in text.requests)
        self.received_s, self.queue_timeout_s, self.timeout_s = received_s, queue_timeout_s, timeout_s
        self.accepted_s = received_s if accepted_s is None else accepted_s
        self.state = JobState.NEW
        self.failure: ApiError | None = None
        self.started_s: float | None = None  # when the engine got it
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.output_tokens = 0
        self.is_complete = False
        self.finish_reasons: list[str] = []
        self.timers: list[asyncio.TimerHandle] = []
        self._deltas: list[TextDelta] = []
        self.news = asyncio.Event() if news is None else news

    def take(self) -> list[TextDelta]:
        """What is new.

        Raises:
            ApiError: it failed: a deadline, the server's end, a bug.
        """
        taken, self._deltas = self._deltas, []
        if not taken and self.failure is not None:
            raise self.failure
        return taken

    def push(self, deltas: list[TextDelta]) -> None:
        """More of it."""
        self._deltas += deltas
        for delta in deltas:
            if delta.finish_reason is not None:
                self.finish_reasons.append(delta.finish_reason)
                self.is_complete = self.is_complete or delta.output is not None
        self.news.set()

    def fail(self, failure: ApiError) -> None:
        """Whoever takes from it gets this."""
        if self.failure is None and not self.is_complete:
            self.failure = failure
        self.news.set()
