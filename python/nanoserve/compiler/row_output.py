"""How a kernel writes a row that a GEMM reads: as float32, rounded to bfloat16, or quantised to 8 bits.

Quantised, a row becomes u8 = round(value / scale) + 128 with scale = largest |value| / 127: a scale per token, found from the
row itself, so that batch mates cannot change a bit (per-token dynamic quantisation as in SmoothQuant and vLLM's W8A8). The
offset of 128 makes the bytes unsigned, as the dot product instructions of x86 want them; the GEMM takes it out again.

Numerics: bfloat16 and the quotient round to nearest, ties to even. A row with a NaN or an infinity gets a scale that is
NaN or infinite, so that it cannot pass for finite further on; its bytes then mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanoserve.compiler.bindings import mlir
from nanoserve.compiler.builder import (
    LANES,
    Operand,
    Value,
    bitcast,
    chunks,
    const,
    htree,
    narrow,
    select,
    vector_of,
)
from nanoserve.compiler.control import UNBOUNDED, Buffer, array, loop, over, scratch

_mlir = mlir()
arith, math = _mlir.arith, _mlir.math

# A row of zeros has this for its largest value: no division by zero, and far above denormals.
_SMALLEST = 1e-30


def row_arguments(dtype: str, ld: int) -> dict[str, str]:
    """Kernel arguments for rows of this type: out[.][ld], and for "u8" scales[.] behind it."""
    if dtype != "u8":
        return {"out": array(UNBOUNDED, ld, element=dtype)}
    return {"out": array(UNBOUNDED, ld, element="i8"), "scales": array(UNBOUNDED)}


class RowOutput:
    """Writes rows of `cols` values; make one outside of loops (it may need stack memory).

    Args:
        out: the rows. scales: one float per row, for quantised rows only.
    """

    def __init__(self, cols: int, dtype: str, out: Buffer, scales: Buffer | None = None) -> None:
        self._cols = cols
        self._dtype = dtype
        self._out = out
        self._scales = scales
        self._kept = scratch(cols) if dtype == "u8" else None

    def write(self, row: Operand, value: Callable[[Operand, int], Value]) -> None:
        """out[row, at ...] = value(at, width), a float32 vector, for every column `at`; each is asked for once."""
        if self._kept is None:

            @over(self._cols)
            def _(at: Any, width: int) -> None:
                self._out.store(narrow(value(at, width), self._dtype), row, at)

            return
        self._quantise(row, value)

    def _quantise(self, row: Operand, value: Callable[[Operand, int], Value]) -> None:
        kept, scales = self._kept, self._scales
        assert kept is not None
        assert scales is not None

        def larger(at: Operand, width: int, before: Value) -> Value:
            v = value(at, width)
            kept.store(v, at)
            return _larger(bitcast(v, "i32") & 0x7FFF_FFFF, before)

        whole = self._cols // LANES * LANES
        largest = const(0, vector_of(LANES, "i32"))
        if whole:
            carried = loop(0, whole, LANES, carry=[largest])
            (largest,) = carried(lambda at, before: [larger(at, LANES, before[0])])
        top = htree(bitcast(largest, "f32"), _larger_magnitude)
        for at, width in chunks(self._cols - whole):
            rest = larger(whole + at, width, const(0, vector_of(width, "i32")))
            top = _larger_magnitude(htree(bitcast(rest, "f32"), _larger_magnitude), top)
        floor = const(_SMALLEST, "f32")
        top = select(top < floor, floor, top)  # not true for a NaN
        scales[row] = top * (1.0 / 127.0)
        inverse = 127.0 / top

        @over(self._cols)
        def _(at: Any, width: int) -> None:
            quotient = Value(math.roundeven((kept.load(at, width=width) * inverse).ir))
            whole = Value(arith.fptosi(vector_of(width, "i32"), quotient.ir)) + 128
            self._out.store(Value(arith.trunci(vector_of(width, "i8"), whole.ir)), row, at)


def _larger(a: Value, b: Value) -> Value:
    return select(a > b, a, b)


def _larger_magnitude(a: Value, b: Value) -> Value:
    """Of floats without a sign, compared as integers: they stay in order, and a NaN is above them all, never lost."""
    return bitcast(_larger(bitcast(a, "i32"), bitcast(b, "i32")), "f32")
