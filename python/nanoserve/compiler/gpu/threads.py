"""Authoring layer for GPU kernels, part three: who a thread is, and what threads tell each other.

Reductions have one order. Within a warp, values are exchanged over distances 16, 8, 4, 2, 1, so that every lane has
the same result, to the bit, for an operation that commutes; of a block, the warps' results are combined from the
first to the last.
"""

from __future__ import annotations

from collections.abc import Callable

from nanoserve.compiler.bindings import mlir_gpu
from nanoserve.compiler.builder import Value, const, i32, i64, ir, select
from nanoserve.compiler.control import when
from nanoserve.compiler.gpu.chip import WARP
from nanoserve.compiler.gpu.memory import Array

gpu, nvvm = mlir_gpu().gpu, mlir_gpu().nvvm


def thread_id() -> Value:
    """Of this thread in its block."""
    return Value(gpu.thread_id(gpu.Dimension.x))


def block_id(axis: str = "x") -> Value:
    return Value(gpu.block_id(getattr(gpu.Dimension, axis)))


def only_where(condition: Value | None, body: Callable[[], None]) -> None:
    """Runs the body where the condition holds, everywhere without one."""
    if condition is None:
        body()
    else:
        when(condition)(body)


def barrier() -> None:
    """Wait for all threads of the block; what they wrote to memory is visible afterwards. All must get here."""
    gpu.barrier()


def barrier_of(group: Value, threads: int) -> None:
    """The same for `threads` of a block, whole warps, that name the same group, 0 to 14. All of the group must get here."""
    nvvm.barrier(barrier_id=i32(group + 1).ir, number_of_threads=const(threads, "i32").ir)


def shuffle_xor(value: Value, distance: int) -> Value:
    """The value of the lane whose number differs in that bit. All lanes of the warp must get here."""
    return _shuffle("xor", value, distance)


def _shuffle(mode: str, value: Value, distance: int) -> Value:
    """A register of 32 bits goes at a time, so 64 bits go in halves."""
    if str(value.type) == "i64":
        low, high = (_shuffle(mode, i32(half), distance) for half in (value, value >> 32))
        return (i64(high) << 32) | i64(low, unsigned=True)
    attribute = ir.Attribute.parse(f"#gpu<shuffle_mode {mode}>")
    return Value(gpu.shuffle(value.ir, const(distance, "i32").ir, const(WARP, "i32").ir, attribute)[0])


def over_warp(value: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """All lanes' values combined, in every lane."""
    for distance in (16, 8, 4, 2, 1):
        value = combine(value, shuffle_xor(value, distance))
    return value


def running_sum(value: Value) -> Value:
    """Of a warp: the sum of the values of this lane and those before it, whose order a float sum would depend on."""
    lane = thread_id() % WARP
    for distance in (1, 2, 4, 8, 16):
        before = _shuffle("up", value, distance)
        value = select(lane < distance, value, value + before)
    return value


def over_block(value: Value, combine: Callable[[Value, Value], Value], warps: int, slots: Array) -> Value:
    """All threads' values combined, in every thread; `slots` is shared memory of its own, one element per warp."""
    value = over_warp(value, combine)
    if warps == 1:
        return value
    thread = thread_id()

    @when(thread % WARP < 1)
    def _() -> None:
        slots[thread // WARP] = value

    barrier()
    total = slots[0]
    for warp in range(1, warps):
        total = combine(total, slots[warp])
    return total
