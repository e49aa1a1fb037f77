"""One model on devices of several kinds, each in its own process: which code runs is the chip's, the answers are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from tests.gpu.conftest import ROOT


@cache
def on(capability: str, *arguments: str, version: str = "12080") -> dict[str, Any]:
    """What chip_answers tells of a device of that capability, under a driver of that version."""
    paths = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests"), *sys.path]
    env = {
        **os.environ, "NANOSERVE_FAKE_CUDA_CAPABILITY": capability, "NANOSERVE_FAKE_CUDA_VERSION": version,
        "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.gpu.chip_answers", "llama", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_answers_have_the_same_bits_on_every_chip(precision: str) -> None:
    old, new = on("8.0", precision), on("9.0", precision)
    assert (old["chip"], new["chip"]) == ("sm_80", "sm_90a")
    assert old["answers"] == new["answers"]


def test_tiles_brought_by_the_copy_engine_change_no_bit() -> None:
    """A prompt in steps of few rows, or in one of more than 64: another kernel, the same answers."""
    few, many = (on("9.0", "bfloat16", "wgmma", chunk) for chunk in ("48", "128"))
    assert few["most_rows"] <= 64 < many["most_rows"]
    assert many["wgmma"]
    assert many["tma"]
    assert few["answers"] == many["answers"] == on("9.0", "bfloat16")["answers"]
