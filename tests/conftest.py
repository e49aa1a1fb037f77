"""Run from a source checkout: the package comes from python/, compiled kernels go to the build folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
for entry in (str(ROOT), str(ROOT / "tests"), str(ROOT / "python")):
    if entry not in sys.path:
        sys.path.insert(0, entry)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What is asserted must not depend on the terminal, or the service, that the tests run in.
for name in ("COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS"):
    os.environ.pop(name, None)
# The same examples each time, however long the machine takes for one.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")
_cache = Path(os.environ.setdefault("NANOSERVE_CACHE_DIR", str(ROOT / "build" / "kernel-cache")))
_cache.mkdir(mode=0o700, parents=True, exist_ok=True)
