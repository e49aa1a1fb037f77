"""The check on a GPU, on the emulator: it runs whole, what is wrong fails by name, what is missing is skipped by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.gpu.check_folder import WITHOUT_GPU, command
from tools.gpu_check import (
    attention_speed,
    attention_work,
    kernel_cases,
    kernel_speed,
    numerics,
    parts,
    product_speed,
    report,
    show,
)
from tools.gpu_check import run as run_module
from tools.gpu_check.device_rows import Rows
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.manifest import sources_digest
from tools.gpu_check.places import KERNELS, MANIFEST
from tools.gpu_check.record import Record
from tools.gpu_check.switches import IN_TURN

from nanoserve.compiler.gpu.artifact import ArtifactStore
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.kernels.cuda import library

CHIP = parse_chip("sm_90a")


def results_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# ---- it runs


def test_it_runs_whole_on_the_emulator(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = command("run", "--fake", "--folder", prepared, "--out", out, "--only", WITHOUT_GPU)
    results = results_of(out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert results["passed"]
    assert [(name, part["status"]) for name, part in results["parts"].items()] == [
        (part.name, "passed") for part in parts.PARTS if part.name in WITHOUT_GPU.split(",")
    ]
    assert results["command"].startswith("python -m tools.gpu_check run --fake")
    assert results["commit"] != "unknown"
    checks = {check["name"] for part in results["parts"].values() for check in part["checks"]}
    for told in (
        "every kernel loads",
        "gemm_mma bf16 x bf16, gated: a row's bits",
        "gemm_tma, gated",
        "gemm_tma, gated: a row's bits",
        "gemm_tma, gated, of few tiles",
        "gemm_tma, gated: gemm_mma's bits",
        "attention bf16: by rows and by segments the same bits",
        "gemm_f32 f32 x f32, gated: the CPU's bits",
        "gpt2: the tokens of ours on the CPU",
        "bfloat16, mma: after a preemption, the same bits",
        "bfloat16, mma: each kernel after the one in front, the same bits",
        "bfloat16, wgmma: alone, launched kernel by kernel, the same bits",
        "bfloat16, mma: temperature, running ahead, the host's tokens",
        "tiny: alone and among 4, the same bits",
        "tiny: the tokens that the device chooses are the host's",
        "tiny: greedy tokens are those of the largest logits",
        "cublas: the default's logits, nearly",
        "wgmma: the default's logits, to the bit",
        "attention of tiny, decoding: PyTorch's, nearly",
        "gate_up of tiny by wgmma: PyTorch's, nearly",
    ):
        assert told in checks
    loaded = results["parts"]["environment"]["facts"]["kernels"]["count"]
    assert loaded == len(results_of(prepared / MANIFEST)["kernels"]["sm_90a"]) > 150
    tables = {name for part in results["parts"].values() for name in part["tables"]}
    assert tables == {
        "decode", "prefill", "prefill in chunks", "mixed", "products", "decode attention", "decode attention, mixed",
        "chunk attention", "prefill attention",
    }  # fmt: skip
    switched = results["parts"]["switches"]["tables"]["decode"]
    assert [row["products"] for row in switched] == ["mma", IN_TURN, "cublas", "wgmma"]
    lines = done.stdout.strip().splitlines()
    assert lines[-1] == "every part ran and passed"
    assert len(show.shown(results).splitlines()) <= 60
    assert list(tmp_path.iterdir()) == [out]  # parts' own files are gone
    everything = command("show", out, "--all").stdout
    assert "kv_write bf16: a row's bits: m = 1, 3, 17, 65" in everything
    assert report.table(results) == report.NOTHING  # an emulator's times are nobody's


def test_every_kind_of_kernel_has_a_case() -> None:
    assert set(kernel_cases.kinds()) == set(kernel_cases.CASES)


def test_a_kind_without_a_case_is_a_named_skip(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "toolchain", library.toolchain)
    only = {"logits": kernel_cases.CASES["logits"]}
    monkeypatch.setattr(numerics, "CASES", only)
    record = Record(tmp_path / "record.json", 0.9)  # no time for what comes after the kinds
    numerics.run(Gpu(prepared, fake=True), record)
    assert {
        "name": "numerics of norm",
        "reason": "it has no case in tools/gpu_check/kernel_cases.py",
    } in record.data["skips"]
    assert "numerics of logits" not in [skip["name"] for skip in record.data["skips"]]


def test_what_is_left_out_of_a_folder_that_travels_is_not_needed(tmp_path: Path) -> None:
    """Machine code alone, and the store is valid with it."""
    done = command(
        "prepare",
        "--folder",
        tmp_path / "folder",
        "--only",
        "ceilings",
        "--chip",
        "sm_80",
        "--chip",
        "sm_90a",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for chip, kernels in results_of(tmp_path / "folder" / MANIFEST)["kernels"].items():
        (key,) = kernels.values()
        artifact = ArtifactStore(tmp_path / "folder" / KERNELS).find(key)
        assert artifact is not None
        assert (artifact.chip, artifact.ptx, artifact.llvm_ir) == (chip, "", "")
        assert artifact.cubin[:4] == b"\x7fELF"


def test_full_sizes_launch_nothing_that_is_not_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every launch of kernel_speed at its full sizes, without running one: kernels, arguments and grids are in order."""
    specs = set(kernel_speed.specs(CHIP, False, tmp_path))
    put: dict[GpuKernelSpec, int] = {}

    class Dry:
        def __init__(self) -> None:
            self.tiny, self.fake, self.torch, self.chip = False, False, None, CHIP
            self.results = {"ceilings": {"facts": {"copy_bytes_per_s": 3e12, "bf16_flops": 7e14}}}

        def memory(self, array: np.ndarray) -> Rows:
            return Rows(1 << 20, array.nbytes, array)

        def put(self, spec: GpuKernelSpec, args: list[Any]) -> None:
            assert spec in specs
            names = [name for name, _ in spec.arguments]
            scalars = {
                name: arg
                for name, pointer, arg in zip(names, spec.pointers, args, strict=True)
                if not pointer
            }
            assert all(isinstance(value, int) for value in scalars.values())
            assert all(blocks > 0 for blocks in spec.grid_of(scalars))
            put[spec] = put.get(spec, 0) + 1

        def seconds(self, work: Any, launches: int) -> float:
            for i in range(launches):
                work(i)
            return 1e-3

    for module in (product_speed, attention_work):
        monkeypatch.setattr(module, "random_rows", lambda *args, **options: Rows(1 << 21, 1 << 21, None))
    monkeypatch.setattr(
        product_speed.ProductOperands, "error", lambda self, spec, m: self.put(spec, m) or 0.0
    )
    monkeypatch.setattr(attention_speed, "_check", lambda *args: None)
    record = Record(tmp_path / "record.json", 300)
    kernel_speed.run(Dry(), record)  # type: ignore[arg-type]
    assert record.data["left_out"] == []
    assert [check for check in record.data["checks"] if not check["passed"]] == []
    tables = record.data["tables"]
    assert len(tables["decode attention"]) == 3 * 12
    assert {row["lengths"] for row in tables["decode attention, mixed"]} == {"1 x 32768 + 63 x 512"}
    assert {(row["rows"], row["start"]) for row in tables["chunk attention"]} == {(50, 32768)}
    by = [row["by"] for row in tables["products"]]
    assert by == sorted(by)  # wgmma, the risky one, after mma
    assert {row["m"] for row in tables["products"] if row["by"] == "wgmma"} == {
        m for m in product_speed.ROWS if m > 64
    }
    assert {(row["product"], row["m"]) for row in tables["products"] if row["model"] == "Llama-3.1-8B"} == {
        (name, m)
        for name in ("qkv", "out", "gate_up", "down", "head")
        for m in product_speed.ROWS
        if name != "head" or m <= 256
    }
    gate = next(row for row in tables["products"] if row["product"] == "gate_up" and row["m"] == 2048)
    assert gate["of_products"] == pytest.approx(2 * 2048 * 2 * 8192 * 2048 / 1e-3 / 7e14)
    assert set(put) >= {spec for spec in specs if spec.kind == "paged_attention"}


# ---- what is wrong fails, by name


def test_a_damaged_kernel_fails_and_is_named(damaged: Path, tmp_path: Path) -> None:
    name, key = next(iter(results_of(damaged / MANIFEST)["kernels"]["sm_90a"].items()))
    image = damaged / KERNELS / f"{results_of(damaged / KERNELS / f'{key}.json')['files']['cubin']}.cubin"
    image.write_bytes(image.read_bytes()[:-1] + b"!")
    out = tmp_path / "results.json"
    done = command("run", "--fake", "--folder", damaged, "--out", out, "--only", "environment,ceilings")
    assert done.returncode == 1
    assert f"FAILED loads: {name}: not in the store, or damaged" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == "NOT every part ran and passed: environment failed"
    assert results_of(out)["parts"]["ceilings"]["status"] == "passed"  # others run all the same


def test_a_part_that_dies_costs_no_other(damaged: Path, tmp_path: Path) -> None:
    (damaged / MANIFEST).write_text(json.dumps({"commit": "abc", "sources": sources_digest()}))
    out = tmp_path / "results.json"
    done = command("run", "--fake", "--folder", damaged, "--out", out, "--only", "environment,ceilings")
    found = results_of(out)["parts"]
    assert done.returncode == 1
    assert (found["environment"]["status"], found["ceilings"]["status"]) == ("died", "passed")
    assert "KeyError: 'kernels'" in found["environment"]["printed"]
    assert "its last words: KeyError: 'kernels'" in done.stdout


def test_a_part_that_hangs_is_ended(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 100\n")
    slow.chmod(0o700)
    monkeypatch.setattr(run_module.sys, "executable", str(slow))
    monkeypatch.setattr(run_module, "_GRACE", 0.2)
    monkeypatch.setattr(run_module, "BY_NAME", {"numerics": parts.Part("numerics", 0.3, "")})
    runner = run_module.Runner(
        prepared, tmp_path / "out.json", 60, fake=False, tiny=True, about={"command": ""}
    )
    assert not runner.run(["numerics"])
    assert runner.results["parts"]["numerics"]["status"] == "took too long"
    assert runner.results["parts"]["numerics"]["seconds"] < 20


def test_parts_without_time_are_left_out_by_name(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = command("run", "--fake", "--folder", prepared, "--out", out, "--minutes", "0.01")
    assert done.returncode == 1
    assert {part["status"] for part in results_of(out)["parts"].values()} == {"left out"}
    assert "numerics left out" in done.stdout.strip().splitlines()[-1]


# ---- what is missing is skipped, by name


def test_a_part_that_cannot_run_is_a_named_skip_and_no_pass(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = command("run", "--fake", "--folder", prepared, "--out", out, "--only", "sanitizer,peers")
    assert done.returncode == 1
    assert "skipped: compute-sanitizer: the emulator checks by itself" in done.stdout
    assert "skipped: other engines: PyTorch has no CUDA device here" in done.stdout
    assert "NOT every part ran and passed: peers skipped, sanitizer skipped" in done.stdout


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    done = command("run", "--fake", "--out", tmp_path / "out.json", "--only", "numerics,speed")
    assert done.returncode == 1
    assert "--only: speed must be of environment, numerics" in done.stderr
    done = command("run", "--fake", "--folder", tmp_path, "--out", tmp_path / "out.json")
    assert done.returncode == 1
    assert "prepared.json is missing: run `python -m tools.gpu_check prepare` first" in done.stderr
