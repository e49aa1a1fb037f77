"""Runs a GPU kernel on the CPU: the LLVM IR that its machine code comes from, in the emulator."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np

from nanoserve.compiler.gpu.artifact import Artifact
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.emulator.emulated_kernel import EmulatedKernel
from nanoserve.kernels.cuda.library import load_artifacts

ORDERS = (0, 1, 2)  # of threads: each as far as it gets, the last first, and random


@cache
def artifact(spec: GpuKernelSpec, chip: str = "sm_90") -> Artifact:
    """The compiled kernel, kept on disk between runs."""
    return load_artifacts([spec], parse_chip(chip))[spec]


@cache
def _kernel(spec: GpuKernelSpec, chip: str) -> EmulatedKernel:
    return EmulatedKernel(spec, artifact(spec, chip))


def launch(spec: GpuKernelSpec, *args: np.ndarray | int, order: int = 0, chip: str = "sm_90") -> None:
    """One launch on arrays that are changed in place; integers are the kernel's scalars."""
    _kernel(spec, chip)(*args, order=order)


def same_in_every_order(
    spec: GpuKernelSpec,
    *args: np.ndarray | int,
    out: int,
    orders: Iterable[int] = ORDERS,
    chip: str = "sm_90",
) -> np.ndarray:
    """What argument `out` holds after a launch, the same bits for every order of threads."""
    results = []
    for order in orders:
        copies = [value.copy() if isinstance(value, np.ndarray) else value for value in args]
        launch(spec, *copies, order=order, chip=chip)
        results.append(copies[out])
    for result in results[1:]:
        assert result.tobytes() == results[0].tobytes(), f"{spec.symbol}: the order of threads changes bits"
    return np.asarray(results[0])
