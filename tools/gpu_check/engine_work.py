"""What an engine is made to do while its clock runs: steps of decoding, a prompt, and a mixed workload.

The batcher keeps what a step raises in the request it struck, a dead device's errors too, and goes on. So every step here is
followed by a look at the requests: numbers of an engine that does not answer are none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from tools.gpu_check.tiny_models import tokens_of

from nanoserve import ModelConfig, NanoServingEngine, Request, SamplingParams


class NativeClock:
    """Stands before the native step and adds up the time that calls of it take.

    Attributes:
        seconds: by the call's name. `finish` waits for the device.
    """

    def __init__(self, native: Any) -> None:
        self._native = native
        self.seconds: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._native, name)
        if not callable(found):
            return found

        def timed(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return found(*args, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

        return timed


def advance(engine: NanoServingEngine, requests: Iterable[Request]) -> float:
    """Seconds of one step, after which all of the requests go on.

    Raises:
        RuntimeError: one has failed, or has ended.
    """
    begin = time.perf_counter()
    engine.step()
    seconds = time.perf_counter() - begin
    for request in requests:
        if request.error is not None or request.is_finished:
            raise RuntimeError(f"request {request.req_id}: {request.error or request.finish_reason}")
    return seconds


def decode(
    engine: NanoServingEngine,
    batch: int,
    context: int,
    *,
    steps: int,
    warm_s: float = 0.0,
    least_s: float = 0.0,
) -> dict[str, Any]:
    """Of a step of `batch` sequences: milliseconds, those of each native call, the share outside of them, of the steps that
    were started ahead, and the tokens of context in the middle.

    Args:
        steps, least_s: steps, and seconds, that are measured at least, as long as there is room for more tokens.
        warm_s: seconds of steps before, in at most half of that room: an idle device's clock is low.
    """  # fmt: skip
    prompts = [random_tokens(engine.config, context, number) for number in range(batch)]
    executor: Any = engine.executor
    # More than are looked at: the first decode while the last are still at their prompts.
    room = executor.max_model_len - context
    params = SamplingParams(temperature=0.0, max_tokens=room, ignore_eos=True)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    while any(len(request.output_tokens) < 3 for request in requests):
        advance(engine, requests)
    room -= max(len(request.output_tokens) for request in requests) + 1  # steps after which all go on
    warm: list[float] = []
    while sum(warm) < warm_s and len(warm) < room // 2:
        warm.append(advance(engine, requests))
    known = statistics.mean(request.total_len for request in requests)
    clock = NativeClock(executor._native)
    executor._native = clock
    times: list[float] = []
    ahead_before = engine.get_stats()["steps_ahead"]
    while len(times) < room - len(warm) and (len(times) < steps or sum(times) < least_s):
        times.append(advance(engine, requests))
    executor._native = clock._native
    ahead = engine.get_stats()["steps_ahead"] - ahead_before
    for request in requests:
        engine.abort(request.req_id)
    while engine.has_unfinished:
        engine.step()
    return {
        "step_ms": statistics.median(times) * 1e3,
        "native_ms": {name: seconds * 1e3 / len(times) for name, seconds in clock.seconds.items()},
        "outside_native": 1 - sum(clock.seconds.values()) / sum(times),
        "ahead": ahead / len(times),
        "steps": len(times),
        "context": known + len(times) / 2,
    }


def prefill(engine: NanoServingEngine, tokens: int) -> float:
    """Seconds of a prompt that no cache knows, the median of three."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    times = []
    for number in range(4):
        engine.radix_mgr.clear()
        request = engine.add_request(random_tokens(engine.config, tokens, 1000 + number), params)
        begin = time.perf_counter()
        while engine.has_unfinished:
            engine.step()
        times.append(time.perf_counter() - begin)
        _are_whole([request], [1])
    return statistics.median(times[1:])


def _are_whole(requests: list[Request], counts: list[int]) -> None:
    """Raises RuntimeError where a request has failed, or has other than so many tokens."""
    for request, tokens, count in zip(requests, tokens_of(requests), counts, strict=True):
        if len(tokens) != count:
            raise RuntimeError(f"request {request.req_id}: {len(tokens)} tokens, {count} were asked for")


def random_tokens(config: ModelConfig, count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, config.vocab_size, count).tolist()


def workload(vocab: int, tiny: bool) -> tuple[list[list[int]], list[int]]:
    """Prompts and how many tokens each gets: of random lengths between 100 and 1024, both."""
    rng = np.random.default_rng(0)
    count, least, most = (4, 5, 12) if tiny else (256, 100, 1024)
    prompts = [
        rng.integers(0, min(vocab, 10000), int(rng.integers(least, most + 1))).tolist() for _ in range(count)
    ]
    return prompts, [int(rng.integers(least, most + 1)) for _ in range(count)]


def mixed(engine: NanoServingEngine, config: ModelConfig, tiny: bool, limit: float) -> dict[str, Any]:
    """Tokens per second over the whole workload, or over its first `limit` seconds."""
    prompts, counts = workload(config.vocab_size, tiny)
    tokens_of(engine.generate([prompts[0]], SamplingParams(temperature=0.6, max_tokens=2, ignore_eos=True)))
    begin = time.perf_counter()
    requests = [
        engine.add_request(prompt, SamplingParams(temperature=0.6, max_tokens=count, ignore_eos=True))
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    while engine.has_unfinished and time.perf_counter() - begin < limit:
        engine.step()
    seconds = time.perf_counter() - begin
    is_whole = not engine.has_unfinished
    tokens = sum(map(len, tokens_of(requests)))
    if is_whole:
        _are_whole(requests, counts)
    for request in requests:
        engine.abort(request.req_id)
    return {
        "requests": len(prompts), "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds, "whole": is_whole,
    }  # fmt: skip
