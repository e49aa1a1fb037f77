"""Runs a GPU kernel on the CPU: the LLVM IR that its machine code comes from, in the emulator."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np

from nanoserve.compiler.gpu.artifact import Artifact
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.emulator import Emulator
from nanoserve.kernels.cuda.library import load_artifacts

ORDERS = (0, 1, 2)  # of threads: each as far as it gets, the last first, and random


@cache
def artifact(spec: GpuKernelSpec, chip: str = "sm_90") -> Artifact:
    """The compiled kernel, kept on disk between runs."""
    return load_artifacts([spec], parse_chip(chip))[spec]


@cache
def _emulator(spec: GpuKernelSpec, chip: str) -> Emulator:
    return Emulator(artifact(spec, chip).llvm_ir)


def launch(spec: GpuKernelSpec, *args: np.ndarray | int, order: int = 0, chip: str = "sm_90") -> None:
    """One launch on arrays that are changed in place; integers are the kernel's scalars."""
    names = [name for name, _ in spec.arguments]
    assert len(names) == len(args), f"{spec.symbol} takes {', '.join(names)}"
    for name, is_pointer, value in zip(names, spec.pointers, args, strict=True):
        assert is_pointer == isinstance(value, np.ndarray), f"{spec.symbol}: {name}"
    scalars = {name: value for name, value in zip(names, args, strict=True) if isinstance(value, int)}
    launched = artifact(spec, chip).launch
    _emulator(spec, chip).launch(
        launched.entry,
        spec.grid_of(scalars),
        (launched.block, 1, 1),
        launched.shared_bytes,
        list(args),
        order=order,
    )


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
