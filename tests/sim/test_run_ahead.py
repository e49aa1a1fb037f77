"""Which steps are started before the one before them is over, and what they cost: nothing for those who decode alone, nobody's turn."""

from __future__ import annotations

from typing import Any

import pytest

from nanoserve.native import CudaDeviceLost
from nanoserve.request import Request, RequestState
from nanoserve.sampling import SamplingParams
from support.fakes import System, prefix_hashes


def forwards(system: System) -> list[list[Any]]:
    """Whom each forward computed."""
    return [[req_id for req_id, _, _ in batch] for batch in system.executor.batches]


def test_all_steps_of_a_decode_are_started_ahead_and_none_is_for_nothing() -> None:
    """Also at the boundaries of pages, the second one's included."""
    system = System(page_size=4, device=True)
    request = system.add("a", [1, 2, 3], max_tokens=30)
    system.drain()
    assert request.output_tokens == system.expected(request)
    assert system.executor.num_forwards == 30
    assert system.executor.num_ahead == 28  # not the prompt's, nor the first after it
    assert system.batcher.get_stats()["steps_ahead"] == 28
    assert [event.step for event in system.scheduler.events if event.kind == "finished"] == [30]


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 1},
        {"repetition_penalty": 1.3},
        {"min_tokens": 9},
        {"bad_word_ids": [(7,)]},
        {"bad_word_ids": [(30, 7)]},
    ],
)
def test_a_step_with_a_token_for_the_host_to_choose_is_not_overtaken(params: dict[str, Any]) -> None:
    system = System(device=True)
    plain, other = system.add("a", [1, 2, 3], max_tokens=10), system.add("b", [4], max_tokens=10, **params)
    system.drain()
    assert system.executor.num_ahead == 0
    assert [plain.output_tokens, other.output_tokens] == [system.expected(plain), system.expected(other)]


def test_a_least_number_of_tokens_is_the_hosts_until_it_is_reached() -> None:
    system = System(device=True, eos=(0, 1))
    request = system.add("a", [1, 2, 3], max_tokens=40, min_tokens=20, ignore_eos=False)
    while len(request.output_tokens) < 20:
        system.step()
    assert system.executor.num_ahead == 0
    system.drain()
    assert system.executor.num_ahead > 5
    assert request.output_tokens == system.expected(request)


def test_a_step_that_computes_a_prompt_is_not_overtaken() -> None:
    system = System(chunk_size=4, device=True)
    system.add("a", [1, 2, 3], max_tokens=30)
    for _ in range(3):
        system.step()
    assert (before := system.executor.num_ahead) > 0
    system.add("b", list(range(16)), max_tokens=2)
    system.step()
    assert [system.step().batch.size for _ in range(4)] == [2] * 4
    assert system.executor.num_ahead == before


def test_who_arrives_while_a_step_is_ahead_is_in_the_next_one() -> None:
    system = System(device=True)
    system.add("a", [1, 2, 3], max_tokens=40)
    while not system.executor.num_ahead:
        system.step()
    system.add("b", [4, 5], max_tokens=4)
    assert "b" not in system.step().scheduled
    assert "b" in system.step().scheduled


def test_a_seat_that_becomes_free_is_taken_at_once() -> None:
    """By whoever waits for it: its last token is no surprise, so nobody is started ahead of that."""
    system = System(max_batch_size=2, device=True)
    system.add("a", [1], max_tokens=12)
    last = system.add("b", [2], max_tokens=6)
    system.add("c", [3], max_tokens=6)
    while not last.is_finished:
        system.step()
    assert system.executor.num_ahead > 0
    assert "c" in system.step().scheduled


def test_a_full_house_is_no_reason_to_wait() -> None:
    """Somebody waits, but can have no seat: the step is started ahead."""
    system = System(max_batch_size=1, device=True)
    system.add("a", [1], max_tokens=12)
    system.add("b", [2], max_tokens=12)
    system.drain()
    assert system.executor.num_ahead == 2 * 10


def stopped(system: System, prompt: list[int], at: int, **params: Any) -> Request:
    """A request that ends after `at` tokens by one that nobody can foresee."""
    alone = SamplingParams(temperature=0.0, max_tokens=at, ignore_eos=True)
    full = system.expected(Request("rehearsal", prompt, params=alone))
    return system.add("stopped", prompt, **{"max_tokens": 40, "stop_token_ids": (full[-1],), **params})


def for_nothing(request: Request) -> tuple[float, ...]:
    """The key of its last token, which nothing needs."""
    return tuple(prefix_hashes(request.token_ids)[-1].tolist())


def free_keys(system: System, other: Request) -> set[tuple[float, ...]]:
    """All that the pages hold which are not another request's: pages of one token, and no prefix cache."""
    held = set(other.page_table.pages)
    keys, _ = system.pool.get_layer_cache(0)
    return {tuple(keys[page, 0, 0].tolist()) for page in range(system.pool.num_pages) if page not in held}


def test_pages_of_who_ended_are_empty_after_the_step_that_wrote_them_for_nothing() -> None:
    system = System(page_size=1, cache=False, device=True)
    other = system.add("other", [9, 9], max_tokens=40)
    request = stopped(system, [5, 6, 7], at=9)
    while not request.is_finished:
        system.step()
    assert request.finish_reason == "stop"
    assert forwards(system)[-1] == ["other", "stopped"]  # the step ahead
    system.step()
    assert for_nothing(request) not in free_keys(system, other)
    system.drain()
    system.check_nothing_is_held()


def test_who_sits_out_for_want_of_pages_is_not_forgotten() -> None:
    """When pages come back, the step after the next has everybody."""
    system = System(num_pages=5, page_size=8, cache=False, device=True)
    first = stopped(system, list(range(8)), at=8, max_tokens=30)
    second, third = system.add("b", list(range(7)), max_tokens=12), system.add("c", [1, 2, 3], max_tokens=10)
    while not first.is_finished:
        last = system.step()
    assert "c" not in last.scheduled
    assert third.state is RequestState.DECODE
    assert "c" in {**system.step().scheduled, **system.step().scheduled}
    assert not second.is_finished
    system.drain()
    assert system.executor.num_ahead > 0
    assert third.output_tokens == system.expected(third)


def test_a_step_whose_tokens_are_lost_is_computed_again() -> None:
    """And so is the one ahead of it; what it left in the pages of who ends meanwhile goes with them."""
    system = System(page_size=1, cache=False, device=True)

    def lose() -> None:
        if system.executor.num_waiting:  # another one was started
            raise MemoryError("lost")

    system.executor.telling = lose
    other = system.add("other", [9, 9], max_tokens=40)
    request = stopped(system, [5, 6, 7], at=9)
    while not request.is_finished:
        system.step()
    assert system.executor.num_ahead > 5
    assert request.output_tokens == system.expected(request)
    assert for_nothing(request) not in free_keys(system, other)
    system.drain()
    assert other.output_tokens == system.expected(other)


def test_a_step_ahead_of_nobody_is_forgotten() -> None:
    system = System(device=True)
    request = stopped(system, [5, 6, 7], at=9)
    while not request.is_finished:
        system.step()
    assert system.scheduler.in_flight is None
    assert not system.batcher.has_unfinished
    assert system.executor.num_waiting == 0
    system.check_nothing_is_held()


def test_aborts_between_steps_find_their_pages_later() -> None:
    """Of who is in the step ahead: while others are too, the pages come back when that one is over."""
    system = System(page_size=1, cache=False, device=True)
    first, second = system.add("a", [1, 2], max_tokens=40), system.add("b", [3, 4], max_tokens=40)
    while not system.executor.num_ahead:
        system.step()
    assert system.batcher.abort("a")
    assert system.pool.num_used_pages > len(second.page_table)
    system.step()
    assert system.pool.num_used_pages == len(second.page_table)
    assert first.output_tokens == system.expected(first)[: len(first.output_tokens)]
    assert system.batcher.abort("b")
    system.check_nothing_is_held()


@pytest.mark.parametrize("at", ["before", "after", "telling"])
def test_a_lost_device_is_told_to_whoever_asks_for_a_step(at: str) -> None:
    """Whatever is being done with it then; no request is blamed."""
    system = System(device=True)
    request = system.add("a", [1, 2, 3], max_tokens=20)

    def lose() -> None:
        raise CudaDeviceLost("an illegal memory access")

    while not system.executor.num_ahead:
        system.step()
    setattr(system.executor, at, lose)
    system.executor.telling = lose
    for _ in range(2):
        with pytest.raises(CudaDeviceLost):
            system.batcher.step()
    assert not request.is_finished


@pytest.mark.parametrize("at", ["after", "telling"])
def test_an_interrupt_while_a_step_is_ahead_loses_no_token(at: str) -> None:
    """While it is started, and while the tokens of the one before it are waited for."""
    system = System(device=True)
    request = system.add("a", [1, 2, 3], max_tokens=20)

    def interrupt() -> None:
        setattr(system.executor, at, None)
        raise KeyboardInterrupt

    while not system.executor.num_ahead:
        system.step()
    for _ in range(3):
        system.step()
        setattr(system.executor, at, interrupt)
        with pytest.raises(KeyboardInterrupt):
            system.step()
        system.check()
        assert system.scheduler.in_flight is None
    system.drain()
    assert request.output_tokens == system.expected(request)
