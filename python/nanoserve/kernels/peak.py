"""What the machine can do, measured by kernels that do nothing else: the rate of reading memory, and of each arithmetic's
multiply-adds. A GEMM waits for one of the two; bench/kernels.py says how close it comes.

    read  out[unit] = the exclusive or of the unit's 64 KiB, lane by lane: a stream with the GEMM's prefetch distance
    dot   out[unit] = a register tile of products over STEPS steps, from operands that stay in L1, summed over the tile

Work units are blocks of memory, or passes over the operands.
"""

from __future__ import annotations

from typing import Any

from nanoserve.compiler.target import Target
from nanoserve.kernels.library import KernelSpec

READ_BYTES = 64 * 1024  # of a unit
STEPS = 128  # of the inner loop, per unit
UNIT_PASSES = 64  # over the operands, per unit
ARITHMETICS = {"f32": 1, "bf16": 2, "int8": 4}  # products per 32-bit lane and instruction
_LINE = 16  # int32 of a cache line
_AHEAD_LINES = 128


def read_spec() -> KernelSpec:
    """Args: data int32[.][READ_BYTES / 4], out int32[.][16], begin, end over blocks of READ_BYTES."""
    return KernelSpec.make("peak", measure="read", arithmetic="")


def dot_spec(arithmetic: str) -> KernelSpec:
    """Args: x[STEPS][8], w[STEPS][48], out[.][16], begin, end over units of unit_dots() multiply-adds.

    All are 32-bit lanes: of float32, of pairs of bfloat16, or of four bytes; out is float32, for int8 int32.

    Raises:
        ValueError: an arithmetic that is not known.
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"peak: arithmetic {arithmetic!r} must be one of {', '.join(ARITHMETICS)}")
    return KernelSpec.make("peak", measure="dot", arithmetic=arithmetic)


def tile(target: Target) -> tuple[int, int]:
    """(rows, vectors) of the register tile."""
    return (8, 3) if target.budget >= 28 else (6, 1)


def unit_dots(arithmetic: str, target: Target) -> int:
    """Multiply-adds of one unit of `dot`."""
    rows, vectors = tile(target)
    return rows * vectors * 16 * ARITHMETICS[arithmetic] * STEPS * UNIT_PASSES


def build(symbol: str, target: Target, *, measure: str, arithmetic: str) -> None:
    if measure == "read":
        _build_read(symbol)
    else:
        _build_dot(symbol, target, arithmetic)


def _build_read(symbol: str) -> None:
    from nanoserve.compiler.builder import Value, zeros
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop

    size, streams = READ_BYTES // 4, 8
    memory, lanes = array(UNBOUNDED, size, element="i32"), array(UNBOUNDED, _LINE, element="i32")

    @kernel(symbol, data=memory, out=lanes, begin="index", end="index")
    def _(data: Any, out: Any, begin: Value, end: Value) -> None:
        @loop(begin, end)
        def _(unit: Value) -> None:
            @loop(0, size, streams * _LINE, carry=[zeros(element="i32")] * streams)
            def total(at: Value, total: list[Value]) -> list[Value]:
                for i in range(streams):
                    data.prefetch(unit, at + (_AHEAD_LINES + i) * _LINE)
                return [one ^ data.load(unit, at + i * _LINE) for i, one in enumerate(total)]

            result = total[0]
            for one in total[1:]:
                result = result ^ one
            out.store(result, unit, 0)


def _build_dot(symbol: str, target: Target, arithmetic: str) -> None:
    from nanoserve.compiler.builder import Value, fma, splat, zeros
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop
    from nanoserve.compiler.vector_math import bf16_pairs, dot_bf16, dot_int8, int8_fours

    rows, vectors = tile(target)
    lanes, sums = ("f32" if arithmetic == "f32" else "i32"), ("i32" if arithmetic == "int8" else "f32")

    def lane_groups(lanes: Value) -> Value:
        if arithmetic == "f32":
            return lanes
        return (bf16_pairs if arithmetic == "bf16" else int8_fours)(lanes, target)

    def dot(acc: Value, a: Value, b: Value) -> Value:
        if arithmetic == "f32":
            return fma(a, b, acc)
        return (dot_bf16 if arithmetic == "bf16" else dot_int8)(acc, a, b, target)

    @kernel(
        symbol, x=array(STEPS, 8, element=lanes), w=array(STEPS, 48, element=lanes),
        out=array(UNBOUNDED, 16, element=sums), begin="index", end="index",
    )  # fmt: skip
    def _(x: Any, w: Any, out: Any, begin: Value, end: Value) -> None:
        @loop(begin, end)
        def _(unit: Value) -> None:
            def step(at: Value, acc: list[Value]) -> list[Value]:
                weights = [lane_groups(w.load(at, 16 * j)) for j in range(vectors)]
                result = []
                for i in range(rows):
                    a = lane_groups(splat(x[at, i]))
                    result += [dot(acc[i * vectors + j], a, weights[j]) for j in range(vectors)]
                return result

            @loop(0, UNIT_PASSES, carry=[zeros(element=sums)] * (rows * vectors))
            def total(_: Value, acc: list[Value]) -> list[Value]:
                @loop(0, STEPS, carry=acc)
                def inner(at: Value, acc: list[Value]) -> list[Value]:
                    return step(at, acc)

                result: list[Value] = inner
                return result

            result = total[0]
            for one in total[1:]:
                result = result + one
            out.store(result, unit, 0)
