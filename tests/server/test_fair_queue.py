"""Who is next: by arrival within a key, by what was served between keys."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nanoserve.server.fair_queue import FairQueue


@dataclass(eq=False)
class _Job:
    key: int
    tokens: int
    number: int


def job(key: int, tokens: int = 10, number: int = 0) -> Any:
    return _Job(key, tokens, number)


def test_one_key_is_first_come_first_served() -> None:
    queue = FairQueue()
    for number in range(5):
        queue.push(job(1, 1 + number, number))
    assert [queue.pop().number for _ in range(5)] == list(range(5))
    assert queue.peek() is None
    assert len(queue) == queue.num_tokens == 0


def test_a_key_with_many_jobs_does_not_hold_up_one_with_few() -> None:
    queue = FairQueue()
    for number in range(100):
        queue.push(job(1, number=number))
    queue.push(job(2))
    assert 2 in [queue.pop().key for _ in range(2)]


def test_shares_are_of_tokens() -> None:
    queue = FairQueue()
    for number in range(1000):
        queue.push(job(1, 100, number))
        queue.push(job(2, 10, number))
    served: Counter[int] = Counter()
    for _ in range(400):
        one = queue.pop()
        served[one.key] += one.tokens
    assert abs(served[1] - served[2]) <= 100


def test_an_idle_key_saves_up_no_turns() -> None:
    queue = FairQueue()
    for number in range(100):
        queue.push(job(1, number=number))
    for _ in range(50):
        queue.pop()
    for number in range(50):
        queue.push(job(2, number=number))
    keys = [queue.pop().key for _ in range(20)]
    assert 9 <= keys.count(1) <= 11


def test_a_key_that_was_served_does_not_come_back_as_a_new_one() -> None:
    """Else a client that sends one job at a time, each after the last was taken, would always be next."""
    queue = FairQueue()
    for number in range(50):
        queue.push(job(1, 10, number))
    served: Counter[int] = Counter()
    for _ in range(40):
        if not any(one.key == 2 for one in queue.jobs()):
            queue.push(job(2, 100))
        one = queue.pop()
        served[one.key] += one.tokens
    assert abs(served[1] - served[2]) <= 110


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove"]), st.integers(0, 3), st.integers(1, 50))))
def test_counts_hold(operations: list[tuple[str, int, int]]) -> None:
    queue, waiting = FairQueue(), []
    for kind, key, tokens in operations:
        if kind == "push":
            waiting.append(job(key, tokens))
            queue.push(waiting[-1])
        elif waiting and kind == "pop":
            first = queue.peek()
            assert queue.pop() is first
            assert first is next(one for one in waiting if one.key == first.key)
            waiting.remove(first)
        elif waiting:
            gone = waiting.pop(key % len(waiting))
            queue.remove(gone)
        assert queue.num_jobs == len(waiting) == len(queue.jobs())
        assert queue.num_tokens == sum(one.tokens for one in waiting)
