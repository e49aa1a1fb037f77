"""Who is held back because somebody is just computing what it shares: requests that arrive together and begin alike.

Pages enter the prefix tree only when their request's prompt has led to finite logits. Until then a second request with the
same beginning would compute it again, so it is passed over at admission while the first, its elder, is being prefilled. Only
the order of admissions changes: whoever is held back holds nothing, and what a request computes depends on nobody else.

A waiting request is held back for an elder if
  1. it shares at least MIN_SHARED_PAGES whole pages more with it than with the tree: its gain. Waiting may cost a step, and
     a step has to read all weights for however few tokens: on CPU about the time of one or two pages of 16;
  2. the gain is at least 1 / MIN_SHARE of what it has to compute now: a common greeting is no reason to stand in line;
  3. the elder has at most (what it has to compute now) + gain to go. Side by side in one round each would take about
     twice the shorter one's tokens to end; behind such an elder it is not later than that, and the gain is saved;
  4. the elder came earlier, or is before it in the queue's order.
Idle budget is no reason to go: on CPU a step takes time for each of its tokens, so work done twice is time lost.
Never held back: who takes nothing from the cache, because it is disabled or because rows of logits of the prompt are wanted.
Such a request may well be the elder.

Progress. Held back are only requests that have an elder in prefill, so somebody runs, and who runs needs nobody who waits:
there are no cycles, and a chain (nested prefixes) has a running request at its end. An elder computes to its end, or
fails, is aborted or preempted; then the next admission asks anew, in the queue's order. When all start over nobody is an
elder.
Fairness. By 4 newcomers which the policy does not prefer are never waited for, so a finite number of requests ever are. By 2
each elder that ends well takes a quarter or more off what is to compute, W, and by 3 it takes at most W + gain tokens: all
of them together at most 4 W + W, as long as nothing of theirs is evicted. Those who are let past take pages and seats, but
only in that time: once nobody holds it back the request has its place in the queue as before.

Cost. Elders are found by the bytes of their first pages, one look-up per request asked; of those found, the pages behind
what is cached are compared, and only if they are the same everything. A verdict lasts while its elder is in prefill.
RequestPool looks at a bounded part of the queue, so a step with nothing shared costs O(prefilling + admitted), and one with
an empty queue nothing.
"""

from __future__ import annotations

from array import array

import numpy as np

from nanoserve.request import Request, RequestState
from nanoserve.scheduling.residents import Residents

MIN_SHARED_PAGES = 2
MIN_SHARE = 4


class Twins:
    """The prompts in progress, by how they begin.

    Args:
        residents: whose prompts in progress, cache and diary these are.
    """

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._page_size: int = residents.kv_pool.page_size
        self._first = MIN_SHARED_PAGES * self._page_size
        self._elders: dict[bytes, list[Request]] = {}
        self._held: dict[int, Request] = {}  # arrival of who is held back: its elder

    def look(self) -> None:
        """Sees who is in prefill now; before the first question of a step, and `add` for who joins in between."""
        self._elders.clear()
        for elder in self._residents.prefill_mgr.active_requests:
            self.add(elder)
        if self._held:
            prefill = RequestState.PREFILL
            self._held = {arrival: elder for arrival, elder in self._held.items() if elder.state is prefill}

    def add(self, elder: Request) -> None:
        """Somebody was admitted."""
        if elder.total_len >= self._first and self._residents.radix_mgr.enabled:
            self._elders.setdefault(elder.cache_key(self._first).tobytes(), []).append(elder)

    def holds_back(self, request: Request) -> bool:
        """A waiting request had better wait for an elder: rules 1 to 4 of the head. Recorded when it begins to."""
        if request.arrival in self._held:
            return True
        elders = self._elders.get(request.cache_key(self._first).tobytes())
        if not elders or request.lacks_prompt_logprobs:
            return False
        key = request.cache_key()
        cached = self._residents.radix_mgr.peek(key)
        to_compute = len(key) - cached
        uncached = slice(cached, cached + self._first)
        wanted = request.token_ids[uncached]
        for elder in elders:
            if elder.token_ids[uncached] != wanted:  # most often: only what is cached is the same
                continue
            gain = self._shared(key, elder) - cached
            if (
                gain >= self._first
                and MIN_SHARE * gain >= to_compute
                and elder.extend_len <= to_compute + gain
                and (elder.arrival < request.arrival or self._residents.pool.is_before(elder, request))
            ):
                self._hold_back(request, elder, gain)
                return True
        return False

    def _hold_back(self, request: Request, elder: Request, gain: int) -> None:
        residents = self._residents
        self._held[request.arrival] = elder
        residents.stats.held_back += 1
        residents.events.record(residents.steps, "held_back", request.req_id, by=elder.req_id, tokens=gain)

    def _shared(self, key: array[int], elder: Request) -> int:
        """Leading tokens in whole pages that are the same: what the tree will have of the elder's."""
        other = elder.cache_key(len(key))
        length = min(len(key), len(other))
        differs = np.frombuffer(key, np.int32, length) != np.frombuffer(other, np.int32, length)
        first = int(differs.argmax())
        same = first if differs[first] else length
        return same - same % self._page_size
