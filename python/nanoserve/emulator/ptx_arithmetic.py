"""PTX instructions that only compute: arithmetic, comparisons, conversions, moves.

Each function writes what the instruction does and returns True, or returns False if it is none of its own.
"""

from __future__ import annotations

from nanoserve.emulator.function_text import FunctionText
from nanoserve.emulator.inline_ptx import Statement
from nanoserve.emulator.ir_text import type_bits
from nanoserve.emulator.ptx_registers import PtxRegisters, width

_INTEGER = {"add": "add", "sub": "sub", "and": "and", "or": "or", "xor": "xor", "shl": "shl"}
_FLOAT = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
_UNARY = {
    "ex2": "exp2",
    "lg2": "log2",
    "sqrt": "sqrt",
    "tanh": "tanh",
    "sin": "sin",
    "cos": "cos",
    "abs": "fabs",
}
_TYPES = {
    "f16": "half",
    "bf16": "bfloat",
    "f32": "float",
    "f64": "double",
    "f16x2": "<2 x half>",
    "bf16x2": "<2 x bfloat>",
}
_SUFFIXES = {"float": "f32", "double": "f64", "half": "f16"}
_SIGNED = {"eq": "eq", "ne": "ne", "lt": "slt", "le": "sle", "gt": "sgt", "ge": "sge"}
_UNSIGNED = {"eq": "eq", "ne": "ne", "lt": "ult", "le": "ule", "gt": "ugt", "ge": "uge"}
_UNSIGNED |= {"lo": "ult", "ls": "ule", "hi": "ugt", "hs": "uge"}


def compute(f: FunctionText, registers: PtxRegisters, s: Statement) -> bool:
    special = {"mov": _move, "setp": _compare, "selp": _select, "cvt": _convert, "prmt": _permute}.get(s.head)
    if special is not None:
        return special(f, registers, s)
    if not s.operands:
        return False
    kind = s.modifiers[-1] if s.modifiers else ""
    return _float(f, registers, s, _TYPES[kind]) if kind in _TYPES else _integer(f, registers, s, kind)


def _float(f: FunctionText, registers: PtxRegisters, s: Statement, type_: str) -> bool:
    destination, *sources = s.operands
    suffix = _SUFFIXES.get(type_)
    if s.head not in _FLOAT and suffix is None:
        return False
    values = [registers.read_as(source, type_) for source in sources]
    typed = ", ".join(f"{type_} {value}" for value in values)
    if s.head in _FLOAT:
        result = f.value(f"{_FLOAT[s.head]} {type_} {', '.join(values)}")
    elif s.head == "fma":
        result = f.value(f"call {type_} @llvm.fma.{suffix}({typed})")
    elif s.head in ("min", "max"):
        result = f.value(f"call {type_} @llvm.{s.head}num.{suffix}({typed})")
    elif s.head in _UNARY:
        result = f.value(f"call {type_} @llvm.{_UNARY[s.head]}.{suffix}({typed})")
    elif s.head == "neg":
        result = f.value(f"fneg {typed}")
    elif s.head in ("rcp", "rsqrt"):
        of = f.value(f"call {type_} @llvm.sqrt.{suffix}({typed})") if s.head == "rsqrt" else values[0]
        result = f.value(f"fdiv {type_} 1.0, {of}")
    else:
        return False
    registers.write_as(destination, type_, result)
    return True


def _integer(f: FunctionText, registers: PtxRegisters, s: Statement, kind: str) -> bool:
    bits = width(s.modifiers)
    destination, *sources = s.operands
    signed = kind.startswith("s")
    values = [registers.read(source, bits) for source in sources]
    if s.head in _INTEGER:
        result = f.value(f"{_INTEGER[s.head]} i{bits} {', '.join(values)}")
    elif s.head == "mul" and "lo" in s.modifiers:
        result = f.value(f"mul i{bits} {', '.join(values)}")
    elif s.head == "mad" and "lo" in s.modifiers:
        result = f.value(f"add i{bits} {f.value(f'mul i{bits} {values[0]}, {values[1]}')}, {values[2]}")
    elif s.head == "shr":
        result = f.value(f"{'ashr' if signed else 'lshr'} i{bits} {', '.join(values)}")
    elif s.head == "not":
        result = f.value(f"xor i{bits} {values[0]}, -1")
    elif s.head in ("min", "max"):
        typed = ", ".join(f"i{bits} {value}" for value in values)
        result = f.value(f"call i{bits} @llvm.{'s' if signed else 'u'}{s.head}.i{bits}({typed})")
    else:
        return False
    registers.write(destination, result, bits)
    return True


def _move(f: FunctionText, registers: PtxRegisters, s: Statement) -> bool:
    """Between registers; `{a, b}` on one side packs or unpacks, the first in the low bits."""
    destination, source = s.operands
    bits = width(s.modifiers)
    if isinstance(destination, tuple):
        part = bits // len(destination)
        whole = registers.read(source, bits)
        for i, name in enumerate(destination):
            registers.write(name, f.value(f"lshr i{bits} {whole}, {i * part}"), bits)
    elif isinstance(source, tuple):
        part = bits // len(source)
        whole = "0"
        for i, name in enumerate(source):
            moved = f.value(f"shl i{bits} {f.resize(registers.read(name, part), part, bits)}, {i * part}")
            whole = f.value(f"or i{bits} {whole}, {moved}")
        registers.write(destination, whole, bits)
    else:
        registers.write(destination, registers.read(source, bits), bits)
    return True


def _compare(f: FunctionText, registers: PtxRegisters, s: Statement) -> bool:
    destination, a, b = s.operands
    compare, kind = s.modifiers[0], s.modifiers[-1]
    if len(s.modifiers) != 2:
        return False
    if kind in _TYPES:
        type_ = _TYPES[kind]
        # Ordered, but for "ne", which PTX has as ordered too.
        name = {"eq": "oeq", "ne": "one", "lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge"}.get(compare)
        values = f"{registers.read_as(a, type_)}, {registers.read_as(b, type_)}"
        result = f.value(f"fcmp {name} {type_} {values}") if name else None
    else:
        name = (_SIGNED if kind.startswith("s") else _UNSIGNED).get(compare)
        bits = width(s.modifiers)
        values = f"{registers.read(a, bits)}, {registers.read(b, bits)}"
        result = f.value(f"icmp {name} i{bits} {values}") if name else None
    if result is None:
        return False
    registers.write(destination, result, 1)
    return True


def _select(f: FunctionText, registers: PtxRegisters, s: Statement) -> bool:
    destination, a, b, predicate = s.operands
    bits = width(s.modifiers)
    pair = f"i{bits} {registers.read(a, bits)}, i{bits} {registers.read(b, bits)}"
    registers.write(destination, f.value(f"select i1 {registers.read(predicate, 1)}, {pair}"), bits)
    return True


def _convert(f: FunctionText, registers: PtxRegisters, s: Statement) -> bool:
    """Between float formats (to nearest even) and integer widths."""
    destination, *sources = s.operands
    to, of = s.modifiers[-2:]
    if to in ("bf16x2", "f16x2") and of == "f32":  # the first operand into the upper half
        half = _TYPES[to.removesuffix("x2")]
        high, low = (f.value(f"fptrunc float {registers.read_as(x, 'float')} to {half}") for x in sources)
        one = f.value(f"insertelement <2 x {half}> poison, {half} {low}, i32 0")
        registers.write_as(
            destination, f"<2 x {half}>", f.value(f"insertelement <2 x {half}> {one}, {half} {high}, i32 1")
        )
    elif to == "tf32" and of == "f32":
        # To nearest, ties away from zero ("rna"): the format keeps 10 bits of the fraction.
        rounded = f.value(f"add i32 {registers.read(sources[0], 32)}, {1 << 12}")
        registers.write(destination, f.value(f"and i32 {rounded}, {-(1 << 13)}"), 32)
    elif to in _TYPES and of in _TYPES:
        kinds = _TYPES[of], _TYPES[to]
        operation = "fpext" if type_bits(kinds[0]) < type_bits(kinds[1]) else "fptrunc"
        value = registers.read_as(sources[0], kinds[0])
        registers.write_as(destination, kinds[1], f.value(f"{operation} {kinds[0]} {value} to {kinds[1]}"))
    elif to not in _TYPES and of not in _TYPES:
        bits, wanted = width([of]), width([to])
        value = registers.read(sources[0], bits)
        if of.startswith("s") and bits < wanted:
            value, bits = f.value(f"sext i{bits} {value} to i{wanted}"), wanted
        registers.write(destination, f.resize(value, bits, wanted), wanted)
    else:
        return False
    return True


def _permute(f: FunctionText, registers: PtxRegisters, s: Statement) -> bool:
    if s.modifiers != ["b32"]:
        return False
    values = [("i32", registers.read(operand, 32)) for operand in s.operands[1:]]
    registers.write(s.operands[0], f.call("i32", "nvemu_permute_bytes", values, pure=True), 32)
    return True
