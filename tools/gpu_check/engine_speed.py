"""The engine on real shapes with random weights: a step of decoding, a prompt, and a mixed workload.

A step of decoding must read its weights and its requests' keys and values: the time that takes at the measured bandwidth is
its floor. A prompt must multiply: its floor is at the measured rate of products.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tools.gpu_check.ceilings import Ceilings
from tools.gpu_check.engines import engine_specs, make_engine, random_bfloat16
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.record import Record
from tools.gpu_check.shapes import kv_bytes, models, prefill_flops, step_weight_bytes
from tools.gpu_check.tiny_models import BF16

from nanoserve import ModelConfig, NanoServingEngine, SamplingParams
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec

BATCHES = (1, 8, 32, 128, 256)
CONTEXT, STEPS, PROMPT = 512, 24, 2048
PAGE = 16
MIXED_MODELS = ("Qwen3-0.6B", "Llama-3.2-1B", "tiny")  # those with room for it
MIXED_SECONDS = 30.0  # at most, of one


def specs(chip: Chip, tiny: bool, folder: Path) -> Iterable[GpuKernelSpec]:
    for config in models(tiny).values():
        yield from engine_specs(config, chip, BF16, "bf16", max_model_len=256 if tiny else 4096)


def run(gpu: Gpu, record: Record) -> None:
    ceilings = Ceilings.of(gpu.results.get("ceilings"))
    for name, config in models(gpu.tiny).items():
        if record.has_time(name, 8 + 4e-9 * step_weight_bytes(config)):
            with record.attempt(name):
                _model(gpu, record, name, config, ceilings)
            gc.collect()  # of a device's memory, too


def _model(gpu: Gpu, record: Record, name: str, config: ModelConfig, ceilings: Ceilings | None) -> None:
    begin = time.perf_counter()
    engine = engine_of(gpu, config)
    record.fact(f"{name}: seconds to start", time.perf_counter() - begin)
    measure(gpu, record, name, engine, ceilings)
    if name in MIXED_MODELS and record.has_time(f"mixed workload of {name}", 5):
        limit = min(MIXED_SECONDS, record.seconds_left - 2)
        record.row("mixed", model=name, by="nanoserve", **mixed(engine, config, gpu.tiny, limit))


def engine_of(
    gpu: Gpu, config: ModelConfig, executor_options: dict[str, Any] | None = None, **options: Any
) -> NanoServingEngine:
    """For 256 requests, or 4 tiny ones, with as many pages as they need, or as there is room for."""
    if gpu.tiny:
        options = {"kv_cache_pages": 64, "max_num_batched_tokens": 128, "max_chunk_size": 128, "max_batch_size": 4,
                   "max_model_len": 256, **options}  # fmt: skip
    else:
        wanted = 256 * PROMPT // PAGE
        room = (
            gpu.device.free_bytes
            - step_weight_bytes(config)
            - 2 * config.vocab_size * config.n_embd
            - (6 << 30)
        )
        options = {"kv_cache_pages": max(1024, min(wanted, int(0.9 * room) // (kv_bytes(config) * PAGE))),
                   "max_num_batched_tokens": 4096, "max_chunk_size": PROMPT, "max_batch_size": 256, "max_model_len": 4096,
                   **options}  # fmt: skip
    return make_engine(
        gpu,
        config,
        random_bfloat16(config),
        BF16,
        executor_options,
        page_size=PAGE,
        eos_token_id=[],
        **options,
    )


def measure(
    gpu: Gpu, record: Record, name: str, engine: NanoServingEngine, ceilings: Ceilings | None,
    batches: Iterable[int] | None = None, **labels: Any,
) -> None:  # fmt: skip
    """Rows of decode steps and of a prompt."""
    config = engine.config
    for batch in batches or ((1, 4) if gpu.tiny else BATCHES):
        if not record.has_time(f"{name}: {batch} sequences", 2):
            break
        context, steps = (20, 4) if gpu.tiny else (CONTEXT, STEPS)
        found = decode(engine, batch, context, steps)
        row: dict[str, Any] = {"model": name, **labels, "sequences": batch, **found}
        if ceilings is not None:
            size = step_weight_bytes(config) + batch * (context + steps // 2) * kv_bytes(config)
            row["of_roofline"] = size / ceilings.bandwidth / (found["step_ms"] * 1e-3)
        record.row("decode", **row)
    if record.has_time(f"{name}: a prompt", 2):
        tokens = 100 if gpu.tiny else PROMPT
        seconds = prefill(engine, tokens)
        row = {"model": name, **labels, "tokens": tokens, "ms": seconds * 1e3}
        if ceilings is not None:
            row["of_products"] = prefill_flops(config, tokens) / seconds / ceilings.products
        record.row("prefill", **row)


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


def decode(engine: NanoServingEngine, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Of a step of `batch` sequences: milliseconds, those of each native call, the share outside of them, and of the
    steps that were started ahead."""
    prompts = [random_tokens(engine.config, context, number) for number in range(batch)]
    executor: Any = engine.executor
    # More than are looked at: the first decode while the last are still at their prompts.
    params = SamplingParams(temperature=0.0, max_tokens=executor.max_model_len - context, ignore_eos=True)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    while any(len(request.output_tokens) < 3 for request in requests):
        engine.step()
    clock = NativeClock(executor._native)
    executor._native = clock
    times = []
    ahead_before = engine.get_stats()["steps_ahead"]
    begin = time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - before)
    total = time.perf_counter() - begin
    executor._native = clock._native
    ahead = (engine.get_stats()["steps_ahead"] - ahead_before) / steps
    for request in requests:
        engine.abort(request.req_id)
    while engine.has_unfinished:
        engine.step()
    return {
        "step_ms": statistics.median(times) * 1e3,
        "native_ms": {name: seconds * 1e3 / steps for name, seconds in clock.seconds.items()},
        "outside_native": 1 - sum(clock.seconds.values()) / total,
        "ahead": ahead,
    }


def prefill(engine: NanoServingEngine, tokens: int) -> float:
    """Seconds of a prompt that no cache knows, the median of three."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    times = []
    for number in range(4):
        engine.add_request(random_tokens(engine.config, tokens, 1000 + number), params)
        begin = time.perf_counter()
        while engine.has_unfinished:
            engine.step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


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
    engine.generate([prompts[0]], SamplingParams(temperature=0.6, max_tokens=2, ignore_eos=True))
    begin = time.perf_counter()
    requests = [
        engine.add_request(prompt, SamplingParams(temperature=0.6, max_tokens=count, ignore_eos=True))
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    while engine.has_unfinished and time.perf_counter() - begin < limit:
        engine.step()
    seconds = time.perf_counter() - begin
    tokens = sum(len(request.output_tokens) for request in requests)
    found = {
        "requests": len(prompts), "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds,
        "whole": not engine.has_unfinished,
    }  # fmt: skip
    for request in requests:
        engine.abort(request.req_id)
    return found
