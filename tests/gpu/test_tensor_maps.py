"""Tensor maps from the driver to the step: what cuTensorMapEncodeTiled demands, and what the launcher makes of it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.gpu.conftest import BUILD
from tests.gpu.emulated_images import image_of, load_images
from tests.gpu.test_cuda_blas import LIMITS
from tests.gpu.test_cuda_engine import BF16, answers, configs

from gpu.fake_driver import CudaError as DriverError
from gpu.fake_driver import FakeDriver, own_driver
from gpu.matrix_problem import MatrixProblem
from gpu.run_kernel import artifact
from gpu.test_emulator_tensor import MADE, Copying
from nanoserve import NanoServingEngine, SamplingParams
from nanoserve.compiler.gpu.artifact import Artifact, ArtifactStore
from nanoserve.cuda.executor import CudaExecutor
from nanoserve.emulator import FAKE_DRIVER, image, library_path
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm_tma import gemm_tma_spec
from nanoserve.kernels.cuda.wgmma_tile import Shape
from nanoserve.models.weights import random_weights
from nanoserve.native import (
    CudaDevice,
    CudaError,
    CudaGraph,
    CudaKernel,
    CudaMemory,
    CudaStep,
    CudaStream,
    cuda_launch,
    cuda_pool,
)

INVALID_VALUE, NOT_SUPPORTED = 1, 801
BFLOAT16 = 9
ENCODE = "cuTensorMapEncodeTiled"


# ---- the driver


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    with own_driver() as fake:
        yield fake


def encoded(driver: FakeDriver, address: int, *, skew: int = 0, **changes: Any) -> bytes:
    """A map of 16 rows of 64 bfloat16, of which boxes have 8."""
    given = {
        "type": BFLOAT16, "dims": [64, 16], "strides": [128], "box": [64, 8], "steps": [1, 1], "interleave": 0,
        "swizzle": 3, "promotion": 2, "fill": 0, **changes,
    }  # fmt: skip
    rank = given.get("rank", len(given["dims"]))
    bytes_ = ctypes.create_string_buffer(128 + 128)
    at = ctypes.addressof(bytes_) + -ctypes.addressof(bytes_) % 64 + skew
    arrays = [
        (kind * 8)(*given[name])
        for name, kind in (("dims", ctypes.c_uint64), ("strides", ctypes.c_uint64), ("box", ctypes.c_uint32), ("steps", ctypes.c_uint32))
    ]  # fmt: skip
    options = [given[name] for name in ("interleave", "swizzle", "promotion", "fill")]
    driver.call(ENCODE, at, given["type"], rank, address, *arrays, *options)
    return ctypes.string_at(at, 128)


ADDRESS = 1 << 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skew": 16}, "must be aligned to 64 bytes"),
        ({"type": 13}, "tensorDataType = 13"),
        ({"rank": 0}, "tensorRank = 0"),
        ({"rank": 6}, "tensorRank = 6"),
        ({"address": ADDRESS + 8}, "globalAddress = .*: must be a multiple of 16"),
        ({"address": 0}, "globalAddress = 0"),
        ({"dims": [64, 0]}, "globalDim = 0"),
        ({"dims": [64, 2**32 + 1]}, "globalDim = 4294967297"),
        ({"strides": [136]}, "globalStrides = 136: must be a multiple of 16"),
        ({"strides": [2**40]}, "globalStrides = 1099511627776: .* less than 2.40"),
        ({"box": [64, 0]}, "boxDim = 0"),
        ({"box": [64, 257]}, "boxDim = 257: must be 1 to 256"),
        ({"box": [4, 8]}, "boxDim.0. in bytes = 8: must be a multiple of 16"),
        ({"box": [72, 8]}, "boxDim.0. in bytes = 144: must not be more than the swizzle spans"),
        ({"box": [64, 8], "swizzle": 2}, "boxDim.0. in bytes = 128: must not be more than the swizzle spans"),
        ({"steps": [1, 9]}, "elementStrides = 9: must be 1 to 8"),
        ({"steps": [1, 2]}, "elementStrides = 2: only 1 is emulated"),
        ({"interleave": 1}, "interleave = 1"),
        ({"swizzle": 4}, "swizzle = 4"),
        ({"promotion": 4}, "l2Promotion = 4"),
        ({"fill": 1, "type": 1}, "oobFill = 1"),
        ({"fill": 2}, "oobFill = 2"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_driver_refuses(driver: FakeDriver, changes: dict[str, Any], message: str) -> None:
    encoded(driver, ADDRESS)
    with pytest.raises(DriverError, match=message) as refused:
        encoded(driver, **{"address": ADDRESS, **changes})
    assert refused.value.code == INVALID_VALUE


def test_other_types_and_swizzles_are_taken(driver: FakeDriver) -> None:
    for kind, size in ((0, 1), (6, 2), (7, 4), (8, 8), (11, 4)):
        encoded(driver, ADDRESS, type=kind, box=[128 // size, 8])
    encoded(driver, ADDRESS, dims=[64, 2**32], strides=[2**40 - 16], box=[256, 256], swizzle=0)
    encoded(
        driver, ADDRESS, dims=[64] * 5, strides=[128, 16, 256, 4096], box=[8] * 5, steps=[1] * 5, swizzle=1
    )


def test_devices_before_hopper_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOSERVE_FAKE_CUDA_CAPABILITY", "8.9")
    with own_driver() as fake:
        with pytest.raises(DriverError, match=r"compute capability 9\.0 and higher") as refused:
            encoded(fake, ADDRESS)
        assert refused.value.code == NOT_SUPPORTED


def copying_image() -> bytes:
    made = Copying()
    made.shown = 512
    for step in (*MADE, Copying.copy, Copying.wait, Copying.show):
        step(made)
    return image(made.text())


def test_a_launch_takes_the_map_by_value_and_a_graph_keeps_it(driver: FakeDriver) -> None:
    function = driver.load(copying_image(), "copying")
    first, second = (np.arange(1024, dtype=np.uint16) + start for start in (1, 2000))
    sources = [driver.upload(each) for each in (first, second)]
    out, stream = driver.alloc(1024), driver.stream()
    driver.launch(function, [encoded(driver, sources[0]), out, 0, 3], stream)
    driver.call("cuStreamSynchronize", stream)
    plain = driver.download(out, 512, np.uint16)
    assert sorted(plain) == list(first[3 * 64 : 11 * 64])
    driver.capture(stream)
    driver.launch(function, [encoded(driver, sources[1]), out, 0, 0], stream)
    graph = driver.end_capture(stream)
    assert (driver.download(out, 512, np.uint16) == plain).all()
    for start in (2000, 5000):  # the map stays what it was, the memory is what it is now
        values = np.arange(1024, dtype=np.uint16) + start
        driver.call("cuMemcpyHtoD_v2", sources[1], values.ctypes.data, values.nbytes)
        driver.call("cuCtxSynchronize")
        driver.call("cuGraphLaunch", graph, stream)
        driver.call("cuStreamSynchronize", stream)
        assert sorted(driver.download(out, 512, np.uint16)) == list(range(start, start + 512))


# ---- the launcher

PROBLEM = MatrixProblem(150, 136, 77, x="bf16", dtype="bf16")
SPEC = gemm_tma_spec(PROBLEM.k, PROBLEM.n, PROBLEM.ldx, PROBLEM.ldy, Shape(2, 128, 3), Epilogue())


@pytest.fixture(scope="module")
def made() -> Artifact:
    return artifact(SPEC, "sm_90a")


def loaded(made: Artifact, **changes: Any) -> CudaKernel:
    """Its kernel; changes of the tensor maps' forms by name of the part, of x's and w's alike."""
    names = ("argument", "element", "dims", "strides", "box", "swizzle")
    tensors = [
        tuple(changes.get(name, value) for name, value in zip(names, form, strict=True))
        for form in made.launch.native_tensors
    ]
    launch = made.launch
    return CudaKernel(CudaDevice(), image_of(made), launch.entry, launch.block, launch.shared_bytes, tensors)  # type: ignore[arg-type]


def test_a_kernel_on_the_device_and_in_a_graph(made: Artifact) -> None:
    kernel, stream = loaded(made), CudaStream(CudaDevice())
    p = PROBLEM
    x, w, y = (CudaMemory(stream, each.nbytes) for each in (p.x, p.w, p.y0))

    def launch() -> None:
        memory = [(each.address, each.num_bytes) for each in (x, w)]
        cuda_launch(stream, kernel, SPEC.grid_of({"m": p.m}), [*memory, y.address, p.m])

    def result() -> bytes:
        out = np.zeros_like(p.y0)
        y.download(out)
        y.upload(p.y0)
        return out[: p.m, : p.n].tobytes()

    for memory, values in ((x, p.x), (w, p.w), (y, p.y0)):
        memory.upload(values)
    launch()
    expected = p.run(SPEC, chip="sm_90a").tobytes()
    assert result() == expected
    graph = CudaGraph(stream, launch)
    for _ in range(2):
        graph.launch(stream)
        assert result() == expected


def test_what_a_kernel_of_tensor_maps_refuses(made: Artifact) -> None:
    part = r"a tensor map has a box of 2 to 5 dimensions, an extent for each but the outermost"
    for changes, message in (
        ({"box": (64,)}, part),
        ({"dims": (64, 2)}, part),
        ({"strides": ()}, part),
        ({"box": (64, 0)}, "a number of a tensor map"),
        ({"swizzle": 48}, "swizzle spans 0, 32, 64 or 128 bytes, not 48"),
        ({"element": "f64"}, "f64"),
        ({"argument": 40}, "argument of a tensor map"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(made, **changes)


def test_what_a_launch_of_tensor_maps_refuses(made: Artifact) -> None:
    stream = CudaStream(CudaDevice())
    x = CudaMemory(stream, 1 << 16)
    memory = (x.address, x.num_bytes)
    for kernel, args, error, message in (
        (loaded(made), [x.address, memory, x.address, 1], ValueError, "argument 0 is taken by a tensor map"),
        (loaded(made), [memory, memory, memory, 1], ValueError, "an argument is memory, and taken by its address"),
        (loaded(made), [(x.address, 8), memory, x.address, 1], ValueError, "8 bytes are less than one of"),
        (loaded(made, argument=9), [memory, memory, x.address, 1], ValueError, "argument of a tensor map"),
        (loaded(made, strides=(68,)), [memory, memory, x.address, 1], CudaError, f"{ENCODE}: CUDA_ERROR_INVALID_VALUE"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            cuda_launch(stream, kernel, (1, 1, 1), args)  # type: ignore[arg-type]


def test_what_a_plan_of_tensor_maps_refuses(made: Artifact) -> None:
    step = CudaStep(cuda_pool(CudaStream(CudaDevice()), 4), LIMITS)
    grid: list[tuple[tuple[str, int], int, int]] = [(("number", 1), 1, 1)]
    good, small = ("buffer", step.buffer(1 << 16)), ("buffer", step.buffer(16))

    def add(*args: tuple[Any, ...], **changes: Any) -> None:
        step.op("product", [(0, loaded(made, **changes), grid)], args)

    add(good, good, good, ("number", 1))
    with pytest.raises(ValueError, match="memory of the plan's own, a buffer or a weight, is needed"):
        add(("ids",), good, good, ("number", 1))
    with pytest.raises(
        ValueError, match="product: 16 bytes are less than one of its tensor map's outermost parts"
    ):
        add(small, good, good, ("number", 1))
    with pytest.raises(ValueError, match="argument of a tensor map"):
        add(good, good, good, ("number", 1), argument=4)
    with pytest.raises(CudaError, match=f"product: {ENCODE}: CUDA_ERROR_INVALID_VALUE"):
        add(good, good, good, ("number", 1), strides=(68,))


def test_a_driver_without_tensor_maps_says_so(tmp_path: Path) -> None:
    """And runs everything else: it is asked for when a kernel needs it."""
    old = tmp_path / "libcuda.so.1"
    data = library_path(FAKE_DRIVER).read_bytes()
    assert ENCODE.encode() in data
    old.write_bytes(data.replace(ENCODE.encode(), ENCODE[:-1].encode() + b"_"))
    code = (
        "from tests.gpu.test_tensor_maps import *\n"
        "stream = CudaStream(CudaDevice())\n"
        "x = CudaMemory(stream, 1 << 16)\n"
        "kernel, memory = loaded(artifact(SPEC, 'sm_90a')), (x.address, x.num_bytes)\n"
        "cuda_launch(stream, kernel, (1, 1, 1), [memory, memory, x.address, 1])\n"
    )
    env = {
        **os.environ, "NANOSERVE_CUDA_DRIVER": str(old), "LD_LIBRARY_PATH": str(BUILD),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    before = "import tests.gpu.conftest, os\nos.environ['NANOSERVE_CUDA_DRIVER'] = " + repr(str(old)) + "\n"
    done = subprocess.run(
        [sys.executable, "-c", before + code],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=BUILD.parents[1],
    )
    assert done.returncode != 0
    assert "CudaDriverMissing" in done.stderr
    assert f"the CUDA driver has no {ENCODE}, it is older than CUDA 12.0" in done.stderr


def test_artifacts_carry_the_forms(made: Artifact, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "cuda")
    store.store("k", made)
    found = store.find("k")
    assert found == made
    assert found is not None
    assert dict(found.launch.tensors) == dict(SPEC.tensors)
    assert [form[0] for form in found.launch.native_tensors] == [0, 1]


# ---- the engine


def test_many_sequences_decode_in_a_graph_of_tensor_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 64 rows a step, each with the answers it has alone, and the CPU's tokens."""
    load_images(monkeypatch)
    config = configs()["llama"]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=1)
    prompts = [[7 * i % 300 + 1] for i in range(70)]

    def engine(sequences: int, **where: Any) -> NanoServingEngine:
        return NanoServingEngine(
            config, random_weights(config, 1), precision=BF16, kv_cache_pages=160, max_num_batched_tokens=128,
            max_batch_size=sequences, **where,
        )  # fmt: skip

    many, few = (engine(sequences, device="cuda", gemm="wgmma") for sequences in (70, 3))
    together = answers(many.generate(prompts, params))
    assert isinstance(many.executor, CudaExecutor)
    assert many.executor.counts["graph_launches"] >= 2
    for start in (0, 67):
        assert answers(few.generate(prompts[start : start + 3], params)) == together[start : start + 3]
    on_cpu = answers(engine(70, device="cpu").generate(prompts, params))
    assert [tokens for tokens, _ in together] == [tokens for tokens, _ in on_cpu]
    np.testing.assert_allclose([probs for _, probs in together], [probs for _, probs in on_cpu], atol=5e-3)
