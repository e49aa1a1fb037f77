"""The engine and a constraint: who is asked what and when, how requests end, and that nobody else notices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanoserve.errors import RequestRefused
from nanoserve.logprobs import token_logprob
from nanoserve.request import Request
from nanoserve.sampling import SamplingParams
from nanoserve.structured import StructuredOutputs
from support.constraints import AllowList
from support.fakes import VOCAB, System, logits_after, prefix_hashes, prompt

ODD = set(range(1, VOCAB, 2))


def logits_of(tokens: list[int]) -> np.ndarray:
    return logits_after(prefix_hashes(tokens)[-1])


def greedy_rollout(prompt_tokens: list[int], steps: list[set[int] | None]) -> list[int]:
    """The largest allowed logit each time."""
    tokens = list(prompt_tokens)
    for allowed in steps:
        logits = logits_of(tokens)
        tokens.append(max(allowed or range(VOCAB), key=lambda token: (logits[token], -token)))
    return tokens[len(prompt_tokens) :]


def test_tokens_are_the_best_allowed_ones_and_the_end_is_a_stop() -> None:
    system, steps = System(), [ODD, {4, 6}, None, {9}]
    constraint = AllowList(steps, VOCAB)
    request = system.add("a", prompt(5), 99, constraint=constraint)
    mate = system.add("b", prompt(6, 1), 12)
    system.drain()
    assert request.output_tokens == greedy_rollout(prompt(5), steps) == constraint.accepted
    assert (request.finish_reason, request.stop_reason) == ("stop", None)
    assert mate.output_tokens == system.expected(mate)
    system.check_nothing_is_held()


def test_a_complete_text_ends_before_max_tokens_and_min_tokens_count() -> None:
    """The last token that max_tokens allows may complete it; and what can only be over is over, min_tokens or not."""
    system = System()
    exact = system.add("exact", prompt(5), 3, constraint=AllowList([ODD] * 3, VOCAB))
    short = system.add("short", prompt(5), 2, constraint=AllowList([ODD] * 3, VOCAB))
    early = system.add("early", prompt(5), 9, min_tokens=8, constraint=AllowList([ODD] * 3, VOCAB))
    system.drain()
    assert [r.finish_reason for r in (exact, short, early)] == ["stop", "length", "stop"]
    assert [len(r.output_tokens) for r in (exact, short, early)] == [3, 2, 3]


def test_eos_ends_it_only_where_it_may_end_and_is_not_told() -> None:
    """EOS is the model's favourite everywhere: it comes as soon as it is allowed, after min_tokens."""
    for min_tokens, may_end, expected in ((0, True, 0), (2, True, 2), (0, False, 4)):
        system = System(eos=[30])
        constraint = AllowList([ODD] * 4, VOCAB, may_end=may_end)
        bias = {30: 100.0}
        request = system.add(
            "a", prompt(5), 9, constraint=constraint, ignore_eos=False, min_tokens=min_tokens, logit_bias=bias
        )
        system.drain()
        assert request.finish_reason == "stop"
        assert len(constraint.accepted) == expected
        assert request.output_tokens == [*constraint.accepted, *([30] if may_end else [])]


def test_ignored_eos_never_comes_and_stop_ids_end_it() -> None:
    system = System(eos=[30])
    bias = {30: 100.0, 28: 50.0}
    ignoring = AllowList([ODD] * 4, VOCAB, may_end=True)
    first = system.add("a", prompt(5), 9, constraint=ignoring, logit_bias=bias)
    stopping = AllowList([ODD] * 4, VOCAB, may_end=True)
    second = system.add(
        "b", prompt(5), 9, constraint=stopping, logit_bias=bias, stop_token_ids=[28], min_tokens=1
    )
    system.drain()
    assert len(first.output_tokens) == 4
    assert first.finish_reason == "stop"
    assert (second.finish_reason, second.stop_reason, second.output_tokens[1:]) == ("stop", 28, [28])
    assert len(stopping.accepted) == 1


def test_a_watcher_ends_it_with_its_own_reason() -> None:
    system = System()
    request = system.add(
        "a", prompt(5), 9, constraint=AllowList([ODD] * 2, VOCAB), watcher=lambda token: "enough"
    )
    late = system.add(
        "b",
        prompt(5),
        9,
        min_tokens=5,
        constraint=AllowList([ODD] * 2, VOCAB),
        watcher=lambda token: "enough",
    )
    system.drain()
    assert (request.finish_reason, request.stop_reason, len(request.output_tokens)) == ("stop", "enough", 1)
    assert (late.finish_reason, late.stop_reason, len(late.output_tokens)) == ("stop", None, 2)


@pytest.mark.parametrize(
    ("question", "step"),
    [("allowed", 0), ("allowed", 2), ("accept", 0), ("accept", 2), ("must_end", 1), ("must_end", 2)],
)
def test_a_constraint_that_raises_fails_its_own_request(question: str, step: int) -> None:
    system = System(eos=[30])
    bad = system.add("bad", prompt(5), 9, constraint=AllowList([ODD] * 5, VOCAB, raises=(question, step)))
    good = system.add("good", prompt(5, 1), 9, constraint=AllowList([ODD] * 5, VOCAB))
    mate = system.add("mate", prompt(6, 1), 12)
    system.drain()
    assert bad.finish_reason == "error"
    assert f"no {question}" in str(bad.error)
    assert len(bad.output_tokens) == (step if question != "must_end" else step - 1)
    assert good.output_tokens == greedy_rollout(prompt(5, 1), [ODD] * 5)
    assert mate.output_tokens == system.expected(mate)
    system.check_nothing_is_held()


def test_where_no_token_is_left_the_request_fails_by_name() -> None:
    system = System(eos=[30])
    nothing = system.add("a", prompt(5), 9, constraint=AllowList([ODD, set()], VOCAB))
    banned = system.add("b", prompt(5), 9, constraint=AllowList([{3}], VOCAB), bad_word_ids=[[3]])
    mate = system.add("mate", prompt(6, 1), 12)
    system.drain()
    for request in (nothing, banned):
        assert request.finish_reason == "error"
        assert "structured_outputs" in str(request.error)
    assert mate.output_tokens == system.expected(mate)


def test_preemption_tells_nothing_twice() -> None:
    system = System(num_pages=8, page_size=4, max_batch_size=4, cache=False)
    constraints = [AllowList([ODD] * 14, VOCAB) for _ in range(4)]
    requests = [system.add(i, prompt(6, i), 20, constraint=constraints[i]) for i in range(4)]
    system.drain()
    assert sum(request.num_preemptions for request in requests) > 0
    for i, (request, constraint) in enumerate(zip(requests, constraints, strict=True)):
        assert request.output_tokens == constraint.accepted == greedy_rollout(prompt(6, i), [ODD] * 14)
        assert request.finish_reason == "stop"


def test_a_failed_forward_tells_nothing_twice() -> None:
    system = System()
    constraints = [AllowList([ODD] * 6, VOCAB) for _ in range(3)]
    requests = [system.add(i, prompt(6, i), 20, constraint=constraints[i]) for i in range(3)]
    system.step()
    system.executor.transient = 2
    system.drain()
    for i, (request, constraint) in enumerate(zip(requests, constraints, strict=True)):
        assert request.output_tokens == constraint.accepted == greedy_rollout(prompt(6, i), [ODD] * 6)


def test_an_aborted_request_is_told_nothing_more() -> None:
    system = System()
    constraint = AllowList([ODD] * 9, VOCAB)
    request = system.add("a", prompt(5), 20, constraint=constraint)
    system.step()
    system.step()
    system.executor.before = lambda: system.batcher.abort("a")
    system.step()
    assert request.finish_reason == "abort"
    assert constraint.accepted == request.output_tokens
    assert len(request.output_tokens) == 2
    system.check_nothing_is_held()


def test_log_probabilities_stay_the_models_own() -> None:
    """Of a forbidden favourite, too: it leads the list, and the allowed token has the rank that the model gave it."""
    system, steps = System(), [{3}, {8}, {1}]
    request = system.add("a", prompt(5), 9, constraint=AllowList(steps, VOCAB), logprobs=2)
    system.drain()
    tokens = prompt(5)
    for entry, (token,) in zip(request.logprobs, steps, strict=True):
        assert entry == token_logprob(logits_of(tokens), token, 2)
        tokens.append(token)


def test_structured_outputs_without_a_constraint_are_refused() -> None:
    system = System()
    request = Request("a", [1], params=SamplingParams(structured_outputs=StructuredOutputs(json_object=True)))
    with pytest.raises(RequestRefused, match="structured_outputs: needs a tokenizer"):
        system.batcher.add_request(request)


@pytest.mark.parametrize("value", [{"json": {}}, "json", True])
def test_another_type_of_structured_outputs_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"structured_outputs: .* must be StructuredOutputs"):
        SamplingParams(structured_outputs=value)
