"""Whole models on the GPU: in float32 the tokens of transformers, and the same bits however a request is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
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
    tokens_of,
    ways_to_answer,
)

from nanoserve import ModelConfig, NanoServingEngine, SamplingParams, load_weights, random_weights
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
        yield from engine_specs(configs()[_BITS], chip, BF16, **limits, gemm=one.gemm)


def run(gpu: Gpu, record: Record) -> None:
    for name in oracles(gpu.tiny):
        if record.has_time(f"tokens of {name}", 2):
            with record.attempt(f"tokens of {name}"):
                _tokens(gpu, record, name)
    ways = [("float32", F32, "mma")]
    for name, one in arithmetics(gpu.chip, ours=True).items():
        ways.append((f"bfloat16, {name}", BF16, one.gemm))
    for name, precision, gemm in ways:
        if record.has_time(f"bits in {name}", 2):
            with record.attempt(f"bits in {name}"):
                _bits(gpu, record, name, precision, gemm)
        if gpu.tiny and gemm != "mma":  # of the emulator's time, a way of each
            continue
        if record.has_time(f"overlap in {name}", 2):
            with record.attempt(f"overlap in {name}"):
                _overlap(gpu, record, name, precision, gemm)


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


def _maker(gpu: Gpu, precision: Precision, gemm: str) -> Callable[..., NanoServingEngine]:
    """Of engines with the same weights."""
    config = configs()[_BITS]
    weights = random_weights(config, 1)

    def make(**options: Any) -> NanoServingEngine:
        return make_engine(gpu, config, weights, precision, **{**OPTIONS, "gemm": gemm, **options})

    return make


def _bits(gpu: Gpu, record: Record, name: str, precision: Precision, gemm: str) -> None:
    prompts = random_prompts((1, 5, 30, 30, 30)) if gpu.tiny else random_prompts()
    ways = ways_to_answer(_maker(gpu, precision, gemm), prompts)
    for way, found, wanted, was_so in islice(ways, 1) if gpu.tiny and gemm != "mma" else ways:
        differ = [number for number, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
        detail = f"answers {differ} differ" if differ else "" if was_so else "it did not run that way"
        record.check(f"{name}: {way}, the same bits", not differ and was_so, detail)


_CHOICES = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    "temperature": SamplingParams(temperature=0.8, max_tokens=12, seed=1, ignore_eos=True),
    "all at once": SamplingParams(
        temperature=1.2, top_k=50, top_p=0.9, min_p=0.01, max_tokens=12, seed=4, ignore_eos=True
    ),
}


def _overlap(gpu: Gpu, record: Record, name: str, precision: Precision, gemm: str) -> None:
    """Tokens that the device chooses, with the next step on its way, are those of the host's, a step at a time.

    GREEDY asks for log-probabilities, which only the host has: nothing else in this part runs ahead.
    """
    make = _maker(gpu, precision, gemm)
    prompts = random_prompts((1, 5) if gpu.tiny else (1, 5, 70, 130, 64))
    ahead, by_itself = make(enable_prefix_cache=False), make(enable_prefix_cache=False, overlaps=False)
    for how, params in _CHOICES.items():
        before = ahead.get_stats()["steps_ahead"]
        found, wanted = (tokens_of(engine.generate(prompts, params)) for engine in (ahead, by_itself))
        steps = ahead.get_stats()["steps_ahead"] - before
        differ = [number for number, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
        detail = f"answers {differ} differ" if differ else f"{steps} steps started ahead"
        record.check(f"{name}: {how}, running ahead, the host's tokens", not differ and steps > 0, detail)
    idle = by_itself.get_stats()["steps_ahead"]
    record.check(f"{name}: without overlap, no step is ahead", idle == 0, f"{idle} are")
