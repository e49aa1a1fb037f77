"""LLVM IR text as MLIR's newer LLVM prints it, made into what llvmlite's older one reads, with the same meaning.

dynamic shared memory   MLIR gives it a size of 0 bytes, of which NVPTX makes a static variable of one: external
library calls           MLIR calls NVIDIA's library for what LLVM has an instruction for, with the same bits
float constants         LLVM 23 prints the shortest decimal, or bits as f0x3F800000; LLVM 22 wants exact ones
"""

from __future__ import annotations

import re
import struct

_DYNAMIC_SHARED = re.compile(
    r"^(@__dynamic_shmem__\d+) = internal addrspace\(3\) global \[0 x i8\] undef, align \d+$", re.MULTILINE
)
_SHARED_ALIGNMENT = 1024  # what the swizzled tiles of wgmma need

_LIBRARY_CALL = re.compile(r"@(__nv_\w+)")
_INSTRUCTIONS = {
    "__nv_fmaf": "llvm.fma.f32",
    "__nv_sqrtf": "llvm.sqrt.f32",
    "__nv_fabsf": "llvm.fabs.f32",
    "__nv_copysignf": "llvm.copysign.f32",
}

# A type, which holds for the constants after it, or a constant.
_TYPE_OR_CONSTANT = re.compile(
    r"\b(?P<type>float|double|bfloat|half)\b|(?<![\w.%])(?P<decimal>-?\d+\.\d+e[+-]\d+)\b|\bf0x(?P<bits>[0-9A-F]+)\b"
    r"|(?<![\w.%])(?P<word>[+-](?:inf|qnan))\b"
)
_WORDS = {  # bits of float and double; those of a float are written widened
    "+inf": "7FF0000000000000", "-inf": "FFF0000000000000", "+qnan": "7FF8000000000000", "-qnan": "FFF8000000000000",
}  # fmt: skip
_NARROW = {"bfloat": "0xR", "half": "0xH"}  # what LLVM 22 writes before their bits


class UnknownText(RuntimeError):
    """LLVM IR that has no form the back end reads."""


def readable(text: str) -> str:
    """The same module, for LLVM 22.

    Raises:
        UnknownText: it calls a library, or holds a constant that cannot be written.
    """
    unknown = sorted(set(_LIBRARY_CALL.findall(text)) - _INSTRUCTIONS.keys())
    if unknown:
        raise UnknownText(f"no instruction for {', '.join(unknown)}, and no library is linked")
    text = _LIBRARY_CALL.sub(lambda found: f"@{_INSTRUCTIONS[found[1]]}", text)
    text = _DYNAMIC_SHARED.sub(
        rf"\1 = external addrspace(3) global [0 x i8], align {_SHARED_ALIGNMENT}", text
    )
    return "\n".join(_exact_constants(line) for line in text.split("\n"))


def _exact_constants(line: str) -> str:
    kind = ""

    def write(found: re.Match[str]) -> str:
        nonlocal kind
        if found["type"]:
            kind = found["type"]
            return found[0]
        if found["bits"]:
            return _bits(kind, found["bits"])
        if found["word"]:
            return _word(kind, found["word"])
        return _decimal(kind, found["decimal"])

    return _TYPE_OR_CONSTANT.sub(write, line)


def _bits(kind: str, digits: str) -> str:
    match kind, len(digits):
        case "double", 16:
            return f"0x{digits}"
        case "float", 8:
            (value,) = struct.unpack(">f", bytes.fromhex(digits))
            return _widened(value)
        case (("bfloat" | "half"), 4):
            return f"{_NARROW[kind]}{digits}"
    raise UnknownText(f"a constant f0x{digits} of type {kind or 'unknown'}")


def _word(kind: str, word: str) -> str:
    if kind not in ("float", "double"):
        raise UnknownText(f"a constant {word} of type {kind or 'unknown'}")
    return f"0x{_WORDS[word]}"


def _decimal(kind: str, text: str) -> str:
    value = float(text)
    if kind == "double":
        return text
    if kind == "float":
        return _widened(struct.unpack("f", struct.pack("f", value))[0])
    if value.is_integer() and abs(value) <= 256:  # exact in every type
        return text
    raise UnknownText(f"a constant {text} of type {kind or 'unknown'}")


def _widened(value: float) -> str:
    """float is written as the double of the same value."""
    return f"0x{struct.pack('>d', value).hex().upper()}"
