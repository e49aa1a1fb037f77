"""Random numbers on the device that kernels and PyTorch both read, and back again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tools.gpu_check.gpu import Gpu

_BEYOND_CACHE = 3 * 64 * 2**20  # bytes


@dataclass(frozen=True, slots=True)
class Rows:
    """Numbers on the device, as long as this lives.

    Attributes:
        held: a tensor of PyTorch's where that has the device, else memory of ours.
    """

    address: int
    num_bytes: int
    held: Any
    shape: tuple[int, ...] = ()
    dtype: str = "bf16"


def random_rows(gpu: Gpu, *shape: int, dtype: str = "bf16", scale: float = 1.0) -> Rows:
    """Normal numbers."""
    if gpu.torch is not None:
        torch = gpu.torch
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        made = torch.empty(*shape, device="cuda", dtype=kind).normal_(std=scale)
        torch.cuda.synchronize()
        return Rows(made.data_ptr(), made.nbytes, made, shape, dtype)
    values = np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32) * np.float32(scale)
    narrow = values if dtype == "f32" else (values.view(np.uint32) >> 16).astype(np.uint16)
    held = gpu.memory(narrow)
    return Rows(held.address, narrow.nbytes, held, shape, dtype)


def synchronize(gpu: Gpu) -> None:
    """Our stream and PyTorch's, which know nothing of each other."""
    gpu.stream.synchronize()
    if gpu.torch is not None:
        gpu.torch.cuda.synchronize()


def tensor_of(gpu: Gpu, rows: Rows) -> Any:
    """A tensor of them as they are now, on the device or, where PyTorch has none, on the host."""
    synchronize(gpu)
    if gpu.torch is not None:
        return rows.held
    import torch

    found = np.empty(rows.shape, np.float32 if rows.dtype == "f32" else np.uint16)
    rows.held.download(found)
    made = torch.from_numpy(found)
    return made if rows.dtype == "f32" else made.view(torch.bfloat16)


def copies(size: int, tiny: bool) -> int:
    """Of something of so many bytes, so that the cache does not hold what is needed next."""
    return 2 if tiny else max(1, min(40, -(-_BEYOND_CACHE // size)))


def apart(found: Any, wanted: Any) -> float:
    """How far rows are from those they should be, at worst: relative to the number, and what is usual in its row."""
    usual = wanted.square().mean(-1, keepdim=True).sqrt()
    worst = ((found.float() - wanted).abs() / (usual + wanted.abs())).max().item()
    return float(worst) if worst == worst else float("inf")
