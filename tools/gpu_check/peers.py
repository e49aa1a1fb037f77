"""The mixed workload by other engines on the same device: transformers' continuous batching, vLLM and nano-vllm where they are.

Same shape, random weights, the same prompts and counts of tokens, temperature 0.6. What is not installed, or does not finish in
its time, is named.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.random_checkpoint import write_random_checkpoint
from tools.gpu_check.engine_speed import workload
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.record import Record
from tools.gpu_check.shapes import RAW, models

from nanoserve import ModelConfig
from nanoserve.models.weights import checkpoint_shapes

MODEL = "Qwen3-0.6B"
_SECONDS = 60.0  # of one engine


def run(gpu: Gpu, record: Record) -> None:
    if gpu.torch is None:
        record.skip("other engines", "PyTorch has no CUDA device here")
        return
    config = models(False)[MODEL]
    engines: dict[str, tuple[str, Callable[..., tuple[int, float, bool]]]] = {
        "transformers": ("transformers", _transformers),
        "vLLM": ("vllm", _vllm),
        "nano-vllm": ("nanovllm", _vllm),
    }
    for name, (package, measure) in engines.items():
        if importlib.util.find_spec(package) is None:
            record.skip(name, "it is not installed")
            continue
        if not record.has_time(name, 15):
            continue
        try:
            tokens, seconds, whole = measure(gpu, config, package, min(_SECONDS, record.seconds_left - 8))
        except Exception as error:  # another engine's own trouble is no failure of this one
            record.skip(name, f"{type(error).__name__}: {str(error)[:200]}")
            continue
        if tokens == 0:
            record.skip(name, f"no token in {seconds:.0f} s")
            continue
        record.row(
            "mixed", model=MODEL, by=name, tokens=tokens, seconds=seconds, tokens_per_s=tokens / seconds, whole=whole
        )  # fmt: skip


def _transformers(gpu: Gpu, config: ModelConfig, package: str, limit: float) -> tuple[int, float, bool]:
    """Tokens in the time, streamed so that those of unfinished requests count."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    torch = gpu.torch
    raw = dict(RAW[MODEL])
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(raw.pop("model_type"), **raw), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()  # fmt: skip
    prompts, counts = workload(config.vocab_size, False)
    how = GenerationConfig(
        do_sample=True, temperature=0.6, max_new_tokens=max(counts), eos_token_id=-1, pad_token_id=0
    )  # fmt: skip
    manager = model.init_continuous_batching(generation_config=how)
    if hasattr(manager, "warmup"):
        manager.warmup()
    manager.start()
    try:
        manager.add_request(prompts[0], request_id="first", max_new_tokens=4)
        _results(manager, {"first": 4}, limit / 2)
        begin = time.perf_counter()
        wanted = {}
        for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            manager.add_request(prompt, request_id=str(number), max_new_tokens=count, streaming=True)
            wanted[str(number)] = count
        found = _results(manager, wanted, limit - 5)
        seconds = time.perf_counter() - begin
    finally:
        manager.stop(block=False)
    tokens = sum(found.values())
    return tokens, seconds, tokens >= sum(counts)


def _results(manager: Any, wanted: dict[str, int], limit: float) -> dict[str, int]:
    """Tokens by request, until all are there or the time is up."""
    end, found = time.perf_counter() + limit, dict.fromkeys(wanted, 0)
    while time.perf_counter() < end and any(found[key] < count for key, count in wanted.items()):
        result = manager.get_result(timeout=0.2)
        if result is not None and result.request_id in found:
            if result.error:
                raise RuntimeError(result.error)
            found[result.request_id] = max(found[result.request_id], len(result.generated_tokens))
        elif result is None and not manager.is_running():
            raise RuntimeError("its thread has ended")
    return found


def _vllm(gpu: Gpu, config: ModelConfig, package: str, limit: float) -> tuple[int, float, bool]:
    """By the interface that both have: LLM(path).generate(prompts, params)."""
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
        return sum(counts), time.perf_counter() - begin, True
