"""A CUDA device in software for all tests here: built once, and what the native module takes for the driver."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.gpu.check_folder import damaged, prepared

__all__ = ["damaged", "prepared"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "x64-release"
# Before anybody asks for the driver: a process looks for it once.
os.environ["NANOSERVE_CUDA_DRIVER"] = str(BUILD / "libfakecuda.so")
os.environ["NANOSERVE_CUBLAS"] = str(BUILD / "libfakecublas.so")
os.environ["NANOSERVE_EMULATOR"] = str(BUILD)


@pytest.fixture(scope="session", autouse=True)
def emulator() -> None:
    """Compiles it; several test processes take turns, and all but the first find nothing to do."""
    scripts = str(Path(sys.executable).parent)  # a cmake from a wheel lives beside this Python
    env = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    cmake = shutil.which("cmake", path=env["PATH"])
    assert cmake is not None, "the emulator's tests need cmake"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "emulator.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["--preset", "x64-release", f"-DPython_EXECUTABLE={sys.executable}"],
            ["--build", str(BUILD), "--target", "nvemu", "fakecuda", "fakecublas", "--parallel", "2"],
        ):
            done = subprocess.run(
                [cmake, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
