"""No starvation: under every policy, a request the policy likes least ends while a flood of favourites never stops."""

from __future__ import annotations

from typing import Any

import pytest

from nanoserve.request import MAX_PRIORITY
from nanoserve.scheduling.policies import AGING_TOKENS_PER_STEP, LPM_WINDOW, PRIORITY_TOKENS
from support.fakes import System, prompt

# policy: (what the victim is, what the flood is): lengths, priorities, and the same prompt for all of the flood
FLOODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fcfs": ({"length": 30}, {"length": 3}),
    "sjf": ({"length": 60}, {"length": 3}),
    "ljf": ({"length": 2}, {"length": 40}),
    "priority": ({"length": 8, "priority": 2}, {"length": 8, "priority": -2}),
    "lpm": ({"length": 30}, {"length": 24}),
}


def bound(policy: str) -> int:
    """Steps after which no newcomer can come before the victim."""
    terms = {
        "fcfs": 0,
        "sjf": 60 - 3,
        "ljf": (40 + 2) - (2 + 2),
        "priority": 4 * PRIORITY_TOKENS,
        "lpm": 24,
    }
    return terms[policy] // AGING_TOKENS_PER_STEP + 1


@pytest.mark.parametrize("policy", FLOODS)
def test_a_flood_of_favourites_starves_nobody(policy: str) -> None:
    """Three favourites arrive in every step, more than can be served; the victim still ends by its bound."""
    system = System(policy=policy, page_size=4, num_pages=48, max_batch_size=2, chunk_size=64)
    victim_is, flood_is = FLOODS[policy]
    warm = system.add("warm", prompt(flood_is["length"]), max_tokens=1)
    system.drain()
    assert warm.is_finished
    for i in range(4):  # both seats are taken and somebody waits already
        system.add(f"first {i}", prompt(flood_is["length"]), 2, priority=flood_is.get("priority", 0))
    system.step()
    victim = system.add("victim", prompt(victim_is["length"], 99), 2, priority=victim_is.get("priority", 0))
    overtaken = 0
    limit = (
        bound(policy) * 4 + 40
    )  # those that arrived before the bound are served first, two seats at a time
    for step in range(limit):
        for i in range(3):
            system.add(f"{step}.{i}", prompt(flood_is["length"]), 2, priority=flood_is.get("priority", 0))
        output = system.step()
        overtaken += sum(request is not victim for request in output.finished)
        if victim.is_finished:
            break
    assert victim.finish_reason == "length", f"not served in {limit} steps, overtaken {overtaken} times"
    assert policy == "fcfs" or overtaken > 4, "the flood was no flood"
    waited = next(e.detail["waited"] for e in system.scheduler.events.of("victim") if e.kind == "admitted")
    for i in range(3 * (step + 1)):
        system.batcher.abort((i // 3, i % 3))
    assert waited <= limit
    system.drain()
    system.check_nothing_is_held()


def test_a_preempted_request_is_not_starved_by_arrivals() -> None:
    """It keeps its place: whoever arrived after it is admitted after it, again and again."""
    system = System(num_pages=6, page_size=4, max_batch_size=3, cache=False)
    old, young = system.add("old", prompt(6), max_tokens=12), system.add("young", prompt(6, 1), max_tokens=12)
    late: list[Any] = []
    for step in range(200):
        if not (old.is_finished and young.is_finished):
            late.append(system.add(step, prompt(2, step), max_tokens=3))
        system.step()
        if not system.batcher.has_unfinished:
            break
    assert young.num_preemptions > 0
    lost, back = (
        [e.step for e in system.scheduler.events.of("young") if e.kind == kind][-1]
        for kind in ("preempted", "admitted")
    )
    admitted = [e.step for r in late for e in system.scheduler.events.of(r.req_id) if e.kind == "admitted"]
    assert lost < back
    assert not [step for step in admitted if lost <= step < back], "somebody was let in before it"
    assert not system.batcher.has_unfinished


def test_the_bounds_are_bounds() -> None:
    """What the argument of policies.py rests on: terms are bounded, and lpm looks at a bounded part of the queue."""
    with pytest.raises(ValueError, match=f"priority: 1001 must be in \\[-{MAX_PRIORITY}, {MAX_PRIORITY}\\]"):
        System().add("a", [1], priority=MAX_PRIORITY + 1)
    system = System(policy="lpm", max_batch_size=1)
    for i in range(2 * LPM_WINDOW):
        system.add(i, prompt(4, i))
    looked_at: list[Any] = []
    system.scheduler.pool.head(lambda tokens: looked_at.append(tokens) or 0)  # type: ignore[func-returns-value]
    assert len(looked_at) == LPM_WINDOW
    system.drain()
