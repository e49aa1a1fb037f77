"""Sequences that outgrow their rotary angles, and prompts that want rows of logits: nobody is held up and nothing mixes."""

from __future__ import annotations

import pytest

from support.fakes import System, prompt


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("length", [3, 19, 20, 21, 40])
def test_a_sequence_crosses_the_switch_once(length: int, cache: bool, device: bool) -> None:
    """It starts over exactly where it outgrows its angles; the step that did it says so; the answer is the lone one's."""
    system = System(switch_len=20, chunk_size=4, cache=cache, device=device)
    request = system.add("a", prompt(length), 30)
    other = system.add("b", prompt(7, 1), 10)
    outputs = system.drain()
    assert request.output_tokens == system.expected(request)
    assert other.output_tokens == system.expected(other)
    told = [req_id for output in outputs for req_id in output.preempted]
    assert told == (["a"] if length <= 20 else [])
    assert request.num_preemptions == len(told)
    system.check_nothing_is_held()


def test_both_sides_of_the_switch_are_cached_apart() -> None:
    """A long prompt finds long keys and a short one short keys, though their first tokens are the same."""
    system = System(switch_len=20, chunk_size=4, num_pages=200)
    for length, hit in ((40, 0), (16, 0), (40, 36), (16, 12), (36, 32), (12, 8)):
        request = system.add(f"{length}-{hit}", prompt(40)[:length], 2)
        system.drain()
        assert request.output_tokens == system.expected(request)
        # What is found are whole pages of 4; the last token is always computed.
        assert request.cached_prompt_tokens // 4 == hit // 4, (length, hit)


def test_prompts_that_want_logits_do_not_shut_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two long prompts share the rows of logits of a step; a small request behind them is served meanwhile."""
    from nanoserve.scheduling import scoring

    monkeypatch.setattr(scoring, "MAX_PROMPT_LOGPROB_ROWS", 8)
    system = System(num_pages=400, chunk_size=8, max_batch_size=8)
    slow = [system.add(name, prompt(160, i), 2, prompt_logprobs=0) for i, name in enumerate("abc")]
    quick = system.add("quick", prompt(4, 9), 2)
    steps = 0
    while not quick.is_finished:
        system.step()
        steps += 1
    assert steps <= 4
    monkeypatch.setattr(scoring, "MAX_PROMPT_LOGPROB_ROWS", 64)
    slow += [system.add(name, prompt(160, i), 2, prompt_logprobs=0) for i, name in enumerate("def", start=3)]
    system.step()  # several are in the middle of their prompts
    monkeypatch.setattr(scoring, "MAX_PROMPT_LOGPROB_ROWS", 8)
    quick = system.add("late", prompt(4, 10), 2)
    for _ in range(4):
        system.step()
    assert quick.is_finished
    system.drain()
    for request in slow:
        assert request.output_tokens == system.expected(request)
        assert len(request.prompt_logprobs or []) == 160
