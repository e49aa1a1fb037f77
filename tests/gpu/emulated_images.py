"""What stands in for the cubins of an engine's kernels on the emulated device."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.gpu.conftest import ROOT

from nanoserve import emulator
from nanoserve.compiler.gpu.artifact import Artifact
from nanoserve.cuda import backend
from nanoserve.emulator import image

IMAGES = Path(os.environ.get("NANOSERVE_CACHE_DIR") or ROOT / "build" / "kernel-cache") / "emulated"


@cache
def _maker() -> bytes:
    """Digest of what makes images."""
    digest = hashlib.sha256()
    for path in sorted(Path(emulator.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def image_of(artifact: Artifact) -> bytes:
    """What the fake driver loads, kept on disk: compiling it takes longer than running it."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    path = IMAGES / hashlib.sha256(_maker() + artifact.llvm_ir.encode()).hexdigest()
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(image(artifact.llvm_ir))
        part.replace(path)
    return path.read_bytes()


def load_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine on a device in this process loads these instead of cubins."""
    make = backend.CudaBackend.make_executor

    def make_executor(self: Any, *args: Any, **options: Any) -> Any:
        return make(self, *args, image=image_of, **options)

    monkeypatch.setattr(backend.CudaBackend, "make_executor", make_executor)
