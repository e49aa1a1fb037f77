"""What `prepare` says of its folder, and whether it was made from the files that are here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tools.gpu_check.places import MANIFEST, ROOT

# What a kernel, or the choice of those that are needed, is made from. Read as files: nothing of it can be imported before the
# native module is built, and a build in vain is a minute of the device's time.
_SOURCES = (
    *(f"python/nanoserve/{folder}/**/*.py" for folder in ("compiler", "kernels", "cuda", "models")),
    "tools/gpu_check/*_cases.py",
    "tools/gpu_check/shapes.py",
    "tools/gpu_check/tiny_models.py",
    "tests/gpu/*_problem.py",
)


def sources_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in ROOT.glob(pattern)):
        data = path.read_bytes()
        digest.update(b"%s\0%d\0" % (path.relative_to(ROOT).as_posix().encode(), len(data)) + data)
    return digest.hexdigest()


def write(folder: Path, **manifest: Any) -> None:
    made = {**manifest, "sources": sources_digest()}
    (folder / MANIFEST).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """Raises SystemExit, saying what to do, where there is none, or it is of other sources."""
    path = folder / MANIFEST
    again = "run `python -m tools.gpu_check prepare` first, where the compilers are"
    if not path.exists():
        raise SystemExit(f"{path} is missing: {again}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.get("sources") != sources_digest():
        raise SystemExit(f"{path} was made from other sources than these: {again}")
    return found


def kernels_digest(manifest: dict[str, Any]) -> str:
    """Of all kernels in a folder."""
    return hashlib.sha256(json.dumps(manifest.get("kernels"), sort_keys=True).encode()).hexdigest()
