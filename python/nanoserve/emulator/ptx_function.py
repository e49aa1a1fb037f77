"""Inline PTX as a function of LLVM IR: each statement becomes what it does, each register a variable.

Registers are integers of a declared width in stack slots, which LLVM turns back into values. A statement with a predicate is
a branch around it. What an instruction does is in the methods `_<opcode>`; one that has none is an error when the module is
read, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nanoserve.emulator import instructions as gpu
from nanoserve.emulator.access_checks import AccessChecks
from nanoserve.emulator.errors import UnsupportedInstruction
from nanoserve.emulator.function_text import Declarations, FunctionText
from nanoserve.emulator.inline_ptx import Address, Operand, Statement, parse
from nanoserve.emulator.ir_text import members, type_bits

_BINARY = {"add": "add", "sub": "sub", "and": "and", "or": "or", "xor": "xor", "shl": "shl"}
_FLOAT_BINARY = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
_FLOATS = {"f16": "half", "bf16": "bfloat", "f32": "float", "f64": "double", "f16x2": "<2 x half>"}
_FLOATS["bf16x2"] = "<2 x bfloat>"
_COMPARE = {"eq": "eq", "ne": "ne", "lt": "slt", "le": "sle", "gt": "sgt", "ge": "sge"}
_SPACES = {"global": 1, "shared": 3}
_UNARY = {
    "ex2": "exp2",
    "lg2": "log2",
    "sqrt": "sqrt",
    "tanh": "tanh",
    "sin": "sin",
    "cos": "cos",
    "abs": "fabs",
}
# Hints and fences: threads run one at a time, so memory is always in order.
_NOTHING = {
    "fence",
    "membar",
    "prefetch",
    "prefetchu",
    "griddepcontrol",
    "nanosleep",
    "createpolicy",
    "discard",
}


def _width(modifiers: Sequence[str]) -> int:
    for modifier in reversed(modifiers):
        found = re.fullmatch(r"(?:[busf]|bf)(\d+)(x2)?", modifier)
        if found:
            return int(found[1]) * (2 if found[2] else 1)
        if modifier == "pred":
            return 1
    return 32


class PtxFunction:
    """One asm call with its operand types."""

    def __init__(
        self,
        name: str,
        result: str,
        params: Sequence[str],
        ptx: str,
        constraints: str,
        declarations: Declarations,
        checks: AccessChecks,
    ) -> None:
        self._f = FunctionText(name, result, params, declarations)
        self._checks = checks
        self._registers: dict[str, tuple[str, int]] = {}  # name -> slot, bits
        outputs = members(result)
        codes = [code for code in constraints.split(",") if not code.startswith("~")]
        if len([code for code in codes if code.startswith("=")]) != len(outputs):
            raise UnsupportedInstruction(f"inline PTX with {constraints!r} for a result of {result}")
        for i, type_ in enumerate(outputs):
            self._declare(f"${i}", type_bits(type_))
        for i, (type_, code) in enumerate(zip(params, codes[len(outputs) :], strict=True)):
            number = i + len(outputs)
            self._declare(f"${number}", type_bits(type_))
            bits = self._f.to_bits(type_, self._f.arg(i))
            self._store(f"${number}", bits, type_bits(type_))
            if code.isdigit():  # tied: an output that starts with this value
                self._store(f"${code}", bits, type_bits(type_))
        for statement in parse(ptx):
            self._guarded(statement)
        self._f.ret([self._load(f"${i}", type_bits(type_)) for i, type_ in enumerate(outputs)])

    def text(self) -> str:
        return self._f.text()

    # --- registers ----------------------------------------------------------------------------------------------------

    def _declare(self, name: str, bits: int) -> None:
        slot = self._f.slot(f"i{bits}")
        self._registers[name] = (slot, bits)
        self._f.emit(f"  store i{bits} 0, ptr {slot}")

    def _slot(self, name: str) -> tuple[str, int]:
        if name not in self._registers:
            raise UnsupportedInstruction(f"inline PTX uses {name}, which it does not declare")
        return self._registers[name]

    def _store(self, name: str, value: str, bits: int) -> None:
        if name == "_":
            return
        slot, own = self._slot(name)
        self._f.emit(f"  store i{own} {self._f.resize(value, bits, own)}, ptr {slot}")

    def _load(self, operand: Operand, bits: int) -> str:
        """An operand's value as an integer of `bits`."""
        assert isinstance(operand, str), operand
        literal = re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand)
        if literal:
            return str(int(literal[1], 16))
        if re.fullmatch(r"-?(?:0[xX][0-9A-Fa-f]+|\d+)", operand):
            return str(int(operand, 0))
        if operand.startswith("%"):
            return self._f.resize(gpu.special_register(self._f, operand[1:]), 32, bits)
        slot, own = self._slot(operand)
        return self._f.resize(self._f.value(f"load i{own}, ptr {slot}"), own, bits)

    def _load_float(self, operand: Operand, type_: str) -> str:
        return self._f.from_bits(type_, self._load(operand, type_bits(type_)))

    def _store_float(self, name: Operand, type_: str, value: str) -> None:
        assert isinstance(name, str)
        self._store(name, self._f.to_bits(type_, value), type_bits(type_))

    def _words(self, operand: Operand) -> list[str]:
        names = operand if isinstance(operand, tuple) else (operand,)
        return [self._load(name, 32) for name in names]

    def _address(self, operand: Operand) -> str:
        if not isinstance(operand, Address):
            raise UnsupportedInstruction(f"inline PTX: {operand!r} where an address is expected")
        base = self._load(operand.base, 64)
        return self._f.value(f"add i64 {base}, {operand.offset}") if operand.offset else base

    # --- statements ---------------------------------------------------------------------------------------------------

    def _guarded(self, statement: Statement) -> None:
        if statement.predicate is None:
            return self._statement(statement)
        condition = self._load(statement.predicate, 1)
        do, after = self._f.label("do"), self._f.label("after")
        first, second = (after, do) if statement.negated else (do, after)
        self._f.emit(f"  br i1 {condition}, label %{first}, label %{second}")
        self._f.place(do)
        self._statement(statement)
        self._f.emit(f"  br label %{after}")
        return self._f.place(after)

    def _statement(self, s: Statement) -> None:
        if s.opcode == ".reg":
            for name in s.operands[1:]:
                self._declare(str(name), _width([str(s.operands[0]).lstrip(".")]))
            return
        if s.opcode.startswith("fence.proxy.async"):
            self._f.call("void", "nvemu_proxy_fence", [])
            return
        if s.head in _NOTHING:
            return
        handler = getattr(self, f"_{s.head}", None)
        if handler is not None:
            handler(s)
        elif not self._arithmetic(s):
            raise UnsupportedInstruction(f"the emulator does not know the PTX instruction {s.opcode}")

    def _arithmetic(self, s: Statement) -> bool:
        """The ordinary instructions, whose operands are one width."""
        kind = s.modifiers[-1] if s.modifiers else ""
        bits = _width(s.modifiers)
        float_type = _FLOATS.get(kind)
        destination, *sources = s.operands
        if float_type is not None:
            values = [self._load_float(source, float_type) for source in sources]
            typed = ", ".join(f"{float_type} {value}" for value in values)
            suffix = {"float": "f32", "double": "f64", "half": "f16"}.get(float_type)
            if s.head in _FLOAT_BINARY:
                result = self._f.value(f"{_FLOAT_BINARY[s.head]} {float_type} {', '.join(values)}")
            elif s.head == "fma" and suffix:
                result = self._f.value(f"call {float_type} @llvm.fma.{suffix}({typed})")
            elif s.head in ("min", "max") and suffix:
                result = self._f.value(f"call {float_type} @llvm.{s.head}num.{suffix}({typed})")
            elif s.head in _UNARY and suffix:
                result = self._f.value(f"call {float_type} @llvm.{_UNARY[s.head]}.{suffix}({typed})")
            elif s.head in ("rcp", "rsqrt") and suffix:
                of = values[0]
                if s.head == "rsqrt":
                    of = self._f.value(f"call {float_type} @llvm.sqrt.{suffix}({typed})")
                result = self._f.value(f"fdiv {float_type} 1.0, {of}")
            else:
                return False
            self._store_float(destination, float_type, result)
            return True
        values = [self._load(source, bits) for source in sources]
        if s.head in _BINARY or (s.head == "mul" and "lo" in s.modifiers) or s.head == "shr":
            shift = "ashr" if kind.startswith("s") else "lshr"
            operation = {"mul": "mul", "shr": shift}.get(s.head) or _BINARY[s.head]
            result = self._f.value(f"{operation} i{bits} {', '.join(values)}")
        elif s.head == "not":
            result = self._f.value(f"xor i{bits} {values[0]}, -1")
        elif s.head in ("min", "max"):
            name = ("s" if kind.startswith("s") else "u") + s.head
            typed = ", ".join(f"i{bits} {value}" for value in values)
            result = self._f.value(f"call i{bits} @llvm.{name}.i{bits}({typed})")
        else:
            return False
        self._store(str(destination), result, bits)
        return True

    def _mov(self, s: Statement) -> None:
        destination, source = s.operands
        bits = _width(s.modifiers)
        if isinstance(destination, tuple):  # unpack
            part = bits // len(destination)
            whole = self._load(source, bits)
            for i, name in enumerate(destination):
                self._store(name, self._f.value(f"lshr i{bits} {whole}, {i * part}"), bits)
        elif isinstance(source, tuple):  # pack
            part = bits // len(source)
            whole = "0"
            for i, name in enumerate(source):
                widened = self._f.resize(self._load(name, part), part, bits)
                moved = self._f.value(f"shl i{bits} {widened}, {i * part}")
                whole = self._f.value(f"or i{bits} {whole}, {moved}")
            self._store(destination, whole, bits)
        else:
            assert isinstance(destination, str)
            self._store(destination, self._load(source, bits), bits)

    def _access(self, s: Statement, address: str, count: int, is_store: bool) -> str:
        """A checked pointer to `count` elements, which PTX demands to be aligned to all of them."""
        space = next((_SPACES[m.split("::")[0]] for m in s.modifiers if m.split("::")[0] in _SPACES), 0)
        num_bytes = count * _width(s.modifiers) // 8
        type_ = f"ptr addrspace({space})" if space else "ptr"
        pointer = self._f.value(f"inttoptr i64 {address} to {type_}")
        check = self._checks.function(space, num_bytes, num_bytes, is_store)
        self._f.emit(f"  call void @{check}(i32 %line, {type_} {pointer})")
        return f"{type_} {pointer}"

    def _ld(self, s: Statement) -> None:
        destination, source, *_ = s.operands
        names = destination if isinstance(destination, tuple) else (str(destination),)
        bits = _width(s.modifiers)
        pointer = self._access(s, self._address(source), len(names), False)
        type_ = f"<{len(names)} x i{bits}>"
        loaded = self._f.value(f"load {type_}, {pointer}, align {len(names) * bits // 8}")
        for i, name in enumerate(names):
            self._store(name, self._f.value(f"extractelement {type_} {loaded}, i32 {i}"), bits)

    def _st(self, s: Statement) -> None:
        destination, source, *_ = s.operands
        names = source if isinstance(source, tuple) else (source,)
        bits = _width(s.modifiers)
        pointer = self._access(s, self._address(destination), len(names), True)
        type_ = f"<{len(names)} x i{bits}>"
        whole = "poison"
        for i, name in enumerate(names):
            whole = self._f.value(f"insertelement {type_} {whole}, i{bits} {self._load(name, bits)}, i32 {i}")
        self._f.emit(f"  store {type_} {whole}, {pointer}, align {len(names) * bits // 8}")

    def _setp(self, s: Statement) -> None:
        destination, a, b = s.operands
        compare, kind = s.modifiers[0], s.modifiers[-1]
        if kind in _FLOATS or compare not in (*_COMPARE, "lo", "ls", "hi", "hs"):
            raise UnsupportedInstruction(f"the emulator does not know the PTX instruction {s.opcode}")
        bits = _width(s.modifiers)
        unsigned = {"lo": "ult", "ls": "ule", "hi": "ugt", "hs": "uge"}
        condition = unsigned.get(compare) or _COMPARE[compare]
        if kind.startswith("u"):
            condition = condition.replace("s", "u", 1) if condition[0] == "s" else condition
        values = f"{self._load(a, bits)}, {self._load(b, bits)}"
        self._store(str(destination), self._f.value(f"icmp {condition} i{bits} {values}"), 1)

    def _selp(self, s: Statement) -> None:
        destination, a, b, predicate = s.operands
        bits = _width(s.modifiers)
        pair = f"i{bits} {self._load(a, bits)}, i{bits} {self._load(b, bits)}"
        self._store(str(destination), self._f.value(f"select i1 {self._load(predicate, 1)}, {pair}"), bits)

    def _cvt(self, s: Statement) -> None:
        """Between float formats, and integer widths."""
        destination, *sources = s.operands
        to, of = s.modifiers[-2:]
        if to in ("bf16x2", "f16x2") and of == "f32":
            half = _FLOATS[to.removesuffix("x2")]
            high, low = (
                self._f.value(f"fptrunc float {self._load_float(x, 'float')} to {half}") for x in sources
            )
            one = self._f.value(f"insertelement <2 x {half}> poison, {half} {low}, i32 0")
            both = self._f.value(f"insertelement <2 x {half}> {one}, {half} {high}, i32 1")
            self._store_float(destination, f"<2 x {half}>", both)
        elif to == "tf32" and of == "f32":
            # To nearest, ties away from zero ("rna"): the format keeps 10 bits of the fraction.
            rounded = self._f.value(f"add i32 {self._load(sources[0], 32)}, {1 << 12}")
            self._store(str(destination), self._f.value(f"and i32 {rounded}, {-(1 << 13)}"), 32)
        elif to in _FLOATS and of in _FLOATS:
            kinds = _FLOATS[of], _FLOATS[to]
            operation = "fpext" if type_bits(kinds[0]) < type_bits(kinds[1]) else "fptrunc"
            value = self._load_float(sources[0], kinds[0])
            self._store_float(
                destination, kinds[1], self._f.value(f"{operation} {kinds[0]} {value} to {kinds[1]}")
            )
        elif to not in _FLOATS and of not in _FLOATS:
            bits, wanted = _width([of]), _width([to])
            value = self._load(sources[0], bits)
            if of.startswith("s") and bits < wanted:
                value, bits = self._f.value(f"sext i{bits} {value} to i{wanted}"), wanted
            self._store(str(destination), self._f.resize(value, bits, wanted), wanted)
        else:
            raise UnsupportedInstruction(f"the emulator does not know the PTX instruction {s.opcode}")

    # --- the warp and the block ---------------------------------------------------------------------------------------

    def _bar(self, s: Statement) -> None:
        if s.opcode == "bar.warp.sync":
            self._f.call("void", "nvemu_warp_sync", [gpu.LINE, ("i32", self._load(s.operands[0], 32))])
        elif "sync" in s.modifiers:
            count = self._load(s.operands[1], 32) if len(s.operands) > 1 else "0"
            aligned = s.head == "bar" or "aligned" in s.modifiers
            gpu.barrier(self._f, self._load(s.operands[0], 32), count, aligned)
        elif "arrive" in s.modifiers:
            id_, count = (self._load(operand, 32) for operand in s.operands)
            self._f.call("void", "nvemu_barrier_arrive", [gpu.LINE, ("i32", id_), ("i32", count)])
        else:
            raise UnsupportedInstruction(f"the emulator does not know the PTX instruction {s.opcode}")

    _barrier = _bar

    def _shfl(self, s: Statement) -> None:
        destination, *rest = s.operands
        predicate = rest.pop(0) if len(rest) == 5 else None
        value, b, c, mask = (self._load(operand, 32) for operand in rest)
        moved, in_range = gpu.shuffle(self._f, s.modifiers[1], mask, value, b, c)
        self._store(str(destination), moved, 32)
        if predicate is not None:
            self._store(str(predicate), in_range, 1)

    def _elect(self, s: Statement) -> None:
        leader, elected = gpu.elect(self._f, self._load(s.operands[-1], 32))
        if len(s.operands) == 3:
            self._store(str(s.operands[0]), leader, 32)
        self._store(str(s.operands[-2]), elected, 1)

    def _prmt(self, s: Statement) -> None:
        values = [("i32", self._load(operand, 32)) for operand in s.operands[1:]]
        self._store(str(s.operands[0]), self._f.call("i32", "nvemu_permute_bytes", values, pure=True), 32)

    # --- matrices and asynchronous copies -----------------------------------------------------------------------------

    def _ldmatrix(self, s: Statement) -> None:
        destination, source = s.operands
        names = destination if isinstance(destination, tuple) else (str(destination),)
        words = gpu.load_matrix(self._f, len(names), "trans" in s.modifiers, self._address(source))
        for name, word in zip(names, words, strict=True):
            self._store(name, word, 32)

    def _stmatrix(self, s: Statement) -> None:
        gpu.store_matrix(
            self._f, "trans" in s.modifiers, self._address(s.operands[0]), self._words(s.operands[1])
        )

    def _mma(self, s: Statement) -> None:
        """mma.sync.aligned.<shape>.row.col.f32.<a>.<b>.f32"""
        shape, *layouts, d_type, a_type, b_type, c_type = s.modifiers[2:]
        if layouts != ["row", "col"] or a_type != b_type or (d_type, c_type) != ("f32", "f32"):
            raise UnsupportedInstruction(f"the emulator does not know the PTX instruction {s.opcode}")
        registers = [word for operand in s.operands[1:] for word in self._words(operand)]
        for name, word in zip(s.operands[0], gpu.mma(self._f, shape, a_type, registers), strict=True):  # type: ignore[arg-type]
            self._store(str(name), word, 32)

    def _cp(self, s: Statement) -> None:
        kind = ".".join(s.modifiers)
        if re.match(r"async\.c[ag]\.shared", kind):
            destination, source, size, *rest = s.operands
            copied = self._load(rest[0], 32) if rest and "cache_hint" not in kind else None
            num_bytes = int(self._load(size, 32))
            gpu.copy_async(self._f, self._address(destination), self._address(source), num_bytes, copied)
        elif kind == "async.commit_group":
            self._f.call("void", "nvemu_copy_commit", [])
        elif kind == "async.wait_all":
            self._f.call("void", "nvemu_copy_wait_all", [])
        elif kind == "async.wait_group":
            self._f.call("void", "nvemu_copy_wait", [("i32", self._load(s.operands[0], 32))])
        else:
            raise UnsupportedInstruction(f"the emulator does not know the PTX instruction {s.opcode}")

    def _wgmma(self, s: Statement) -> None:
        simple = {"fence": "nvemu_wgmma_fence", "commit_group": "nvemu_wgmma_commit"}
        if s.modifiers[0] in simple:
            self._f.call("void", simple[s.modifiers[0]], [gpu.LINE])
        elif s.modifiers[0] == "wait_group":
            self._f.call("void", "nvemu_wgmma_wait", [gpu.LINE, ("i32", self._load(s.operands[0], 32))])
        else:
            self._wgmma_multiply(s)

    def _wgmma_multiply(self, s: Statement) -> None:
        """wgmma.mma_async.sync.aligned.m64n<n>k16.f32.<a>.<b> d, a, b-desc, scale-d, scale-a, scale-b, trans..."""
        found = re.fullmatch(
            r"mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(\w+)\.(\w+)", ".".join(s.modifiers)
        )
        if found is None or found[2] != found[3]:
            raise UnsupportedInstruction(f"the emulator does not know the PTX instruction {s.opcode}")
        names, a, b, scale_d, *modifiers = s.operands
        assert isinstance(names, tuple)
        result = gpu.wgmma(
            self._f,
            int(found[1]),
            found[2],
            self._words(names),
            self._words(a) if isinstance(a, tuple) else [self._load(a, 64)],
            self._load(b, 64),
            self._load(scale_d, 1),
            [self._load(modifier, 32) for modifier in modifiers],
        )
        for name, word in zip(names, result, strict=True):
            self._store(name, word, 32)
