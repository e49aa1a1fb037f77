"""A GPU kernel by specification: what its code depends on, what it is called with, and how it is launched. Data only.

Every kernel takes bare pointers (64-bit device addresses), 64-bit integers, and memory by a tensor map, in the order of
its spec's arguments.
How many blocks run follows from those integers alone (Extent), so that a launch can be captured in a CUDA graph for a
bucket of rows: what changes from step to step is read from device memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from nanoserve.compiler.gpu.chip import MAX_THREADS, WARP

Param = int | float | str | bool | None
UNBOUNDED = 1 << 31  # stands for "as many rows as the caller says", as in compiler/control.py
SCALAR = "index"
_MAX_GRID = (2**31 - 1, 65535, 65535)  # blocks along x, y, z


def pointer(*shape: int, element: str = "f32") -> str:
    """The type of a pointer argument: row-major, shape[0] usually UNBOUNDED."""
    return f"memref<{'x'.join(map(str, shape))}x{element}>"


class TensorForm(NamedTuple):
    """An argument's memory as a tensor, for the chip's copy engine (TMA): the kernel gets 128 bytes that the driver makes.

    Dimensions are counted from the innermost. The outermost has as many elements as the memory holds; what a box has
    beyond any dimension is zeros.

    Attributes:
        element: "bf16".
        dims: elements, of all dimensions but the outermost.
        strides: elements from one to the next, of all dimensions but the innermost.
        box: elements along each dimension that a copy brings.
        swizzle: bytes of a row whose 16-byte lines are permuted in shared memory, as wgmma reads them; 0: none.
    """

    element: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


Argument = str | TensorForm  # an MLIR type, or memory by a tensor map


class Extent(NamedTuple):
    """Blocks along one dimension of the grid: times * ceil(scalar / per), or `times` where there is no scalar.

    Attributes:
        scalar: name of an integer argument.
    """

    scalar: str | None = None
    per: int = 1
    times: int = 1

    def blocks(self, scalars: Mapping[str, int]) -> int:
        return self.times * (1 if self.scalar is None else -(-scalars[self.scalar] // self.per))


Grid = tuple[Extent, Extent, Extent]
ONE = Extent()


@dataclass(frozen=True, slots=True)
class GpuKernelSpec:
    """One kernel.

    Args:
        kind: the file of kernels/cuda/ that builds it.
        params: what it is built with, sorted by name.
        arguments: (name, type) in order: pointer(...), SCALAR, or a TensorForm.
        grid: blocks along x, y and z.
        block: threads of a block, whole warps.
        shared_bytes: dynamic shared memory of a block.
    """

    kind: str
    params: tuple[tuple[str, Param], ...]
    arguments: tuple[tuple[str, Argument], ...]
    grid: Grid
    block: int
    shared_bytes: int = 0

    @classmethod
    def make(
        cls, kind: str, arguments: Mapping[str, Argument], grid: tuple[Extent, ...], block: int, /,
        shared_bytes: int = 0, **params: Param,
    ) -> GpuKernelSpec:  # fmt: skip
        """A spec of checked shape; missing dimensions of the grid are 1.

        Raises:
            ValueError: a block that is no whole number of warps, or a grid of an argument that is none.
        """
        if block % WARP or not WARP <= block <= MAX_THREADS:
            raise ValueError(f"{kind}: block={block} must be a multiple of {WARP}, at most {MAX_THREADS}")
        for extent in grid:
            if extent.scalar is not None and arguments.get(extent.scalar) != SCALAR:
                raise ValueError(f"{kind}: the grid depends on {extent.scalar!r}, no integer argument")
        x, y, z = [*grid, ONE, ONE][:3]
        return cls(
            kind, tuple(sorted(params.items())), tuple(arguments.items()), (x, y, z), block, shared_bytes
        )

    @property
    def symbol(self) -> str:
        """A readable, deterministic entry name: the kind, the sizes, and a digest that tells the rest apart."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:8]
        numbers = "_".join(
            f"{name}{value}" for name, value in self.params if type(value) is int and len(name) <= 2
        )
        return "_".join(part for part in (self.kind, numbers.lower(), digest) if part)

    @property
    def pointers(self) -> tuple[bool, ...]:
        """Of each argument, whether it is memory, by a pointer or a tensor map."""
        return tuple(kind != SCALAR for _, kind in self.arguments)

    @property
    def tensors(self) -> tuple[tuple[str, TensorForm], ...]:
        """The arguments that are tensor maps."""
        return tuple((name, kind) for name, kind in self.arguments if isinstance(kind, TensorForm))

    def grid_of(self, scalars: Mapping[str, int]) -> tuple[int, int, int]:
        """How many blocks a launch with these integers has; none where there is nothing to do.

        Raises:
            ValueError: more than a grid can have.
        """
        x, y, z = (extent.blocks(scalars) for extent in self.grid)
        for axis, blocks, most in zip("xyz", (x, y, z), _MAX_GRID, strict=True):
            if blocks > most:
                raise ValueError(f"{self.symbol}: grid.{axis}={blocks} must be at most {most}")
        return x, y, z
