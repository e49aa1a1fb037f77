"""What the device can do, measured: memory copied and read, bfloat16 products, and what a launch costs.

Everything else is told as a fraction of these.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.record import Record

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.kernels.cuda.activation import convert_spec
from nanoserve.native import CudaMemory, cuda_launch

_EMPTY = convert_spec(8, 8, 8)  # a kernel with next to nothing to do


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes, floating-point operations and launches: per second, and seconds."""

    bandwidth: float
    products: float

    @classmethod
    def of(cls, results: dict[str, Any] | None) -> Ceilings | None:
        """From the results of this part; None where it did not run."""
        facts = (results or {}).get("facts", {})
        if "copy_bytes_per_s" not in facts or "bf16_flops" not in facts:
            return None
        return cls(max(facts["copy_bytes_per_s"], facts.get("read_bytes_per_s", 0.0)), facts["bf16_flops"])


def specs(chip: Chip, tiny: bool, folder: Path) -> Iterable[GpuKernelSpec]:
    return [_EMPTY]


def run(gpu: Gpu, record: Record) -> None:
    record.fact("copy_bytes_per_s", _copied(gpu, 1 << 16 if gpu.tiny else 1 << 31))
    _launches(gpu, record)
    if gpu.torch is None:
        record.skip("read bandwidth and products", "PyTorch has no CUDA device here")
        return
    torch = gpu.torch
    values = torch.randn(1 << 29, device="cuda")
    record.fact("read_bytes_per_s", 4 * len(values) / gpu.torch_seconds(lambda i: torch.sum(values), 4))
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty(n, n, device="cuda", dtype=torch.bfloat16)
    once, again = (gpu.torch_seconds(lambda i: torch.matmul(a, b, out=out), 10, 9) for _ in range(2))
    record.fact("bf16_flops", 2 * n**3 / min(once, again))
    record.fact("spread", abs(once - again) / once)


def _copied(gpu: Gpu, size: int) -> float:
    """Bytes per second of a copy on the device, those read and those written."""
    source, target = CudaMemory(gpu.stream, size), CudaMemory(gpu.stream, size)
    block = np.random.default_rng(0).integers(0, 255, min(size, 1 << 26), np.uint8)  # never zeros
    for offset in range(0, size, len(block)):
        source.upload(block, offset)
    return 2 * size / gpu.seconds(lambda i: target.copy_from(source, size), 4)


def _launches(gpu: Gpu, record: Record) -> None:
    x, out = gpu.memory(np.ones((1, 8), np.float32)), gpu.memory(np.ones((1, 8), np.uint16))
    args = [x, out, 1]
    count = 4 if gpu.tiny else 1000
    gpu.put(_EMPTY, args)
    gpu.stream.synchronize()
    kernel, addresses = gpu.kernel(_EMPTY), [x.address, out.address, 1]
    begin = time.perf_counter()
    for _ in range(count):
        cuda_launch(gpu.stream, kernel, (1,), addresses)
    gpu.stream.synchronize()
    record.fact("launch_s", (time.perf_counter() - begin) / count)
    record.fact("launch_in_graph_s", gpu.seconds(lambda i: gpu.put(_EMPTY, args), count))
