"""Call: the jobs of one HTTP request, taken together: a prompt each, and all of them end with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

from nanoserve.outputs import RequestOutput, TextDelta, Usage
from nanoserve.server.errors import ApiError
from nanoserve.server.gateway import Gateway
from nanoserve.server.job import Job

_log = logging.getLogger("nanoserve.server")


class Call:
    """Jobs that share `news`."""

    def __init__(self, gateway: Gateway, jobs: Sequence[Job], news: asyncio.Event) -> None:
        self.jobs = jobs
        self._gateway, self._news = gateway, news
        self.outputs: list[RequestOutput | None] = [None] * len(jobs)

    def open(self) -> None:
        """All jobs are let in, or none. Raises ApiError."""
        self._gateway.open(self.jobs)

    def close(self) -> None:
        """Whatever still runs is cancelled. Idempotent."""
        for job in self.jobs:
            self._gateway.cancel(job)

    async def news(self) -> AsyncIterator[list[tuple[int, TextDelta]]]:
        """(number of the prompt, what is new of it), as it comes.

        Raises:
            ApiError: one failed; of a sequence that failed inside the engine, the log says why.
        """
        left = len(self.jobs)
        while left:
            if all(job.failure is None for job in self.jobs):  # what came before a failure is told before it
                await self._news.wait()
            self._news.clear()
            new = [(at, delta) for at, job in enumerate(self.jobs) for delta in job.take()]
            for at, delta in new:
                if delta.finish_reason == "error":
                    failed = self.jobs[at].text.requests[delta.index]
                    _log.error("request %s failed in the engine: %s", failed.req_id, failed.error)
                    raise ApiError(500, "the engine failed on this request", "engine_error")
                if delta.output is not None:
                    self.outputs[at] = delta.output
                    left -= 1
            if new:
                yield new

    @property
    def usage(self) -> Usage:
        """Of what has ended."""
        done = [output.usage for output in self.outputs if output is not None]
        return Usage(
            sum(one.prompt_tokens for one in done), sum(one.completion_tokens for one in done), sum(one.cached_tokens for one in done)
        )  # fmt: skip
