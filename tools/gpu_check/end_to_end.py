"""Whole models on the GPU: in float32 the tokens of transformers, and the same bits however a request is computed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tools.gpu_check.engines import arithmetics, engine_specs, make_engine
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.places import MODELS
from tools.gpu_check.record import Record
from tools.gpu_check.tiny_models import (
    BF16,
    F32,
    GREEDY,
    OPTIONS,
    answers,
    configs,
    random_prompts,
    ways_to_answer,
)

from nanoserve import ModelConfig, load_weights, random_weights
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.precision import Precision

ORACLES = ("gpt2", "llama-odd", "qwen3")  # of tests/support/families.py
_TINY_ORACLES = ("gpt2",)
_BITS = "qwen3"  # of tiny_models.py


def oracles(tiny: bool) -> tuple[str, ...]:
    return _TINY_ORACLES if tiny else ORACLES


def specs(chip: Chip, tiny: bool, folder: Path) -> Iterable[GpuKernelSpec]:
    limits = {"max_num_batched_tokens": 128, "max_num_seqs": 4}
    for name in oracles(tiny):
        yield from engine_specs(ModelConfig.from_pretrained(folder / MODELS / name), chip, F32, **limits)
    yield from engine_specs(configs()[_BITS], chip, F32, **limits)
    for one in arithmetics(chip, ours=True).values():
        yield from engine_specs(configs()[_BITS], chip, BF16, **limits, **one.executor)


def run(gpu: Gpu, record: Record) -> None:
    for name in oracles(gpu.tiny):
        if record.has_time(f"tokens of {name}", 2):
            with record.attempt(f"tokens of {name}"):
                _tokens(gpu, record, name)
    ways: list[tuple[str, Precision, dict[str, Any]]] = [("float32", F32, {})]
    for name, one in arithmetics(gpu.chip, ours=True).items():
        ways.append((f"bfloat16, {name}", BF16, one.executor))
    for name, precision, given in ways[:2] if gpu.tiny else ways:
        if record.has_time(f"bits in {name}", 2):
            with record.attempt(f"bits in {name}"):
                _bits(gpu, record, name, precision, given)


def _tokens(gpu: Gpu, record: Record, name: str) -> None:
    path = gpu.folder / MODELS / name
    config, weights = ModelConfig.from_pretrained(path), load_weights(path)
    prompts = [
        [token % config.vocab_size for token in prompt] for prompt in random_prompts((1, 5, 33) if gpu.tiny else (1, 5, 70, 130, 64))
    ]  # fmt: skip
    found = [
        tokens
        for tokens, _ in answers(make_engine(gpu, config, weights, F32, **OPTIONS).generate(prompts, GREEDY))
    ]
    if gpu.fake:
        from nanoserve import NanoServingEngine

        whose = "ours on the CPU"
        cpu = NanoServingEngine(config, weights, **{**OPTIONS, "device": "cpu"})
        wanted = [tokens for tokens, _ in answers(cpu.generate(prompts, GREEDY))]
    else:
        from support.oracle import oracle_generate

        whose = "transformers"
        wanted = [oracle_generate(path, prompt, GREEDY.max_tokens) for prompt in prompts]
    differ = [number for number, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
    record.check(
        f"{name}: the tokens of {whose}", not differ, f"prompts {differ} differ" if differ else f"{len(prompts)} prompts"
    )  # fmt: skip


def _bits(gpu: Gpu, record: Record, name: str, precision: Precision, given: dict[str, Any]) -> None:
    config = configs()[_BITS]
    weights = random_weights(config, 1)

    def make(buckets: list[int] | None = None, **options: Any) -> Any:
        more = {} if buckets is None else {"buckets": buckets}
        return make_engine(gpu, config, weights, precision, {**given, **more}, **{**OPTIONS, **options})

    prompts = random_prompts((1, 5, 30, 30, 30)) if gpu.tiny else random_prompts()
    for way, found, wanted, was_so in ways_to_answer(partial(make), prompts):
        differ = [number for number, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
        detail = f"answers {differ} differ" if differ else "" if was_so else "it did not run that way"
        record.check(f"{name}: {way}, the same bits", not differ and was_so, detail)
