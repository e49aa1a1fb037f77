"""The C++ tests, built with AddressSanitizer and UndefinedBehaviorSanitizer and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "x64-asan"


def run(*command: str, cwd: Path = ROOT) -> str:
    scripts = str(Path(sys.executable).parent)  # a cmake from a wheel lives beside this Python
    env = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_native_tests_pass_under_the_sanitizers() -> None:
    """Pool, tables, threads, attention items and executor, with plain C++ kernels; no leak, race of bytes or overflow."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        pytest.skip("no cmake on this machine")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no C++ compiler on this machine")
    run(cmake, "--preset", "x64-asan", f"-DPython_EXECUTABLE={sys.executable}")
    run(cmake, "--build", str(BUILD), "--target", "native_tests", "--parallel", "2")
    output = run(str(BUILD / "native_tests"))
    checks = re.search(r"^(\d+) checks, 0 failures$", output, re.MULTILINE)
    assert checks is not None
    assert int(checks[1]) > 1000
