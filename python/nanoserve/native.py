"""Finds and loads the native module `_ch16` (CMake target `ch16`).

Two places may hold it: the installed package, and `build/<preset>/` of a source checkout after
`cmake --build build/x64-release --target ch16`. The newest wins, so whichever was built last is what runs.
`NANOSERVE_NATIVE=/path/to/file.so` overrides both (the sanitizer tests use it).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

_NAME = "_ch16"
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def _candidates() -> list[Path]:
    override = os.environ.get("NANOSERVE_NATIVE")
    if override:
        if not Path(override).is_file():
            raise ImportError(
                f"NANOSERVE_NATIVE: {override} is not a file; unset it to use the module that was built"
            )
        return [Path(override)]
    package = Path(__file__).resolve().parent
    found = [package / f"{_NAME}{_SUFFIX}"]
    found += [Path(entry) / "nanoserve" / f"{_NAME}{_SUFFIX}" for entry in sys.path if entry]
    root = package.parent.parent
    if (root / "CMakeLists.txt").is_file():
        found += [root / "build" / preset / f"{_NAME}{_SUFFIX}" for preset in ("x64-release", "x64-debug")]
    return [path for path in found if path.is_file()]


def _load() -> ModuleType:
    candidates = _candidates()
    if not candidates:
        raise ImportError(
            f"nanoserve's native module {_NAME}{_SUFFIX} is not built for this Python. Build it with "
            "`pip install -e .` or `cmake --preset x64-release && cmake --build build/x64-release --target ch16`."
        )
    path = max(candidates, key=lambda p: p.stat().st_mtime)
    name = f"nanoserve.{_NAME}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load the native module from {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    from nanoserve._ch16 import (
        LOGITS_BLOCK,
        CublasError,
        CublasMissing,
        CudaDevice,
        CudaDeviceLost,
        CudaDriverMissing,
        CudaError,
        CudaGraph,
        CudaKernel,
        CudaLimits,
        CudaMemory,
        CudaStep,
        CudaStream,
        CudaTimeMark,
        KVCachePool,
        LogitsReader,
        PageTable,
        PoolExhausted,
        StepExecutor,
        ThreadPool,
        WeightArena,
        checksum,
        cuda_launch,
        cuda_layer_cache,
        cuda_pool,
        default_num_threads,
        paged_attention,
    )
else:
    _module = _load()
    LOGITS_BLOCK = _module.LOGITS_BLOCK
    CublasError = _module.CublasError
    CublasMissing = _module.CublasMissing
    CudaDevice = _module.CudaDevice
    CudaDeviceLost = _module.CudaDeviceLost
    CudaDriverMissing = _module.CudaDriverMissing
    CudaError = _module.CudaError
    CudaGraph = _module.CudaGraph
    CudaKernel = _module.CudaKernel
    CudaLimits = _module.CudaLimits
    CudaMemory = _module.CudaMemory
    CudaStep = _module.CudaStep
    CudaStream = _module.CudaStream
    CudaTimeMark = _module.CudaTimeMark
    KVCachePool = _module.KVCachePool
    LogitsReader = _module.LogitsReader
    PageTable = _module.PageTable
    PoolExhausted = _module.PoolExhausted
    StepExecutor = _module.StepExecutor
    ThreadPool = _module.ThreadPool
    WeightArena = _module.WeightArena
    checksum = _module.checksum
    cuda_launch = _module.cuda_launch
    cuda_layer_cache = _module.cuda_layer_cache
    cuda_pool = _module.cuda_pool
    default_num_threads = _module.default_num_threads
    paged_attention = _module.paged_attention

__all__ = [
    "LOGITS_BLOCK",
    "CublasError",
    "CublasMissing",
    "CudaDevice",
    "CudaDeviceLost",
    "CudaDriverMissing",
    "CudaError",
    "CudaGraph",
    "CudaKernel",
    "CudaLimits",
    "CudaMemory",
    "CudaStep",
    "CudaStream",
    "CudaTimeMark",
    "KVCachePool",
    "LogitsReader",
    "PageTable",
    "PoolExhausted",
    "StepExecutor",
    "ThreadPool",
    "WeightArena",
    "checksum",
    "cuda_launch",
    "cuda_layer_cache",
    "cuda_pool",
    "default_num_threads",
    "paged_attention",
]
