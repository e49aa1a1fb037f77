"""DecodeManager: the requests that compute one token per step.

They come first in every step: each costs one row, and making them wait would stall text somebody is reading.
"""

from __future__ import annotations

from nanoserve.batch import Batch
from nanoserve.request import Request


class DecodeManager:
    """Requests whose prompt is computed, in the order they got there.

    Args:
        max_batch_size: most rows of one step; the scheduler also admits no more requests than that.
    """

    def __init__(self, max_batch_size: int = 32) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size: {max_batch_size} must be at least 1")
        self.max_batch_size = max_batch_size
        self.running: dict[int | str, Request] = {}

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def has_running(self) -> bool:
        return bool(self.running)

    def add_request(self, request: Request) -> None:
        """From now on the request decodes.

        Raises:
            ValueError: its prompt is not computed up to the last token.
        """
        if request.extend_len != 1 or not request.output_tokens:
            raise ValueError(f"request {request.req_id!r} cannot decode: {request.extend_len} tokens are not computed")
        self.running[request.req_id] = request

    def remove(self, request: Request) -> None:
        """Forget a request; nothing happens when it is not there."""
        self.running.pop(request.req_id, None)

    def remove_finished(self) -> list[Request]:
        """Forget the finished requests and return them."""
        finished = [request for request in self.running.values() if request.is_finished]
        for request in finished:
            del self.running[request.req_id]
        return finished

    def take(self, budget: int) -> list[Request]:
        """The first `budget` rows, at most max_batch_size."""
        rows = list(self.running.values())
        return rows[: min(budget, self.max_batch_size)]

    def schedule(self) -> Batch | None:
        """One token of each; finished requests drop out. Pages for the token must be there."""
        self.remove_finished()
        rows = self.take(self.max_batch_size)
        return Batch.from_decode(rows) if rows else None
