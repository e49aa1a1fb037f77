"""Reading LLVM IR as text: types, and lists that nest.

A module's text is rewritten line by line, never parsed as a whole: LLVM's printer puts one instruction on a line and always
spells it the same way. What a line holds is found by brackets that balance, so this is all the syntax that is needed.
"""

from __future__ import annotations

import re

_OPEN = "<({["
_CLOSE = ">)}]"
POINTER_BYTES = 8
_SCALAR_BYTES = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "fp128": 16}
_IDENTIFIER = r'(?:[-\w.$]+|"[^"]*")'
VALUE = rf"[%@]{_IDENTIFIER}"


def closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    quoted = False
    for i in range(start, len(text)):
        char = text[i]
        if char == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
            if depth == 0:
                return i
    raise ValueError(f"no bracket closes {text[start : start + 40]!r}")


def split_list(text: str) -> list[str]:
    """The parts of a list, at commas outside brackets and quotes."""
    parts: list[str] = []
    depth = start = 0
    quoted = False
    for i, char in enumerate(text):
        if char == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


def leading_type(text: str) -> str:
    """The type that text begins with: "<4 x float>" of "<4 x float> %x"."""
    if text and text[0] in _OPEN:
        return text[: closing(text, 0) + 1]
    found = re.match(r"ptr(?: addrspace\(\d+\))?|[%\w.]+", text)
    if found is None:
        raise ValueError(f"no type at {text[:40]!r}")
    return found[0]


def type_bytes(type_: str) -> int | None:
    """Size in memory, without padding at its end; None for what is not computed here (structures)."""
    if type_.startswith("ptr"):
        return POINTER_BYTES
    if type_ in _SCALAR_BYTES:
        return _SCALAR_BYTES[type_]
    if re.fullmatch(r"i\d+", type_):
        bits = int(type_[1:])
        return -(-bits // 8)
    sequence = re.fullmatch(r"([<\[])(\d+) x (.+)[>\]]", type_)
    if sequence is None:
        return None
    if sequence[1] == "<" and sequence[3] == "i1":
        return -(-int(sequence[2]) // 8)
    element = type_bytes(sequence[3])
    return None if element is None else int(sequence[2]) * element


def type_bits(type_: str) -> int:
    """Width of what fits a register: i1 is 1, a pointer 64."""
    if re.fullmatch(r"i\d+", type_):
        return int(type_[1:])
    size = type_bytes(type_)
    if size is None:
        raise ValueError(f"{type_} is no register")
    return 8 * size


def members(type_: str) -> list[str]:
    """The types that a function's result consists of: none for void."""
    if type_ == "void":
        return []
    return split_list(type_[1:-1]) if type_.startswith("{") else [type_]
