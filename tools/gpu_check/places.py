"""Where things are: the checkout, and the folder that `prepare` fills and `run` takes along."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu_check"
FAKE_BUILD = ROOT / "build" / "x64-release"  # where the emulator and the fake driver are built
KERNELS, MODELS, EXPECTED, MANIFEST = "cuda", "models", "expected.npz", "prepared.json"  # in the folder


def find_imports() -> None:
    """The package, and the problems of tests/ that the check shares with them."""
    for entry in (str(ROOT / "tests"), str(ROOT / "python"), str(ROOT)):
        if entry not in sys.path:
            sys.path.insert(0, entry)
