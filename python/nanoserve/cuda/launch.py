"""One launch by itself, outside a plan: to check a device, and to measure it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.native import CudaKernel, CudaStream, cuda_launch


class Placed(Protocol):
    """What lies on a device."""

    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


def launch(
    stream: CudaStream,
    kernel: CudaKernel,
    spec: GpuKernelSpec,
    args: Sequence[int | Placed],
    *,
    is_behind: bool = False,
) -> None:
    """Puts it into the stream.

    Args:
        args: in the kernel's order: what lies on the device, addresses and integers.
        is_behind: nothing but launches is in front of it, so that it may begin early.
    """
    names, by_map = [name for name, _ in spec.arguments], dict(spec.tensors)
    scalars = {
        name: arg
        for name, pointer, arg in zip(names, spec.pointers, args, strict=True)
        if isinstance(arg, int) and not pointer
    }
    values = [
        arg if isinstance(arg, int) else (arg.address, arg.num_bytes) if name in by_map else arg.address
        for name, arg in zip(names, args, strict=True)
    ]
    cuda_launch(stream, kernel, spec.grid_of(scalars), values, is_behind)
