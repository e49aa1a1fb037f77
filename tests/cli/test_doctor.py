"""nanoserve doctor finds what is missing, says how to mend it, and never dies of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoserve.cli import health
from nanoserve.cli.health import BAD, NOTE, OK, Finding
from nanoserve.compiler import bindings, jit

Run = Callable[..., Any]


def test_a_healthy_machine_serves(run: Run) -> None:
    """The real checks, with a model compiled from nothing and run."""
    result = run("doctor", "--json")
    told = json.loads(result.stdout)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert (result.exit_code, told["can_serve"]) == (0, True)
    assert set(found) == {
        "package", "python", "native module", "MLIR", "linker", "CPU", "cores", "memory", "kernel cache", "packages",
        "optional packages", "CUDA driver", "GPU", "GPU compilers", "GPU kernels", "end to end",
    }  # fmt: skip
    assert all(finding["value"] and finding["meaning"] for finding in found.values())
    assert "_ch16" in found["native module"]["value"]
    assert int(found["end to end"]["value"].split()[0]) > 5, "kernels compiled, not found in a cache"
    assert "numpy" in found["packages"]["value"]
    assert "run on the CPU" in found["CUDA driver"]["meaning"]


def test_the_table_names_every_finding(run: Run) -> None:
    result = run("doctor", "--no-run")
    assert result.exit_code == 0
    for name in ("native module", "kernel cache", "memory"):
        assert name in result.stdout
    assert "end to end" not in result.stdout
    assert result.stdout.endswith("This machine can serve.\n")


def test_what_keeps_it_from_serving_is_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Finding("soul", BAD, "lost \x1b[2J [bold]", "needed", "find it")
    monkeypatch.setattr(health, "CHECKS", (health.python, lambda: broken))
    result = run("doctor", "--no-run")
    assert result.exit_code == 1
    assert "lost \\x1b[2J [bold]" in result.stdout
    assert "to do: find it" in result.stdout
    assert result.stdout.endswith("This machine cannot serve: see what is bad above.\n")
    told = run("doctor", "--no-run", "--json")
    assert (told.exit_code, json.loads(told.stdout)["can_serve"]) == (1, False)


def test_something_optional_missing_is_not_fatal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CHECKS", (lambda: Finding("extra", NOTE, "missing", "optional", "get it"),))
    assert run("doctor", "--no-run").exit_code == 0


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy_check() -> Finding:
        raise KeyError("tired")

    monkeypatch.setattr(health, "CHECKS", (lazy_check,))
    (finding,) = health.findings(run_model=False)
    assert (finding.name, finding.status) == ("lazy check", BAD)
    assert "KeyError: 'tired'" in finding.value


def test_no_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nanoserve.native", None)
    finding = health.native_module()
    assert (finding.status, finding.value) == (BAD, "missing")
    assert finding.fix


def test_no_compiler_is_a_note_because_the_cache_may_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "toolchain", lambda: None)
    finding = health.mlir_bindings()
    assert (finding.status, finding.value) == (NOTE, "missing")
    assert "pip install" in finding.fix
    assert health.end_to_end().status == NOTE
    monkeypatch.setattr(jit, "linker", lambda: None)
    assert health.linker().status == NOTE


def test_the_kernel_cache_and_who_may_write_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "kernels"
    monkeypatch.setenv("NANOSERVE_CACHE_DIR", str(cache))
    assert health.kernel_cache().value == f"{cache}: not there yet, made at the first start"
    assert not cache.exists(), "looking changes nothing"
    cache.mkdir(mode=0o700)
    (cache / "a.so").write_bytes(b"x" * 2048)
    finding = health.kernel_cache()
    assert (finding.status, finding.value) == (OK, f"{cache}: 1 kernels, 2.00 KiB, mode 0700")
    cache.chmod(0o770)
    finding = health.kernel_cache()
    assert finding.status == BAD
    assert "mode 0770 lets other users write code" in finding.fix


def test_a_package_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("jinja2", "torch") else find(name)
    )
    finding = health.needed_packages()
    assert (finding.status, finding.value, finding.fix) == (BAD, "missing: jinja2", "pip install jinja2")
    optional = health.optional_packages()
    assert optional.status == OK
    assert "torch" not in optional.value


@pytest.mark.parametrize(
    ("returncode", "stdout", "stderr", "status", "value"),
    [
        (0, "noise\n11 kernels\n", "", OK, "11 kernels"),
        (1, "", "Traceback\nValueError: wrong\n", BAD, "ValueError: wrong"),
        (1, "some progress\n", "wrong\n", BAD, "wrong"),
        (1, "", "", BAD, "exit status 1"),
        (-4, "", "", BAD, "ended by signal 4"),
        (0, "", "", BAD, "exit status 0"),
    ],
)
def test_the_model_runs_in_a_process_that_may_die(
    monkeypatch: pytest.MonkeyPatch, returncode: int, stdout: str, stderr: str, status: str, value: str
) -> None:
    ended = SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    finding = health.end_to_end()
    assert (finding.status, finding.value) == (status, value)


def test_no_gpu_is_no_fault() -> None:
    """A driver is looked for once per process, and where it was looked for is told."""
    code = "from nanoserve.cli import health; [print(each.status, each.value) for each in (health.cuda_driver(), health.gpu())]"
    env = {
        **os.environ,
        "NANOSERVE_CUDA_DRIVER": "/nowhere/libcuda.so.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    driver, device = done.stdout.splitlines()
    assert driver.startswith("ok none: no CUDA driver: /nowhere/libcuda.so.1")
    assert device == "ok none found"
