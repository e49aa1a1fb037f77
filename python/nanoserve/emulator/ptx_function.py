"""Inline PTX as a function of LLVM IR: each statement becomes what it does.

A statement with a predicate is a branch around it. Instructions that only compute are in ptx_arithmetic.py; those that touch
memory, the warp or the block are the methods `_<opcode>` here. One that nobody knows is an error when the module is read, never
a guess.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nanoserve.emulator import instructions as gpu
from nanoserve.emulator.access_checks import AccessChecks
from nanoserve.emulator.errors import UnsupportedInstruction
from nanoserve.emulator.function_text import Declarations, FunctionText
from nanoserve.emulator.inline_ptx import Statement, parse
from nanoserve.emulator.ir_text import members, type_bits
from nanoserve.emulator.ptx_arithmetic import compute
from nanoserve.emulator.ptx_registers import PtxRegisters, names, width

_LINE = 16  # bytes of a bulk copy's unit
_SPACES = {"global": 1, "shared": 3}
# Hints and fences: threads run one at a time, so memory is always in order.
_NOTHING = {
    "fence",
    "membar",
    "prefetch",
    "prefetchu",
    "nanosleep",
    "createpolicy",
    "discard",
}


class PtxFunction:
    """One asm call with the types of its operands: `text()` is a function that does the same.

    Raises:
        UnsupportedInstruction: it holds one that nobody knows.
    """

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
        self._r = PtxRegisters(self._f)
        self._checks = checks
        outputs = members(result)
        codes = [code for code in constraints.split(",") if code and not code.startswith("~")]
        if sum(code.startswith("=") for code in codes) != len(outputs) or len(codes) != len(outputs) + len(
            params
        ):
            raise UnsupportedInstruction(
                f"inline PTX with {constraints!r} for {result} of ({', '.join(params)})"
            )
        for i, type_ in enumerate(outputs):
            self._r.declare(f"${i}", type_bits(type_))
        for i, (type_, code) in enumerate(zip(params, codes[len(outputs) :], strict=True)):
            bits = self._f.to_bits(type_, self._f.arg(i))
            self._r.declare(f"${i + len(outputs)}", type_bits(type_))
            self._r.write(f"${i + len(outputs)}", bits, type_bits(type_))
            if code.isdigit():  # tied: an output that starts with this value
                self._r.write(f"${code}", bits, type_bits(type_))
        for statement in parse(ptx):
            self._guarded(statement)
        self._f.ret([self._r.read(f"${i}", type_bits(type_)) for i, type_ in enumerate(outputs)])

    def text(self) -> str:
        return self._f.text()

    def _guarded(self, statement: Statement) -> None:
        if statement.predicate is None:
            self._statement(statement)
            return
        condition = self._r.read(statement.predicate, 1)
        do, after = self._f.label("do"), self._f.label("after")
        first, second = (after, do) if statement.negated else (do, after)
        self._f.emit(f"  br i1 {condition}, label %{first}, label %{second}")
        self._f.place(do)
        self._statement(statement)
        self._f.emit(f"  br label %{after}")
        self._f.place(after)

    def _statement(self, s: Statement) -> None:
        handler = getattr(self, f"_{s.head}", None)
        if s.opcode == ".reg":
            for name in s.operands[1:]:
                self._r.declare(str(name), width([str(s.operands[0]).lstrip(".")]))
        elif s.opcode.startswith("fence.proxy.async"):
            self._f.call("void", "nvemu_proxy_fence", [])
        elif s.opcode == "griddepcontrol.wait":
            self._f.call("void", "nvemu_await_previous", [])
        elif s.head in _NOTHING or s.opcode == "griddepcontrol.launch_dependents":
            return
        elif handler is not None:
            handler(s)
        elif not compute(self._f, self._r, s):
            raise self._unknown(s)

    @staticmethod
    def _unknown(s: Statement) -> UnsupportedInstruction:
        return UnsupportedInstruction(f"the emulator does not know the PTX instruction {s.opcode}")

    # --- memory -------------------------------------------------------------------------------------------------------

    def _access(self, s: Statement, address: str, count: int, is_store: bool) -> str:
        """A checked pointer to `count` elements, which PTX demands to be aligned to all of them."""
        spaces = [_SPACES[m.split("::")[0]] for m in s.modifiers if m.split("::")[0] in _SPACES]
        num_bytes = count * width(s.modifiers) // 8
        space = spaces[0] if spaces else 0
        type_ = f"ptr addrspace({space})" if space else "ptr"
        pointer = self._f.value(f"inttoptr i64 {address} to {type_}")
        check = self._checks.function(space, num_bytes, num_bytes, is_store)
        self._f.emit(f"  call void @{check}(i32 %line, {type_} {pointer})")
        return f"{type_} {pointer}, align {num_bytes}"

    def _ld(self, s: Statement) -> None:
        destinations = names(s.operands[0])
        bits = width(s.modifiers)
        pointer = self._access(s, self._r.address(s.operands[1]), len(destinations), False)
        type_ = f"<{len(destinations)} x i{bits}>"
        loaded = self._f.value(f"load {type_}, {pointer}")
        for i, name in enumerate(destinations):
            self._r.write(name, self._f.value(f"extractelement {type_} {loaded}, i32 {i}"), bits)

    def _st(self, s: Statement) -> None:
        sources = names(s.operands[1])
        bits = width(s.modifiers)
        pointer = self._access(s, self._r.address(s.operands[0]), len(sources), True)
        type_ = f"<{len(sources)} x i{bits}>"
        whole = "poison"
        for i, name in enumerate(sources):
            whole = self._f.value(
                f"insertelement {type_} {whole}, i{bits} {self._r.read(name, bits)}, i32 {i}"
            )
        self._f.emit(f"  store {type_} {whole}, {pointer}")

    def _cp(self, s: Statement) -> None:
        kind = ".".join(s.modifiers)
        if re.match(r"async\.c[ag]\.shared", kind):
            destination, source, size, *rest = s.operands
            copied = self._r.read(rest[0], 32) if rest and "cache_hint" not in kind else None
            addresses = self._r.address(destination), self._r.address(source)
            gpu.copy_async(self._f, *addresses, int(self._r.read(size, 32)), copied)
        elif kind == "async.wait_group":
            self._f.call("void", "nvemu_copy_wait", [("i32", self._r.read(s.operands[0], 32))])
        elif kind in ("async.commit_group", "async.wait_all"):
            self._f.call("void", "nvemu_copy_commit" if "commit" in kind else "nvemu_copy_wait_all", [])
        elif kind == "async.bulk.prefetch.L2.global":
            self._prefetch(s)
        else:
            raise self._unknown(s)

    def _prefetch(self, s: Statement) -> None:
        """A hint, but not to memory that is not there: its first and last line are read."""
        address, num_bytes = self._r.address(s.operands[0]), int(self._r.read(s.operands[1], 32))
        if num_bytes <= 0 or num_bytes % _LINE:
            raise UnsupportedInstruction(f"{s.opcode} of {num_bytes} bytes: it takes a multiple of {_LINE}")
        check = self._checks.function(1, _LINE, _LINE, False)
        for offset in (0, num_bytes - _LINE):
            pointer = self._f.value(
                f"inttoptr i64 {self._f.value(f'add i64 {address}, {offset}')} to ptr addrspace(1)"
            )
            self._f.emit(f"  call void @{check}(i32 %line, ptr addrspace(1) {pointer})")
            self._f.value(f"load volatile <{_LINE} x i8>, ptr addrspace(1) {pointer}, align {_LINE}")

    # --- the warp and the block ---------------------------------------------------------------------------------------

    def _bar(self, s: Statement) -> None:
        if s.opcode == "bar.warp.sync":
            self._f.call("void", "nvemu_warp_sync", [gpu.LINE, ("i32", self._r.read(s.operands[0], 32))])
            return
        id_, *count = (self._r.read(operand, 32) for operand in s.operands)
        if "sync" in s.modifiers:
            gpu.barrier(self._f, id_, count[0] if count else "0", s.head == "bar" or "aligned" in s.modifiers)
        elif "arrive" in s.modifiers:
            self._f.call("void", "nvemu_barrier_arrive", [gpu.LINE, ("i32", id_), ("i32", count[0])])
        else:
            raise self._unknown(s)

    _barrier = _bar

    def _shfl(self, s: Statement) -> None:
        destination, *rest = s.operands
        predicate = rest.pop(0) if len(rest) == 5 else "_"
        value, b, c, mask = (self._r.read(operand, 32) for operand in rest)
        moved, in_range = gpu.shuffle(self._f, s.modifiers[1], mask, value, b, c)
        self._r.write(destination, moved, 32)
        self._r.write(predicate, in_range, 1)

    def _elect(self, s: Statement) -> None:
        *leader_name, elected_name, mask = s.operands
        leader, elected = gpu.elect(self._f, self._r.read(mask, 32))
        for name in leader_name:
            self._r.write(name, leader, 32)
        self._r.write(elected_name, elected, 1)

    # --- matrices -----------------------------------------------------------------------------------------------------

    def _write_words(self, destinations: Sequence[object], words: Sequence[str]) -> None:
        for name, word in zip(destinations, words, strict=True):
            self._r.write(str(name), word, 32)

    def _ldmatrix(self, s: Statement) -> None:
        destinations = names(s.operands[0])
        address = self._r.address(s.operands[1])
        self._write_words(
            destinations, gpu.load_matrix(self._f, len(destinations), "trans" in s.modifiers, address)
        )

    def _stmatrix(self, s: Statement) -> None:
        address = self._r.address(s.operands[0])
        gpu.store_matrix(self._f, "trans" in s.modifiers, address, self._r.words(s.operands[1]))

    def _mma(self, s: Statement) -> None:
        """mma.sync.aligned.<shape>.row.col.f32.<a>.<b>.f32 d, a, b, c"""
        shape, *layouts, d_type, a_type, b_type, c_type = s.modifiers[2:]
        if layouts != ["row", "col"] or a_type != b_type or (d_type, c_type) != ("f32", "f32"):
            raise self._unknown(s)
        registers = [word for operand in s.operands[1:] for word in self._r.words(operand)]
        self._write_words(names(s.operands[0]), gpu.mma(self._f, shape, a_type, registers))

    def _wgmma(self, s: Statement) -> None:
        simple = {"fence": "nvemu_wgmma_fence", "commit_group": "nvemu_wgmma_commit"}
        if s.modifiers[0] in simple:
            self._f.call("void", simple[s.modifiers[0]], [gpu.LINE])
        elif s.modifiers[0] == "wait_group":
            self._f.call("void", "nvemu_wgmma_wait", [gpu.LINE, ("i32", self._r.read(s.operands[0], 32))])
        else:
            self._wgmma_multiply(s)

    def _wgmma_multiply(self, s: Statement) -> None:
        """wgmma.mma_async.sync.aligned.m64n<n>k16.f32.<a>.<b> d, a, b-desc, scale-d, scale-a, scale-b, trans..."""
        found = re.fullmatch(
            r"mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(\w+)\.(\w+)", ".".join(s.modifiers)
        )
        if found is None or found[2] != found[3]:
            raise self._unknown(s)
        d, a, b, scale_d, *modifiers = s.operands
        result = gpu.wgmma(
            self._f,
            int(found[1]),
            found[2],
            self._r.words(d),
            self._r.words(a) if isinstance(a, tuple) else [self._r.read(a, 64)],
            self._r.read(b, 64),
            self._r.read(scale_d, 1),
            [self._r.read(modifier, 32) for modifier in modifiers],
        )
        self._write_words(names(d), result)
