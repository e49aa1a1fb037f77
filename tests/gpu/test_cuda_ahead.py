"""Steps that are started before the tokens of the one before them are known, on the device in software."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.gpu.test_cuda_engine import engine, prompts
from tools.gpu_check.tiny_models import BF16

from nanoserve import NanoServingEngine, SamplingParams
from nanoserve.cuda.executor import CudaExecutor
from nanoserve.draws import Draws

__all__ = ["engine", "prompts"]  # fixtures

Make = Callable[..., NanoServingEngine]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
KINDS = [
    GREEDY,
    SamplingParams(temperature=0.8, max_tokens=20, seed=1, ignore_eos=True),
    SamplingParams(temperature=1.5, top_k=20, max_tokens=15, seed=2, ignore_eos=True),
    SamplingParams(temperature=1.0, top_p=0.8, max_tokens=17, seed=3, ignore_eos=True),
    SamplingParams(temperature=1.2, top_k=50, top_p=0.9, min_p=0.01, max_tokens=11, seed=4, ignore_eos=True),
]


def tokens(made: NanoServingEngine, prompts: list[list[int]], params: Any) -> list[list[int]]:
    done = made.generate(prompts, params)
    assert [request.error for request in done] == [None] * len(done)
    made.audit()
    return [request.output_tokens for request in done]


def on_host(made: NanoServingEngine) -> NanoServingEngine:
    """The same engine, whose tokens the host chooses, a step at a time."""
    made.batcher._run_ahead._executor = None
    return made


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tokens_the_device_chooses_are_the_samplers(
    engine: Make, prompts: list[list[int]], name: str
) -> None:
    gpu = engine(name)
    assert tokens(gpu, prompts, KINDS) == tokens(engine(name, device="cpu"), prompts, KINDS)
    stats = gpu.get_stats()
    assert stats["steps_ahead"] > 10
    assert stats["steps_ahead"] < stats["steps"]


def test_running_ahead_changes_no_token(engine: Make, prompts: list[list[int]]) -> None:
    """By graphs or launches, alone or together, after a preemption, with those whose tokens the host must choose."""
    expected = tokens(on_host(engine("llama", BF16)), prompts, KINDS)
    assert tokens(engine("llama", BF16), prompts, KINDS) == expected
    alone = engine("llama", BF16, buckets=[])
    assert [tokens(alone, [one], params)[0] for one, params in zip(prompts, KINDS, strict=True)] == expected
    longer, several = replace(KINDS[3], max_tokens=40), [prompt[:30] for prompt in prompts[2:]]
    crowded = engine("llama", BF16, kv_cache_pages=11, enable_prefix_cache=False)
    assert tokens(crowded, several, longer) == tokens(engine("llama", BF16), several, longer)
    assert crowded.get_stats()["preemptions"] > 0
    penalised = SamplingParams(temperature=0.0, max_tokens=9, repetition_penalty=1.5, ignore_eos=True)
    mixed = tokens(engine("llama", BF16), [*prompts, prompts[0]], [*KINDS, penalised])
    assert mixed[:-1] == expected
    assert mixed[-1] == tokens(on_host(engine("llama", BF16)), [prompts[0]], penalised)[0]


def test_who_ends_is_in_the_step_ahead_for_nothing(engine: Make, prompts: list[list[int]]) -> None:
    free = [replace(KINDS[1], max_tokens=30, seed=seed) for seed in range(len(prompts))]
    full = tokens(engine("gpt2", device="cpu"), prompts, free)
    ends = [output[5 + 3 * index] for index, output in enumerate(full)]  # at different steps
    params = [replace(one, stop_token_ids=(end,)) for one, end in zip(free, ends, strict=True)]
    gpu = engine("gpt2")
    expected = [output[: output.index(end) + 1] for output, end in zip(full, ends, strict=True)]
    assert tokens(gpu, prompts, params) == expected
    assert gpu.get_stats()["steps_ahead"] > 3
    held = gpu.radix_mgr.tree_pages()
    assert gpu.kv_pool.num_used_pages == len(list(held))


def test_requests_come_and_go_while_a_step_is_ahead(engine: Make, prompts: list[list[int]]) -> None:
    gpu = engine("llama", max_batch_size=8, enable_prefix_cache=False)
    alone = [tokens(gpu, [prompt], GREEDY)[0] for prompt in prompts]
    requests = []
    for prompt in prompts:
        requests.append(gpu.add_request(prompt, GREEDY))
        for _ in range(4):
            gpu.step()
            gpu.audit()
    gone = requests.pop(2)
    was_live = gpu.abort(gone.req_id)
    while gpu.has_unfinished:
        gpu.step()
        gpu.audit()
    assert [request.output_tokens for request in requests] == [*alone[:2], *alone[3:]]
    assert was_live is (gone.finish_reason == "abort")
    assert gpu.kv_pool.num_used_pages == 0


def test_nothing_is_held_when_everybody_has_gone(engine: Make, prompts: list[list[int]]) -> None:
    gpu = engine("gpt2", enable_prefix_cache=False)
    requests = [gpu.add_request(prompt, GREEDY) for prompt in prompts[:3]]
    while not gpu.get_stats()["steps_ahead"]:
        gpu.step()
    for request in requests:
        assert gpu.abort(request.req_id)
    gpu.audit()
    assert not gpu.has_unfinished
    assert gpu.kv_pool.num_used_pages == 0
    assert tokens(gpu, prompts, GREEDY) == tokens(engine("gpt2", device="cpu"), prompts, GREEDY)


def test_steps_end_in_order_and_two_may_be_started(engine: Make) -> None:
    gpu = engine("gpt2")
    executor = gpu.executor
    assert isinstance(executor, CudaExecutor)
    batch = gpu.add_request([1, 2, 3], GREEDY) and gpu.batcher.scheduler.step().batch
    draws = Draws.of(batch.sampling_requests)
    first, second = executor.start(batch, draws), executor.start(batch, draws)
    with pytest.raises(RuntimeError, match="2 steps are in flight: finish one"):
        executor.start(batch, draws)
    with pytest.raises(ValueError, match=r"step \d+ is not the oldest in flight"):
        second.tokens()
    with pytest.raises(ValueError, match="are gone: another one was started"):
        first.logits([0])
    assert first.tokens() == second.tokens()
    assert np.argmax(second.logits([0]).values[0]) == second.tokens()[0]
    batch.sources = np.array([0, 0, 1], np.int32)
    with pytest.raises(ValueError, match="source is 1, must be in"):
        executor.start(batch, draws)
