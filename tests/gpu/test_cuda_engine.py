"""The whole engine on a CUDA device in software: the launcher, pages and graphs that a GPU would run, kernels and all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.gpu.emulated_images import image_of
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

from nanoserve import NanoServingEngine, SamplingParams
from nanoserve.compiler.gpu.chip import CHIPS
from nanoserve.cuda import backend, step_sizes
from nanoserve.cuda.executor import CudaExecutor, chip_of, default_buckets
from nanoserve.cuda.step_sizes import StepSizes
from nanoserve.models.weights import random_weights
from nanoserve.native import CudaDevice, CudaError, CudaKernel, cuda_layer_cache
from nanoserve.precision import Precision


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., NanoServingEngine]:
    """engine(name, precision, **options) with the same random weights every time."""
    make = backend.CudaBackend.make_executor
    changes: dict[str, Any] = {}

    def make_executor(self: Any, *args: Any, **options: Any) -> CudaExecutor:
        return make(self, *args, image=image_of, **options, **changes)

    monkeypatch.setattr(backend.CudaBackend, "make_executor", make_executor)

    def made(name: str, precision: Precision = F32, **options: Any) -> NanoServingEngine:
        changes.clear()
        changes.update({name: options.pop(name) for name in ("buckets", "start_early") if name in options})
        config = configs()[name]
        return NanoServingEngine(
            config, random_weights(config, 1), precision=precision, **{**OPTIONS, **options}
        )

    return made


@pytest.fixture
def prompts() -> list[list[int]]:
    return random_prompts()


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma2", "phi3", "qwen2"])
def test_float32_tokens_are_the_cpus(
    engine: Callable[..., NanoServingEngine], prompts: list[list[int]], name: str
) -> None:
    gpu = engine(name)
    ours, theirs = (
        answers(gpu.generate(prompts, GREEDY)),
        answers(engine(name, device="cpu").generate(prompts, GREEDY)),
    )
    for (tokens, logprobs), (cpu_tokens, cpu_logprobs) in zip(ours, theirs, strict=True):
        assert tokens == cpu_tokens
        assert np.abs(np.subtract(logprobs, cpu_logprobs)).max() < 2e-6
    counts = gpu.executor.counts  # type: ignore[union-attr]
    assert counts["graph_launches"] > 3
    assert counts["steps"] > counts["graph_launches"]  # prompts are launched kernel by kernel
    gpu.audit()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_is_near_the_cpus(
    engine: Callable[..., NanoServingEngine], prompts: list[list[int]], name: str
) -> None:
    ours = answers(engine(name, BF16).generate(prompts, GREEDY))
    theirs = answers(engine(name, BF16, device="cpu").generate(prompts, GREEDY))
    for (tokens, logprobs), (cpu_tokens, cpu_logprobs) in zip(ours, theirs, strict=True):
        same = next(
            (at for at, (a, b) in enumerate(zip(tokens, cpu_tokens, strict=True)) if a != b), len(tokens)
        )
        assert same > 0
        assert np.abs(np.subtract(logprobs[:same], cpu_logprobs[:same])).max() < 0.02


@pytest.mark.parametrize("precision", [F32, BF16], ids=["float32", "bfloat16"])
def test_an_answer_has_the_same_bits_whatever_else_runs(
    engine: Callable[..., NanoServingEngine], prompts: list[list[int]], precision: Precision
) -> None:
    """Alone or among others, in chunks of any size, by graphs or launches, from the prefix cache, after a preemption."""

    def make(**options: Any) -> NanoServingEngine:
        return engine("qwen3", precision, **options)

    ways = list(ways_to_answer(make, prompts))
    assert len(ways) == 5
    for way, found, wanted, was_so in ways:
        assert found == wanted, way
        assert was_so, way


def test_graphs_are_made_once_per_bucket(engine: Callable[..., NanoServingEngine]) -> None:
    gpu = engine("gpt2", buckets=[1, 4])
    for _ in range(2):
        gpu.generate([[1], [2], [3]], GREEDY)
        gpu.generate([[4, 5]], GREEDY)
    counts = gpu.executor.counts  # type: ignore[union-attr]
    assert counts["graphs"] == 2
    assert counts["graph_launches"] >= 4 * (GREEDY.max_tokens - 2)
    assert default_buckets(100) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]


def test_log_probabilities_of_a_prompt_need_more_rows_than_sequences(
    engine: Callable[..., NanoServingEngine], prompts: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1, ignore_eos=True)
    told = []
    for device in ("cuda", "cpu"):
        (request,) = engine("gpt2", device=device).generate([prompts[2]], params)
        assert request.error is None
        assert request.prompt_logprobs is not None
        told.append([each.logprob for each in request.prompt_logprobs if each is not None])
    assert len(told[0]) == len(prompts[2]) - 1
    np.testing.assert_allclose(told[0], told[1], atol=2e-6)


def test_keys_and_values_are_where_the_pages_say(engine: Callable[..., NanoServingEngine]) -> None:
    """A page of the prefix cache holds on the GPU what it holds on the CPU, laid out for a GPU."""
    prompt = list(range(40))
    held = []
    for device in ("cuda", "cpu"):
        made = engine("llama", device=device)
        made.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1))
        cached, pages = made.radix_mgr.match_prefix(prompt)
        assert cached == 32
        if device == "cuda":
            rows = [
                cuda_layer_cache(made.kv_pool, 1, values)[pages].swapaxes(1, 2) for values in (False, True)
            ]
        else:
            rows = [cache[pages] for cache in made.kv_pool.get_layer_cache(1)]
        held.append([np.asarray(each).reshape(32, 2, 32) for each in rows])
    for ours, theirs in zip(*held, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("precision", [F32, BF16], ids=["float32", "bfloat16"])
def test_a_page_is_copied_and_cleared_in_all_layers(
    engine: Callable[..., NanoServingEngine], precision: Precision
) -> None:
    """And no other page is touched."""
    made = engine("llama", precision, kv_cache_pages=9)
    made.generate([list(range(70))], SamplingParams(temperature=0.0, max_tokens=1))
    pool = made.kv_pool

    def contents() -> np.ndarray:
        return np.array(
            [[cuda_layer_cache(pool, layer, values) for values in (False, True)] for layer in (0, 1)]
        )

    expected = contents()
    assert expected[:, :, 1:4].any(axis=(3, 4, 5)).all()  # of every layer, keys and values
    copy = pool.copy_page(2)
    expected[:, :, copy] = expected[:, :, 2]
    np.testing.assert_array_equal(contents(), expected)
    pool.scrub([1, 3])
    expected[:, :, [1, 3]] = 0
    np.testing.assert_array_equal(contents(), expected)


# ---- what goes wrong


def test_devices_are_checked(engine: Callable[..., NanoServingEngine]) -> None:
    with pytest.raises(ValueError, match="device: 'tpu' must be cpu, cuda or cuda:N"):
        engine("gpt2", device="tpu")
    with pytest.raises(ValueError, match="device: there is no cuda:7; of CUDA devices there are 1: cuda:0"):
        engine("gpt2", device="cuda:7")
    with pytest.raises(ValueError, match="int8 is for the CPU"):
        engine("gpt2", Precision("int8", "bfloat16"))
    with pytest.raises(ValueError, match="num_threads: 2 is for the CPU, device is 'cuda'"):
        engine("gpt2", num_threads=2)


def test_a_machine_without_a_driver_says_so() -> None:
    code = "from nanoserve.cuda.backend import open_device; open_device('cuda')"
    env = {
        **os.environ,
        "NANOSERVE_CUDA_DRIVER": "/nowhere/libcuda.so.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "CudaDriverMissing: no CUDA driver: /nowhere/libcuda.so.1" in done.stderr
    assert "Without a GPU, device='cpu' works" in done.stderr


def test_more_pages_than_fit_are_refused_with_the_numbers(engine: Callable[..., NanoServingEngine]) -> None:
    with pytest.raises(
        MemoryError, match=r"the KV pool: \d+ bytes on .*, \d+ of \d+ are free: CUDA_ERROR_OUT_OF_MEMORY"
    ):
        engine("gpt2", kv_cache_pages=2**24)


def test_a_kernel_is_loaded_once_and_tells_what_it_takes(engine: Callable[..., NanoServingEngine]) -> None:
    executor = engine("gpt2").executor
    assert isinstance(executor, CudaExecutor)
    assert len(executor._kernels) == len(executor.artifacts)
    for kernel in executor._kernels.values():
        assert kernel.num_registers > 0
        assert kernel.local_bytes >= 0
    made = next(iter(executor.artifacts.values()))
    with pytest.raises(ValueError, match=r"bytes of shared memory, a block of .* can have \d+"):
        CudaKernel(CudaDevice(), image_of(made), made.launch.entry, 32, 10**7)
    with pytest.raises(CudaError, match=r"finding nobody in its image: CUDA_ERROR_NOT_FOUND"):
        CudaKernel(CudaDevice(), image_of(made), "nobody", 32)


def test_an_image_that_is_none_is_refused() -> None:
    with pytest.raises(CudaError, match=r"loading k on .* CUDA_ERROR_INVALID_IMAGE"):
        CudaKernel(CudaDevice(), b"no image at all", "k", 32)


def test_the_chip_is_the_devices() -> None:
    class Device:
        def __init__(self, capability: int) -> None:
            self.capability, self.name = capability, "A GPU"

    for capability, name in ((80, "sm_80"), (86, "sm_86"), (89, "sm_89"), (90, "sm_90a")):
        assert chip_of(Device(capability)) == CHIPS[name]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"A GPU has compute capability 7\.5"):
        chip_of(Device(75))  # type: ignore[arg-type]


def test_who_has_no_room_among_the_pieces_is_a_chunk(
    engine: Callable[..., NanoServingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two sequences of two segments each one, where three pieces fit; no bit tells."""
    prompts = random_prompts((520, 515))
    options = {"kv_cache_pages": 80, "max_batch_size": 2, "max_chunk_size": 128}
    roomy = engine("llama", **options)
    wanted = answers(roomy.generate(prompts, GREEDY))
    monkeypatch.setattr(step_sizes, "_MORE_PIECES", 1)  # than sequences: three pieces
    tight = engine("llama", **options)
    assert answers(tight.generate(prompts, GREEDY)) == wanted
    executors: list[Any] = [roomy.executor, tight.executor]
    launches = [each.counts["graph_launches"] for each in executors]
    # A step with a chunk is no graph: only those of the first alone, before or after the second, are.
    assert launches[0] >= GREEDY.max_tokens - 2 > launches[1] + 2


@pytest.mark.parametrize(
    ("longest", "sequences", "pieces"),
    [(512, 4, 4), (513, 4, 8), (131072, 256, 8192 + 256), (131072, 4, 1024)],
)
def test_room_for_pieces_is_what_sequences_can_have_or_enough(
    longest: int, sequences: int, pieces: int
) -> None:
    sizes = StepSizes.of(configs()["llama"], F32, 2048, sequences, longest)
    assert sizes.max_pieces == pieces
