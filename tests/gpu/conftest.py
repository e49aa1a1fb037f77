"""A CUDA device in software for all tests here: built once, and what the native module takes for the driver."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from tests.gpu.check_folder import damaged, prepared, record

from nanoserve.emulator.library import library

__all__ = ["damaged", "prepared", "record"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "x64-release"
# Before anybody asks for the driver: a process looks for it once.
os.environ["NANOSERVE_CUDA_DRIVER"] = str(BUILD / "libfakecuda.so")
os.environ["NANOSERVE_CUBLAS"] = str(BUILD / "libfakecublas.so")
os.environ["NANOSERVE_EMULATOR"] = str(BUILD)


@cache
def _build() -> str:
    """Compiles it; several test processes take turns, and all but the first find nothing to do. What went wrong, if anything."""
    scripts = str(Path(sys.executable).parent)  # a cmake from a wheel lives beside this Python
    env = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    cmake = shutil.which("cmake", path=env["PATH"])
    if cmake is None:
        return "the emulator's tests need cmake"
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
            if done.returncode != 0:
                return done.stdout[-4000:] + done.stderr[-4000:]
    return ""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Loads it before other tests run: their heap may grow to where shared memory must lie (of a Python that is no PIE)."""
    folder = Path(__file__).parent
    if any(folder in item.path.parents for item in session.items) and not _build():
        library()


@pytest.fixture(scope="session", autouse=True)
def emulator() -> None:
    assert _build() == ""
