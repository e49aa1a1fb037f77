"""The commands on a CUDA device in software: they run, plan, look at it, and show its kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.gpu.emulated_images import load_images
from typer.testing import CliRunner

from nanoserve.cli import health
from nanoserve.cli.app import app
from nanoserve.cli.gpu_kernels import GPU_KERNELS
from nanoserve.compiler.gpu import cubin
from nanoserve.compiler.gpu.chip import CHIPS
from nanoserve.compiler.gpu.lowering import STAGES
from nanoserve.cuda import executor
from nanoserve.cuda.same_bits import OtherBits
from nanoserve.kernels.cuda import library
from nanoserve.native import CudaDevice, CudaStep
from support.text_checkpoint import make_text_checkpoint

Run = Callable[..., Any]
ON_GPU = ["--device", "cuda", "--max-num-seqs", "4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("generate", ...) -> a result with exit_code, stdout and stderr."""
    load_images(monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str | Path) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


def test_generate_says_what_the_cpu_says(run: Run, checkpoint: Path) -> None:
    words = ["generate", checkpoint, "-p", "Hello", "--temperature", "0", "--max-tokens", "8", "--ignore-eos"]
    gpu, cpu = run(*words, *ON_GPU), run(*words)
    assert (gpu.exit_code, gpu.stdout) == (0, cpu.stdout)
    blas = run(*words, *ON_GPU, "--gemm", "cublas", "--gemm", "qkv=mma")
    assert (blas.exit_code, blas.stdout) == (0, cpu.stdout)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--device", "cuda:9"], 2, "device: there is no cuda:9"),
        (["--device", "metal"], 2, "device: 'metal' must be cpu, cuda or cuda:N"),
        (["--gpu-memory-utilization", "0.5"], 2, "gpu_memory_utilization: 0.5 is for a GPU"),
        (["--device", "cuda", "--threads", "2"], 2, "num_threads: 2 is for the CPU, device is 'cuda'"),
        (["--device", "cuda", "--gpu-memory-utilization", "0.5", "--kv-cache", "1MiB"], 2,
         "gpu_memory_utilization: 0.5 and kv_cache_bytes: 1048576 both say"),
        (["--gemm", "cublas"], 2, "gemm: {'*': 'cublas'} is for a GPU, device is 'cpu'"),
        (["--device", "cuda", "--gemm", "blas"], 2, "gemm: 'blas' for * must be one of mma, wgmma, cublas"),
        (["--device", "cuda", "--gemm", "up=mma"], 2, "gemm: product 'up' must be one of qkv, out, gate_up, down, head, *"),
        (["--device", "cuda", "--gemm", "qkv=mma", "--gemm", "qkv=cublas"], 2,
         "--gemm: 'qkv=cublas': 'qkv' has mma already"),
        (["--device", "cuda", "--gpu-memory-utilization", "2"], 2, "gpu_memory_utilization: 2.0 must be more than 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["plan", "generate"])
def test_what_a_user_may_get_wrong(
    run: Run, checkpoint: Path, command: str, words: list[str], code: int, message: str
) -> None:
    prompt = ["-p", "x"] if command == "generate" else []
    result = run(command, checkpoint, *prompt, *words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(f"error: {message}")


def test_no_driver_is_a_sentence_and_exit_code_1(checkpoint: Path) -> None:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "NANOSERVE_CUDA_DRIVER": "/nowhere/libcuda.so.1",
    }
    command = [sys.executable, "-m", "nanoserve", "generate", str(checkpoint), "-p", "x", "--device", "cuda"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no CUDA driver: /nowhere/libcuda.so.1")
    assert done.stderr.endswith("Without a GPU, device='cpu' works\n")


def test_a_device_whose_instructions_differ_is_a_sentence_and_exit_code_1(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", checkpoint, "-p", "x", "--max-tokens", "1", *ON_GPU, "--dtype", "bfloat16", "--gemm", "wgmma"]  # fmt: skip
    assert run(*words).exit_code == 0

    def differ(*args: Any) -> None:
        raise OtherBits("gemm: wgmma: it differs")

    monkeypatch.setattr(executor, "check_same_bits", differ)
    result = run(*words)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "error: gemm: wgmma: it differs")


# ---- plan


def test_the_plan_is_what_a_model_gets_and_shows_its_arithmetic(run: Run, checkpoint: Path) -> None:
    words = ["plan", checkpoint, *ON_GPU, "--gpu-memory-utilization", "0.5", "--max-model-len", "128"]
    told = json.loads(run(*words, "--json").stdout)
    assert told["device"] == "cuda"
    assert told["memory_bytes"] == CudaDevice().total_bytes // 2
    assert told["total_bytes"] == told["weight_bytes"] + told["activation_bytes"] + told["kv_cache_bytes"]
    assert told["num_pages"] == 4 * 128 // 16
    assert told["stored_bytes"] is not None
    assert "of 512.0 MiB = 0.5 x 1.00 GiB of cuda:0, nanoserve emulated GPU (sm_90a)" in run(*words).stdout


def test_a_gpu_that_is_not_here_is_planned(run: Run, checkpoint: Path) -> None:
    words = ["plan", checkpoint, "--device", "cuda", "--memory", "80GiB"]
    assert "of 72.00 GiB = 0.9 x 80.00 GiB of a GPU" in run(*words).stdout
    assert "of 80.00 GiB = 80.00 GiB of a GPU" in run(*words, "--kv-cache", "1MiB").stdout
    plans = [json.loads(run(*words, *more, "--json").stdout) for more in ([], ["--gemm", "head=cublas"])]
    workspace = CudaStep.blas_workspace_bytes
    assert plans[1]["activation_bytes"] == plans[0]["activation_bytes"] + workspace
    result = run("plan", checkpoint, "--device", "cuda", "--memory", "1MB")
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "error: gpu_memory_utilization: 0.9 of 1000000 bytes is 900000, less than "
    )


# ---- doctor


def test_doctor_describes_the_device(run: Run) -> None:
    findings = {
        one["name"]: one for one in json.loads(run("doctor", "--no-run", "--json").stdout)["findings"]
    }
    assert findings["CUDA driver"]["value"].endswith("libfakecuda.so: 1 devices")
    told = findings["GPU"]["value"]
    assert told.startswith("cuda:0: nanoserve emulated GPU, compute capability 9.0, ")
    assert told.endswith("of 1.00 GiB free, kernels for sm_90a")
    for name in ("llvmlite", "triton", "ptxas"):
        assert name in findings["GPU compilers"]["value"]
    assert "kernels" in findings["GPU kernels"]["value"]


def test_doctor_counts_kernels_and_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NANOSERVE_CACHE_DIR", str(tmp_path))
    assert health.gpu_kernels().value == f"{tmp_path / 'cuda'}: not there yet"
    chip = CHIPS["sm_80"]
    library.load_artifacts([GPU_KERNELS["convert"][0](chip), GPU_KERNELS["norm"][0](chip)], chip)
    assert health.gpu_kernels().value == f"{tmp_path / 'cuda'}: 2 kernels"
    monkeypatch.setattr(cubin, "version", lambda: None)
    found = health.gpu_compilers()
    assert (found.status, found.fix) == (health.OK, "pip install 'nanoserve[cuda]'")
    assert found.value.endswith("; missing: ptxas")


def test_an_old_gpu_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from nanoserve.cli import health; print(health.gpu())"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NANOSERVE_FAKE_CUDA_CAPABILITY": "7.5"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "status='note'" in done.stdout
    assert "has compute capability 7.5, kernels are made for sm_80" in done.stdout


# ---- explain


def stages(text: str) -> list[str]:
    return [line.split()[2].rstrip(":") for line in text.splitlines() if line.startswith("// ----")]


def test_a_kernel_is_shown_from_mlir_to_the_chips_instructions(run: Run) -> None:
    text = run("explain", "gemm_mma", "--chip", "sm_80").stdout
    named = ["written", *(stage.name for stage in STAGES), "llvm-ir", "ptx", "usage"]
    assert stages(text) == [*named, "sass"] or (stages(text) == named and cubin.disassemble(b"") is None)
    assert ".target sm_80" in text
    assert "mma.sync" in text
    assert "registers per thread\n0 bytes of registers spilled" in text


def test_a_triton_kernel_is_shown_by_tritons_stages(run: Run) -> None:
    text = run("explain", "split", "--device", "cuda").stdout
    assert stages(text)[:6] == ["written", "ttir", "ttgir", "llvm-ir", "ptx", "usage"]
    assert "def split(" in text
    assert "ttg." in text


def test_the_chip_is_the_devices_or_the_one_that_is_named(run: Run) -> None:
    assert ".target sm_90a" in run("explain", "norm", "--device", "cuda", "--stage", "ptx").stdout
    assert ".target sm_86" in run("explain", "norm", "--chip", "sm_86", "--stage", "ptx").stdout
    text = run("explain", "gemm_tma", "--chip", "sm_90a", "--stage", "ptx").stdout
    assert "cp.async.bulk.tensor" in text
    assert "wgmma.mma_async" in text


def test_every_gpu_kernel_is_listed_and_can_be_made(run: Run) -> None:
    listed = run("explain", "--device", "cuda", "--list").stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(GPU_KERNELS)
    folder = Path(library.__file__).parent
    written = {
        path.stem for path in folder.glob("*.py")
        if "\ndef build(" in path.read_text() or "\ndef triton_source(" in path.read_text()
    }  # fmt: skip
    assert {make(CHIPS["sm_90a"]).kind for make, _ in GPU_KERNELS.values()} == written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["softmax", "--device", "cuda"], "KERNEL: 'softmax' must be one of gemm_f32, gemm_mma, "),
        (["norm", "--chip", "sm_42"], "chip: 'sm_42' must be one of sm_80, "),
        (["norm", "--chip", "sm_80", "--stage", "magic"], "--stage: 'magic' must be one of written, simplify, "),
        (["gemm_tma", "--chip", "sm_80"], "--chip: sm_80 has no warpgroup products, sm_90a has"),
        (["norm", "--device", "gpu"], "device: 'gpu' must be cpu, cuda or cuda:N"),
    ],
)  # fmt: skip
def test_names_that_are_not_known(run: Run, words: list[str], message: str) -> None:
    result = run("explain", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
