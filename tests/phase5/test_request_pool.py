"""Phase 5: the request pool. Where a request is, and the only ways from one state to another."""

from __future__ import annotations

import itertools

import pytest

from nanoserve.errors import IllegalTransition, RequestRefused
from nanoserve.request import Request, RequestState
from nanoserve.scheduling.policies import POLICIES, get_policy
from nanoserve.scheduling.request_pool import LEGAL, RequestPool

MOVES = {
    RequestState.PREFILL: lambda pool, request: pool.admit(request),
    RequestState.DECODE: lambda pool, request: pool.start_decode(request),
    RequestState.PREEMPTED: lambda pool, request: pool.preempt(request),
    RequestState.FINISHED: lambda pool, request: pool.finish(request, "length"),
}
PATHS = {
    RequestState.WAITING: [],
    RequestState.PREFILL: [RequestState.PREFILL],
    RequestState.DECODE: [RequestState.PREFILL, RequestState.DECODE],
    RequestState.PREEMPTED: [RequestState.PREFILL, RequestState.PREEMPTED],
    RequestState.FINISHED: [RequestState.PREFILL, RequestState.FINISHED],
}


def request_in(pool: RequestPool, state: RequestState) -> Request:
    request = Request("a", [1, 2])
    pool.add(request)
    for step in PATHS[state]:
        MOVES[step](pool, request)
    assert request.state is state
    return request


def where(pool: RequestPool, request: Request) -> list[str]:
    places = {"waiting": pool.waiting, "running": pool.running.values(), "finished": pool.finished}
    return [name for name, held in places.items() if any(one is request for one in held)]


@pytest.mark.parametrize(("old", "new"), list(itertools.product(RequestState, MOVES)), ids=lambda s: s.value)
def test_transitions(old: RequestState, new: RequestState) -> None:
    """Every pair of states: a legal move arrives in one place, an illegal one raises and changes nothing."""
    pool = RequestPool()
    request = request_in(pool, old)
    before = where(pool, request)
    if new in LEGAL[old]:
        MOVES[new](pool, request)
        assert request.state is new
        expected = {"prefill": "running", "decode": "running", "preempted": "waiting"}.get(
            new.value, "finished"
        )
        assert where(pool, request) == [expected]
    else:
        with pytest.raises(IllegalTransition, match=f"'a': {old.value} -> {new.value}"):
            MOVES[new](pool, request)
        assert request.state is old
        assert where(pool, request) == before


def test_an_empty_pool_has_nothing_to_do() -> None:
    """No head, no counts, and a request it does not know cannot be moved by it."""
    pool = RequestPool()
    assert (pool.head(), pool.num_waiting, pool.num_running, pool.num_live) == (None, 0, 0, 0)
    with pytest.raises(IllegalTransition, match="'a' cannot become prefill: it is not in this pool"):
        pool.admit(Request("a", [1]))


def test_a_live_id_is_refused_and_a_finished_one_is_free_again() -> None:
    """Two live requests of one id could not be told apart by anyone who aborts one."""
    pool = RequestPool()
    first = Request("a", [1])
    pool.add(first)
    with pytest.raises(RequestRefused, match="'a' is in use"):
        pool.add(Request("a", [2]))
    pool.finish(first, "abort")
    with pytest.raises(RequestRefused, match="'a' was served before"):
        pool.add(first)
    pool.add(Request("a", [2]))


def test_seniority_is_the_arrival_and_survives_preemption() -> None:
    """A preempted request goes back before those that came after it."""
    pool = RequestPool()
    requests = [Request(i, [1]) for i in range(4)]
    for request in requests:
        pool.add(request, step=0)
    for request in requests[:3]:
        pool.admit(request)
    pool.preempt(requests[2])
    pool.preempt(requests[1])
    assert [r.req_id for r in pool.waiting] == [1, 2, 3]
    assert [r.arrival for r in requests] == [0, 1, 2, 3]


def test_finished_requests_do_not_pile_up() -> None:
    """A server's memory does not grow with its history; live requests are never forgotten."""
    pool = RequestPool()
    for i in range(3000):
        request = Request(i, [1])
        pool.add(request)
        if i % 2:
            pool.finish(request, "abort")
    assert len(pool.finished) <= 1024
    assert pool.num_live == pool.num_waiting == 1500


def order(policy: str, requests: list[tuple[int, Request]]) -> list[object]:
    """Ids in the order the pool gives them out; each request comes with its step of arrival."""
    pool = RequestPool(policy)
    for step, request in requests:
        pool.add(request, step)
    given = []
    while (head := pool.head()) is not None:
        given.append(head.req_id)
        pool.finish(head, "abort")
    return given


def test_policies_order_the_queue() -> None:
    """Equal arrivals: by arrival, by size up, by size down, by priority; ties by arrival."""
    sizes = {"m": 20, "l": 40, "s": 10}
    requests = lambda: [  # noqa: E731
        (0, Request(name, [1] * size, max_tokens=5, priority=p))
        for (name, size), p in zip(sizes.items(), (1, 0, 1), strict=True)
    ]
    assert order("fcfs", requests()) == ["m", "l", "s"]
    assert order("sjf", requests()) == ["s", "m", "l"]
    assert order("ljf", requests()) == ["l", "m", "s"]
    assert order("priority", requests()) == ["l", "m", "s"]


def test_age_makes_up_for_size() -> None:
    """A long job is overtaken by shorter ones for a bounded number of steps only: then nothing can come before it."""
    early = (0, Request("long", [1] * 100, max_tokens=1))
    soon = (10, Request("soon", [1], max_tokens=1))
    late = (25, Request("late", [1], max_tokens=1))
    assert order("sjf", [early, soon, late]) == ["soon", "long", "late"]
    assert order(
        "priority", [(0, Request("low", [1], priority=1)), (63, Request("a", [1])), (65, Request("b", [1]))]
    ) == [
        "a",
        "low",
        "b",
    ]


def test_the_longest_cached_prefix_goes_first_but_not_for_ever() -> None:
    """lpm asks the cache at admission; each step of waiting counts like four cached tokens."""
    cached = {1: 0, 2: 12, 3: 30}
    pool = RequestPool("lpm")
    for step, token in ((0, 1), (1, 2), (9, 3)):
        pool.add(Request(token, [token]), step)

    def peek(tokens: object) -> int:
        return cached[next(iter(tokens))]  # type: ignore[call-overload]

    head = pool.head(peek)
    assert head is not None
    assert head.req_id == 2  # scores: 0, 4 - 12, 36 - 30
    pool.finish(head, "abort")
    assert pool.head(peek).req_id == 1  # type: ignore[union-attr]


def test_policies_have_two_names_and_unknown_ones_are_refused() -> None:
    """The long names of the course mean the short ones."""
    assert get_policy("shortest-job-first") is get_policy("sjf") is POLICIES["sjf"]
    assert get_policy("longest-prefix-match") is get_policy("lpm")
    with pytest.raises(ValueError, match="policy: 'random' must be one of fcfs, sjf"):
        RequestPool("random")
