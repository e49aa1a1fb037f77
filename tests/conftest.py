"""Run from a source checkout: the package comes from python/, compiled kernels go to the build folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for entry in (str(ROOT), str(ROOT / "tests"), str(ROOT / "python")):
    if entry not in sys.path:
        sys.path.insert(0, entry)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_cache = Path(os.environ.setdefault("NANOSERVE_CACHE_DIR", str(ROOT / "build" / "kernel-cache")))
_cache.mkdir(mode=0o700, parents=True, exist_ok=True)
