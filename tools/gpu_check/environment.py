"""The machine, and every prepared kernel loaded by its driver: registers and bytes of them in memory, as the driver has them."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
from importlib import metadata
from typing import Any

from tools.gpu_check.gpu import Gpu
from tools.gpu_check.places import KERNELS, MANIFEST
from tools.gpu_check.record import Record

from nanoserve.compiler.gpu.artifact import ArtifactStore
from nanoserve.native import CudaError

_PACKAGES = ("torch", "triton", "transformers", "numpy", "vllm", "nanovllm")


def run(gpu: Gpu, record: Record) -> None:
    for name, value in about(gpu).items():
        record.fact(name, value)
    prepared = json.loads((gpu.folder / MANIFEST).read_text(encoding="utf-8"))["kernels"]
    if gpu.chip.name not in prepared:
        record.check(
            "prepared", False, f"nothing is prepared for {gpu.chip.name}, only for {', '.join(prepared)}"
        )
        return
    store = ArtifactStore(gpu.folder / KERNELS)
    failed, spilling, most = 0, 0, 0
    for symbol, key in prepared[gpu.chip.name].items():
        if not record.has_time("the rest of the kernels"):
            return
        artifact = store.find(key)
        if artifact is None:
            failed += 1
            record.check(f"loads: {symbol}", False, "not in the store, or damaged")
            continue
        try:
            kernel = gpu.load(artifact)
            registers, local = kernel.num_registers, kernel.local_bytes
        except (CudaError, ValueError) as error:
            failed += 1
            record.check(f"loads: {symbol}", False, str(error))
            continue
        most = max(most, registers)
        if local:
            spilling += 1
            record.row("local", kernel=symbol, registers=registers, local_bytes=local)
    count = len(prepared[gpu.chip.name])
    record.fact("kernels", {"count": count, "most_registers": most, "with_local_bytes": spilling})
    record.check("every kernel loads", failed == 0, f"{count - failed} of {count}")


def about(gpu: Gpu) -> dict[str, Any]:
    """What results must be read with."""
    found: dict[str, Any] = {
        "device": gpu.device.name,
        "capability": gpu.device.capability / 10,
        "chip": gpu.chip.name,
        "multiprocessors": gpu.device.num_multiprocessors,
        "memory_bytes": gpu.device.total_bytes,
        "free_bytes": gpu.device.free_bytes,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "driver": _driver(),
        "versions": {
            name: metadata.version(name) for name in _PACKAGES if importlib.util.find_spec(name) is not None
        },
    }
    if gpu.torch is not None:
        found["l2_bytes"] = gpu.torch.cuda.get_device_properties(0).L2_cache_size
        found["versions"]["cuda"] = gpu.torch.version.cuda
    return found


def _driver() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
