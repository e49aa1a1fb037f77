"""What users of other engines reported, as tests: the scheduler's part of it.

Each test is named after the bug and says where it was seen. Cancellation, wedges and preemption, the four prefix-cache bugs
of small engines, and bad requests that take the others with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nanoserve.errors import RequestRefused
from nanoserve.logits import Logits
from nanoserve.native import KVCachePool
from nanoserve.request import Request
from nanoserve.sampling import Sampler
from nanoserve.scheduling.prefill_manager import PrefillManager
from support.fakes import ModelFault, System, prompt

# ---- cancellation (sglang#36333, #36876, #34894; vllm#14326; llama.cpp#24496, #13262; ik_llama.cpp#1929)


def queued(system: System) -> None:
    system.decode.max_batch_size = 1


def mid_chunk(system: System) -> None:
    system.step()


def decoding(system: System) -> None:
    for _ in range(6):
        system.step()


def preempted(system: System) -> None:
    system.scheduler.residents.preempt(
        system.scheduler.pool.running["victim"], by=system.scheduler.pool.running["other"]
    )


STATES: dict[str, Callable[[System], None]] = {
    "waiting": queued,
    "prefill": mid_chunk,
    "decode": decoding,
    "preempted": lambda system: (decoding(system), preempted(system))[0],
}


@pytest.mark.parametrize("state", STATES)
def test_an_abort_in_any_state_frees_everything_within_a_step(state: str) -> None:
    """Pages, pin, seat and id are free at once; a second abort says False; the neighbour never notices."""
    system = System(page_size=4, chunk_size=4, num_pages=32)
    other = system.add("other", prompt(13, 1), max_tokens=9)
    victim = system.add("victim", prompt(13), max_tokens=9)
    if state == "waiting":
        system.decode.max_batch_size = 1
        system.step()
    STATES[state](system)
    assert victim.state.value == state
    assert system.batcher.abort("victim")
    assert not system.batcher.abort("victim")
    assert (victim.finish_reason, victim.kv_pages, victim.radix_node) == ("abort", [], None)
    assert "victim" not in system.scheduler.pool.live
    system.check()
    system.add("victim", prompt(3, 5))
    system.drain()
    assert other.output_tokens == system.expected(other)
    system.check_nothing_is_held()


@pytest.mark.parametrize("steps", [0, 2, 6])
def test_an_abort_while_the_batch_is_computed_is_not_missed(steps: int) -> None:
    """The batch-transition window: the token sampled for it is dropped, its pages are free when the step ends."""
    system = System(page_size=4, chunk_size=4)
    other = system.add("other", prompt(13, 1), max_tokens=9)
    victim = system.add("victim", prompt(13), max_tokens=9)
    for _ in range(steps):
        system.step()
    made = len(victim.output_tokens)
    system.executor.before = lambda: system.batcher.abort("victim") and None  # type: ignore[assignment, func-returns-value]
    output = system.step()
    system.executor.before = None
    assert "victim" in output.scheduled
    assert "victim" not in output.new_tokens
    assert (victim.is_finished, len(victim.output_tokens), victim.kv_pages) == (True, made, [])
    assert victim not in output.finished
    system.drain()
    assert other.output_tokens == system.expected(other)
    system.check_nothing_is_held()


def test_an_abort_of_somebody_unknown_hurts_nobody() -> None:
    """A queued client's disconnect must not end another client's request."""
    system = System()
    request = system.add(1, prompt(6))
    for unknown in (2, "1", -1):
        assert not system.batcher.abort(unknown)
    system.drain()
    assert request.finish_reason == "length"


def test_an_id_can_be_used_again_while_its_aborted_owner_is_still_in_flight() -> None:
    """The map from id to request never sends one request's token, or error, to another."""
    system = System()
    first = system.add("a", prompt(8), max_tokens=5)

    def replace() -> None:
        system.executor.before = None
        system.batcher.abort("a")
        system.add("a", prompt(8, 1), max_tokens=5)

    system.executor.before = replace
    system.step()
    second = system.scheduler.pool.live["a"]
    assert second is not first
    system.drain()
    assert first.output_tokens == []
    assert second.output_tokens == system.expected(second)


# ---- wedges, memory, preemption (vllm#39734, #45414, #11067; vllm-ascend#16315; Megatron-LM#6722)


def test_a_request_larger_than_the_pool_is_refused_at_the_door() -> None:
    """It would block the queue's head for ever; the message has the arithmetic, and the queue goes on."""
    system = System(num_pages=4, page_size=4)
    with pytest.raises(
        RequestRefused, match="14 prompt tokens and max_tokens=4 need 5 pages of 4 tokens, the pool has 4"
    ):
        system.add("large", prompt(14), max_tokens=4)
    exact = system.add("exact", prompt(13), max_tokens=4)  # 16 tokens are computed: the last is only sampled
    assert system.drain()[-1].finished == [exact]
    assert system.scheduler.events.of("large")[0].kind == "refused"


@pytest.mark.parametrize("whole", [False, True])
def test_many_requests_against_few_pages_all_end(whole: bool) -> None:
    """Sixteen requests against eight blocks: preempted again and again, none lost, none changed."""
    prefill = PrefillManager(KVCachePool(8, 4, 1, 1, 4), 32) if whole else None
    system = System(num_pages=8, page_size=4, max_batch_size=16, prefill_mgr=prefill)
    requests = [system.add(i, prompt(2 + i % 7, i), max_tokens=8 + i % 9) for i in range(16)]
    system.drain()
    assert system.batcher.get_stats()["preemptions"] > 5
    assert [r.output_tokens for r in requests] == [system.expected(r) for r in requests]
    system.check_nothing_is_held()


def test_the_oldest_running_request_is_never_preempted() -> None:
    """Progress: whoever is oldest when pages run out keeps its own and advances in that very step."""
    system = System(num_pages=9, page_size=2, max_batch_size=6, cache=False)
    for i in range(6):
        system.add(i, prompt(3, i), max_tokens=12)
    preempted = 0
    while system.batcher.has_unfinished:
        running = system.scheduler.pool.running.values()
        oldest = min(running, key=lambda r: r.arrival) if running else None
        before = (
            None if oldest is None else (oldest.num_preemptions, len(oldest.output_tokens), oldest.cached_len)
        )
        output = system.step()
        preempted += len(output.preempted)
        if oldest is not None and before is not None:
            assert oldest.num_preemptions == before[0]
            assert len(oldest.output_tokens) > before[1] or oldest.cached_len > before[2]
    assert preempted > 0


def test_two_requests_do_not_preempt_each_other_for_ever() -> None:
    """Thrash: each needs nearly the whole pool. The elder finishes first, and the younger recomputes at most twice."""
    system = System(num_pages=8, page_size=4, chunk_size=4, cache=False)
    old, young = (
        system.add("old", prompt(12), max_tokens=18),
        system.add("young", prompt(12, 1), max_tokens=18),
    )
    outputs = system.drain()
    assert len(outputs) < 60
    assert old.num_preemptions == 0
    assert 0 < young.num_preemptions <= 2
    ended = [r.req_id for output in outputs for r in output.finished]
    assert ended == ["old", "young"]


def test_the_elder_gets_the_last_page_and_the_younger_keeps_what_it_has() -> None:
    """Two need a page in the same step and one is left: no preemption, whatever their order in the batch."""
    system = System(num_pages=5, page_size=4, chunk_size=4, cache=False)
    old, young = system.add("old", prompt(12), max_tokens=8), system.add("young", prompt(2, 1), max_tokens=8)
    for _ in range(3):
        system.step()
    assert system.decode.requests == [young, old]
    assert (old.cached_len, young.cached_len, system.pool.num_free_pages) == (12, 4, 1)
    output = system.step()
    assert (output.scheduled, output.preempted) == ({"old": 1}, ())
    assert len(young.kv_pages) == 1
    system.drain()
    assert [r.output_tokens for r in (old, young)] == [system.expected(r) for r in (old, young)]


def test_preemption_and_admission_do_not_chase_each_other() -> None:
    """Nobody is let in during a step that took pages away from somebody, also if it would fit and comes first."""
    system = System(num_pages=6, page_size=4, max_batch_size=3, cache=False, policy="sjf")
    system.add("old", prompt(8), max_tokens=12)
    system.add("young", prompt(8, 1), max_tokens=12)
    system.step()
    system.step()
    system.add("tiny", prompt(1, 2), max_tokens=1)
    while not (output := system.step()).preempted:
        assert "tiny" not in output.scheduled
    assert (output.preempted, output.scheduled) == (("young",), {"old": 1})
    assert system.step().scheduled == {"old": 1, "tiny": 1}
    system.drain()


def test_long_prompts_that_do_not_fit_together_are_not_let_in_together() -> None:
    """What a running prompt has yet to get is spoken for: the second waits at the door instead of being preempted."""
    system = System(num_pages=12, page_size=4, chunk_size=4)
    requests = [system.add(i, prompt(32, i), max_tokens=4) for i in range(3)]
    system.drain()
    assert system.batcher.get_stats()["preemptions"] == 0
    assert [r.output_tokens for r in requests] == [system.expected(r) for r in requests]


def test_a_preempted_request_finds_its_own_pages_again() -> None:
    """What was validated stays cached while nobody needs the room: coming back costs less than a page."""
    system = System(page_size=4)
    request = system.add("a", prompt(6), max_tokens=20)
    for _ in range(10):
        system.step()
    assert request.cached_len == 15
    system.scheduler.residents.preempt(request, by=request)
    assert (request.cached_len, request.kv_pages) == (0, [])
    assert system.step().scheduled == {"a": 4}
    assert request.prefix_hit_len == 12
    system.drain()
    assert request.output_tokens == system.expected(request)


def test_a_blocked_head_is_let_in_when_an_abort_makes_room() -> None:
    """Its place is not forgotten until the next arrival: the very next step."""
    system = System(num_pages=8, page_size=4, max_batch_size=3, cache=False)
    system.add("stays", prompt(6), max_tokens=9)
    system.add("leaves", prompt(12, 1), max_tokens=9)
    system.step()
    system.add("waits", prompt(12, 2), max_tokens=4)
    for _ in range(2):
        assert "waits" not in system.step().scheduled
    system.batcher.abort("leaves")
    assert "waits" in system.step().scheduled
    system.drain()


def test_a_blocked_head_is_let_in_when_its_prefix_gets_cached() -> None:
    """It did not fit beside another request of the same prompt; once that one's prompt is shared, it does."""
    system = System(num_pages=8, page_size=4, max_batch_size=2, chunk_size=8)
    same = prompt(16)
    system.add("first", same, max_tokens=6)
    system.add("second", [*same, 1], max_tokens=6)
    assert [system.step().scheduled for _ in range(3)] == [
        {"first": 8},
        {"first": 8},
        {"first": 1, "second": 1},
    ]
    system.drain()


def test_pinned_pages_that_nobody_holds_do_not_wedge_the_pool() -> None:
    """Two compute the same prefix; the first caches it. The second pins the first's pages while holding its own copies,
    then needs the whole pool: it starts over, finds the cached pages and ends."""
    system = System(num_pages=6, page_size=4, chunk_size=16)
    same = prompt(8)
    first, second = system.add("first", same, max_tokens=2), system.add("second", same, max_tokens=16)
    system.step()
    assert set(first.kv_pages).isdisjoint(second.kv_pages)
    system.drain(limit=40)
    assert second.num_preemptions == 1
    assert second.output_tokens == system.expected(second)
    assert system.scheduler.events.of("second")[-1].kind == "pages_freed"


def test_a_running_request_is_not_starved_by_new_arrivals() -> None:
    """A full queue of newcomers: the running request gets its token in every step, and a long prompt its chunk."""
    system = System(chunk_size=4, max_batch_size=4, max_num_batched_tokens=8, num_pages=100)
    chat = system.add("chat", prompt(3), max_tokens=30)
    document = system.add("document", prompt(60, 1), max_tokens=2)
    for step in range(29):
        system.add(step, prompt(5, step), max_tokens=1)
        output = system.step()
        assert output.scheduled["chat"] >= 1
    assert chat.output_tokens
    assert document.output_tokens
    system.drain()


def test_nobody_overtakes_the_head_for_pages() -> None:
    """A large prompt waits for memory at the head; small ones behind it would fit and must not take it away."""
    system = System(num_pages=8, page_size=4, max_batch_size=4)
    running = system.add("running", prompt(12), max_tokens=8)
    system.step()
    system.add("large", prompt(24, 1), max_tokens=2)
    system.add("small", prompt(2, 2), max_tokens=2)
    while not running.is_finished:
        assert "small" not in system.step().scheduled
    outputs = system.drain()
    started = [req_id for output in outputs for req_id in output.scheduled]
    assert started.index("large") < started.index("small")


# ---- prefix cache and scheduling (nano-vllm#114, #207, #208; mini-sglang#142)


@pytest.mark.parametrize("length", [4, 8, 16])
def test_a_fully_cached_prompt_of_whole_pages_still_computes_a_token(length: int) -> None:
    """Zero tokens to prefill: the last one is computed again, in a page of its own, and the shared one is not written."""
    system = System(page_size=4)
    first = system.add("first", prompt(length), max_tokens=5)
    system.drain()
    second = system.add("second", prompt(length), max_tokens=5)
    third = system.add("third", prompt(length), max_tokens=5)
    output = system.step()
    assert output.scheduled == {"second": 1, "third": 1}
    system.drain()
    assert first.output_tokens == second.output_tokens == third.output_tokens
    assert second.prefix_hit_len == length - 1


def test_counts_are_taken_after_the_prefix_was_acquired() -> None:
    """num_scheduled_tokens from before the hit would run past the prompt, under preemption most of all."""
    system = System(num_pages=9, page_size=2, chunk_size=5, max_batch_size=4)
    shared = prompt(6)
    requests = [system.add(i, shared + prompt(i % 3, i), max_tokens=7) for i in range(12)]
    for output in system.drain():
        for req_id, count in output.scheduled.items():
            assert 1 <= count <= 5, (req_id, count)
    assert system.batcher.get_stats()["preemptions"] > 0
    assert system.radix.cache_hits > 0
    assert [r.output_tokens for r in requests] == [system.expected(r) for r in requests]


def test_a_request_of_the_same_batch_does_not_hit_pages_that_are_not_computed() -> None:
    """Four equal prompts, too short to wait for each other: no hit, nothing is in the pages yet. In the next step there is."""
    system = System(page_size=4, chunk_size=16)
    for i in range(4):
        system.add(i, prompt(7), max_tokens=3)
    assert system.step().scheduled == {0: 7, 1: 7, 2: 7, 3: 7}
    system.add("late", prompt(7), max_tokens=3)
    assert system.step().scheduled["late"] == 3
    system.drain()


def test_a_prompt_in_progress_is_not_shared() -> None:
    """Chunks that led to no logits yet are not in the tree, however many of their pages are full."""
    system = System(page_size=4, chunk_size=8)
    system.add("a", prompt(30), max_tokens=2)
    system.step()
    system.step()
    assert system.radix.tree_pages() == []
    system.add("b", prompt(7) + prompt(20, 1), max_tokens=2)  # shares too little to be held back
    assert system.step().scheduled == {"a": 8, "b": 8}
    system.drain()


def test_a_prefix_computed_twice_stays_with_both() -> None:
    """The second to cache it keeps the pages its table points at; they are freed with it, not under it."""
    system = System(page_size=4, num_pages=16)
    requests = [system.add(i, prompt(7), max_tokens=10) for i in range(2)]  # too short to be held back
    for _ in range(3):
        system.step()
    assert set(requests[0].kv_pages).isdisjoint(requests[1].kv_pages)
    system.add("presses", prompt(20, 3), max_tokens=2)
    system.drain()
    assert [r.output_tokens for r in requests] == [system.expected(r) for r in requests]


# ---- one bad request (vllm#43920, #44793, #45346; sglang#33187, #33206; vllm#53029)


def crowd(system: System, bad: str) -> tuple[list[Request], Request]:
    """Three decoding, one bad request, one prompt in chunks beside it."""
    good = [system.add(i, prompt(6 + i, i), max_tokens=12) for i in range(3)]
    system.step()
    culprit = system.add(bad, prompt(10, 7), max_tokens=12)
    good.append(system.add("long", prompt(40, 8), max_tokens=4))
    return good, culprit


def ends_alone(system: System, good: list[Request], culprit: Request, words: str) -> None:
    system.drain()
    assert culprit.finish_reason == "error"
    assert words in str(culprit.error)
    assert [r.output_tokens for r in good] == [system.expected(r) for r in good]
    assert {r.finish_reason for r in good} == {"length"}
    system.check_nothing_is_held()


def test_a_request_that_breaks_the_forward_ends_alone() -> None:
    """The batch is computed again piece by piece: who raises alone gets the error, the others their tokens."""
    system = System(chunk_size=8)
    good, culprit = crowd(system, "bad")
    system.executor.raises.add("bad")
    ends_alone(system, good, culprit, "ModelFault: request 'bad' breaks the model")
    assert issubclass(ModelFault, Exception)


def test_a_batch_too_large_for_memory_is_computed_piece_by_piece() -> None:
    """A MemoryError of the whole batch ends nobody, if each piece alone can be computed."""
    system = System(chunk_size=8)
    good, other = crowd(system, "other")
    system.executor.transient = 3
    system.drain()
    assert system.executor.transient == 0
    for request in (*good, other):
        assert request.output_tokens == system.expected(request)


def test_a_request_that_breaks_the_sampler_ends_alone() -> None:
    """As for the forward: sampled again row by row."""

    class Fragile(Sampler):
        def sample(self, logits: Any, requests: Any, eos_token_ids: Any) -> list[int]:
            if any(r.req_id == "bad" for r in requests):
                raise ZeroDivisionError("bad row")
            return super().sample(logits, requests, eos_token_ids)

    system = System(chunk_size=8, sampler=Fragile())
    good, culprit = crowd(system, "bad")
    ends_alone(system, good, culprit, "ZeroDivisionError: bad row")


def test_a_request_that_cannot_be_cached_or_admitted_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of the prefix cache are the request's whose call it was."""
    for name in ("acquire", "commit"):
        system = System(chunk_size=8)
        original = getattr(system.radix, name)

        def breaks(request: Request, *rest: Any, original: Any = original, **options: Any) -> None:
            if request.req_id == "bad":
                raise MemoryError("no room")
            original(request, *rest, **options)

        monkeypatch.setattr(system.radix, name, breaks)
        good, culprit = crowd(system, "bad")
        ends_alone(system, good, culprit, "MemoryError: no room")


def test_a_failed_admission_is_reported_even_if_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only request fails before its first step: the step has no batch but names who ended."""
    system = System()
    request = system.add("bad", prompt(4))
    monkeypatch.setattr(system.radix, "acquire", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    output = system.step()
    assert (output.batch, output.finished) == (None, [request])
    assert "admission failed" in str(request.error)


@pytest.mark.parametrize("cache", [True, False])
def test_a_request_whose_logits_are_not_finite_ends_alone_and_leaves_no_nan(cache: bool) -> None:
    """No random text with status 200: an error, nothing cached, and its pages are zeros before anybody gets them."""
    system = System(chunk_size=8, num_pages=24, cache=cache)
    good, culprit = crowd(system, "bad")
    system.executor.poisoned.add("bad")
    ends_alone(system, good, culprit, "not finite")
    assert culprit.output_tokens == []
    assert all(np.isfinite(cache).all() for cache in system.pool.get_layer_cache(0))
    assert system.radix.peek(culprit.prompt_tokens) == 0


@pytest.mark.parametrize("how", ["abort", "abort in flight", "preempt", "interrupt, then abort"])
def test_unseen_nan_does_not_outlive_its_request(how: str) -> None:
    """Chunks that led to no logits may hold NaN nobody has seen: whatever way the request loses its pages, they are
    zeroed first."""
    system = System(chunk_size=4, num_pages=24)
    system.executor.poisoned.add("bad")
    system.add("old", prompt(4, 1), max_tokens=12)
    bad = system.add("bad", prompt(30), max_tokens=4)
    system.step()
    system.step()
    assert not all(np.isfinite(cache).all() for cache in system.pool.get_layer_cache(0))
    if how == "abort":
        system.batcher.abort("bad")
    elif how == "abort in flight":
        system.executor.before = lambda: system.batcher.abort("bad") and None  # type: ignore[assignment, func-returns-value]
        system.step()
        system.executor.before = None
    elif how == "preempt":
        system.scheduler.residents.preempt(bad, by=system.scheduler.pool.running["old"])
    else:
        system.executor.after = interrupt
        with pytest.raises(KeyboardInterrupt):
            system.batcher.step()
        system.executor.after = None
        system.batcher.abort("bad")
    assert all(np.isfinite(cache).all() for cache in system.pool.get_layer_cache(0))
    system.check()
    system.drain()


def interrupt() -> None:
    raise KeyboardInterrupt


def test_nan_written_by_an_interrupted_decode_step_is_not_left_behind() -> None:
    """The step was thrown away, so its rows count as never computed; what they wrote is still zeroed at the end."""
    system = System(page_size=4)
    request = system.add("a", prompt(4), max_tokens=8)
    system.step()
    system.executor.poisoned.add("a")
    system.executor.after = interrupt
    with pytest.raises(KeyboardInterrupt):
        system.batcher.step()
    system.executor.after = None
    assert request.cached_len == request.validated_len == 4
    system.batcher.abort("a")
    assert all(np.isfinite(cache).all() for cache in system.pool.get_layer_cache(0))


def test_an_interrupt_loses_no_request() -> None:
    """Ctrl-C in the middle of a forward: the step did not happen, and the next one repeats it."""
    system = System(chunk_size=8)
    requests = [system.add(i, prompt(5 + 3 * i, i), max_tokens=6) for i in range(4)]
    for _ in range(5):
        system.executor.after = interrupt
        with pytest.raises(KeyboardInterrupt):
            system.batcher.step()
        system.executor.after = None
        system.check()
        system.step()
    system.drain()
    assert [r.output_tokens for r in requests] == [system.expected(r) for r in requests]


def test_an_interrupted_run_leaves_nothing_queued() -> None:
    """run_until_complete takes back what it queued, and only that; a refused request takes its companions back too."""
    system = System()
    other = system.add("other", prompt(5), max_tokens=6)
    mine = [Request(i, prompt(6, i), max_tokens=5, temperature=0.0) for i in range(3)]
    system.executor.after = interrupt
    with pytest.raises(KeyboardInterrupt):
        system.batcher.run_until_complete(mine)
    system.executor.after = None
    assert [r.finish_reason for r in mine] == ["abort"] * 3
    with pytest.raises(RequestRefused, match="'other' is in use"):
        system.batcher.run_until_complete([Request("new", [1], max_tokens=1), Request("other", [1])])
    assert set(system.scheduler.pool.live) == {"other"}
    system.drain()
    assert other.output_tokens == system.expected(other)


def test_a_sampler_that_returns_too_few_tokens_ends_only_who_it_was_asked_for() -> None:
    """The wrong number of tokens says nothing about whose is missing: asked again row by row, it does."""

    class Forgetful(Sampler):
        def sample(self, logits: Any, requests: Any, eos_token_ids: Any) -> list[int]:
            tokens = super().sample(logits, requests, eos_token_ids)
            return [token for token, r in zip(tokens, requests, strict=True) if r.req_id != "bad"]

    system = System(chunk_size=8, sampler=Forgetful())
    good, culprit = crowd(system, "bad")
    ends_alone(system, good, culprit, "ValueError: not enough values")


def test_an_executor_with_a_stale_block_max_is_an_error() -> None:
    """Maxima of another batch would fail, or spare, the wrong request."""
    system = System()
    request = system.add("a", prompt(5))
    forward = system.executor.forward

    def stale(batch: Any) -> Any:
        logits = forward(batch)
        return Logits(logits.values, np.ones((7, 1), np.float32))

    system.executor.forward = stale  # type: ignore[method-assign]
    system.drain()
    assert "block_max of shape (7, 1) for logits of shape (1, 32)" in str(request.error)


@pytest.mark.parametrize("shape", [(0, 32), (2, 32), (32,)])
def test_an_executor_that_returns_the_wrong_rows_is_an_error_not_a_mixup(shape: tuple[int, ...]) -> None:
    """Tokens are given out by row: a missing or extra row would give one request another's token."""
    system = System()
    request = system.add("a", prompt(5))
    system.executor.forward = lambda batch: Logits.of(np.zeros(shape, np.float32))  # type: ignore[method-assign]
    system.drain()
    assert request.finish_reason == "error"
    assert str(shape) in str(request.error)
