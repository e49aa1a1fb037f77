"""The attention kernels in Triton's interpreter: a second opinion that shares no compiler and no emulator with the first."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.gpu.conftest import ROOT


def test_float32_forms_are_what_they_should_be() -> None:
    """Groups, windows, caps, ragged lengths; pages of nobody are NaN."""
    paths = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests"), *sys.path]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "tests.gpu.interpreted_attention"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 5
    for form, distances in found.items():
        for kernel, distance in distances.items():
            assert distance < 3e-6, f"{form}: {kernel} is off by {distance}"
