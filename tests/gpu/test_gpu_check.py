"""The check on a GPU, on the emulator: it runs whole, what is wrong fails by name, what is missing is skipped by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools.gpu_check import build, kernel_cases, kernel_speed, numerics, parts, report, show
from tools.gpu_check import run as run_module
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.places import FOLDER, KERNELS, MANIFEST, ROOT
from tools.gpu_check.record import Record

from nanoserve.compiler.gpu.artifact import ArtifactStore
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.kernels.cuda import library
from nanoserve.kernels.cuda.library import key_of, load_artifacts

CHIP = parse_chip("sm_90a")
WITHOUT_GPU = "environment,numerics,end_to_end,ceilings,engine_speed,kernel_speed,switches"


def command(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", *map(str, args)],
        cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared() -> Path:
    """A folder with all that the parts need at tiny sizes."""
    folder = FOLDER.with_name(f"gpu_check_{os.environ.get('PYTEST_XDIST_WORKER', 'test')}")
    done = command("prepare", "--tiny", "--folder", folder, "--only", WITHOUT_GPU, "--jobs", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kernels for sm_90a" in done.stdout
    return folder


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it, to do harm to."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    shutil.copytree(prepared / KERNELS, folder / KERNELS)
    shutil.copy(prepared / MANIFEST, folder)
    return folder


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
        "gemm_wgmma bf16 x bf16, gated: a row's bits",
        "gemm_tma, gated",
        "gemm_tma, gated: a row's bits",
        "attention bf16: by rows and by segments the same bits",
        "gemm_f32 f32 x f32, gated: the CPU's bits",
        "gpt2: the tokens of ours on the CPU",
        "bfloat16, mma: after a preemption, the same bits",
    ):
        assert told in checks
    loaded = results["parts"]["environment"]["facts"]["kernels"]["count"]
    assert loaded == len(results_of(prepared / MANIFEST)["kernels"]["sm_90a"]) > 150
    tables = {name for part in results["parts"].values() for name in part["tables"]}
    assert tables == {"decode", "prefill", "mixed", "products", "decode attention", "prefill attention"}
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

        def memory(self, array: np.ndarray) -> kernel_speed.Rows:
            return kernel_speed.Rows(1 << 20, array.nbytes, array)

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

    monkeypatch.setattr(
        kernel_speed, "random_rows", lambda *args, **options: kernel_speed.Rows(1 << 21, 1 << 21, None)
    )
    record = Record(tmp_path / "record.json", 300)
    kernel_speed.run(Dry(), record)  # type: ignore[arg-type]
    assert record.data["left_out"] == []
    assert [check for check in record.data["checks"] if not check["passed"]] == []
    tables = record.data["tables"]
    assert len(tables["decode attention"]) == 3 * 12
    assert {(row["product"], row["m"]) for row in tables["products"] if row["model"] == "Llama-3.1-8B"} == {
        (name, m)
        for name in ("qkv", "out", "gate_up", "down", "head")
        for m in kernel_speed.ROWS
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


@pytest.mark.parametrize(
    ("kind", "right", "wrong", "told"),
    [
        ("norm", "fmul", "fadd", "error"),
        ("embedding", "fadd", "fsub", "elements differ"),
    ],
)
def test_a_kernel_that_computes_something_else_fails_and_is_named(
    damaged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    right: str,
    wrong: str,
    told: str,
) -> None:
    monkeypatch.setattr(library, "toolchain", library.toolchain)
    case = next(iter(kernel_cases.CASES[kind](CHIP)))
    (spec,) = case.specs
    made = load_artifacts([spec], CHIP)[spec]
    assert right in made.llvm_ir
    changed = replace(made, llvm_ir=made.llvm_ir.replace(right, wrong))
    ArtifactStore(damaged / KERNELS).store(key_of(spec, CHIP), changed)
    record = Record(tmp_path / "record.json", 60)
    monkeypatch.setattr(numerics, "CASES", {kind: lambda chip: [case]})
    monkeypatch.setattr(numerics, "kinds", lambda: [kind])
    monkeypatch.setattr(record, "has_time", lambda name, seconds=0.0: name == case.name)
    numerics.run(Gpu(damaged, fake=True), record)
    (bad,) = [check for check in record.data["checks"] if not check["passed"]]
    assert bad["name"] == case.name
    assert told in bad["detail"]


def test_bits_that_depend_on_the_number_of_rows_are_noticed(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "toolchain", library.toolchain)

    def run(launch: Any, m: int) -> list[np.ndarray]:
        return [np.full((m, 2), 1 + (m == 17) * 2**-23, np.float32)]

    case = kernel_cases.Case("invented", (), run, lambda m: [np.ones((m, 2))], 1e-5)
    record = Record(tmp_path / "record.json", 60)
    numerics._check(Gpu(prepared, fake=True), record, case)
    assert [(check["name"], check["passed"]) for check in record.data["checks"]] == [
        ("invented", True), ("invented: a row's bits", False),
    ]  # fmt: skip
    assert "other bits with [17] rows" in record.data["checks"][1]["detail"]


def test_a_part_that_dies_costs_no_other(damaged: Path, tmp_path: Path) -> None:
    (damaged / MANIFEST).write_text('{"commit": "abc"}')
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
        prepared, tmp_path / "out.json", 60, fake=True, tiny=True, about={"command": ""}
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
    assert "NOT every part ran and passed: sanitizer skipped, peers skipped" in done.stdout


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    done = command("run", "--fake", "--out", tmp_path / "out.json", "--only", "numerics,speed")
    assert done.returncode == 1
    assert "--only: speed must be of environment, numerics" in done.stderr
    done = command("run", "--fake", "--folder", tmp_path, "--out", tmp_path / "out.json")
    assert done.returncode == 1
    assert "prepared.json is missing: run `python -m tools.gpu_check prepare` first" in done.stdout


# ---- the native module


def test_the_native_module_is_built_by_a_compiler_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a module of one function in the place of ours, which takes a minute."""
    source = tmp_path / "module.cpp"
    source.write_text(
        '#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_ch16, m) { m.def("answer", [] { return 42; }); }\n'
    )
    monkeypatch.setattr(build, "sources", lambda: [source])
    made = build.build_native(tmp_path / "native", with_cmake=False)
    code = f"import sys; sys.path.insert(0, {str(made.parent)!r}); import _ch16; print(_ch16.answer())"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "42\n"
    )
    written = made.stat().st_mtime_ns
    monkeypatch.setattr(build, "is_current", lambda module: module.exists())
    assert build.build_native(tmp_path / "native", with_cmake=False).stat().st_mtime_ns == written
    source.write_text("this is no C++")
    made.unlink()
    with pytest.raises(build.BuildFailed, match=r"module\.cpp"):
        build.build_native(tmp_path / "native", with_cmake=False)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(build.BuildFailed, match=r"no C\+\+ compiler: .*/nowhere/c"):
        build.build_native(tmp_path / "native", with_cmake=False)


def test_all_sources_are_built() -> None:
    """Those that CMake's target is made of."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    core = text[
        text.index("add_library(nanoserve_core") : text.index("target_include_directories(nanoserve_core")
    ]
    module = text[text.index("pybind11_add_module") : text.index("set_target_properties(ch16")]
    listed = {
        line.strip().rstrip(")") for line in (core + module).splitlines() if line.strip().startswith("src/")
    }
    assert {str(path.relative_to(ROOT)) for path in build.sources()} == listed
    assert (build.pybind11_headers() / "pybind11" / "numpy.h").is_file()


# ---- the report


def invented() -> dict[str, Any]:
    """Results of a GPU, as if."""
    decode = [
        {
            "model": "Llama-3.2-1B",
            "sequences": count,
            "step_ms": 1.5,
            "outside_native": 0.04,
            "native_ms": {"start": 0.1, "finish": 1.2},
            "ahead": 1.0,
            "of_roofline": share,
        }
        for count, share in ((1, 0.71), (8, 0.75), (32, 0.7), (256, 0.4))
    ]
    prefill = [{"model": "Llama-3.2-1B", "tokens": 2048, "ms": 12.25, "of_products": 0.55}]
    mixed = {"model": "Qwen3-0.6B", "seconds": 20.0, "whole": True}
    attention = [
        {"model": "Llama-3.2-1B", "batch": batch, "context": 4096, "us": 20.0, "of_bandwidth": share}
        for batch, share in ((1, 0.5), (16, 0.85), (64, 0.9))
    ]
    products = [
        {"model": "Llama-3.2-1B", "product": name, "m": 1, "by": "mma", "us": 9.0, "of_bandwidth": share, "of_products": 0.01}
        for name, share in (("qkv", 0.6), ("out", 0.7), ("down", 0.9))
    ]  # fmt: skip

    def part(status: str = "passed", **found: Any) -> dict[str, Any]:
        return {
            "status": status,
            "seconds": 3.0,
            "checks": [],
            "skips": [],
            "left_out": [],
            "facts": {},
            "tables": {},
            **found,
        }

    passing = {"name": "a", "passed": True, "detail": ""}
    return {
        "command": "python -m tools.gpu_check run", "commit": "abc", "machine": {}, "fake": False, "tiny": False, "passed": False,
        "parts": {
            "environment": part(
                checks=[passing],
                facts={"device": "A GPU", "versions": {"torch": "2.11"}, "multiprocessors": 132, "driver": "1",
                       "kernels": {"count": 3, "most_registers": 128, "with_local_bytes": 0}},
            ),
            "numerics": part("failed", checks=[passing, {"name": "norm", "passed": False, "detail": "error 1"}]),
            "ceilings": part(facts={"copy_bytes_per_s": 3e12, "bf16_flops": 7e14, "launch_s": 2e-6}),
            "engine_speed": part(tables={"decode": decode, "prefill": prefill,
                                         "mixed": [{**mixed, "by": "nanoserve", "tokens_per_s": 9000.0}]}),
            "kernel_speed": part(tables={"decode attention": attention, "products": products}),
            "peers": part(tables={"mixed": [{**mixed, "by": "transformers", "tokens_per_s": 3000.0, "whole": False}]},
                          skips=[{"name": "vLLM", "reason": "it is not installed"}]),
        },
    }  # fmt: skip


def test_a_report_says_what_was_reached_and_what_was_not() -> None:
    text = report.table(invented())
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    reached = {row[0]: row[1:] for row in rows if len(row) == 4}
    assert reached["a decode step of Llama-3.2-1B, 1 to 32 sequences, against reading its weights and keys"] == [
        "at least 70%", "70% at least, median 71%", "yes",
    ]  # fmt: skip
    assert reached["a prompt of 2,048 tokens of Llama-3.2-1B, of the measured rate of products"] == [
        "at least 60%",
        "55%",
        "no",
    ]
    assert reached["attention of decoding, 4k to 32k of context, of the measured bandwidth"][1:] == [
        "50% at least, median 85%",
        "no",
    ]
    assert reached["256 requests of Qwen3-0.6B against transformers"] == ["at least 2x", "3.00x", "yes"]
    assert reached["256 requests of Qwen3-0.6B against vLLM"][1:] == [
        "not measured: it is not installed",
        "no",
    ]
    assert reached["256 requests of Qwen3-0.6B against nano-vllm"][1:] == ["not measured", "no"]
    assert reached["a decode step of Llama-3.2-1B: Python's time, outside of the native step"][1:] == [
        "4.0% at most, waiting for the device 80% at least, 100% of the steps started ahead",
        "yes",
    ]
    assert "| Llama-3.2-1B | 1.50 (71%) | 1.50 (75%) | 1.50 (70%) | 1.50 (40%) | 12.25 (55%) |" in text
    assert "| Qwen3-0.6B, transformers | 3,000 | its first 20 s |" in text
    assert "| Llama-3.2-1B, mma | 70% |" in text
    assert "A GPU; torch 2.11; 2 of 3 checks passed; parts that did not pass: numerics failed" in text


def test_a_report_of_nothing_says_so() -> None:
    assert report.table(None) == report.NOTHING
    bare = {**invented(), "parts": {}}
    assert "not measured" in report.table(bare)
    assert show.shown(bare).splitlines() == ["NOT every part ran and passed: it was stopped"]


def test_the_end_of_the_output_tells_the_story() -> None:
    lines = show.shown(invented()).splitlines()
    assert "    FAILED norm: error 1" in lines
    assert "    skipped: vLLM: it is not installed" in lines
    assert any(line.startswith("target missed a prompt of 2,048 tokens") for line in lines)
    assert lines[-1] == "NOT every part ran and passed: numerics failed"
    crowded = invented()
    crowded["parts"]["numerics"]["skips"] = [{"name": str(i), "reason": "?"} for i in range(100)]
    lines = show.shown(crowded).splitlines()
    assert len(lines) == 59
    assert lines[-1] == "NOT every part ran and passed: numerics failed"


def test_the_readme_gets_it_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import report as bench_report

    document = tmp_path / "README.md"
    document.write_text("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n")
    monkeypatch.setattr(bench_report, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_report, "DOCUMENTS", {document: {"gpu": bench_report.BLOCKS["gpu"]}})
    assert bench_report.updated(document) == f"before\n<!-- gpu -->\n{report.NOTHING}<!-- /gpu -->\nafter\n"
    (tmp_path / "gpu.json").write_text(json.dumps(invented()))
    assert report.table(invented()) in bench_report.updated(document)
