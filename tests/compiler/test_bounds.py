"""No kernel touches memory outside of its arrays; prefetches may, they cannot fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import nanoserve

TESTS = Path(__file__).parent.parent


def run(kind: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(nanoserve.__file__).parent.parent), str(TESTS)])
    return subprocess.run(
        [sys.executable, "-m", "compiler.guarded_calls", kind], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["gemm", "narrow_gemm", "peak", "attention", "norm", "embedding", "convert", "kv_write"]
)
def test_nothing_beyond_the_arrays_is_touched(kind: str) -> None:
    result = run(kind)
    assert result.returncode == 0, f"status {result.returncode}: {result.stderr}"
    assert result.stdout == "done\n"


def test_an_overrun_is_noticed() -> None:
    assert run("overrun").returncode == -signal.SIGSEGV
