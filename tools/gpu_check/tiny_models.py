"""Small models with random weights, and the ways to run them that must not change a bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

from nanoserve import ModelConfig, NanoServingEngine, SamplingParams
from nanoserve.models.rope import Rope
from nanoserve.precision import Precision

F32, BF16 = Precision(), Precision("bfloat16", "bfloat16")
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=2)
OPTIONS: dict[str, Any] = {
    "kv_cache_pages": 64, "max_num_batched_tokens": 128, "max_chunk_size": 48, "max_batch_size": 4, "device": "cuda",
}  # fmt: skip

Answers = list[tuple[list[int], list[float]]]


@cache
def configs() -> dict[str, ModelConfig]:
    llama: dict[str, Any] = {
        "vocab_size": 300, "n_layer": 2, "n_head": 4, "n_embd": 64, "n_kv_head": 2, "head_dim": 32, "max_seq_len": 1024,
        "positions": "rope", "norm": "rmsnorm", "gated_mlp": True, "activation": "silu", "intermediate_size": 96,
        "qkv_bias": False, "out_bias": False, "mlp_bias": False, "family": "llama",
    }  # fmt: skip
    return {
        "gpt2": ModelConfig(vocab_size=300, n_layer=2, n_head=2, n_embd=32, max_seq_len=256),
        "llama": ModelConfig(**llama, tie_embeddings=False),
        "qwen3": ModelConfig(**llama, qk_norm="head", sliding_window=40, sliding_layers=(True, False)),
        "gemma2": ModelConfig(
            **{
                **llama,
                "activation": "gelu_tanh",
                "post_norm": True,
                "attention_softcap": 3.0,
                "logits_softcap": 2.0,
                "embedding_scale": 8.0,
                "sliding_window": 40,
                "sliding_layers": (True, False),
                "family": "gemma",
            }
        ),
        "phi3": ModelConfig(
            **{
                **llama,
                "family": "phi3",
                "rope": Rope(
                    32,
                    kind="longrope",
                    original_len=72,
                    amplitude=1.1,
                    short_factor=(1.0,) * 16,
                    long_factor=(1.5,) * 16,
                ),
            }
        ),
        "qwen2": ModelConfig(**{**llama, "qkv_bias": True}),
    }


def random_prompts(sizes: tuple[int, ...] = (1, 5, 70, 130, 64)) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 300, size).tolist() for size in sizes]


def answers(done: list[Any]) -> Answers:
    """Tokens, and every log-probability to the bit."""
    logprobs = [[each.logprob for each in request.logprobs] for request in done]
    return list(zip(tokens_of(done), logprobs, strict=True))


def tokens_of(done: list[Any]) -> list[list[int]]:
    """Raises RuntimeError where a request has failed: the engine keeps errors, a device's among them, in its requests."""
    for request in done:
        if request.error is not None:
            raise RuntimeError(f"request {request.req_id}: {request.error}")
    return [request.output_tokens for request in done]


def _begin_early(engine: NanoServingEngine) -> bool:
    return engine.executor.counts["early_launches"] > 0  # type: ignore[union-attr]


def ways_to_answer(
    make: Callable[..., NanoServingEngine], prompts: list[list[int]]
) -> Iterator[tuple[str, Answers, Answers, bool]]:
    """(way, its answers, those it must give to the bit, whether it was that way at all); `make` takes engine options."""
    reference = answers(make().generate(prompts, GREEDY))
    alone = make(enable_prefix_cache=False, buckets=[])
    each = [answers(alone.generate([prompt], GREEDY))[0] for prompt in prompts]
    yield "alone, launched kernel by kernel", each, reference, alone.executor.counts["graphs"] == 0  # type: ignore[union-attr]
    in_turn = make(start_early=False)
    found = answers(in_turn.generate(prompts, GREEDY))
    was_so = not _begin_early(in_turn) and _begin_early(alone) == in_turn.executor.device.starts_early  # type: ignore[union-attr]
    yield "each kernel after the one in front", found, reference, was_so
    chunks = make(max_chunk_size=7, max_num_batched_tokens=16)
    yield "in chunks", answers(chunks.generate(prompts, GREEDY)), reference, True
    cached = answers(chunks.generate(prompts, GREEDY))
    yield "from the prefix cache", cached, reference, chunks.get_stats()["cache_hit_rate"] > 0
    longer = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=2)
    several = [prompt[:30] for prompt in prompts[2:]]
    crowded = make(kv_cache_pages=11, enable_prefix_cache=False)
    found = answers(crowded.generate(several, longer))
    wanted = answers(alone.generate(several, longer))
    yield "after a preemption", found, wanted, crowded.get_stats()["preemptions"] > 0
