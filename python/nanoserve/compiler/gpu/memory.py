"""Authoring layer for GPU kernels, part two: memory.

Array is global or shared memory with static strides. SharedMemory hands out the dynamic shared memory of a block,
whose size the spec states. copy_async brings 16 bytes from global into shared memory while the thread goes on; commit
closes a group of such copies, and wait_until waits until at most so many of the youngest groups are still under way.
What a thread copied, the others see after a barrier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nanoserve.compiler.bindings import mlir, mlir_gpu
from nanoserve.compiler.builder import Operand, Value, index, type_of, vector_of
from nanoserve.compiler.control import Buffer

_mlir, _gpu = mlir(), mlir_gpu()
memref, vector = _mlir.memref, _mlir.vector
gpu, nvgpu = _gpu.gpu, _gpu.nvgpu

BYTES = {"f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i64": 8, "i8": 1}  # of elements
LINE = 16  # bytes that one thread moves at once, at most
_SHARED = "#gpu.address_space<workgroup>"


class Array(Buffer):
    """A Buffer whose runs are aligned: load(i, j, width=4) begins at a multiple of 4 elements, at most 16 bytes."""

    __slots__ = ()

    def _alignment(self, width: int) -> int:
        return min(LINE, width * BYTES[self.element])

    def load(self, *at: Operand, width: int = 16) -> Value:
        """A vector, also for width=1."""
        return Value(
            vector.load(
                vector_of(width, self.element), self.ir, self._at(at), alignment=self._alignment(width)
            )
        )

    def store(self, value: Value, *at: Operand) -> None:
        vector.store(value.ir, self.ir, self._at(at), alignment=self._alignment(value.width))


class SharedMemory:
    """The dynamic shared memory of a block, not initialised; make one per kernel."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._base = gpu.dynamic_shared_memory(type_of(f"memref<?xi8, {_SHARED}>"))

    def array(self, *shape: int, element: str = "f32", alignment: int = LINE) -> Array:
        """The next so many elements.

        Raises:
            ValueError: more than the spec has asked for.
        """
        start = -(-self._taken // alignment) * alignment
        self._taken = start + math.prod(shape) * BYTES[element]
        if self._taken > self._size:
            raise ValueError(f"shared memory: {self._taken} bytes are taken, the spec says {self._size}")
        kind = type_of(f"memref<{'x'.join(map(str, shape))}x{element}, {_SHARED}>")
        return Array(memref.view(kind, self._base, index(start).ir, []))


def copy_async(
    source: Array,
    source_at: Sequence[Operand],
    target: Array,
    target_at: Sequence[Operand],
    *,
    valid: Value | None = None,
) -> None:
    """16 bytes of global memory to shared memory, both aligned so; past the L1 cache.

    Args:
        valid: how many elements to read; the others become zeros. All by default.
    """
    nvgpu.device_async_copy(
        target.ir, [index(i).ir for i in target_at], source.ir, [index(i).ir for i in source_at],
        LINE // BYTES[source.element], src_elements=None if valid is None else valid.ir, bypass_l1=True,
    )  # fmt: skip


def commit() -> Any:
    """What this thread copied since the last commit is a group, maybe an empty one."""
    return nvgpu.device_async_create_group([])


def wait_until(groups: int, group: Any) -> None:
    """Wait until at most so many of this thread's groups are under way. `group` is any commit() before this one."""
    nvgpu.device_async_wait(group, num_groups=groups)


def rounded(value: Value, element: str) -> Value:
    """float32 as `element`, to nearest even; f32 as it is. One instruction, which keeps subnormals."""
    if element == "f32":
        return value
    is_vector = str(value.type).startswith("vector")
    return Value(
        _mlir.arith.truncf(vector_of(value.width, element) if is_vector else type_of(element), value.ir)
    )
