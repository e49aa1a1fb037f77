"""In which order the waiting queue is served, and why nobody waits forever.

Every policy is one number per request, its `term`, in tokens: smaller goes first. The queue is sorted by

    key = term + AGING_TOKENS_PER_STEP * (the step in which the request arrived)

Linear aging lifts all waiting requests at the same rate, so it never changes their order among themselves; only the
difference in arrival counts, and that is known at the door. Hence a key is computed once, the queue stays sorted by
insertion alone, and a request with term t can be overtaken only by requests that arrive less than
(t - smallest term) / AGING_TOKENS_PER_STEP steps after it: a bounded number of steps, then it is the head.

Longest-prefix-match is the exception: what is cached changes while a request waits. Its term is looked up when a seat is
free, for the first LPM_WINDOW requests of the queue only; the price is that a better match further back is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nanoserve.request import Request

AGING_TOKENS_PER_STEP = 4
PRIORITY_TOKENS = 256  # one level of priority is worth this much: 64 steps of waiting
LPM_WINDOW = 16


@dataclass(frozen=True, slots=True)
class Policy:
    """An order of the waiting queue.

    Args:
        term: tokens, smaller is served earlier; must not change while a request waits.
        by_prefix: each cached token of the prompt makes the term one token smaller, looked up at admission.
    """

    name: str
    term: Callable[[Request], int]
    by_prefix: bool = False

    def key(self, request: Request, step: int) -> int:
        """The request's place in a queue it joins in this step."""
        return self.term(request) + AGING_TOKENS_PER_STEP * step


def _nothing(request: Request) -> int:
    return 0


def _size(request: Request) -> int:
    return request.max_total_len


def _minus_size(request: Request) -> int:
    return -request.max_total_len


def _priority(request: Request) -> int:
    return PRIORITY_TOKENS * request.priority


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("fcfs", _nothing),
        Policy("sjf", _size),
        Policy("ljf", _minus_size),
        Policy("priority", _priority),
        Policy("lpm", _nothing, by_prefix=True),
    )
}
LONG_NAMES = {
    "first-come-first-served": "fcfs",
    "shortest-job-first": "sjf",
    "longest-job-first": "ljf",
    "longest-prefix-match": "lpm",
}


def get_policy(policy: str | Policy) -> Policy:
    """A policy by its short or long name; one of your own passes through.

    Raises:
        ValueError: with the names there are.
    """
    if isinstance(policy, Policy):
        return policy
    found = POLICIES.get(LONG_NAMES.get(policy, policy))
    if found is None:
        raise ValueError(f"policy: {policy!r} must be one of {', '.join([*POLICIES, *LONG_NAMES])}")
    return found
