"""TextThreads: parsing, templates, tokenizing and grammars, in a few threads instead of the event loop.

What waits for them is bounded like the queue for the engine, in all and by key, and ends with its client: work that was
not begun is then never done.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from nanoserve.server.errors import ApiError
from nanoserve.server.metrics import Metrics
from nanoserve.server.settings import ServerSettings

NUM_THREADS = 2
T = TypeVar("T")


class TextThreads:
    """The threads."""

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._threads = ThreadPoolExecutor(NUM_THREADS, "nanoserve-text")
        self._per_key: Counter[int] = Counter()

    @property
    def num_pending(self) -> int:
        return self._per_key.total()

    async def run(self, work: Callable[[], T], key: int) -> T:
        """What `work` returns; `key` is the number of the caller's.

        Raises:
            ApiError: 429 when too much waits, 503 when it was not done in `queue_timeout_s`.
        """
        settings = self._settings
        full = None
        if self.num_pending >= settings.max_queue_requests:
            full = f"queue: {self.num_pending} requests wait to be prepared, at most {settings.max_queue_requests} may"
        elif self._per_key[key] >= settings.max_requests_per_key:
            full = (
                f"requests: {self._per_key[key]} of this key wait to be prepared, at most "
                f"{settings.max_requests_per_key} may"
            )
        if full is not None:
            self._metrics.refused("text_queue_full")
            raise ApiError(429, full, "queue_full", headers={"Retry-After": "1"})
        self._per_key[key] += 1
        try:
            async with asyncio.timeout(settings.queue_timeout_s) as late:
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except TimeoutError:
            if not late.expired():
                raise
            self._metrics.refused("queue_timeout")
            raise ApiError(
                503, f"queue_timeout: it was not prepared in {settings.queue_timeout_s:g} s", "queue_timeout", headers={"Retry-After": "1"}
            ) from None  # fmt: skip
        finally:
            self._per_key[key] -= 1
            if not self._per_key[key]:
                del self._per_key[key]

    def close(self) -> None:
        """What was not begun is not done."""
        self._threads.shutdown(wait=False, cancel_futures=True)
