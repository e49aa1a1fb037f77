"""The watcher: how text ends a request without the engine knowing text. And `stop_reason`, for every way to end."""

from __future__ import annotations

from typing import Any

import pytest

from nanoserve.errors import RequestRefused
from nanoserve.request import Request
from nanoserve.sampling import SamplingParams
from support.fakes import PairWatcher, System, prompt, rollout


class Recorder:
    """Ends its request at the n-th token; `seen` is what it was told."""

    def __init__(self, at: int = 0, verdict: str = "enough") -> None:
        self.seen: list[int] = []
        self.at, self.verdict = at, verdict

    def __call__(self, token: int) -> str | None:
        self.seen.append(token)
        return self.verdict if len(self.seen) == self.at else None


def test_every_committed_token_is_told_once_and_in_order() -> None:
    """The token that ends the request included."""
    system, watchers = System(), [Recorder() for _ in range(5)]
    requests = [system.add(i, prompt(3 + i, i), 7, watcher=watchers[i]) for i in range(5)]
    system.drain()
    for request, watcher in zip(requests, watchers, strict=True):
        assert watcher.seen == request.output_tokens
        assert (request.finish_reason, request.stop_reason, len(watcher.seen)) == ("length", None, 7)


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_string_ends_the_request(at: int) -> None:
    """At the first token (still in prefill), in the middle, and at the one that max_tokens would have ended anyway."""
    system, plain = System(), System()
    request = system.add("a", prompt(5), 7, watcher=Recorder(at, "STOP"))
    other = system.add("b", prompt(5, 1), 7)
    free = plain.add("a", prompt(5), 7)
    outputs = system.drain()
    plain.drain()
    assert (request.finish_reason, request.stop_reason) == ("stop", "STOP")
    assert request.output_tokens == free.output_tokens[:at]
    assert other.finish_reason == "length"
    assert [r.req_id for output in outputs for r in output.finished].count("a") == 1
    assert sum("a" in output.new_tokens for output in outputs) == at
    system.check_nothing_is_held()


def test_recomputed_tokens_are_not_told_again() -> None:
    """A preempted request starts over with its outputs as known tokens: a stop string must not be found twice."""
    system = System(num_pages=8, page_size=4, max_batch_size=4, cache=False)
    watchers = [Recorder() for _ in range(4)]
    requests = [system.add(i, prompt(6, i), 14, watcher=watchers[i]) for i in range(4)]
    system.drain()
    assert sum(request.num_preemptions for request in requests) > 0
    assert [watcher.seen for watcher in watchers] == [request.output_tokens for request in requests]


def test_a_discarded_step_tells_nothing() -> None:
    """Interrupted after the forward pass: the token is sampled again, and told when it is committed."""
    system, watcher = System(), Recorder()
    request = system.add("a", prompt(5), 6, watcher=watcher)

    def interrupt() -> None:
        raise KeyboardInterrupt

    for step in range(8):
        system.executor.after = interrupt if step % 2 else None
        if step % 2:
            with pytest.raises(KeyboardInterrupt):
                system.step()
        else:
            system.step()
        assert watcher.seen == request.output_tokens
    system.executor.after = None
    system.drain()
    assert watcher.seen == request.output_tokens
    assert len(watcher.seen) == 6


def test_a_watcher_that_raises_fails_its_own_request() -> None:
    """Its neighbours keep their tokens, and its pages come back clean."""
    system, alone = System(), System()

    def broken(token: int) -> str | None:
        raise LookupError(f"no text for {token}")

    request = system.add("a", prompt(5), 7, watcher=broken)
    other = system.add("b", prompt(6, 1), 7)
    expected = alone.add("b", prompt(6, 1), 7)
    system.drain()
    alone.drain()
    assert (request.finish_reason, request.stop_reason, request.output_tokens) == ("error", None, [])
    assert request.error is not None
    assert request.error.startswith("its watcher failed: LookupError: no text for ")
    assert (other.finish_reason, other.output_tokens) == ("length", expected.output_tokens)
    system.check_nothing_is_held()


def test_an_interrupt_inside_a_watcher_leaves_a_working_engine() -> None:
    """Whoever was not committed yet is computed again; nobody's tokens change."""
    system = System()
    pending = [True]

    def impatient(token: int) -> str | None:
        if pending:
            pending.clear()
            raise KeyboardInterrupt
        return None

    requests = [system.add(i, prompt(5 + i, i), 5, watcher=impatient if i == 1 else None) for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        system.step()
    system.check()
    assert [len(request.output_tokens) for request in requests] == [1, 0, 0]
    system.drain()
    alone = [Request(r.req_id, r.prompt_tokens, params=r.params) for r in requests]
    assert [request.output_tokens for request in requests] == [rollout(request) for request in alone]
    system.check_nothing_is_held()


def test_an_interrupt_inside_a_watcher_leaves_no_unproven_page_behind() -> None:
    """The neighbour's NaNs were computed and never judged: aborted before the next step, its pages are zeroed all the same."""
    system = System()

    def interrupted(token: int) -> str | None:
        raise KeyboardInterrupt

    system.executor.poisoned.add("b")
    system.add("a", prompt(5), 5, watcher=interrupted)
    system.add("b", prompt(9, 1), 5)
    with pytest.raises(KeyboardInterrupt):
        system.step()
    system.batcher.abort("b")
    system.batcher.abort("a")
    system.check()
    system.check_nothing_is_held()


def test_a_watcher_may_abort_its_own_request_and_others() -> None:
    """Not its job, but what a callback can reach it will call: nothing is freed twice, nobody is resurrected."""
    system = System()

    def aborting(token: int) -> str | None:
        system.batcher.abort("a")
        system.batcher.abort("b")
        return "too late"

    first, second = system.add("a", prompt(5), 9, watcher=aborting), system.add("b", prompt(6, 1), 9)
    third = system.add("c", prompt(7, 2), 9)
    system.drain()
    assert [r.finish_reason for r in (first, second, third)] == ["abort", "abort", "length"]
    assert first.stop_reason is None
    system.check_nothing_is_held()


def test_a_verdict_before_min_tokens_is_ignored_but_the_token_is_told() -> None:
    """The watcher must see all tokens to know the text; min_tokens only decides when it is heeded."""
    for at, expected in ((2, "length"), (3, "length"), (4, "stop")):
        system, watcher = System(), Recorder(at)
        request = system.add("a", prompt(5), 6, min_tokens=3, watcher=watcher)
        system.drain()
        assert (request.finish_reason, len(request.output_tokens)) == (
            expected,
            6 if expected == "length" else 4,
        )
        assert watcher.seen == request.output_tokens


def test_stop_reason_tells_what_ended_the_request() -> None:
    """vLLM's: None for EOS, the id for a stop id, None for length and abort."""
    plain = System()
    free = plain.add("a", prompt(5), 8)
    plain.drain()
    token = free.output_tokens[3]

    def ended(eos: tuple[int, ...] = (), **fields: Any) -> Request:
        system = System(eos=eos)
        request = system.add("a", prompt(5), 8, **fields)
        system.drain()
        return request

    for request, expected in (
        (ended(stop_token_ids=[token]), ("stop", token)),
        (ended((token,), ignore_eos=False), ("stop", None)),
        (ended((token,), ignore_eos=False, stop_token_ids=[token]), ("stop", None)),
        (ended((token,), ignore_eos=True, stop_token_ids=[token]), ("stop", token)),
        (ended(), ("length", None)),
    ):
        assert (request.finish_reason, request.stop_reason) == expected
    both = ended(stop_token_ids=[token], watcher=Recorder(free.output_tokens.index(token) + 1))
    assert both.stop_reason == token


def test_text_without_a_tokenizer_is_refused_at_the_door() -> None:
    """The engine has no tokenizer: it must not accept a stop string that it would never find."""
    system = System()
    for fields, message in (
        ({"stop": ["x"]}, "stop: strings need a tokenizer, use LLM"),
        ({"bad_words": ["x"]}, "bad_words: strings need a tokenizer, use LLM"),
        ({"n": 2}, "n: 2 must be 1: LLM fans out n"),
        ({"logit_bias": {31: 1.0, 32: 1.0}}, r"logit_bias: 32 must be in \[0, 32\)"),
        ({"stop_token_ids": [0, 99]}, r"stop_token_ids\[1\]: 99 must be in \[0, 32\)"),
        ({"bad_word_ids": [(1,), (3, 32)]}, r"bad_word_ids\[1\]\[1\]: 32 must be in \[0, 32\)"),
    ):
        with pytest.raises(RequestRefused, match=f"^request 'a': {message}"):
            system.add("a", prompt(4), **fields)
    assert system.scheduler.stats.refused == 6
    accepted = system.add(
        "a", prompt(4), stop=["x"], bad_words=["y"], bad_word_ids=[(1, 2)], watcher=PairWatcher()
    )
    system.drain()
    assert accepted.is_finished


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"watcher": "stop"}, "watcher: 'stop' must be callable"),
        ({"bad_word_ids": "ab"}, "bad_word_ids: 'ab' must be a sequence of token sequences"),
        (
            {"bad_word_ids": [()]},
            r"bad_word_ids\[0\]: \(\) must be a sequence of token ids that is not empty",
        ),
        ({"bad_word_ids": [5]}, r"bad_word_ids\[0\]: 5 must be"),
        ({"bad_word_ids": [(1, -1)]}, r"bad_word_ids\[0\]\[1\]: -1 must be in"),
        ({"bad_word_ids": [(1,)] * 1025}, "bad_word_ids: 1025 token sequences, at most 1024"),
        ({"bad_word_ids": [(1,) * 1025]}, r"bad_word_ids\[0\]: 1025 tokens, at most 1024"),
    ],
)
def test_what_the_text_layer_gives_is_checked_too(fields: dict[str, Any], message: str) -> None:
    """At construction and by name, as everything else of a request."""
    with pytest.raises(ValueError, match=f"^{message}"):
        Request(1, [1], params=SamplingParams(), **fields)


def test_nothing_left_to_sample_fails_one_request() -> None:
    """Bad words that forbid the vocabulary: an error with the cause for that request, tokens for the others."""
    system, alone = System(), System()
    impossible = system.add("a", prompt(5), 5, bad_word_ids=[(token,) for token in range(32)])
    other = system.add("b", prompt(6, 1), 5, temperature=1.0, seed=3)
    expected = alone.add("b", prompt(6, 1), 5, temperature=1.0, seed=3)
    system.drain()
    alone.drain()
    assert impossible.finish_reason == "error"
    assert "leave no token of the vocabulary to choose" in str(impossible.error)
    assert (other.finish_reason, other.output_tokens) == ("length", expected.output_tokens)
