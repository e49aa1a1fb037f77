"""The mixed workload by other engines on the same device: transformers' continuous batching, vLLM and nano-vllm where they are.

Same shape, random weights, the same prompts and counts of tokens, temperature 0.6. What is not installed, or does not finish in
its time, is named.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from bench.random_checkpoint import write_random_checkpoint
from tools.gpu_check import peer_transformers
from tools.gpu_check.engine_speed import MIXED_SECONDS
from tools.gpu_check.engine_work import workload
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.record import Record
from tools.gpu_check.shapes import RAW, models

from nanoserve import ModelConfig
from nanoserve.models.weights import checkpoint_shapes

MODEL = "Qwen3-0.6B"
_LEAST_S = 15.0  # for a model to be built in, and to answer
_NAMES = {"transformers": "transformers", "vllm": "vLLM", "nanovllm": "nano-vllm"}  # by package

Way = tuple[str, Callable[[], dict[str, Any]]]  # a name, and what measures it


def run(gpu: Gpu, record: Record) -> None:
    if gpu.torch is None:
        record.skip("other engines", "PyTorch has no CUDA device here")
        return
    config = models(False)[MODEL]
    for package, ways in {"transformers": _transformers, "vllm": _vllm, "nanovllm": _vllm}.items():
        if importlib.util.find_spec(package) is None:
            record.skip(_NAMES[package], "it is not installed")
            continue
        for name, measure in ways(gpu, record, config, package):
            if record.has_time(name, _LEAST_S):
                with record.attempt(name):
                    _tell(record, name, measure)
            gc.collect()  # of a device's memory, too
            gpu.torch.cuda.empty_cache()


def _tell(record: Record, name: str, measure: Callable[[], dict[str, Any]]) -> None:
    """A row; another engine's own trouble is no failure of this one."""
    try:
        found = measure()
    except Exception as error:
        record.skip(name, f"{type(error).__name__}: {str(error)[:200]}")
        return
    if found["tokens"] == 0:
        record.skip(name, f"no token in {found['seconds']:.0f} s")
        return
    record.row("mixed", model=MODEL, by=name, **found, tokens_per_s=found["tokens"] / found["seconds"])


def _transformers(gpu: Gpu, record: Record, config: ModelConfig, package: str) -> list[Way]:
    most = max(workload(config.vocab_size, False)[1])

    @cache
    def model() -> Any:
        return peer_transformers.make_model(gpu.torch, MODEL)

    def measure(options: dict[str, Any]) -> dict[str, Any]:
        manager = peer_transformers.make_manager(model(), most, options)
        return peer_transformers.mixed(
            model(), manager, config.vocab_size, lambda: record.seconds_left - 8, MIXED_SECONDS
        )

    return [(name, partial(measure, options)) for name, options in peer_transformers.WAYS.items()]


def _vllm(gpu: Gpu, record: Record, config: ModelConfig, package: str) -> list[Way]:
    """By the interface that both have: LLM(path).generate(prompts, params)."""

    def measure() -> dict[str, Any]:
        module: Any = importlib.import_module(package)
        prompts, counts = workload(config.vocab_size, False)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            write_random_checkpoint(path, RAW[MODEL], checkpoint_shapes(config))
            (path / "generation_config.json").write_text(json.dumps({}))
            more = {"skip_tokenizer_init": True} if package == "vllm" else {}
            llm = module.LLM(str(path), enforce_eager=False, max_model_len=4096, **more)
            params = [
                module.SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=count, **({"detokenize": False} if more else {}))
                for count in counts
            ]  # fmt: skip
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts] if more else prompts
            llm.generate(inputs[:1], params[:1])
            begin = time.perf_counter()
            llm.generate(inputs, params)
            return {"tokens": sum(counts), "seconds": time.perf_counter() - begin, "whole": True}

    return [(_NAMES[package], measure)]
