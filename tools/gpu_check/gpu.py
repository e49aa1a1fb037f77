"""The device under check: prepared kernels on it, launches with NumPy arrays, and time by its own clock.

`fake` stands for the emulator behind its fake driver: kernels are loaded from their LLVM IR, sizes are tiny.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tools.gpu_check.places import KERNELS

from nanoserve.compiler.gpu.artifact import Artifact, ArtifactStore
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.cuda.executor import chip_of
from nanoserve.cuda.launch import Placed, launch, load_kernel, placed
from nanoserve.kernels.cuda import library
from nanoserve.native import (
    CudaDevice,
    CudaGraph,
    CudaKernel,
    CudaMemory,
    CudaStream,
    CudaTimeMark,
)


class Gpu:
    """The first device, with the kernels of a folder.

    Attributes:
        tiny: small problems only: on the emulator, or under a sanitizer.
        torch: PyTorch on this device; None where it sees none, or for tiny problems.
    """

    def __init__(self, folder: Path, *, fake: bool = False, tiny: bool = False) -> None:
        self.folder, self.fake, self.tiny = folder, fake, tiny or fake
        self.device = CudaDevice(0)
        self.stream = CudaStream(self.device)
        self.chip = chip_of(self.device)
        self.store = ArtifactStore(folder / KERNELS)
        self._kernels: dict[GpuKernelSpec, CudaKernel] = {}
        # Whether launches follow each other with nothing else between them, and whether the next one follows one.
        self._is_series = self._is_behind = False
        # What was prepared is what is checked: nothing is compiled here, whatever is installed.
        library.toolchain = lambda spec=None: None
        self.torch = None if self.tiny else _torch()
        self.results: dict[str, Any] = {}  # of the parts before, by name

    def image(self, artifact: Artifact) -> bytes:
        """What the driver loads."""
        if not self.fake:
            return artifact.cubin
        from tests.gpu.emulated_images import image_of

        return image_of(artifact)

    def artifact(self, spec: GpuKernelSpec) -> Artifact:
        """Raises KernelMissing where it was not prepared, or is damaged."""
        return library.load_artifacts([spec], self.chip, self.store)[spec]

    def load(self, artifact: Artifact) -> CudaKernel:
        return load_kernel(self.device, artifact, self.image(artifact))

    def kernel(self, spec: GpuKernelSpec) -> CudaKernel:
        if spec not in self._kernels:
            self._kernels[spec] = self.load(self.artifact(spec))
        return self._kernels[spec]

    def memory(self, array: np.ndarray[Any, Any]) -> CudaMemory:
        """A copy on the device."""
        return placed(self.stream, array)

    def put(self, spec: GpuKernelSpec, args: Sequence[int | Placed]) -> None:
        """One launch into the stream; args: what lies on the device, addresses and integers."""
        launch(self.stream, self.kernel(spec), spec, args, is_behind=self._is_behind)
        self._is_behind = self._is_series

    def launch(
        self, spec: GpuKernelSpec, *args: np.ndarray[Any, Any] | int, order: int = 0, chip: str = ""
    ) -> None:
        """One launch on arrays that are changed in place, as tests/gpu/run_kernel.py's; a GPU has its own order."""
        held = [self.memory(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
        self.put(spec, held)
        for arg, memory in zip(args, held, strict=True):
            if isinstance(arg, np.ndarray) and isinstance(memory, CudaMemory) and arg.flags.writeable:
                memory.download(arg)

    def seconds(self, work: Callable[[int], None], launches: int, rounds: int = 7) -> float:
        """Of one call of work(i), i < launches, which puts something into the stream: the median over rounds, from a graph.

        A graph of several launches shrinks the gaps between them, and as in an engine's step, all but the first may begin before
        the one in front has ended; i lets them take turns among buffers that no cache holds. As _timed says, no host's time is
        in it.
        """

        def all_of_it() -> None:
            self._is_series = True
            try:
                for i in range(launches):
                    work(i)
            finally:
                self._is_series = self._is_behind = False

        all_of_it()  # loads kernels
        self.stream.synchronize()
        graph = CudaGraph(self.stream, all_of_it)

        def timed(repeats: int) -> float:
            before, after = CudaTimeMark(self.device), CudaTimeMark(self.device)
            graph.launch(self.stream)
            before.record(self.stream)
            for _ in range(repeats):
                graph.launch(self.stream)
            after.record(self.stream)
            return before.until(after) * 1e-3 / repeats

        seconds = _timed(timed, rounds)
        self.stream.synchronize()
        return seconds / launches

    def torch_seconds(self, work: Callable[[int], object], launches: int, rounds: int = 7) -> float:
        """The same for PyTorch's work."""
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(min(launches, 3)):
                work(i)
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()  # torch.cuda.graph would collect garbage each time
            for i in range(launches):
                work(i)
            graph.capture_end()

            def timed(repeats: int) -> float:
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                graph.replay()
                before.record()
                for _ in range(repeats):
                    graph.replay()
                after.record()
                after.synchronize()
                return float(before.elapsed_time(after)) * 1e-3 / repeats

            return _timed(timed, rounds) / launches


_LEAST_S, _MOST_REPEATS = 1e-3, 50


def _timed(timed: Callable[[int], float], rounds: int) -> float:
    """Seconds of one graph, the median over rounds; timed(n) launches one, then a mark, n more, and another mark.

    On an idle stream a launch takes longer to arrive than a mark: the first graph keeps the device busy while the others are
    put behind it, and as many of them are measured as take a millisecond, beside which what is between two of them is little.
    """
    repeats = min(_MOST_REPEATS, max(1, round(_LEAST_S / max(timed(1), 1e-7))))
    timed(1)
    return statistics.median(timed(repeats) for _ in range(rounds))


def _torch() -> Any:
    import torch

    return torch if torch.cuda.is_available() else None
