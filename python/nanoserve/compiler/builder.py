"""Authoring layer, part one: values, operators and vectors.

Running a kernel's Python function once *builds* MLIR. An operator on a `Value` appends an operation at the insertion
point; a Python `for` therefore unrolls, and control.loop makes a loop in the generated code.

Numerics: nothing here allows reassociation or contraction. What is written is what runs, in that order; `fma` is fused
because it says so, `a * b + c` is not. That is what lets every kernel promise the same bits for any split of its work.

`Value` wraps ir.Value instead of patching operators into it: the bindings' own classes stay as they are for anyone else
in the process. `.ir` is the way out to operations this layer does not name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from nanoserve.compiler.bindings import mlir

_mlir = mlir()
ir, arith, vector, math, llvm = _mlir.ir, _mlir.arith, _mlir.vector, _mlir.math, _mlir.llvm

LANES = 16  # the vector of this project: LLVM splits it where registers are narrower


def type_of(name: str) -> Any:
    """An MLIR type from its text: "f32", "index", "vector<16xf32>"."""
    return ir.Type.parse(name)


def vector_of(width: int, element: str = "f32") -> Any:
    return ir.VectorType.get([width], type_of(element))


def _is_vector(t: Any) -> bool:
    return isinstance(t, ir.VectorType)


def _element(t: Any) -> Any:
    return ir.VectorType(t).element_type if _is_vector(t) else t


def _is_float(t: Any) -> bool:
    return str(_element(t)) in ("f32", "f64", "f16", "bf16")


class Value:
    """One SSA value with arithmetic. A Python number on either side takes the other side's type."""

    __slots__ = ("ir",)

    def __init__(self, value: Any) -> None:
        self.ir = value

    @property
    def type(self) -> Any:
        return self.ir.type

    @property
    def width(self) -> int:
        """Lanes of a vector."""
        return int(ir.VectorType(self.type).shape[0])

    def __add__(self, other: Operand) -> Value:
        return _binary(arith.addi, arith.addf, self, other)

    def __radd__(self, other: Operand) -> Value:
        return _binary(arith.addi, arith.addf, other, self)

    def __sub__(self, other: Operand) -> Value:
        return _binary(arith.subi, arith.subf, self, other)

    def __rsub__(self, other: Operand) -> Value:
        return _binary(arith.subi, arith.subf, other, self)

    def __mul__(self, other: Operand) -> Value:
        return _binary(arith.muli, arith.mulf, self, other)

    def __rmul__(self, other: Operand) -> Value:
        return _binary(arith.muli, arith.mulf, other, self)

    def __truediv__(self, other: Operand) -> Value:
        return _binary(None, arith.divf, self, other)

    def __rtruediv__(self, other: Operand) -> Value:
        return _binary(None, arith.divf, other, self)

    # Integers here are sizes and offsets, never negative: unsigned division is a shift or a multiply.
    def __floordiv__(self, other: Operand) -> Value:
        return _binary(arith.divui, None, self, other)

    def __mod__(self, other: Operand) -> Value:
        return _binary(arith.remui, None, self, other)

    def __and__(self, other: Operand) -> Value:
        return _binary(arith.andi, None, self, other)

    def __or__(self, other: Operand) -> Value:
        return _binary(arith.ori, None, self, other)

    def __xor__(self, other: Operand) -> Value:
        return _binary(arith.xori, None, self, other)

    def __lshift__(self, other: Operand) -> Value:
        return _binary(arith.shli, None, self, other)

    def __rshift__(self, other: Operand) -> Value:
        return _binary(arith.shrui, None, self, other)

    # Ordered comparisons: false when either side is NaN.
    def __lt__(self, other: Operand) -> Value:
        return _compare("slt", "OLT", self, other)

    def __le__(self, other: Operand) -> Value:
        return _compare("sle", "OLE", self, other)

    def __gt__(self, other: Operand) -> Value:
        return _compare("sgt", "OGT", self, other)

    def __ge__(self, other: Operand) -> Value:
        return _compare("sge", "OGE", self, other)


Operand = Value | int | float


def const(value: int | float, t: Any) -> Value:
    """A constant of a type (MLIR type or its text); a vector type gives the same number in every lane."""
    t = type_of(t) if isinstance(t, str) else t
    if _is_vector(t):
        e = _element(t)
        attr = ir.FloatAttr.get(e, float(value)) if _is_float(e) else ir.IntegerAttr.get(e, int(value))
        return Value(arith.constant(t, ir.DenseElementsAttr.get_splat(t, attr)))
    return Value(arith.constant(t, float(value) if _is_float(t) else int(value)))


def zeros(width: int = LANES, element: str = "f32") -> Value:
    return const(0, vector_of(width, element))


def index(value: Operand) -> Value:
    """A size or offset; a Python int, or an i32 (zero or positive) read from memory."""
    if not isinstance(value, Value):
        return const(value, "index")
    return value if str(value.type) == "index" else Value(arith.index_cast(type_of("index"), value.ir))


def i32(value: Value) -> Value:
    """A size or offset as i32, or the low half of an i64."""
    convert = arith.trunci if str(value.type) == "i64" else arith.index_cast
    return Value(convert(type_of("i32"), value.ir))


def i64(value: Value, *, unsigned: bool = False) -> Value:
    """A size or offset as i64, or an i32 with its sign; `unsigned` takes its bits as a number of zero or more."""
    if str(value.type) == "index":
        return Value(arith.index_cast(type_of("i64"), value.ir))
    return Value((arith.extui if unsigned else arith.extsi)(type_of("i64"), value.ir))


def splat(value: Value, width: int = LANES) -> Value:
    """The same scalar in every lane."""
    return Value(vector.broadcast(ir.VectorType.get([width], value.type), value.ir))


def _pair(a: Operand, b: Operand) -> tuple[Value, Value]:
    """Both operands with one type: numbers become constants, scalars become vectors."""
    if not isinstance(a, Value):
        assert isinstance(b, Value)
        a = const(a, b.type)
    if not isinstance(b, Value):
        b = const(b, a.type)
    if _is_vector(a.type) and not _is_vector(b.type):
        b = splat(b, a.width)
    elif _is_vector(b.type) and not _is_vector(a.type):
        a = splat(a, b.width)
    return a, b


def _binary(
    on_int: Callable[..., Any] | None, on_float: Callable[..., Any] | None, a: Operand, b: Operand
) -> Value:
    a, b = _pair(a, b)
    op = on_float if _is_float(a.type) else on_int
    if op is None:
        raise TypeError(f"no such operation on {a.type}")
    return Value(op(a.ir, b.ir))


def _compare(on_int: str, on_float: str, a: Operand, b: Operand) -> Value:
    a, b = _pair(a, b)
    if _is_float(a.type):
        return Value(arith.cmpf(getattr(arith.CmpFPredicate, on_float), a.ir, b.ir))
    return Value(arith.cmpi(getattr(arith.CmpIPredicate, on_int), a.ir, b.ir))


def select(condition: Value, a: Value, b: Operand) -> Value:
    a, b = _pair(a, b)
    return Value(arith.select(condition.ir, a.ir, b.ir))


def fma(a: Value, b: Operand, c: Operand) -> Value:
    """a * b + c rounded once. (vector.fma may be split in two roundings, math.fma may not.)"""
    a, b = _pair(a, b)
    _, c = _pair(a, c)
    return Value(math.fma(a.ir, b.ir, c.ir))


def fmax(a: Operand, b: Operand) -> Value:
    """a > b ? a : b, one instruction. A NaN in either operand gives b, so put what must not get lost second."""
    a, b = _pair(a, b)
    return select(a > b, a, b)


def fmin(a: Operand, b: Operand) -> Value:
    """a < b ? a : b; as fmax, b where either is NaN."""
    a, b = _pair(a, b)
    return select(a < b, a, b)


def sqrt(a: Value) -> Value:
    return Value(math.sqrt(a.ir))


def absolute(a: Value) -> Value:
    return Value(math.absf(a.ir))


def copysign(a: Value, sign: Value) -> Value:
    return Value(math.copysign(a.ir, sign.ir))


def widen(value: Value) -> Value:
    """bf16 or f16 as float32, exactly; float32 as it is."""
    if str(_element(value.type)) == "f32":
        return value
    wide = vector_of(value.width) if _is_vector(value.type) else type_of("f32")
    return Value(arith.extf(wide, value.ir))


def narrow(value: Value, element: str) -> Value:
    """A float32 vector as bf16, rounded to nearest even, a NaN quiet; as f32, what it is.

    In integers: arith.truncf is a call into a library where the CPU has no instruction, and the instruction takes
    subnormals as zero.
    """
    if element == "f32":
        return value
    bits = bitcast(value, "i32")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = Value(arith.cmpf(arith.CmpFPredicate.UNO, value.ir, value.ir))
    half = select(is_nan, (bits >> 16) | 0x40, rounded)
    return bitcast(Value(arith.trunci(vector_of(value.width, "i16"), half.ir)), element)


def truncate(value: Value, element: str) -> Value:
    """As `narrow`, by the CPU's instruction, subnormals to zero: for targets with bf16_dot."""
    return Value(arith.truncf(vector_of(value.width, element), value.ir))


def paired_lanes(value: Value) -> Value:
    """Neighbouring 16-bit elements as one 32-bit lane, the first in the low half."""
    return Value(vector.bitcast(vector_of(value.width // 2, "i32"), value.ir))


def double(value: Value) -> Value:
    """float32 as float64, exactly."""
    return Value(
        arith.extf(vector_of(value.width, "f64") if _is_vector(value.type) else type_of("f64"), value.ir)
    )


def bitcast(value: Value, element: str, lanes: int = 1) -> Value:
    """The same bits as another element type of the same size, or as `lanes` smaller ones for each."""
    if _is_vector(value.type):
        return Value(vector.bitcast(vector_of(value.width * lanes, element), value.ir))
    return Value(arith.bitcast(type_of(element), value.ir))


def signed_shift_right(value: Value, bits: int) -> Value:
    """An integer shifted with copies of its sign; >> shifts in zeros."""
    return Value(arith.shrsi(value.ir, const(bits, value.type).ir))


def to_float(value: Value) -> Value:
    """A signed integer as float32, rounded to nearest even."""
    return Value(arith.sitofp(vector_of(value.width) if _is_vector(value.type) else type_of("f32"), value.ir))


def to_i64(value: Value) -> Value:
    """A float32 without its fraction; it must fit."""
    return Value(arith.fptosi(type_of("i64"), value.ir))


def intrinsic(name: str, *operands: Value) -> Value:
    """LLVM's intrinsic of that name, which gives the type of its first operand: a * b + c with c first."""
    return Value(llvm.call_intrinsic(operands[0].type, name, [value.ir for value in operands], [], []))


def imin(a: Operand, b: Operand) -> Value:
    return Value(arith.minsi(index(a).ir, index(b).ir))


def imax(a: Operand, b: Operand) -> Value:
    return Value(arith.maxsi(index(a).ir, index(b).ir))


def ceildiv(a: Value, b: Operand) -> Value:
    return (a + (b - 1)) // b


def shuffle(a: Value, b: Value, lanes: Iterable[int]) -> Value:
    """Lanes of a, and of b counted on behind them, in a new order."""
    return Value(vector.shuffle(a.ir, b.ir, list(lanes)))


def transpose(rows: list[Value]) -> list[Value]:
    """n vectors of n lanes, n a power of two: lane j of row i becomes lane i of row j, in log2(n) rounds of shuffles."""
    n, half = len(rows), len(rows) // 2
    while half:
        pairs = [(i, i + half) for i in range(n) if not i & half]
        for i, j in pairs:
            low = [n + at - half if at & half else at for at in range(n)]
            high = [n + at if at & half else at + half for at in range(n)]
            rows = [*rows]
            rows[i], rows[j] = shuffle(rows[i], rows[j], low), shuffle(rows[i], rows[j], high)
        half //= 2
    return rows


def lane(value: Value, i: int) -> Value:
    return Value(vector.extract(value.ir, [], [i]))


def lane_numbers() -> Value:
    """vector<16xi32>: 0, 1, ... 15."""
    text = ", ".join(str(i) for i in range(LANES))
    return Value(
        arith.constant(vector_of(LANES, "i32"), ir.Attribute.parse(f"dense<[{text}]> : vector<{LANES}xi32>"))
    )


def htree(value: Value, op: Callable[[Value, Value], Value]) -> Value:
    """Reduce the lanes to a scalar: the low half with the high half, until one is left. The order is fixed by this."""
    element = str(_element(value.type))
    while value.width > 1:
        half = value.width // 2
        low, high = (
            Value(vector.extract_strided_slice(vector_of(half, element), value.ir, [at], [half], [1]))
            for at in (0, half)
        )
        value = op(low, high)
    return lane(value, 0)


def add(a: Value, b: Value) -> Value:
    return a + b


def chunks(size: int) -> list[tuple[int, int]]:
    """(offset, width) pairs that cover `size` with widths 16, 8, 4, 2, 1: any head size or row length, no padding."""
    covered: list[tuple[int, int]] = []
    at = 0
    for width in (16, 8, 4, 2, 1):
        while size - at >= width:
            covered.append((at, width))
            at += width
    return covered
