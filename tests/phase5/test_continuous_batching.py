"""Phase 5: requests join and leave at every step, and nobody notices the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanoserve.errors import InvariantViolation, RequestRefused
from nanoserve.logits import Logits
from nanoserve.observe.events import EventLog
from nanoserve.request import Request, RequestState
from nanoserve.sampling import SamplingParams
from nanoserve.scheduling.audit import audit
from nanoserve.scheduling.scheduler import Scheduler
from support.fakes import System, prompt


def test_all_requests_finish_with_their_own_output() -> None:
    """Twenty prompts through four seats and a pool that cannot hold four: each ends with what it gets alone."""
    system = System(num_pages=20, max_batch_size=4)
    requests = [system.add(i, prompt(3 + 5 * i % 40, i), max_tokens=1 + i % 13) for i in range(20)]
    system.drain()
    assert [r.output_tokens for r in requests] == [system.expected(r) for r in requests]
    assert {r.finish_reason for r in requests} == {"length"}
    system.check_nothing_is_held()


def test_requests_join_mid_flight() -> None:
    """A request that arrives while others decode gets its first token in the next step, and changes none of theirs."""
    system = System()
    first = system.add("first", prompt(9), max_tokens=12)
    for _ in range(4):
        system.step()
    second = system.add("second", prompt(7, 1), max_tokens=3)
    output = system.step()
    assert output.scheduled == {"first": 1, "second": 7}
    assert set(output.new_tokens) == {"first", "second"}
    system.drain()
    assert [r.output_tokens for r in (first, second)] == [system.expected(r) for r in (first, second)]


def test_requests_of_different_lengths_leave_when_they_are_done() -> None:
    """Nobody waits for the slowest: a seat is taken again in the step after its request ended."""
    system = System(max_batch_size=2)
    system.add("long", prompt(4), max_tokens=12)
    system.add("short", prompt(4, 1), max_tokens=2)
    third = system.add("third", prompt(4, 2), max_tokens=2)
    ended = {}
    for step in range(1, 20):
        for request in system.step().finished:
            ended[request.req_id] = step
        if step == 3:
            assert third.output_tokens, "the seat freed in step 2 was not used in step 3"
    assert ended == {"short": 2, "third": 4, "long": 12}


def test_sampling_does_not_depend_on_company() -> None:
    """Temperature, top-p and a seed: the same tokens alone, among others, and in a pool that preempts."""
    outputs = []
    for others, pages in ((0, 64), (7, 64), (7, 14)):
        system = System(num_pages=pages)
        request = system.add("x", prompt(10), max_tokens=15, temperature=0.9, top_p=0.9, seed=5)
        for i in range(others):
            system.add(i, prompt(6 + i, i + 1), max_tokens=12, temperature=1.0)
        system.drain()
        outputs.append(request.output_tokens)
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(set(outputs[0])) > 3


def test_requests_without_a_seed_get_one_from_the_engines() -> None:
    """The same engine seed and order of arrival repeat a run; another seed, or another place, gives other tokens."""

    def run(seed: int) -> list[list[int]]:
        system = System(seed=seed)
        requests = [system.add(i, prompt(8), max_tokens=10, temperature=1.0) for i in range(2)]
        system.drain()
        return [r.output_tokens for r in requests]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1)[0] != run(1)[1]


def test_an_empty_engine_does_nothing() -> None:
    """A step without requests computes nothing and counts nothing; running no requests returns none."""
    system = System()
    output = system.step()
    assert (output.batch, output.finished, output.scheduled) == (None, [], {})
    assert system.batcher.run_until_complete([]) == []
    assert (system.executor.num_forwards, system.batcher.get_stats()["steps"]) == (0, 0)


def test_batching_takes_fewer_forwards_than_one_at_a_time() -> None:
    """Sixteen requests of 10 tokens: 8 seats need an eighth of the forwards that one seat needs."""
    forwards = {}
    for seats in (1, 8):
        system = System(max_batch_size=seats, num_pages=128)
        for i in range(16):
            system.add(i, prompt(6, i), max_tokens=10)
        system.drain()
        forwards[seats] = system.executor.num_forwards
    assert forwards == {1: 160, 8: 20}


def test_stop_conditions() -> None:
    """EOS, stop ids, min_tokens, ignore_eos and max_tokens, each seen to end (or not end) a request."""
    plain = System().expected(System().add("p", prompt(5), max_tokens=30))
    eos = plain[3]
    first = plain.index(eos)

    def run(**params: Any) -> tuple[str | None, list[int], list[int]]:
        system = System(eos=(eos,))
        request = system.add("r", prompt(5), max_tokens=30, **params)
        system.drain()
        return request.finish_reason, request.output_tokens, system.expected(request)

    assert run(ignore_eos=False)[:2] == ("stop", plain[: first + 1])
    assert run(ignore_eos=True)[:2] == ("length", plain)
    assert run(stop_token_ids=[eos])[:2] == ("stop", plain[: first + 1])
    _, tokens, expected = run(ignore_eos=False, min_tokens=first + 2)
    assert tokens == expected
    assert len(tokens) > first + 2
    assert eos not in tokens[: first + 2]


def test_min_tokens_holds_whatever_the_sampler_does() -> None:
    """A sampler of one's own may return EOS too early: up to min_tokens it is a token like any other."""
    scheduler = Scheduler(System().pool, eos_token_ids=(7,))
    request = Request("a", [1, 2], params=SamplingParams(max_tokens=9, min_tokens=2))
    scheduler.add_request(request)
    for expected in (None, None, "stop"):
        output = scheduler.step()
        assert output is not None
        scheduler.update(output, [7])
        assert request.finish_reason == expected


def test_a_model_length_ends_a_request() -> None:
    """prompt + output reach max_model_len: reason length, not an error and not a token more."""
    system = System(max_model_len=12)
    request = system.add("a", prompt(9), max_tokens=50)
    system.drain()
    assert (request.finish_reason, len(request.output_tokens), request.total_len) == ("length", 3, 12)
    with pytest.raises(
        RequestRefused, match="12 tokens leaves no room for output, prompt \\+ output is at most 12"
    ):
        system.add("b", prompt(12))


def test_statistics_add_up() -> None:
    """Steps, tokens, hits, ends: each counter equals what the run did, and reset sets them to zero."""
    system = System(page_size=4, chunk_size=64)
    first = system.add("a", prompt(9), max_tokens=5)
    system.drain()
    again = system.add("b", prompt(9), max_tokens=5)
    system.add("c", prompt(5, 1), max_tokens=5)
    system.step()
    assert system.batcher.abort("c")
    system.drain()
    with pytest.raises(RequestRefused):
        system.add("d", [999])
    stats = system.batcher.get_stats()
    computed = sum(count for batch in system.executor.batches for _, _, count in batch)
    assert stats["steps"] == system.executor.num_forwards == 10
    assert stats["prefill_tokens"] == 9 + (9 - 8) + 5
    assert stats["decode_tokens"] == 4 + 4
    assert stats["avg_tokens_per_step"] == pytest.approx(computed / 10)
    assert stats["output_tokens"] == 5 + 5 + 1
    assert (stats["cache_hits"], stats["cache_misses"]) == (8, 9 + 1 + 5)
    assert stats["cache_hit_rate"] == pytest.approx(8 / 23)
    counts = (
        "num_finished",
        "num_aborted",
        "num_errors",
        "num_refused",
        "preemptions",
        "num_waiting",
        "num_running",
    )
    assert [stats[name] for name in counts] == [2, 1, 0, 1, 0, 0, 0]
    assert first.output_tokens == again.output_tokens
    assert again.prefix_hit_len == 8
    system.batcher.reset_stats()
    assert not any(system.batcher.get_stats().values())


def test_the_schedulers_time_is_measured_without_the_forward() -> None:
    """A clock that ticks once per look: four looks a step, one tick of forward, two of scheduling."""
    ticks = iter(range(1000))
    system = System(clock=lambda: float(next(ticks)))
    system.add("a", prompt(4), max_tokens=5)
    system.drain()
    stats = system.batcher.get_stats()
    assert stats["forward_s"] == 5.0
    assert stats["scheduler_us_per_request_step"] == pytest.approx(2e6)


def test_events_tell_a_requests_story() -> None:
    """Admitted, its chunks, its pages, its end, in order, and nothing per decoded token."""
    system = System(page_size=4, chunk_size=8)
    system.add("a", prompt(10), max_tokens=5)
    system.drain()
    story = [e.kind for e in system.scheduler.events.of("a")]
    assert story == [
        "admitted", "pages_granted", "chunk", "pages_granted", "chunk", "pages_granted", "finished", "pages_freed",
    ]  # fmt: skip
    assert [e.step for e in system.scheduler.events.of("a")] == [1, 1, 1, 2, 2, 5, 6, 6]


def test_the_event_log_is_bounded_and_knows_its_kinds() -> None:
    """The oldest events are forgotten and counted; a kind that is not in the schema is refused."""
    log = EventLog(capacity=3)
    for step in range(5):
        log.record(step, "finished", "a", reason="stop")
    assert ([e.step for e in log], len(log), log.num_recorded, log.num_forgotten) == ([2, 3, 4], 3, 5, 2)
    with pytest.raises(ValueError, match="kind: 'finnished' must be one of aborted"):
        log.record(6, "finnished", "a")
    with pytest.raises(ValueError, match="capacity: -1"):
        EventLog(-1)


def test_the_schedulers_cost_per_request_and_step() -> None:
    """Everything in Python of 32 decoding requests, sampling included, stays under 10 microseconds each (best of 20)."""
    system = System(
        num_pages=512, page_size=16, max_batch_size=32, chunk_size=64, max_num_batched_tokens=2048, vocab=256
    )
    logits = Logits.of(np.random.default_rng(0).random((32, 256), dtype=np.float32))
    system.executor.forward = lambda batch: logits  # type: ignore[method-assign]
    for i in range(32):  # all prompts fit the first step, so every step has 32 rows
        system.add(i, prompt(20 + i % 16, i), max_tokens=200)
    system.batcher.step()
    costs = []
    for _ in range(20):
        system.batcher.reset_stats()
        for _ in range(8):
            system.batcher.step()
        costs.append(system.batcher.get_stats()["scheduler_us_per_request_step"])
    assert system.scheduler.pool.num_running == 32
    assert min(costs) < 10


# ---- the scheduler alone


def test_the_scheduler_serves_a_model_of_your_own() -> None:
    """step, arrays, update: block tables and slots lead to the same places, tokens go back in row order."""
    system = System(num_pages=40, page_size=4)
    scheduler = Scheduler(system.pool)
    requests = [
        Request(i, prompt(5 + i, i), max_tokens=4, temperature=0.0, ignore_eos=True) for i in range(3)
    ]
    for request in requests:
        scheduler.add_request(request)
    finished = []
    while (output := scheduler.step()) is not None:
        assert (
            output.block_tables.shape[0] == len(output.requests) == len(output.starts) == len(output.counts)
        )
        assert output.block_tables.dtype == output.slot_mapping.dtype == np.int32
        row = 0
        for index, request in enumerate(output.requests):
            for position in range(output.starts[index], output.starts[index] + output.counts[index]):
                assert (
                    output.slot_mapping[row] == output.block_tables[index, position // 4] * 4 + position % 4
                )
                assert output.positions[row] == position
                assert output.input_ids[row] == request.token_ids[position]
                row += 1
        logits = system.executor.forward(output.batch)
        assert len(logits) == len(output.sampling_requests) == len(output.sample_rows)
        finished += scheduler.update(output, logits.values.argmax(axis=1))
        audit(scheduler)
    assert finished == requests
    assert [r.output_tokens for r in requests] == [system.expected(r) for r in requests]
    assert all(type(token) is int for r in requests for token in r.output_tokens)


def test_a_step_must_be_updated_or_discarded_before_the_next() -> None:
    """Otherwise the same tokens would be computed twice; a foreign or used output is refused too."""
    system = System()
    request = system.add("a", prompt(6), max_tokens=2)
    output = system.scheduler.step()
    assert output is not None
    with pytest.raises(RuntimeError, match=r"step 1 needs update\(\) or discard\(\) first"):
        system.scheduler.step()
    with pytest.raises(ValueError, match="tokens: 2 given, 1 requests were sampled"):
        system.scheduler.update(output, [1, 2])
    system.scheduler.discard(output)
    with pytest.raises(RuntimeError, match="step 1 is not the one in flight"):
        system.scheduler.update(output, [1])
    system.drain()
    assert request.output_tokens == system.expected(request)


@pytest.mark.parametrize(("vocab_size", "token"), [(16, 16), (None, 2**31), (16, -1)])
def test_a_token_outside_the_vocabulary_ends_its_request_alone(vocab_size: int | None, token: int) -> None:
    """A sampler of one's own may return anything: it must not be fed to the model in the next step."""
    scheduler = Scheduler(System().pool, vocab_size=vocab_size)
    bad, good = Request("bad", [1, 2], max_tokens=4), Request("good", [3, 4], max_tokens=1)
    scheduler.add_request(bad)
    scheduler.add_request(good)
    output = scheduler.step()
    assert output is not None
    assert scheduler.update(output, [token, 5]) == [bad, good]
    assert (bad.finish_reason, bad.output_tokens) == ("error", [])
    assert f"token {token} was sampled" in str(bad.error)
    assert (good.finish_reason, good.output_tokens) == ("length", [5])
    audit(scheduler)


def test_a_request_that_says_it_is_computed_already_is_refused() -> None:
    """cached_len without pages: the scheduler finds prefixes itself and would have to ignore it."""
    with pytest.raises(RequestRefused, match="cached_len=2, but it holds no pages"):
        System().batcher.add_request(Request("a", [1, 2, 3], cached_len=2))


def test_a_pool_held_by_somebody_else_is_a_loud_error() -> None:
    """Live requests and no way to compute them: an error with the numbers, not a silent engine that reports health."""
    system = System(num_pages=4, page_size=4)
    pages = system.pool.allocate_pages(3)
    system.add("a", prompt(10), max_tokens=4)
    with pytest.raises(InvariantViolation, match="'a' needs 3 pages, 1 of 4 are free"):
        system.batcher.step()
    system.pool.free(pages)
    system.drain()


def test_the_managers_must_share_the_pool() -> None:
    """Pages of two pools have the same numbers and mean different memory."""
    with pytest.raises(ValueError, match="prefill_mgr: works on another KV pool"):
        Scheduler(System().pool, prefill_mgr=System().prefill)
    with pytest.raises(ValueError, match="max_num_batched_tokens: 4 must be at least max_batch_size=8"):
        System(max_num_batched_tokens=4)


# ---- the audit


def test_the_audit_sees_what_it_is_for() -> None:
    """Each kind of disagreement, made by hand, is named."""

    def broken(words: str, damage: Any) -> None:
        system = System(page_size=4, chunk_size=4, max_batch_size=2)
        for i in range(3):
            system.add(i, prompt(9, i), max_tokens=8)
        for _ in range(4):
            system.step()
        damage(system, system.scheduler.pool.running[0])
        with pytest.raises(InvariantViolation, match=words):
            audit(system.scheduler)

    broken("page 0 ", lambda s, r: s.pool.ref([0]))
    broken("is about to write page", lambda s, r: s.pool.ref([r.page_table[r.cached_len // 4]]))
    broken(
        "waiting request 2 has 3 computed tokens",
        lambda s, r: setattr(s.scheduler.pool.waiting[0], "cached_len", 3),
    )
    broken("request 0 is decode and in", lambda s, r: s.decode.remove(r))
    broken("decodes with 2 tokens", lambda s, r: setattr(r, "cached_len", r.cached_len - 1))
    broken("request 0 is prefill and in", lambda s, r: setattr(r, "state", RequestState.PREFILL))
    broken("2 requests run, at most 1", lambda s, r: setattr(s.decode, "max_batch_size", 1))
    broken("request 0 holds pages|not live", lambda s, r: s.scheduler.pool.finish(r, "abort"))
