"""play: requests through a server, and the timeline of what came back.

It is the only loop that times an engine, whichever it is: nanoserve's own, or a peer behind bench/peers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from nanoserve.workloads.timeline import RequestTimes, Timeline
from nanoserve.workloads.workload import WorkloadRequest


class Server(Protocol):
    """What can be measured: greedy, EOS ignored."""

    def add(self, key: int, prompt: list[int], output_tokens: int) -> None:
        """Queue a request for exactly so many tokens."""
        ...

    def step(self) -> Iterable[tuple[int, Sequence[int]]]:
        """Go on until something came, or nearly so: key and new tokens of each request that got some."""
        ...


def play(
    server: Server,
    requests: Sequence[WorkloadRequest],
    max_in_flight: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Timeline:
    """Serve requests, the next one sent when fewer than `max_in_flight` are unanswered.

    Raises:
        RuntimeError: the server gave a token nobody waits for.
    """
    begin = clock()
    entries: list[RequestTimes] = []
    live: dict[int, int] = {}  # tokens that are still to come, by key
    while live or len(entries) < len(requests):
        while len(live) < max_in_flight and len(entries) < len(requests):
            key, request = len(entries), requests[len(entries)]
            entries.append(RequestTimes(len(request.prompt), clock() - begin))
            live[key] = request.output_tokens
            server.add(key, request.prompt, request.output_tokens)
        came = list(server.step())
        now = clock() - begin
        for key, tokens in came:
            if len(tokens) > live.get(key, 0):
                raise RuntimeError(f"request {key}: {len(tokens)} tokens came, {live.get(key, 0)} were left")
            entries[key].tokens.extend(tokens)
            entries[key].times_s.extend([now] * len(tokens))
            live[key] -= len(tokens)
            if not live[key]:
                del live[key]
    return Timeline(entries, clock() - begin)
