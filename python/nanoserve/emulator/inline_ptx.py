"""Reading inline PTX: the text of an `asm` call as a list of statements.

The assembler of a GPU is a small language: statements end with `;`, each may carry a predicate (`@p` or `@!p`), operands are
registers, numbers, `[address + offset]` or `{lists}`. `$0`, `$1`... are the operands of the call. Blocks in braces only limit
where names are visible, which one asm call cannot tell.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nanoserve.emulator.errors import UnsupportedInstruction
from nanoserve.emulator.ir_text import split_list


@dataclass(frozen=True)
class Address:
    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Statement:
    """One instruction, or a declaration of registers (opcode ".reg")."""

    opcode: str  # with its modifiers: "ld.global.v4.b32"
    operands: tuple[Operand, ...]
    predicate: str | None = None
    negated: bool = False

    @property
    def head(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]


def unescape(text: str) -> str:
    """LLVM's string escapes (\\0A for a newline) and the doubled dollar."""
    return re.sub(r"\\([0-9A-Fa-f]{2})", lambda m: chr(int(m[1], 16)), text)


def parse(ptx: str) -> list[Statement]:
    """The statements of an asm call, in order.

    Raises:
        UnsupportedInstruction: a statement is none that can be read.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", ptx, flags=re.DOTALL)
    return [_statement(part) for part in _pieces(text)]


def _pieces(text: str) -> list[str]:
    """Split at semicolons; braces that open or close a scope are dropped, those of operand lists are kept."""
    pieces: list[str] = []
    current = ""
    depth = 0
    for char in text:
        if char == "{" and not current.strip():
            continue
        if char == "}" and depth == 0:
            continue
        depth += (char == "{") - (char == "}")
        if char == ";":
            pieces.append(current)
            current = ""
        else:
            current += char
    pieces.append(current)
    return [" ".join(piece.split()) for piece in pieces if piece.strip()]


def _statement(text: str) -> Statement:
    found = re.fullmatch(r"(?:@(!?)\s*([$%\w]+)\s+)?([.\w:]+)(?:\s+(.*))?", text)
    if found is None:
        raise UnsupportedInstruction(f"inline PTX that cannot be read: {text!r}")
    negated, predicate, opcode, rest = found.groups()
    if opcode == ".reg":
        type_, names = (rest or "").split(" ", 1)
        return Statement(".reg", (type_, *split_list(names)))
    operands = tuple(_operand(part) for part in _split_predicates(rest or ""))
    return Statement(opcode, operands, predicate, negated == "!")


def _split_predicates(text: str) -> list[str]:
    """Operands at commas; `d|p` is two."""
    return [half for part in split_list(text) for half in (part.split("|") if "[" not in part else [part])]


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("["):
        inner = text[1:-1].strip()
        base, sign, offset = re.fullmatch(r"([$%\w]+)\s*(?:([+-])\s*(-?\w+))?", inner).groups()  # type: ignore[union-attr]
        number = int(offset, 0) if offset else 0
        return Address(base, -number if sign == "-" else number)
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    return text
