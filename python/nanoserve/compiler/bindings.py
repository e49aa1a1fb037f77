"""The only module that imports MLIR: upstream's `mlir` package where it is installed, else `torch_mlir`'s copy of it.

`mlir()` imports it (about 0.2 s) and is called only when something must be compiled. `toolchain()` names the distribution
and its version without importing it; that string is part of every cache key, because the wheels are snapshots of LLVM and
another snapshot is another compiler.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Import name -> the distributions that may provide it.
_PROVIDERS = {"mlir": ("mlir-python-bindings", "mlir"), "torch_mlir": ("torch-mlir",)}
_DIALECTS = ("arith", "func", "llvm", "math", "memref", "scf", "vector")
_GPU_DIALECTS = ("gpu", "nvgpu", "nvvm")


class MlirMissing(ImportError):
    """No MLIR Python bindings are installed and a kernel had to be compiled."""


@cache
def _provider() -> tuple[str, str] | None:
    """(import name, "distribution version") of the bindings that would be imported."""
    for package, distributions in _PROVIDERS.items():
        found = importlib.util.find_spec(package)
        # A folder that merely has the name (an LLVM checkout, say) is a namespace package too: look for the bindings.
        folders = (found.submodule_search_locations or []) if found else []
        if not any((Path(folder) / "ir.py").is_file() for folder in folders):
            continue
        for name in distributions:
            try:
                return package, f"{name} {importlib.metadata.version(name)}"
            except importlib.metadata.PackageNotFoundError:
                continue
        return package, f"{package} of unknown version"
    return None


def toolchain() -> str | None:
    """Name and version of the installed bindings, None when there are none. Imports nothing."""
    provider = _provider()
    return provider[1] if provider else None


@cache
def mlir() -> Any:
    """A namespace with `ir`, `PassManager`, `ExecutionEngine` and one attribute per dialect.

    Raises:
        MlirMissing: no bindings are installed.
    """
    provider = _provider()
    if provider is None:
        raise MlirMissing(
            'compiling a kernel needs the MLIR Python bindings: pip install "torch-mlir>=20261001" (or upstream\'s mlir '
            "package). Without them everything still runs from a kernel cache that already holds this model's kernels for "
            "this CPU; NANOSERVE_CACHE_DIR names the cache."
        )
    package = provider[0]
    return SimpleNamespace(
        ir=importlib.import_module(f"{package}.ir"),
        PassManager=importlib.import_module(f"{package}.passmanager").PassManager,
        ExecutionEngine=importlib.import_module(f"{package}.execution_engine").ExecutionEngine,
        **{name: importlib.import_module(f"{package}.dialects.{name}") for name in _DIALECTS},
    )


@cache
def mlir_gpu() -> Any:
    """A namespace with one attribute per dialect of GPU kernels, and `translate`: an operation to LLVM IR text.

    Raises:
        MlirMissing: no bindings are installed.
    """
    package = mlir().ir.__name__.rpartition(".")[0]
    return SimpleNamespace(
        translate=mlir().llvm.translate_module_to_llvmir,
        **{name: importlib.import_module(f"{package}.dialects.{name}") for name in _GPU_DIALECTS},
    )
