"""A compiled kernel on NumPy arrays: the LLVM IR that its machine code comes from, in the emulator."""

from __future__ import annotations

import numpy as np

from nanoserve.compiler.gpu.artifact import Artifact
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.emulator.emulator import Emulator
from nanoserve.emulator.tensor_map import TensorArgument


class EmulatedKernel:
    """One kernel, launched as on a GPU.

    Args:
        spec: what it is. artifact: what was compiled from it.
        llvm_ir: what runs in place of the artifact's own, for a kernel that was changed on purpose.

    Raises:
        EmulatorMissing: the emulator is not built. UnsupportedInstruction: it does not know one of the kernel's.
    """

    def __init__(self, spec: GpuKernelSpec, artifact: Artifact, llvm_ir: str | None = None) -> None:
        self._spec, self._launch = spec, artifact.launch
        self._emulator = Emulator(artifact.llvm_ir if llvm_ir is None else llvm_ir)

    def __call__(self, *args: np.ndarray | int, order: int = 0) -> None:
        """One launch on arrays that are changed in place; integers are the kernel's scalars.

        `order` of threads: 0, each as far as it gets; 1, the last first; any other, random with that seed.

        Raises:
            ValueError: the arguments are not the spec's. EmulatorError: the kernel did what a GPU need not survive.
        """
        spec = self._spec
        names = [name for name, _ in spec.arguments]
        if len(names) != len(args):
            raise ValueError(f"{spec.symbol}: {len(args)} arguments, it takes {', '.join(names)}")
        for name, is_pointer, value in zip(names, spec.pointers, args, strict=True):
            if is_pointer != isinstance(value, np.ndarray):
                raise ValueError(
                    f"{spec.symbol}: {name} must be {'an array' if is_pointer else 'an integer'}"
                )
        tensors = dict(spec.tensors)
        scalars = {name: value for name, value in zip(names, args, strict=True) if isinstance(value, int)}
        block = (self._launch.block, 1, 1)
        self._emulator.launch(
            self._launch.entry,
            spec.grid_of(scalars),
            block,
            self._launch.shared_bytes,
            [
                TensorArgument(value, tensors[name])
                if isinstance(value, np.ndarray) and name in tensors
                else value
                for name, value in zip(names, args, strict=True)
            ],
            order=order,
        )
