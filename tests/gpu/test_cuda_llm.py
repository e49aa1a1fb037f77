"""LLM on a CUDA device in software: a checkpoint in, the CPU's text out, and as much of the device's memory as was said."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.gpu.emulated_images import load_images

from nanoserve import LLM, SamplingParams
from nanoserve.compiler.gpu.artifact import ArtifactStore
from nanoserve.compiler.gpu.chip import CHIPS
from nanoserve.cuda import backend
from nanoserve.cuda.memory_plan import plan_cuda_memory
from nanoserve.kernels.cuda import library
from nanoserve.models.config import ModelConfig
from nanoserve.models.weights import bind_weights, expected_dtypes, random_weights
from nanoserve.native import CudaDevice, CudaStep, CudaStream, cuda_pool
from nanoserve.precision import Precision, choose_precision
from support.text_checkpoint import make_text_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["Once upon a time", "the", "a longer prompt, of several words, to be cut into pieces " * 3]
GRANULARITY = 512  # what the device rounds an allocation up to
MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in float32."""
    return make_text_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def empty_device() -> None:
    """Engines of other tests that are only garbage by now are gone."""
    gc.collect()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Callable[..., LLM]:
    """opened(device="cuda", **options) -> an LLM."""
    load_images(monkeypatch)

    def make(**options: Any) -> LLM:
        return LLM(checkpoint, **{"max_num_seqs": 4, "max_num_batched_tokens": 64, **options})

    return make


def used_bytes(device: CudaDevice) -> int:
    return device.total_bytes - device.free_bytes


def test_texts_are_the_cpus(opened: Callable[..., LLM]) -> None:
    gpu, cpu = opened(device="cuda:0"), opened()
    assert gpu.engine.device_name == "cuda:0, nanoserve emulated GPU (sm_90a)"
    assert cpu.engine.device_name.startswith("cpu (")
    ours, theirs = gpu.generate(PROMPTS, GREEDY), cpu.generate(PROMPTS, GREEDY)
    assert [one.outputs[0].token_ids for one in ours] == [one.outputs[0].token_ids for one in theirs]
    assert [one.text for one in ours] == [one.text for one in theirs]
    streamed = "".join(delta.text for delta in gpu.stream(PROMPTS[0], GREEDY))
    assert streamed == ours[0].text
    messages = [{"role": "user", "content": "Hello"}]
    assert gpu.chat(messages, GREEDY)[0].text == cpu.chat(messages, GREEDY)[0].text


def test_products_by_cublas(opened: Callable[..., LLM]) -> None:
    """What multiplies is chosen for all products or for some, and planned for; the fake library sums in double precision."""
    ours, theirs = opened(device="cuda", gemm={"head": "cublas"}), opened(device="cuda")
    executor = ours.engine.executor
    assert (executor.gemm["head"], executor.gemm["qkv"]) == ("cublas", "mma")
    assert not executor.batch_invariant
    assert theirs.engine.executor.batch_invariant
    more = ours.memory_plan.activation_bytes - theirs.memory_plan.activation_bytes
    assert more == CudaStep.blas_workspace_bytes
    texts = [[one.text for one in llm.generate(PROMPTS, GREEDY)] for llm in (ours, theirs)]
    assert texts[0] == texts[1]
    with pytest.raises(
        ValueError, match=r"^gemm: product 'up' must be one of qkv, out, gate_up, down, head, \*$"
    ):
        opened(device="cuda", gemm={"up": "cublas"})


def test_as_many_run_at_once_as_a_device_is_for(opened: Callable[..., LLM]) -> None:
    for options, most in (
        ({"device": "cuda"}, 256),
        ({"device": "cuda", "max_num_batched_tokens": 64}, 64),
        ({}, 32),
        ({"device": "cuda", "max_num_seqs": 5}, 5),
    ):
        llm = opened(**{"max_num_seqs": None, "max_num_batched_tokens": 2048, "max_model_len": 64, **options})
        assert llm.memory_plan.max_num_seqs == llm.engine.batcher.scheduler.decode_mgr.max_batch_size == most


def test_a_prompt_is_computed_in_as_large_pieces_as_a_step_may_have(opened: Callable[..., LLM]) -> None:
    for device, options, largest in (
        ("cuda", {}, 64),
        ("cuda", {"max_chunk_size": 16}, 16),
        ("cpu", {}, 256),
    ):
        llm = opened(device=device, **options)
        assert llm.engine.batcher.scheduler.prefill_mgr.max_chunk_size == largest


# ---- memory


MODELS: dict[str, ModelConfig] = {
    "gpt2": ModelConfig(vocab_size=301, n_layer=2, n_head=2, n_embd=36, max_seq_len=256),
    "qwen3": ModelConfig(
        vocab_size=300, n_layer=2, n_head=4, n_embd=64, n_kv_head=2, head_dim=32, max_seq_len=1024, positions="rope",
        norm="rmsnorm", gated_mlp=True, activation="silu", intermediate_size=90, qkv_bias=False, out_bias=False,
        mlp_bias=False, family="llama", qk_norm="head", sliding_window=40, sliding_layers=(True, False), tie_embeddings=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", [Precision(), Precision("bfloat16", "bfloat16")], ids=["f32", "bf16"])
def test_the_plan_is_what_an_executor_allocates(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: Precision
) -> None:
    """Whoever adds a buffer to a step or a weight to a model changes both, or sees this fail."""
    load_images(monkeypatch)
    config, sizes = MODELS[name], {"max_num_batched_tokens": 96, "max_num_seqs": 5, "max_model_len": 200}
    gpu = backend.open_device("cuda")
    weights = random_weights(config, 1)
    bound = bind_weights(config, weights)
    plan = gpu.plan_memory(config, bound, precision=precision, kv_cache_bytes=MIB, **sizes)
    empty = used_bytes(gpu.device)
    pool = gpu.make_pool(config, precision, plan.num_pages, plan.page_size)
    pooled = used_bytes(gpu.device) - empty
    zeros = plan.page_bytes  # which pages are cleared from
    assert 0 <= pooled - plan.kv_cache_bytes - zeros < 2 * GRANULARITY
    executor = gpu.make_executor(config, weights, pool, precision=precision, **sizes)
    assert executor.weight_bytes == plan.weight_bytes
    taken = used_bytes(gpu.device) - empty - pooled
    blocks = len(bound) + 30  # rotary tables, buffers, inputs and logits beside the weights
    assert 0 <= taken + zeros - plan.weight_bytes - plan.activation_bytes < blocks * GRANULARITY


def test_a_fraction_of_the_device_is_kept(opened: Callable[..., LLM]) -> None:
    device = CudaDevice()
    empty = used_bytes(device)
    llm = opened(device="cuda", gpu_memory_utilization=0.0015)
    taken = used_bytes(device) - empty
    plan = llm.memory_plan
    assert plan.memory_bytes == int(0.0015 * device.total_bytes)
    assert plan.memory_bytes - plan.page_bytes < plan.total_bytes <= plan.memory_bytes
    assert plan.num_pages == llm.engine.kv_pool.num_pages
    assert abs(taken - plan.total_bytes) < 100 * GRANULARITY
    assert len(llm.generate(PROMPTS, GREEDY)) == 3


def test_a_pool_by_bytes(opened: Callable[..., LLM]) -> None:
    llm = opened(device="cuda", kv_cache_bytes=MIB)
    page = llm.memory_plan.page_bytes
    assert llm.engine.kv_pool.num_pages == MIB // page
    assert llm.memory_plan.memory_bytes is not None


def test_a_pool_is_no_larger_than_all_sequences_can_use(opened: Callable[..., LLM]) -> None:
    assert opened(device="cuda", max_num_seqs=2, max_model_len=64).engine.kv_pool.num_pages == 2 * 64 // 16


def test_what_does_not_fit_says_so_with_the_numbers(opened: Callable[..., LLM]) -> None:
    numbers = r"less than \d+ of weights \(\d+ parameters\) \+ \d+ of activations \+ \d+ of one KV page"
    with pytest.raises(ValueError, match=rf"^gpu_memory_utilization: 1e-05 of \d+ bytes is \d+, {numbers}$"):
        opened(device="cuda", gpu_memory_utilization=1e-5)
    with pytest.raises(
        ValueError, match=r"^kv_cache_bytes: \d+ \+ .* is \d+, more than \d+ bytes of \d+ that are free"
    ):
        opened(device="cuda", kv_cache_bytes=2**31)
    enough = opened(device="cuda", kv_cache_bytes=MIB).memory_plan
    total = CudaDevice().total_bytes
    fraction = (enough.weight_bytes + enough.activation_bytes + 3 * enough.page_bytes) / total
    with pytest.raises(ValueError, match=r"^max_model_len: 512 tokens need 32 KV pages of \d+ bytes"):
        opened(device="cuda", gpu_memory_utilization=fraction, max_model_len=512)
    assert opened(device="cuda", gpu_memory_utilization=fraction).engine.executor.max_model_len <= 48


@pytest.fixture
def half_taken() -> Iterator[None]:
    """Something else holds half of the device."""
    device = CudaDevice()
    held = cuda_pool(CudaStream(device), device.total_bytes // 2 // (2 * 16 * 16 * 4) - 8)
    yield
    del held


@pytest.mark.usefixtures("half_taken")
def test_memory_that_others_hold_cannot_be_had(opened: Callable[..., LLM]) -> None:
    told = (
        r"^gpu_memory_utilization: 0.9 of \d+ bytes is \d+, of which only \d+ are free: .* give at most 0.5$"
    )
    with pytest.raises(ValueError, match=told):
        opened(device="cuda")
    assert opened(device="cuda", gpu_memory_utilization=0.4, max_model_len=64).engine.kv_pool.num_pages == 16


def test_a_device_that_is_not_here_is_planned_the_same() -> None:
    config = MODELS["qwen3"]
    options: dict[str, Any] = {"precision": Precision("bfloat16", "bfloat16"), "max_num_seqs": 1000}
    plans = [
        plan_cuda_memory(config, expected_dtypes(config, "bf16"), chip, 2**29, **options) for chip in CHIPS.values()
    ]  # fmt: skip
    assert len(set(plans)) == 1
    assert plans[0].total_bytes <= plans[0].memory_bytes == int(0.9 * 2**29)


# ---- what goes wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device: 'gpu' must be cpu, cuda or cuda:N"),
        ({"device": None}, "device: None must be cpu, cuda or cuda:N"),
        ({"device": "cuda:3"}, "device: there is no cuda:3; of CUDA devices there are 1: cuda:0"),
        ({"device": "cuda", "quantization": "int8"}, "quantization: int8 is for the CPU; on a GPU, float32 and bfloat16"),
        ({"device": "cuda", "num_threads": 4}, "num_threads: 4 is for the CPU, device is 'cuda': leave it out"),
        ({"device": "cuda", "weight_cache": True}, "weight_cache: True is for the CPU, device is 'cuda'"),
        ({"device": "cuda", "gpu_memory_utilization": 1.5}, "gpu_memory_utilization: 1.5 must be more than 0 and at most 1"),
        ({"device": "cuda", "gpu_memory_utilization": float("nan")}, "gpu_memory_utilization: nan must be more than 0"),
        ({"device": "cuda", "gpu_memory_utilization": "all"}, "gpu_memory_utilization: 'all' must be more than 0"),
        ({"device": "cuda", "gpu_memory_utilization": 0.5, "kv_cache_bytes": 7},
         "gpu_memory_utilization: 0.5 and kv_cache_bytes: 7 both say how large the KV pool is"),
        ({"gpu_memory_utilization": 0.5}, "gpu_memory_utilization: 0.5 is for a GPU, device is 'cpu': leave it out"),
        ({"gemm": "cublas"}, "gemm: 'cublas' is for a GPU, device is 'cpu': leave it out"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Before anything is read: there is no checkpoint."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        LLM(tmp_path / "nothing", **options)


def in_a_process(code: str, **environment: str) -> str:
    """The last line a failing program says; the driver is asked once per process."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


OPEN = "from nanoserve import LLM; LLM('/nowhere', device='cuda')"


def test_without_a_driver_it_says_what_was_looked_for_and_what_works() -> None:
    said = in_a_process(OPEN, NANOSERVE_CUDA_DRIVER="")
    assert "no CUDA driver: libcuda.so.1" in said
    assert said.endswith("Without a GPU, device='cpu' works")


FAULT = """
from gpu.test_fake_driver import bad_kernel
from nanoserve import NanoServingEngine, SamplingParams
from nanoserve.emulator import image
from nanoserve.models.config import ModelConfig
from nanoserve.models.weights import random_weights
from nanoserve.native import CudaDevice, CudaDeviceLost, CudaKernel, CudaStream, cuda_launch
from tests.gpu.emulated_images import image_of
from nanoserve.cuda import backend
make = backend.CudaBackend.make_executor
backend.CudaBackend.make_executor = lambda self, *args, **options: make(self, *args, **options, image=image_of)
config = ModelConfig(vocab_size=300, n_layer=1, n_head=2, n_embd=32, max_seq_len=64)
engine = NanoServingEngine(config, random_weights(config, 1), device="cuda", max_num_batched_tokens=64)
engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
device = CudaDevice()
cuda_launch(CudaStream(device), CudaKernel(device, image(bad_kernel("crooked")), "crooked", 32, 0), [1], [16])
for _ in range(2):
    try:
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
    except CudaDeviceLost as error:
        last = error
raise last
"""


def test_a_device_that_a_kernel_has_broken_is_lost_and_says_so() -> None:
    said = in_a_process(FAULT)
    assert said.startswith("nanoserve._ch16.CudaDeviceLost: ")
    assert "CUDA_ERROR_" in said


def test_an_old_gpu_is_refused_by_name() -> None:
    said = in_a_process(OPEN, NANOSERVE_FAKE_CUDA_CAPABILITY="7.5")
    assert "nanoserve emulated GPU has compute capability 7.5, kernels are made for sm_80" in said


def test_kernels_that_are_neither_here_nor_can_be_made(
    opened: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "toolchain", lambda *_: None)
    monkeypatch.setattr(library, "ArtifactStore", lambda: ArtifactStore(tmp_path))
    with pytest.raises(library.KernelMissing, match=r"is not in .*, and compiling it needs"):
        opened(device="cuda")


def test_auto_is_bfloat16_for_16_bits_on_a_gpu() -> None:
    chosen = {stored: choose_precision("auto", None, "auto", stored, 64, gpu=True) for stored in ("f32", "bf16", "f16")}  # fmt: skip
    assert chosen["f32"] == Precision()
    assert chosen["bf16"] == chosen["f16"] == Precision("bfloat16", "bfloat16")
    assert choose_precision("float32", None, "auto", "bf16", 64, gpu=True) == Precision()
