"""Kernels brought to a device, and launches by themselves, outside a plan: to check a device, and to measure it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from nanoserve.compiler.gpu.artifact import Artifact
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.native import CudaDevice, CudaKernel, CudaMemory, CudaStream, cuda_launch

_LEAST_BYTES = 16  # of memory that is asked for


class Placed(Protocol):
    """What lies on a device."""

    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


def load_kernel(device: CudaDevice, artifact: Artifact, image: bytes) -> CudaKernel:
    """image: what of the artifact the driver loads."""
    how = artifact.launch
    return CudaKernel(
        device, image, how.entry, how.block, how.shared_bytes, how.native_tensors, how.starts_early
    )


def placed(stream: CudaStream, array: NDArray[Any]) -> CudaMemory:
    """A copy of it on the stream's device."""
    held = CudaMemory(stream, max(array.nbytes, _LEAST_BYTES))
    held.upload(array)
    return held


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
