"""The engine on real shapes with random weights: its answers, a step of decoding, a prompt, and a mixed workload.

A step of decoding must read its weights and its requests' keys and values: the time that takes at the measured bandwidth is
its floor. A prompt must multiply: its floor is at the measured rate of products.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.gpu_check.ceilings import Ceilings
from tools.gpu_check.engine_answers import check_answers
from tools.gpu_check.engine_work import decode, mixed, prefill
from tools.gpu_check.engines import engine_specs, make_engine, random_bfloat16
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.record import Record
from tools.gpu_check.shapes import kv_bytes, models, prefill_flops, step_weight_bytes
from tools.gpu_check.sm_clock import sm_mhz
from tools.gpu_check.tiny_models import BF16

from nanoserve import ModelConfig, NanoServingEngine
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec

BATCHES = (1, 8, 32, 128, 256)
CONTEXT, PROMPT = 512, 2048
# Of a row of decoding: steps, and seconds of them; before, seconds for the device to leave its idle clock.
STEPS, LEAST_S, WARM_S = 24, 0.2, 0.3
PAGE = 16
MIXED_MODELS = ("Qwen3-0.6B", "Llama-3.2-1B", "tiny")  # those with room for it
MIXED_SECONDS = 30.0  # at most, of one
CHUNK = 256  # tokens of a prompt's pieces, where decoding beside it is to wait little


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
    with record.attempt(f"answers of {name}"):
        check_answers(gpu, record, name, engine)
    measure(gpu, record, name, engine, ceilings)
    _chunks(gpu, record, name, engine)
    if name in MIXED_MODELS and record.has_time(f"mixed workload of {name}", 5):
        limit = min(MIXED_SECONDS, record.seconds_left - 2)
        with record.attempt(f"mixed workload of {name}"):
            record.row("mixed", model=name, by="nanoserve", **mixed(engine, config, gpu.tiny, limit))


def engine_of(gpu: Gpu, config: ModelConfig, **options: Any) -> NanoServingEngine:
    """For 256 requests, or 4 tiny ones, with as many pages as they need, or as there is room for."""
    if gpu.tiny:
        options = {
            "kv_cache_pages": 64,
            "max_num_batched_tokens": 128,
            "max_batch_size": 4,
            "max_model_len": 256,
            **options,
        }
    else:
        wanted = 256 * PROMPT // PAGE
        room = (
            gpu.device.free_bytes
            - step_weight_bytes(config)
            - 2 * config.vocab_size * config.n_embd
            - (6 << 30)
        )
        options = {"kv_cache_pages": max(1024, min(wanted, int(0.9 * room) // (kv_bytes(config) * PAGE))),
                   "max_num_batched_tokens": 4096, "max_batch_size": 256, "max_model_len": 4096, **options}  # fmt: skip
    return make_engine(gpu, config, random_bfloat16(config), BF16, page_size=PAGE, eos_token_id=[], **options)


def measure(
    gpu: Gpu, record: Record, name: str, engine: NanoServingEngine, ceilings: Ceilings | None,
    batches: Iterable[int] | None = None, **labels: Any,
) -> None:  # fmt: skip
    """Rows of decode steps and of a prompt."""
    config = engine.config
    for batch in batches or ((1, 4) if gpu.tiny else BATCHES):
        if not record.has_time(f"{name}: {batch} sequences", 2):
            break
        with record.attempt(f"{name}: {batch} sequences"):
            found = (
                decode(engine, batch, 20, steps=4)
                if gpu.tiny
                else decode(engine, batch, CONTEXT, steps=STEPS, warm_s=WARM_S, least_s=LEAST_S)
            )
            row: dict[str, Any] = {"model": name, **labels, "sequences": batch, **found, "sm_mhz": sm_mhz()}
            if ceilings is not None:
                size = step_weight_bytes(config) + batch * found["context"] * kv_bytes(config)
                row["of_roofline"] = size / ceilings.bandwidth / (found["step_ms"] * 1e-3)
            record.row("decode", **row)
    if record.has_time(f"{name}: a prompt", 2):
        with record.attempt(f"{name}: a prompt"):
            tokens = 100 if gpu.tiny else PROMPT
            seconds = prefill(engine, tokens)
            row = {"model": name, **labels, "tokens": tokens, "ms": seconds * 1e3}
            if ceilings is not None:
                row["of_products"] = prefill_flops(config, tokens) / seconds / ceilings.products
            record.row("prefill", **row)


def _chunks(gpu: Gpu, record: Record, name: str, engine: NanoServingEngine) -> None:
    """The prompt again, in pieces: the engine's default on a GPU, which `measure` takes, is all that a step may compute."""
    chunk, tokens = (40, 100) if gpu.tiny else (CHUNK, PROMPT)
    if not record.has_time(f"{name}: a prompt in chunks of {chunk}", 2):
        return
    manager = engine.batcher.scheduler.prefill_mgr
    usual = manager.max_chunk_size
    with record.attempt(f"{name}: a prompt in chunks of {chunk}"):
        manager.max_chunk_size = chunk
        record.row(
            "prefill in chunks", model=name, tokens=tokens, chunk=chunk, ms=prefill(engine, tokens) * 1e3
        )
    manager.max_chunk_size = usual
