"""Writing small GPU kernels as LLVM IR text, for tests of the emulator.

Straight from Python, with no compiler in between: what a test says is what the emulator reads. Values have operators; Python
loops unroll, `loop` makes a loop. Every barrier and wait carries a tag as a comment, by which a test can take it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FLOATS = ("float", "double", "half", "bfloat")


@dataclass(frozen=True)
class Value:
    """An SSA value of a kernel; a Python number on the other side of an operator becomes a constant."""

    kernel: Kernel
    name: str
    type: str

    @property
    def typed(self) -> str:
        return f"{self.type} {self.name}"

    def _binary(self, on_int: str, on_float: str, other: Value | float) -> Value:
        right = other.name if isinstance(other, Value) else _literal(other, self.type)
        operation = on_float if self.type in FLOATS else on_int
        return self.kernel.value(f"{operation} {self.type} {self.name}, {right}", self.type)

    def __add__(self, other: Value | float) -> Value:
        return self._binary("add", "fadd", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._binary("sub", "fsub", other)

    def __mul__(self, other: Value | float) -> Value:
        return self._binary("mul", "fmul", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary("", "fdiv", other)

    def __floordiv__(self, other: Value | int) -> Value:
        return self._binary("udiv", "", other)

    def __mod__(self, other: Value | int) -> Value:
        return self._binary("urem", "", other)

    def __xor__(self, other: Value | int) -> Value:
        return self._binary("xor", "", other)

    def __or__(self, other: Value | int) -> Value:
        return self._binary("or", "", other)

    def __and__(self, other: Value | int) -> Value:
        return self._binary("and", "", other)

    def __rshift__(self, other: int) -> Value:
        return self._binary("lshr", "", other)

    def compare(self, predicate: str, other: Value | int) -> Value:
        right = other.name if isinstance(other, Value) else str(other)
        return self.kernel.value(f"icmp {predicate} {self.type} {self.name}, {right}", "i1")

    def __lt__(self, other: Value | int) -> Value:
        return self.compare("slt", other)


def _literal(number: float, type_: str) -> str:
    return f"{float(number):e}" if type_ in FLOATS else str(number)


class Kernel:
    """A kernel being written: `text()` is a whole module.

    Args:
        params: name -> type. shared: name -> (bytes, alignment); 0 bytes is dynamic shared memory.
    """

    def __init__(
        self, name: str, params: dict[str, str], shared: dict[str, tuple[int, int]] | None = None
    ) -> None:
        self._name = name
        self._params = params
        self._shared = shared or {}
        self._lines: list[str] = []
        self._declared: dict[str, str] = {}
        self._count = 0
        self._label = "entry"
        self.p = {name: Value(self, f"%{name}", type_) for name, type_ in params.items()}

    def text(self) -> str:
        variables = [
            f"@{name} = {'external' if size == 0 else 'internal'} addrspace(3) global [{size} x i8]"
            f"{'' if size == 0 else ' undef'}, align {alignment}"
            for name, (size, alignment) in self._shared.items()
        ]
        params = ", ".join(f"{type_} %{name}" for name, type_ in self._params.items())
        head = f"define ptx_kernel void @{self._name}({params}) {{"
        return "\n".join(
            [*variables, *self._declared.values(), head, "entry:", *self._lines, "  ret void", "}", ""]
        )

    # --- values -------------------------------------------------------------------------------------------------------

    def emit(self, line: str) -> None:
        self._lines.append(f"  {line}")

    def value(self, expression: str, type_: str) -> Value:
        self._count += 1
        self.emit(f"%v{self._count} = {expression}")
        return Value(self, f"%v{self._count}", type_)

    def const(self, number: float, type_: str = "i32") -> Value:
        return Value(self, _literal(number, type_), type_)

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        return self.value(f"select {condition.typed}, {a.typed}, {b.typed}", a.type)

    def least(self, a: Value, b: Value) -> Value:
        return self.select(a < b, a, b)

    def cast(self, operation: str, value: Value, type_: str) -> Value:
        return self.value(f"{operation} {value.typed} to {type_}", type_)

    def call(self, result: str, function: str, *args: Value, tag: str = "") -> Any:
        types = ", ".join(arg.type for arg in args)
        self._declared.setdefault(function, f"declare {result} @{function}({types})")
        text = f"call {result} @{function}({', '.join(arg.typed for arg in args)})"
        if result == "void":
            self.emit(text + (f" ; {tag}" if tag else ""))
            return None
        return self.value(text, result)

    def members(self, whole: Value, count: int, type_: str) -> list[Value]:
        return [self.value(f"extractvalue {whole.typed}, {i}", type_) for i in range(count)]

    # --- where am I ---------------------------------------------------------------------------------------------------

    def sreg(self, name: str) -> Value:
        result: Value = self.call("i32", f"llvm.nvvm.read.ptx.sreg.{name}")
        return result

    def barrier(self, tag: str) -> None:
        self.call("void", "llvm.nvvm.barrier.cta.sync.aligned.all", self.const(0), tag=tag)

    # --- memory -------------------------------------------------------------------------------------------------------

    def shared(self, name: str) -> Value:
        return Value(self, f"@{name}", "ptr addrspace(3)")

    def at(self, pointer: Value, index: Value | int, element: str) -> Value:
        where = index if isinstance(index, Value) else self.const(index)
        return self.value(f"getelementptr {element}, {pointer.typed}, {where.typed}", pointer.type)

    def load(
        self, pointer: Value, index: Value | int, type_: str, element: str = "", align: int = 0
    ) -> Value:
        place = self.at(pointer, index, element or type_)
        return self.value(f"load {type_}, {place.typed}, align {align or _SIZES[type_]}", type_)

    def store(
        self, value: Value, pointer: Value, index: Value | int, element: str = "", align: int = 0
    ) -> None:
        place = self.at(pointer, index, element or value.type)
        self.emit(f"store {value.typed}, {place.typed}, align {align or _SIZES[value.type]}")

    # --- control ------------------------------------------------------------------------------------------------------

    def _begin(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._label = label

    def loop(
        self,
        start: Value,
        stop: Value,
        step: int,
        carried: Sequence[Value],
        body: Callable[..., Sequence[Value]],
    ) -> list[Value]:
        """for (i = start; i < stop; i += step): body(i, *carried) gives what the next round carries."""
        self._count += 1
        head, inside, after = (f"{part}{self._count}" for part in ("head", "body", "after"))
        before = self._label
        self.emit(f"br label %{head}")
        self._begin(head)
        at = len(self._lines)
        names = []
        for value in (start, *carried):
            self._count += 1
            names.append(Value(self, f"%v{self._count}", value.type))
        going = names[0] < stop
        self.emit(f"br {going.typed}, label %{inside}, label %{after}")
        self._begin(inside)
        following = body(*names)
        following = [names[0] + step, *following]
        self.emit(f"br label %{head}")
        phis = [
            f"  {name.name} = phi {name.type} [ {first.name}, %{before} ], [ {later.name}, %{self._label} ]"
            for name, first, later in zip(names, (start, *carried), following, strict=True)
        ]
        self._lines[at:at] = phis
        self._begin(after)
        return names[1:]

    def when(self, condition: Value, body: Callable[[], None]) -> None:
        self._count += 1
        do, after = f"do{self._count}", f"past{self._count}"
        self.emit(f"br {condition.typed}, label %{do}, label %{after}")
        self._begin(do)
        body()
        self.emit(f"br label %{after}")
        self._begin(after)

    def load_or_zero(self, inside: Value, pointer: Value, index: Value, type_: str = "float") -> Value:
        """The element if it is inside, else 0, and then not read."""
        self._count += 1
        do, after = f"do{self._count}", f"past{self._count}"
        before = self._label
        self.emit(f"br {inside.typed}, label %{do}, label %{after}")
        self._begin(do)
        loaded = self.load(pointer, index, type_)
        self.emit(f"br label %{after}")
        self._begin(after)
        return self.value(f"phi {type_} [ {_literal(0, type_)}, %{before} ], [ {loaded.name}, %{do} ]", type_)


_SIZES = {"float": 4, "double": 8, "i32": 4, "i64": 8, "<2 x float>": 8, "<4 x float>": 16, "i16": 2, "i8": 1}


def without(text: str, tag: str) -> str:
    """The module without the one line that carries a tag."""
    kept = [line for line in text.splitlines() if not line.endswith(f"; {tag}")]
    assert len(kept) == len(text.splitlines()) - 1, f"{tag!r} is not on exactly one line"
    return "\n".join(kept) + "\n"


def replaced(text: str, old: str, new: str) -> str:
    assert old in text, f"{old!r} is not in the module"
    return text.replace(old, new)


def without_call(function: str, which: int = 0) -> Callable[[str], str]:
    """Of a text, the same without one of the calls of a function that has no result."""

    def mutate(text: str) -> str:
        lines = text.splitlines()
        found = [i for i, line in enumerate(lines) if f"call void @{function}" in line]
        del lines[found[which]]
        return "\n".join(lines)

    return mutate
