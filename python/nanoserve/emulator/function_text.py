"""Writing a function of LLVM IR as text: values with fresh names, and calls of the emulator's run time library.

Functions written here stand in for one instruction of the GPU and are inlined where it stood. Registers of any type pass
through as integers of the same width, which is also how PTX sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nanoserve.emulator.ir_text import members, type_bits

# `convergent`: LLVM must not move such a call to where fewer lanes meet it.
_ATTRIBUTES = "alwaysinline convergent nounwind"


@dataclass
class Declarations:
    """Functions of the run time library that were called, as they must be declared."""

    by_name: dict[str, str] = field(default_factory=dict)

    def add(self, result: str, name: str, types: Sequence[str], pure: bool = False) -> None:
        attributes = " memory(none) willreturn" if pure else " convergent"
        self.by_name.setdefault(name, f"declare {result} @{name}({', '.join(types)}){attributes} nounwind")


class FunctionText:
    """`define internal <result> @name(i32 %line, <type> %a0, <type> %a1, ...)`, being written."""

    def __init__(self, name: str, result: str, params: Sequence[str], declarations: Declarations) -> None:
        self.name = name
        self.result = result
        self.params = list(params)
        self._declarations = declarations
        self._slots: list[str] = []
        self._lines: list[str] = []
        self._count = 0

    def arg(self, index: int) -> str:
        return f"%a{index}"

    def fresh(self) -> str:
        self._count += 1
        return f"%v{self._count}"

    def emit(self, text: str) -> None:
        self._lines.append(text)

    def value(self, expression: str) -> str:
        name = self.fresh()
        self.emit(f"  {name} = {expression}")
        return name

    def slot(self, type_: str) -> str:
        """Memory on the stack for one value."""
        name = self.fresh()
        self._slots.append(f"  {name} = alloca {type_}")
        return name

    def call(self, result: str, function: str, args: Sequence[tuple[str, str]], pure: bool = False) -> str:
        """Calls a function of the run time library with (type, value) pairs."""
        self._declarations.add(result, function, [type_ for type_, _ in args], pure)
        call = f"call {result} @{function}({', '.join(f'{type_} {value}' for type_, value in args)})"
        if result == "void":
            self.emit(f"  {call}")
            return ""
        return self.value(call)

    def label(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def place(self, label: str) -> None:
        self.emit(f"{label}:")

    def to_bits(self, type_: str, value: str) -> str:
        """A register's value as the integer of its width."""
        if type_.startswith("ptr"):
            return self.value(f"ptrtoint {type_} {value} to i64")
        if type_.startswith("i"):
            return value
        return self.value(f"bitcast {type_} {value} to i{type_bits(type_)}")

    def from_bits(self, type_: str, value: str) -> str:
        """The other way round."""
        if type_.startswith("ptr"):
            return self.value(f"inttoptr i64 {value} to {type_}")
        if type_.startswith("i"):
            return value
        return self.value(f"bitcast i{type_bits(type_)} {value} to {type_}")

    def resize(self, value: str, bits: int, wanted: int) -> str:
        """An integer of another width, zero-extended or cut."""
        if bits == wanted:
            return value
        return self.value(f"{'zext' if bits < wanted else 'trunc'} i{bits} {value} to i{wanted}")

    def words(self, values: Sequence[str]) -> str:
        """An array of 32-bit registers in memory, for the run time library."""
        array = self.array(len(values))
        for i, value in enumerate(values):
            self.emit(f"  store i32 {value}, ptr {self.element(array, i)}")
        return array

    def array(self, count: int) -> str:
        return self.slot(f"[{max(1, count)} x i32]")

    def element(self, array: str, index: int) -> str:
        return self.value(f"getelementptr i32, ptr {array}, i64 {index}")

    def load_word(self, array: str, index: int) -> str:
        return self.value(f"load i32, ptr {self.element(array, index)}")

    def ret(self, values: Sequence[str] = ()) -> None:
        """Returns registers given as integers of their widths."""
        types = members(self.result)
        if not types:
            self.emit("  ret void")
        elif not self.result.startswith("{"):
            self.emit(f"  ret {self.result} {self.from_bits(self.result, values[0])}")
        else:
            whole = "poison"
            for i, (type_, value) in enumerate(zip(types, values, strict=True)):
                whole = self.value(
                    f"insertvalue {self.result} {whole}, {type_} {self.from_bits(type_, value)}, {i}"
                )
            self.emit(f"  ret {self.result} {whole}")

    def text(self) -> str:
        params = ", ".join(["i32 %line", *(f"{type_} %a{i}" for i, type_ in enumerate(self.params))])
        head = f"define internal {self.result} @{self.name}({params}) {_ATTRIBUTES} {{"
        return "\n".join([head, *self._slots, *self._lines, "}"])
