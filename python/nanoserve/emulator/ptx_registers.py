"""The registers of one asm call: variables on the stack, integers of a declared width, which LLVM turns back into values."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nanoserve.emulator import instructions as gpu
from nanoserve.emulator.errors import UnsupportedInstruction
from nanoserve.emulator.function_text import FunctionText
from nanoserve.emulator.inline_ptx import Address, Operand
from nanoserve.emulator.ir_text import type_bits


def width(modifiers: Sequence[str]) -> int:
    """Bits of an instruction's operands, by the last type in its name: 32 of "st.global.b32", 1 of a predicate."""
    for modifier in reversed(modifiers):
        found = re.fullmatch(r"(?:[busf]|bf)(\d+)(x2)?", modifier)
        if found:
            return int(found[1]) * (2 if found[2] else 1)
        if modifier == "pred":
            return 1
    return 32


class PtxRegisters:
    def __init__(self, f: FunctionText) -> None:
        self._f = f
        self._slots: dict[str, tuple[str, int]] = {}  # name -> slot, bits

    def declare(self, name: str, bits: int) -> None:
        slot = self._f.slot(f"i{bits}")
        self._slots[name] = (slot, bits)
        self._f.emit(f"  store i{bits} 0, ptr {slot}")

    def write(self, name: Operand, value: str, bits: int) -> None:
        """An integer of `bits` into a register; "_" takes everything and keeps nothing."""
        if name == "_":
            return
        slot, own = self._slot(name)
        self._f.emit(f"  store i{own} {self._f.resize(value, bits, own)}, ptr {slot}")

    def read(self, operand: Operand, bits: int) -> str:
        """A register, number or special register as an integer of `bits`."""
        if not isinstance(operand, str):
            raise UnsupportedInstruction(f"inline PTX: {operand} where a register is expected")
        literal = re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand)
        if literal:
            return str(int(literal[1], 16))
        if re.fullmatch(r"-?(?:0[xX][0-9A-Fa-f]+|\d+)", operand):
            return str(int(operand, 0))
        if operand.startswith("%") and operand not in self._slots:
            return self._f.resize(gpu.special_register(self._f, operand[1:]), 32, bits)
        slot, own = self._slot(operand)
        return self._f.resize(self._f.value(f"load i{own}, ptr {slot}"), own, bits)

    def read_as(self, operand: Operand, type_: str) -> str:
        """The same bits as a float type."""
        return self._f.from_bits(type_, self.read(operand, type_bits(type_)))

    def write_as(self, name: Operand, type_: str, value: str) -> None:
        self.write(name, self._f.to_bits(type_, value), type_bits(type_))

    def words(self, operand: Operand) -> list[str]:
        """32-bit registers: one, or a list of them."""
        return [self.read(name, 32) for name in names(operand)]

    def address(self, operand: Operand) -> str:
        if not isinstance(operand, Address):
            raise UnsupportedInstruction(f"inline PTX: {operand!r} where an address is expected")
        base = self.read(operand.base, 64)
        return self._f.value(f"add i64 {base}, {operand.offset}") if operand.offset else base

    def _slot(self, name: Operand) -> tuple[str, int]:
        if not isinstance(name, str) or name not in self._slots:
            raise UnsupportedInstruction(f"inline PTX uses {name}, which it does not declare")
        return self._slots[name]


def names(operand: Operand) -> tuple[Operand, ...]:
    return operand if isinstance(operand, tuple) else (operand,)
