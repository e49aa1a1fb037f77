"""Authoring layer, part two: kernels, loops and memory.

A kernel is a function of pointers and index values. Pointers are memrefs of static strides passed as bare pointers; the
first extent of an array is never needed (UNBOUNDED), because every loop gets its bounds as arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from nanoserve.compiler.bindings import mlir
from nanoserve.compiler.builder import (
    LANES,
    Operand,
    Value,
    add,
    chunks,
    htree,
    index,
    ir,
    type_of,
    vector_of,
    zeros,
)

_mlir = mlir()
func, memref, scf, vector = _mlir.func, _mlir.memref, _mlir.scf, _mlir.vector

UNBOUNDED = 1 << 31  # stands for "as many rows as the caller says"


def array(*shape: int, element: str = "f32") -> str:
    """The type of a pointer argument: row-major, shape[0] usually UNBOUNDED."""
    return f"memref<{'x'.join(map(str, shape))}x{element}>"


class Buffer:
    """Memory with static strides: b[i, j] is one element, b.load(i, j, width=16) a run of the last dimension."""

    __slots__ = ("element", "ir")

    def __init__(self, value: Any) -> None:
        self.ir = value
        self.element = str(ir.MemRefType(value.type).element_type)

    @staticmethod
    def _at(at: Sequence[Operand]) -> list[Any]:
        return [index(i).ir for i in at]

    def __getitem__(self, at: Operand | tuple[Operand, ...]) -> Value:
        return Value(memref.load(self.ir, self._at(at if isinstance(at, tuple) else (at,))))

    def __setitem__(self, at: Operand | tuple[Operand, ...], value: Value) -> None:
        memref.store(value.ir, self.ir, self._at(at if isinstance(at, tuple) else (at,)))

    def load(self, *at: Operand, width: int = 16) -> Value:
        return Value(vector.load(vector_of(width, self.element), self.ir, self._at(at)))

    def store(self, value: Value, *at: Operand) -> None:
        vector.store(value.ir, self.ir, self._at(at))

    def prefetch(self, *at: Operand, locality: int = 3, write: bool = False) -> None:
        """Ask for a cache line; locality 3 is L1, 2 is L2. The address may lie past the end."""
        memref.prefetch(self.ir, self._at(at), write, locality, True)


def scratch(*shape: int, element: str = "f32") -> Buffer:
    """Stack memory of this call, 64-byte aligned, not initialised. Use outside of loops only: it is freed on return."""
    return Buffer(memref.alloca(type_of(array(*shape, element=element)), [], [], alignment=64))


def kernel(
    symbol: str, *, overlap: Collection[str] = (), **arguments: str
) -> Callable[[Callable[..., None]], None]:
    """@kernel("name", x=array(...), m="index") def _(x, m): ... - a function in the module being built.

    Pointer arguments arrive as Buffer, the others as Value. No pointer but those named in `overlap` may share memory
    with another.
    """

    def define(body: Callable[..., None]) -> None:
        _function(symbol, arguments, body, overlap)

    return define


def helper(
    symbol: str, *, overlap: Collection[str] = (), **arguments: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A function for a kernel of the same module to call: @helper(...) def scores(q, k): ... then scores(q, k).

    `overlap` as kernel's. Never inlined. A hot loop in a function of its own has all registers to itself; among the rest of a long kernel, LLVM
    spills its accumulators.
    """

    def define(body: Callable[..., None]) -> Callable[..., None]:
        f = _function(symbol, arguments, body, overlap)
        f.attributes["llvm.linkage"] = ir.Attribute.parse("#llvm.linkage<internal>")

        def call(*values: Buffer | Operand) -> None:
            func.call(
                [], symbol, [value.ir if isinstance(value, Buffer) else index(value).ir for value in values]
            )

        return call

    return define


def _function(
    symbol: str, arguments: dict[str, str], body: Callable[..., None], overlap: Collection[str] = ()
) -> Any:
    types = [type_of(text) for text in arguments.values()]
    f = func.FuncOp(symbol, ir.FunctionType.get(types, []))
    f.attributes["arg_attrs"] = ir.ArrayAttr.get(
        [
            ir.DictAttr.parse("{llvm.noalias}" if text.startswith("memref") and name not in overlap else "{}")
            for name, text in arguments.items()
        ]
    )
    with ir.InsertionPoint(f.add_entry_block()):
        body(
            *(
                Buffer(value) if text.startswith("memref") else Value(value)
                for value, text in zip(f.arguments, arguments.values(), strict=True)
            )
        )
        func.return_([])
    return f


def loop(
    low: Operand, high: Operand, step: int = 1, carry: Sequence[Value] | None = None
) -> Callable[[Any], Any]:
    """A loop in the generated code: @loop(lo, hi) def _(i): ...

    With `carry`, a list of values that each iteration takes and returns, the decorated name becomes the final list:
    @loop(0, n, carry=[zeros()]) def total(i, total): return [total[0] + x.load(i)]
    """

    def define(body: Callable[..., Any]) -> Any:
        op = scf.ForOp(index(low).ir, index(high).ir, index(step).ir, [value.ir for value in carry or ()])
        with ir.InsertionPoint(op.body):
            i = Value(op.induction_variable)
            if carry is None:
                body(i)
                scf.yield_([])
            else:
                scf.yield_([value.ir for value in body(i, [Value(v) for v in op.inner_iter_args])])
        return None if carry is None else [Value(v) for v in op.results]

    return define


def when(condition: Value, otherwise: Sequence[Value] | None = None) -> Callable[[Callable[[], Any]], Any]:
    """@when(a < b) def _(): ... - runs where the condition holds.

    With `otherwise`, a list of values, the body returns such a list, and the decorated name becomes one or the other:
    @when(a < b, otherwise=[a]) def smaller(): return [b]
    """

    def define(body: Callable[[], Any]) -> Any:
        types = [value.type for value in otherwise or ()]
        op = scf.IfOp(condition.ir, types, has_else=otherwise is not None)
        with ir.InsertionPoint(op.then_block):
            values = body()
            scf.yield_([] if otherwise is None else [value.ir for value in values])
        if otherwise is None:
            return None
        with ir.InsertionPoint(op.else_block):
            scf.yield_([value.ir for value in otherwise])
        return [Value(v) for v in op.results]

    return define


def sum_of_columns(cols: int, term: Callable[[Value, Any, int], Value]) -> Value:
    """The sum over a row's columns of what term(acc, at, width) adds to acc, in an order that depends on `cols` only.

    Four accumulators of 16 lanes (64 columns a turn), then one for each leftover chunk of 16, 8, 4, 2, 1 columns; added in
    that order and halved lane-wise to a scalar.
    """
    whole = cols // 64 * 64

    def turn(at: Any, acc: list[Value]) -> list[Value]:
        return [term(acc[j], at + 16 * j, LANES) for j in range(4)]

    acc = loop(0, whole, 64, carry=[zeros()] * 4)(turn) if whole else [zeros()] * 4
    result = htree((acc[0] + acc[1]) + (acc[2] + acc[3]), add)
    for at, width in chunks(cols - whole):
        result = result + htree(term(zeros(width), whole + at, width), add)
    return result


def either(condition: Value, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Runs the first where the condition holds, the second elsewhere."""
    op = scf.IfOp(condition.ir, has_else=True)
    for block, body in ((op.then_block, then), (op.else_block, otherwise)):
        with ir.InsertionPoint(block):
            body()
            scf.yield_([])


def over(size: int, unit: int = LANES) -> Callable[[Callable[[Operand, int], None]], None]:
    """@over(cols) def _(at, width): ... - every element of a row once: a loop of whole vectors, then the rest unrolled."""

    def define(body: Callable[[Operand, int], None]) -> None:
        whole = size // unit * unit
        if whole:

            @loop(0, whole, unit)
            def _(at: Value) -> None:
                body(at, unit)

        for at, width in chunks(size - whole):
            body(whole + at, width)

    return define
