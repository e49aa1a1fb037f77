"""The work of a plan, bound to buffers and weights: launches of our kernels, and products that cuBLAS does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanoserve.compiler.gpu.artifact import Artifact
from nanoserve.compiler.gpu.spec import Extent, GpuKernelSpec
from nanoserve.native import CudaKernel, CudaStep
from nanoserve.packed_weights import Arg

_ONE: Arg = ("number", 1)


@dataclass(frozen=True, slots=True)
class BoundLaunch:
    """A launch of a plan.

    Attributes:
        variants: (most, spec) ascending; the last takes any number.
        args: by the specs' argument names.
        over: the number that chooses among variants.
    """

    name: str
    variants: tuple[tuple[int | None, GpuKernelSpec], ...]
    args: Mapping[str, Arg]
    over: Arg = _ONE

    @classmethod
    def of(cls, name: str, spec: GpuKernelSpec, *args: Arg) -> BoundLaunch:
        """Of one kernel, its arguments in its order."""
        return cls(name, ((None, spec),), by_name(spec, *args))

    def add_to(
        self,
        native: CudaStep,
        artifacts: Mapping[GpuKernelSpec, Artifact],
        load: Callable[[Artifact], CudaKernel],
    ) -> None:
        """Appends it to a plan."""
        made = []
        for most, spec in self.variants:
            grid = [self._extent(extent) for extent in spec.grid]
            made.append((0 if most is None else most, load(artifacts[spec]), grid))
        names = [name for name, _ in self.variants[0][1].arguments]
        native.op(self.name, made, [self.args[name] for name in names], self.over)

    def _extent(self, extent: Extent) -> tuple[Arg, int, int]:
        scalar = _ONE if extent.scalar is None else self.args[extent.scalar]
        return scalar, extent.per, extent.times


@dataclass(frozen=True, slots=True)
class BoundProduct:
    """A product of a plan that cuBLAS does; arguments as CudaStep.product's."""

    name: str
    args: tuple[Arg, Arg, Arg, Arg]
    options: Mapping[str, Any]
    variants: tuple[()] = ()  # no kernel of ours

    def add_to(
        self,
        native: CudaStep,
        artifacts: Mapping[GpuKernelSpec, Artifact],
        load: Callable[[Artifact], CudaKernel],
    ) -> None:
        """Appends it to a plan."""
        native.product(self.name, *self.args, **self.options)


BoundWork = BoundLaunch | BoundProduct


def by_name(spec: GpuKernelSpec, *args: Arg) -> dict[str, Arg]:
    """Arguments in the kernel's order, by their names."""
    return {name: arg for (name, _), arg in zip(spec.arguments, args, strict=True)}
