"""What users get wrong: each mistake is named with its value and limit, nothing is half done, the engine goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoserve import (
    LLM,
    CheckpointError,
    ModelConfig,
    NanoServingEngine,
    Request,
    SamplingParams,
    random_weights,
)
from support.recording import greedy

CONFIG = ModelConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=32, max_seq_len=128)
WEIGHTS = random_weights(CONFIG, seed=4)
MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-gpt"


def engine(**options: Any) -> NanoServingEngine:
    return NanoServingEngine(CONFIG, WEIGHTS, **{"kv_cache_pages": 32, **options})


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "x", None, True])
def test_engine_seed_is_checked_before_anything_is_queued(seed: Any) -> None:
    """A seed outside 64 bits would otherwise fail after a request was queued."""
    with pytest.raises(ValueError, match="seed"):
        engine(seed=seed)


@pytest.mark.parametrize("priority", [float("nan"), 0.5, "1", None, True, 1001])
def test_priority_is_a_bounded_whole_number(priority: Any) -> None:
    """A NaN in a sorted queue would lose other people's requests."""
    served = engine(policy="priority")
    with pytest.raises(ValueError, match="priority"):
        served.add_request([1], greedy(2), priority=priority)
    assert not served.has_unfinished


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda e: e.generate([1, 2, 3]), r"prompts\[0\]: prompt_tokens"),
        (lambda e: e.generate([None]), r"prompts\[0\]: prompt_tokens"),
        (lambda e: e.generate("text"), "prompts"),
        (lambda e: e.generate(5), "prompts"),
        (lambda e: e.generate([[1]], {"temperature": 0}), "params"),
        (lambda e: e.generate([[1]], [{}]), "params"),
        (lambda e: e.generate([[1], [2]], [greedy(1)]), "params: 1 sampling parameters for 2 prompts"),
        (lambda e: e.add_request([1], {}), "params"),
        (lambda e: e.add_request("ab"), "prompt_tokens"),
        (lambda e: e.add_request([10**5000]), r"prompt_tokens\[0\]: an integer of"),
        (lambda e: e.add_request([True]), r"prompt_tokens\[0\]: True"),
        (lambda e: e.add_request([1], req_id=[1]), "req_id"),
        (lambda e: engine(kv_cache_pages=2**70), "kv_cache_pages"),
        (lambda e: engine(num_threads="1"), "num_threads"),
        (lambda e: engine(max_model_len=9.5), "max_model_len"),
        (lambda e: engine(eos_token_id=[1.5]), "eos_token_id"),
        (lambda e: engine(eos_token_id=True), "eos_token_id"),
        (lambda e: engine(enable_prefix_cache="no"), "enable_prefix_cache"),
        (lambda e: Request(0, [1, 2], cached_len=1.0), "cached_len"),
        (lambda e: LLM(MODEL).generate([1, 2]), r"prompts\[0\]: prompt_tokens"),
        (lambda e: LLM(MODEL).generate("\ud800"), "prompts.0.: .* not Unicode text"),
        (lambda e: LLM(MODEL, dtype="int3"), "dtype: 'int3'"),
        (lambda e: LLM(MODEL, kv_cache_bytes=10), "10"),
    ],
)
def test_mistakes_are_named(call: Any, field: str) -> None:
    """A ValueError that begins with the field, never a TypeError from inside."""
    served = engine()
    with pytest.raises(ValueError, match=field):
        call(served)
    assert not served.has_unfinished
    assert len(served.generate([[1, 2]], greedy(2))[0].output_tokens) == 2


def test_a_model_that_is_not_a_directory_is_refused() -> None:
    for path in (MODEL / "config.json", MODEL / "nowhere"):
        with pytest.raises(CheckpointError, match=r"must be the directory that holds|no such directory"):
            LLM(path)


def test_any_iterable_of_prompts_and_numpy_tokens_are_served() -> None:
    """Generators, tuples and arrays are as good as lists."""
    served = engine()
    expected = [request.output_tokens for request in served.generate([[1, 2], [3]], greedy(3))]
    for prompts in (((1, 2), (3,)), iter([[1, 2], [3]]), [np.array([1, 2]), np.array([3], np.int64)]):
        assert [request.output_tokens for request in served.generate(prompts, greedy(3))] == expected
    outputs = LLM(MODEL).generate(iter(["a", "b"]), greedy(2))
    assert [output.prompt for output in outputs] == ["a", "b"]


def test_ids_of_the_engine_keep_clear_of_the_users() -> None:
    """A live request called 0 must not make generate() fail."""
    served = engine()
    mine = served.add_request([1], greedy(30), req_id=0)
    assert [len(request.output_tokens) for request in served.generate([[2], [3]], greedy(2))] == [2, 2]
    assert served.abort(mine.req_id) or mine.is_finished


def test_refusals_are_counted_wherever_they_happen() -> None:
    served = engine()
    for call in (lambda: served.generate([[1] * 200]), lambda: served.add_request([1] * 200)):
        with pytest.raises(ValueError, match="200"):
            call()
    assert served.get_stats()["num_refused"] == 2


def test_min_tokens_when_every_token_is_a_stop_ends_that_request_only() -> None:
    """There is nothing to sample: an error for it, an answer for its neighbour."""
    served = engine()
    impossible = SamplingParams(temperature=0, max_tokens=4, min_tokens=2, stop_token_ids=tuple(range(64)))
    first, second = served.generate([[1], [2]], [impossible, greedy(4)])
    assert first.finish_reason == "error"
    assert "min_tokens" in str(first.error)
    assert second.finish_reason == "length"


def test_text_keeps_an_eos_byte_that_did_not_end_it() -> None:
    """With ignore_eos the end token is content like any other."""
    llm = LLM(MODEL)
    first = llm.generate("The ", greedy(1))[0].token_ids[0]
    ends = LLM(MODEL, eos_token_id=first)
    assert ends.generate("The ", greedy(5))[0].text == ""
    kept = ends.generate("The ", greedy(1, ignore_eos=True))[0]
    assert (kept.text, kept.finish_reason) == (chr(first), "length")


class Disturbed:
    """An executor or sampler that does something first."""

    def __init__(self, inner: Any, name: str, action: Any) -> None:
        self._inner = inner
        setattr(self, name, lambda *args: (action(), getattr(inner, name)(*args))[1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize("result", [None, "x", float("nan"), 64, -1])
def test_a_sampler_that_returns_no_token_ends_the_requests_it_did_that_to(result: Any) -> None:
    served = engine()
    sample = served.batcher.sampler.sample

    def sometimes(logits: Any, requests: list[Request], eos: Any) -> list[Any]:
        tokens: list[Any] = sample(logits, requests, eos)
        return [
            result if request.req_id == "bad" else token
            for request, token in zip(requests, tokens, strict=True)
        ]

    served.batcher.sampler.sample = sometimes  # type: ignore[method-assign]
    bad = served.add_request([1], greedy(4), req_id="bad")
    good = served.add_request([2], greedy(4), req_id="good")
    while served.has_unfinished:
        served.step()
        served.audit()
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")


@pytest.mark.parametrize("place", ["forward", "sample", "schedule", "update", "append", "admit", "commit"])
def test_ctrl_c_at_any_point_of_a_step_leaves_a_working_engine(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real SIGINT: KeyboardInterrupt comes out, nothing leaks, and the same requests go on to the same answers."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    prompts = [[1, 2, 3], [4, 5], list(range(40))]
    expected = [request.output_tokens for request in engine().generate(prompts, greedy(6))]
    served = engine()
    requests = [served.add_request(prompt, greedy(6)) for prompt in prompts[:2]]
    served.step()
    strikes = iter([True] if place in ("append", "admit", "commit") else [False, True])

    def strike() -> None:
        if next(strikes, False):
            os.kill(os.getpid(), signal.SIGINT)

    def strike_after(owner: Any, name: str) -> None:
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **named: (inner(*args, **named), strike())[0])

    batcher = served.batcher
    if place == "forward":
        batcher.executor = Disturbed(batcher.executor, "forward", strike)
    elif place == "sample":
        batcher.sampler = Disturbed(batcher.sampler, "sample", strike)  # type: ignore[assignment]
    elif place == "append":  # a token is noted, nothing else of its step
        strike_after(Request, "append_output")
    elif place == "admit":  # running, but without a chunk
        strike_after(batcher.scheduler.pool, "admit")
    elif place == "commit":  # in the tree, but without the tree's references
        strike_after(batcher.radix_mgr.tree, "insert")
    else:
        name = "step" if place == "schedule" else "update"
        batcher.scheduler = Disturbed(batcher.scheduler, name, strike)  # type: ignore[assignment]
    if place not in ("append", "admit", "commit"):
        served.step()
    requests.append(served.add_request(prompts[2], greedy(6)))
    with pytest.raises(KeyboardInterrupt):
        served.step()
    served.audit()
    while served.has_unfinished:
        served.step()
        served.audit()
    assert [request.output_tokens for request in requests] == expected
