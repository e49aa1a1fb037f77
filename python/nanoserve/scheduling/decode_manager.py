"""Requests that generate: one token each per step.

`take` gives the rows of the next step. With no more requests than the limit, which the Scheduler guarantees, that is the
list itself, without copying; with more, turns are taken. On its own, `schedule()` also grants the page a request needs
when its next token begins one, and leaves out who cannot get it.
"""

from __future__ import annotations

from nanoserve.batch import Batch
from nanoserve.checks import whole_number
from nanoserve.request import Request
from nanoserve.scheduling.pages import grant
from nanoserve.scheduling.prefill_manager import computed_batch


class DecodeManager:
    """The decoding requests.

    Args:
        max_batch_size: most rows per batch; in an engine, most running requests.
    """

    def __init__(self, max_batch_size: int = 32) -> None:
        self.max_batch_size = whole_number("max_batch_size", max_batch_size, 1)
        self._requests: list[Request] = []

    def add_request(self, request: Request) -> None:
        """From now on one token per step."""
        if request in self._requests:
            raise ValueError(f"request {request.req_id!r} is decoding already")
        self._requests.append(request)

    def remove(self, request: Request) -> bool:
        """Preempted or aborted. False if it was not here."""
        if request not in self._requests:
            return False
        self._requests.remove(request)
        return True

    def remove_finished(self) -> list[Request]:
        """Drops the finished requests and returns them."""
        finished = [request for request in self._requests if request.is_finished]
        if finished:
            self._requests = [request for request in self._requests if not request.is_finished]
        return finished

    def take(self, limit: int) -> list[Request]:
        """Up to `limit` requests to give a row each; not to be modified."""
        limit = min(limit, self.max_batch_size)
        if len(self._requests) <= limit:
            return self._requests
        taken = self._requests[:limit]
        self._requests = self._requests[limit:] + taken
        return taken

    @property
    def requests(self) -> list[Request]:
        return list(self._requests)

    @property
    def num_running(self) -> int:
        return len(self._requests)

    @property
    def has_running(self) -> bool:
        return bool(self._requests)

    def schedule(self) -> Batch | None:
        """The next token of up to `max_batch_size` requests, which counts as computed from here on.

        Raises:
            ValueError: a request has no new token since the last call, or an uncomputed prompt.
        """
        chosen = []
        for request in self.take(self.max_batch_size):
            if request.extend_len != 1:
                raise ValueError(
                    f"request {request.req_id!r} cannot decode: {request.extend_len} of its tokens are not computed, not 1"
                )
            table = request.page_table
            if table is None or grant(table.pool, request, request.total_len) is not None:
                chosen.append((request, 1))
        return computed_batch(chosen)
