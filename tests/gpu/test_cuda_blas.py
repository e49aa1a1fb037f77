"""Products by cuBLAS inside the plan of a device: the library is a fake on the emulated device, its calls are the real ones."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.gpu.conftest import BUILD
from tests.gpu.fake_driver import FakeDriver
from tests.gpu.test_cuda_engine import BF16, F32, GREEDY, answers, configs, image_of

from nanoserve import NanoServingEngine
from nanoserve.cuda import backend
from nanoserve.cuda.cublas import SONAMES, cublas_paths
from nanoserve.cuda.device_weights import DeviceWeights
from nanoserve.cuda.executor import CudaExecutor
from nanoserve.cuda.gemm_choice import choose_gemms, products
from nanoserve.models.config import ModelConfig
from nanoserve.models.weights import random_weights
from nanoserve.native import (
    CublasError,
    CublasMissing,
    CudaDevice,
    CudaLimits,
    CudaStep,
    CudaStream,
    PageTable,
    cuda_pool,
)
from nanoserve.precision import Precision

LLAMA, GPT2 = configs()["llama"], configs()["gpt2"]
# What else comes after a sum, and rows of weights with something between them.
CAPPED = replace(LLAMA, intermediate_size=90, logits_softcap=0.5, residual_scale=0.7, logits_scale=1.3)
MIXED = {"gate_up": "cublas", "head": "cublas", "*": "mma"}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., NanoServingEngine]:
    """engine(config, gemm, precision, **options of the executor), with the same random weights every time."""
    make = backend.CudaBackend.make_executor

    def made(
        config: ModelConfig, gemm: str | Mapping[str, str] | None, precision: Precision = F32, **changes: Any
    ) -> NanoServingEngine:
        """Without a gemm, on the CPU."""

        def make_executor(self: Any, *args: Any, **options: Any) -> CudaExecutor:
            return make(self, *args, **{**options, "image": image_of, **changes})

        monkeypatch.setattr(backend.CudaBackend, "make_executor", make_executor)
        return NanoServingEngine(
            config, random_weights(config, 1), precision=precision, kv_cache_pages=64, max_num_batched_tokens=128,
            max_chunk_size=48, max_batch_size=4, device="cpu" if gemm is None else "cuda", gemm=gemm,
        )  # fmt: skip

    return made


@pytest.fixture
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 300, size).tolist() for size in (1, 5, 70, 130, 64)]


def executor_of(engine: NanoServingEngine) -> CudaExecutor:
    assert isinstance(engine.executor, CudaExecutor)
    return engine.executor


# ---- answers


@pytest.mark.parametrize("config", [LLAMA, GPT2, CAPPED], ids=["llama", "gpt2", "capped"])
def test_float32_tokens_are_the_cpus(
    engine: Callable[..., NanoServingEngine], prompts: list[list[int]], config: ModelConfig
) -> None:
    """Biases, activations, gates, scales, caps and the residual stream are all there in one of these."""
    gpu = engine(config, "cublas")
    ours = answers(gpu.generate(prompts, GREEDY))
    theirs = answers(engine(config, None).generate(prompts, GREEDY))
    for (tokens, logprobs), (cpu_tokens, cpu_logprobs) in zip(ours, theirs, strict=True):
        assert tokens == cpu_tokens
        assert np.abs(np.subtract(logprobs, cpu_logprobs)).max() < 2e-6
    executor = executor_of(gpu)
    assert executor.counts["graph_launches"] > 3
    # Each product of a step by launches; for a graph, twice: once before and once during the capture.
    launched = executor.counts["steps"] - executor.counts["graph_launches"]
    per_step = 4 * config.n_layer + 1
    assert executor.counts["products"] == per_step * (launched + 2 * executor.counts["graphs"])
    assert not executor.batch_invariant
    assert executor.cublas == (str(BUILD / "libfakecublas.so"), 130000)
    gpu.audit()


def test_graphs_and_launches_agree(
    engine: Callable[..., NanoServingEngine], prompts: list[list[int]]
) -> None:
    by_graphs = engine(LLAMA, "cublas", BF16)
    by_launches = engine(LLAMA, "cublas", BF16, buckets=[])
    assert answers(by_graphs.generate(prompts, GREEDY)) == answers(by_launches.generate(prompts, GREEDY))
    assert executor_of(by_graphs).counts["graphs"] > 0
    assert executor_of(by_launches).counts["graphs"] == 0


@pytest.mark.parametrize("gemm", ["cublas", MIXED], ids=["all", "some"])
def test_bfloat16_is_near_our_kernels(
    engine: Callable[..., NanoServingEngine], prompts: list[list[int]], gemm: str | Mapping[str, str]
) -> None:
    ours = answers(engine(LLAMA, gemm, BF16).generate(prompts, GREEDY))
    theirs = answers(engine(LLAMA, None, BF16).generate(prompts, GREEDY))
    for (tokens, logprobs), (cpu_tokens, cpu_logprobs) in zip(ours, theirs, strict=True):
        same = next(
            (at for at, (a, b) in enumerate(zip(tokens, cpu_tokens, strict=True)) if a != b), len(tokens)
        )
        assert same > 0
        assert np.abs(np.subtract(logprobs[:same], cpu_logprobs[:same])).max() < 0.02


def test_a_choice_by_product(engine: Callable[..., NanoServingEngine], prompts: list[list[int]]) -> None:
    """float32 tokens again, and nothing by cuBLAS that was not asked for."""
    gpu = engine(LLAMA, MIXED, buckets=[])
    executor = executor_of(gpu)
    assert executor.gemm == {"qkv": "mma", "out": "mma", "gate_up": "cublas", "down": "mma", "head": "cublas"}
    ours = answers(gpu.generate(prompts, GREEDY))
    theirs = answers(engine(LLAMA, None).generate(prompts, GREEDY))
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    assert executor.counts["products"] == executor.counts["steps"] * (LLAMA.n_layer + 1)
    kinds = {spec.kind for spec in executor.artifacts}
    assert {"gemm_f32", "activation"} <= kinds
    assert not {"gemm_f32", "gemm_mma"} & {
        spec.kind for spec in executor_of(engine(LLAMA, "cublas")).artifacts
    }


def test_without_cublas_bits_are_promised(engine: Callable[..., NanoServingEngine]) -> None:
    executor = executor_of(engine(LLAMA, "mma"))
    assert executor.batch_invariant
    assert executor.cublas is None
    assert executor.counts["products"] == 0


# ---- choices


def test_choices() -> None:
    assert products(LLAMA) == ["qkv", "out", "gate_up", "down", "head"]
    assert products(GPT2) == ["qkv", "out", "up", "down", "head"]
    assert choose_gemms("wgmma", GPT2) == dict.fromkeys(products(GPT2), "wgmma")
    assert choose_gemms({"up": "cublas"}, GPT2) == {**dict.fromkeys(products(GPT2), "mma"), "up": "cublas"}
    assert choose_gemms({"*": "cublas", "head": "mma"}, GPT2)["qkv"] == "cublas"


@pytest.mark.parametrize(
    ("gemm", "message"),
    [
        ("blas", r"gemm: 'blas' for \* must be one of mma, wgmma, cublas"),
        ({"head": "tf32"}, r"gemm: 'tf32' for head must be one of mma, wgmma, cublas"),
        ({"up": "cublas"}, r"gemm: product 'up' must be one of qkv, out, gate_up, down, head, \*"),
        ({"head": "wgmma"}, r"gemm: wgmma for head: f32 times a weight of f32 is for mma only"),
    ],
)
def test_what_is_not_there_is_refused(
    engine: Callable[..., NanoServingEngine], gemm: str | Mapping[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine(LLAMA, gemm)


def test_two_types_in_one_product_are_for_our_kernels(
    engine: Callable[..., NanoServingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 arithmetic with a checkpoint's 16-bit weights."""
    monkeypatch.setattr(DeviceWeights, "dtype", lambda self, name: "bf16")
    with pytest.raises(ValueError, match="gemm: cublas for qkv: f32 times a weight of bf16 is for mma only"):
        engine(LLAMA, "cublas")


# ---- the library


def test_a_machine_without_cublas_says_where_it_looked(
    engine: Callable[..., NanoServingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOSERVE_CUBLAS", "/nowhere/libcublas.so.13")
    with pytest.raises(CublasMissing, match=r"no cuBLAS: .*NANOSERVE_CUBLAS names it; tried\n  /nowhere/lib"):
        engine(LLAMA, "cublas")
    monkeypatch.setenv("NANOSERVE_CUBLAS", str(BUILD / "libfakecuda.so"))
    with pytest.raises(CublasMissing, match=r"libfakecuda.so has no cublasCreate_v2"):
        engine(LLAMA, "cublas")


def test_wheels_come_before_the_systems_loader(tmp_path: Any) -> None:
    library = tmp_path / "nvidia" / "cu13" / "lib" / SONAMES[0]
    library.parent.mkdir(parents=True)
    library.touch()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "NANOSERVE_CUBLAS": ""}
    code = "from nanoserve.cuda.cublas import cublas_paths; print(*cublas_paths())"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    found = done.stdout.split()
    assert found[0] == str(library)
    assert found[-2:] == list(SONAMES)
    assert cublas_paths() == [str(BUILD / "libfakecublas.so")]


LIMITS = CudaLimits(
    max_tokens=4, max_positions=4, max_sequences=4, max_pieces=4, max_samples=4, chunk_rows=16, segment=512, vocab=8, logits_stride=8, num_blocks=1
)  # fmt: skip


def test_a_plan_checks_its_products() -> None:
    step = CudaStep(cuda_pool(CudaStream(CudaDevice()), 4), LIMITS)
    buffer = ("buffer", step.buffer(1024))
    sizes = {"n": 8, "k": 8, "ldx": 8, "ldw": 8, "ldy": 8, "element": "bf16", "y_element": "f32"}

    def product(*args: Any, **changes: Any) -> None:
        step.product("p", *(args or (buffer, buffer, buffer, ("num_rows",))), **{**sizes, **changes})

    with pytest.raises(ValueError, match="p: cuBLAS is not loaded"):
        product()
    step.load_blas(cublas_paths())
    product()
    with pytest.raises(ValueError, match=r"ldx is 7, must be in \[8, 2147483647\]"):
        product(ldx=7)
    with pytest.raises(ValueError, match="p: cuBLAS gives float32 of float32"):
        product(element="f32", y_element="bf16")
    with pytest.raises(ValueError, match=r"buffer is 9, must be in \[0, 0\]"):
        product(buffer, buffer, ("buffer", 9), ("num_rows",))
    with pytest.raises(ValueError, match="p: rows is a number"):
        product(buffer, buffer, buffer, buffer)
    with pytest.raises(ValueError, match="p: x, w and y are pointers"):
        product(buffer, ("num_rows",), buffer, ("num_rows",))


def test_a_refusal_of_the_library_names_the_product() -> None:
    """A buffer that is too small, which the fake library sees."""
    pool = cuda_pool(CudaStream(CudaDevice()), 4)
    step = CudaStep(pool, LIMITS)
    step.load_blas(cublas_paths())
    buffer = ("buffer", step.buffer(64))
    step.product(
        "layers.0.out.weight", buffer, buffer, buffer, ("number", 3), n=8, k=8, ldx=8, ldw=8, ldy=8, element="f32",
        y_element="f32",
    )  # fmt: skip
    table = PageTable(pool)
    table.grow_to(1)
    with pytest.raises(
        CublasError,
        match=r"cublasGemmEx of layers\.0\.out\.weight, 3 rows, n=8, k=8: CUBLAS_STATUS_EXECUTION_FAILED \(13\)",
    ):
        step.start([1], [table], [0], [1], [0], 8)


# ---- the fake library itself

F32_TYPE, BF16_TYPE, COMPUTE_F32, COMPUTE_TF32 = 0, 14, 68, 77
ALLOC_FAILED, INVALID, EXECUTION_FAILED, NOT_SUPPORTED = 3, 7, 13, 15


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    fake = FakeDriver()
    fake.open()
    yield fake
    fake.close()


class Blas:
    """A handle of the fake library, and y = a^T b of column-major matrices through it: status of the call."""

    def __init__(self, stream: int) -> None:
        self.lib = ctypes.CDLL(str(BUILD / "libfakecublas.so"))
        self.handle = ctypes.c_void_p()
        assert self.lib.cublasCreate_v2(ctypes.byref(self.handle)) == 0
        assert self.lib.cublasSetStream_v2(self.handle, ctypes.c_void_p(stream)) == 0

    def gemm(self, a: int, b: int, c: int, m: int, n: int, k: int, **changes: Any) -> int:
        options = {
            "beta": 0.0,
            "lda": k,
            "ldb": k,
            "ldc": m,
            "types": (F32_TYPE,) * 3,
            "compute": COMPUTE_F32,
            **changes,
        }
        alpha, beta = ctypes.c_float(1), ctypes.c_float(options["beta"])
        pointer = ctypes.c_void_p
        a_type, b_type, c_type = options["types"]
        return int(
            self.lib.cublasGemmEx(
                self.handle, 1, 0, m, n, k, ctypes.byref(alpha), pointer(a), a_type, options["lda"], pointer(b), b_type,
                options["ldb"], ctypes.byref(beta), pointer(c), c_type, options["ldc"], options["compute"], -1,
            )
        )  # fmt: skip


def test_the_fake_library_multiplies_in_stream_order(driver: FakeDriver) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 8)).astype(np.float32), rng.standard_normal((5, 8)).astype(np.float32)
    device_a, device_b, device_c = driver.upload(a), driver.upload(b), driver.alloc(4 * 15)
    stream = driver.stream()
    blas = Blas(stream)
    assert blas.gemm(device_a, device_b, device_c, 3, 5, 8) == 0
    assert np.isnan(driver.download(device_c, 15)).all()  # nobody waited; what was there is not added
    driver.call("cuStreamSynchronize", stream)
    product = (b.astype(np.float64) @ a.T.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(driver.download(device_c, 15).reshape(5, 3), product)
    assert blas.gemm(device_a, device_b, device_c, 3, 5, 8, beta=1.0) == 0
    driver.call("cuStreamSynchronize", stream)
    np.testing.assert_allclose(driver.download(device_c, 15).reshape(5, 3), 2 * product, rtol=1e-6)
    assert blas.gemm(device_a, device_b, device_c, 3, 5, 9) == EXECUTION_FAILED  # beyond an allocation
    assert blas.gemm(device_a, device_b, device_c, 3, 5, 8, ldb=7) == INVALID
    assert blas.gemm(device_a, device_b, device_c, 3, 5, 8, ldc=2) == INVALID
    for types in ((BF16_TYPE, F32_TYPE, F32_TYPE), (F32_TYPE, F32_TYPE, BF16_TYPE)):
        assert blas.gemm(device_a, device_b, device_c, 3, 5, 8, types=types) == NOT_SUPPORTED
    assert blas.gemm(device_a, device_b, device_c, 3, 5, 8, compute=COMPUTE_TF32) == NOT_SUPPORTED


def test_the_fake_library_is_strict_in_captures(driver: FakeDriver) -> None:
    """It wants a workspace, and to have multiplied such matrices before; a graph reads what memory holds at each launch."""
    ones = np.ones(4, np.float32)
    x, y = driver.upload(ones), driver.alloc(16)
    stream = driver.stream()
    blas = Blas(stream)
    workspace = driver.alloc(1024)

    def captured() -> int:
        driver.capture(stream)
        status = blas.gemm(x, x, y, 2, 2, 2)
        graphs.append(driver.end_capture(stream))
        return status

    graphs: list[int] = []
    assert captured() == ALLOC_FAILED
    assert (
        blas.lib.cublasSetWorkspace_v2(blas.handle, ctypes.c_void_p(workspace), ctypes.c_size_t(2048))
        == INVALID
    )
    assert blas.lib.cublasSetWorkspace_v2(blas.handle, ctypes.c_void_p(workspace), ctypes.c_size_t(1024)) == 0
    assert captured() == EXECUTION_FAILED
    assert blas.gemm(x, x, y, 2, 2, 2) == 0
    driver.call("cuStreamSynchronize", stream)
    assert captured() == 0
    driver.call("cuMemsetD32_v2", x, 0x40000000, 4)  # 2.0
    driver.call("cuCtxSynchronize")
    driver.call("cuGraphLaunch", graphs[-1], stream)
    driver.call("cuStreamSynchronize", stream)
    assert driver.download(y, 4).tolist() == [8] * 4
