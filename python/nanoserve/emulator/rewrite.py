"""From the LLVM IR that a GPU's code generator gets to LLVM IR that this machine runs.

The kernel's own instructions stay as they are. Replaced are: NVVM intrinsics and inline PTX, by functions that call the
emulator's run time library; shared memory variables, by constant addresses; library functions of CUDA, by those of C. Added
are a check before each access and the table by which the library finds the kernels (nvemu_module, see src/emulator/abi.h).

A replaced instruction knows the line it stood on: that is how messages name it, and how two calls of one instruction are told
apart where the lanes of a warp must be at the same one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nanoserve.emulator import intrinsics
from nanoserve.emulator.access_checks import AccessChecks
from nanoserve.emulator.cuda_library import library_function
from nanoserve.emulator.errors import UnsupportedInstruction
from nanoserve.emulator.function_text import Declarations
from nanoserve.emulator.inline_ptx import unescape
from nanoserve.emulator.ir_text import VALUE, closing, leading_type, split_list, type_bytes
from nanoserve.emulator.module_table import DataVariable, Kernel, module_table
from nanoserve.emulator.ptx_function import PtxFunction
from nanoserve.emulator.shared_layout import SharedLayout, declared, lay_out

_ATTACHMENT = re.compile(r",? ![\w.]+ !(?:\d+|DIExpression\([^)]*\))")
_ASM = re.compile(r'asm (?:(?:sideeffect|alignstack|inteldialect|unwind) )*"((?:[^"\\]|\\.)*)", "([^"]*)"\(')
_DROPPED = re.compile(r"^\s*(?:;|#dbg_|!|source_filename|target |module asm)")
_ATTRIBUTES = re.compile(r"^attributes (#\d+) = \{ (.*) \}$")
_DECLARE = re.compile(r"^declare (.*?)(?:@([-\w.$]+))\(")
_FUNCTION = re.compile(rf"^define (.*?)({VALUE})\(")
_RESULT_WORDS = re.compile(
    r"^(?:(?:noundef|signext|zeroext|range\([^)]*\)|nonnull|noalias|dso_local|hidden|internal)\s+)*"
)
# A parameter that is the bytes themselves; the kernel gets a pointer to them, and may not write there.
_BY_VALUE = re.compile(r'\bbyval\((\[\d+ x i8\])\) align \d+ "nvvm\.grid_constant"')
_DATA = re.compile(rf"^({VALUE}) = (?!.*addrspace\(3\)).*?\b(?:global|constant) (.*)$")


@dataclass(frozen=True)
class HostModule:
    text: str
    kernels: dict[str, Kernel]


class Rewriter:
    """One module on its way."""

    def __init__(self, llvm_ir: str) -> None:
        self._lines = llvm_ir.splitlines()
        self._declarations = Declarations()
        self._checks = AccessChecks(self._declarations, "wgmma.mma_async" in llvm_ir)
        self._shared: SharedLayout = lay_out(self._lines)
        self._attributes = {m[1]: m[2] for line in self._lines if (m := _ATTRIBUTES.match(line))}
        self._replaced: dict[str, str] = {}  # symbol -> text of the function
        self._ptx: dict[tuple[str, ...], str] = {}  # an asm call's text and types -> symbol
        self._kernels: dict[str, Kernel] = {}
        self._data: list[DataVariable] = []
        self._uses: dict[str, set[str]] = {}  # function -> shared variables it names

    def run(self) -> HostModule:
        body = [out for number, line in enumerate(self._lines, start=1) for out in self._line(line, number)]
        self._account_shared()
        notes = "wgmma.mma_async" in "\n".join(self._lines)
        parts = [
            *body,
            *self._checks.texts,
            *self._replaced.values(),
            *module_table(list(self._kernels.values()), self._shared, self._data, notes),
        ]
        text = "\n".join([*parts, *self._declarations.by_name.values()])
        return HostModule(text + "\n" + "\n".join(_missing_intrinsics(text)) + "\n", self._kernels)

    def _line(self, line: str, number: int) -> list[str]:
        if _DROPPED.match(line) or line.startswith("attributes ") or declared(line) is not None:
            return []
        line = _ATTACHMENT.sub("", line)
        if line.startswith("declare "):
            return self._declare(line)
        if line.startswith("define "):
            return [self._define(line)]
        if line.startswith("@"):
            self._note_data(line)
            return [line]
        if self._current is not None and "@" in line:
            self._uses[self._current].update(v.name for v in self._shared.variables if v.name in line)
        if "griddepcontrol.wait" in line and self._current in self._kernels:
            self._kernels[self._current].awaits_previous = True
        line = re.sub(r"(\)|\]) #\d+", r"\1", line)
        line = self._inline_ptx(line, number)
        line = re.sub(r"@(llvm\.nvvm\.[\w.]+)\((\)?)", lambda m: _with_line(m[1], m[2], number), line)
        line = re.sub(r"@llvm\.trap\(\)", f"@nvemu_trap(i32 {number})", line)
        if "@nvemu_trap" in line:
            self._declarations.add("void", "nvemu_trap", ["i32"])
        line = self._shared.place(line)
        return [*self._checks.before(line, number), line]

    _current: str | None = None

    def _define(self, line: str) -> str:
        found = _FUNCTION.match(line)
        if found is None:
            raise UnsupportedInstruction(f"a function definition that cannot be read: {line}")
        name = found[2].strip('@"')
        self._current = name
        self._uses[name] = set()
        end = closing(line, found.end() - 1)
        tail = line[end + 1 :]
        if "ptx_kernel" in found[1]:
            self._kernels[name] = self._kernel(name, line[found.end() : end], tail)
        line = _BY_VALUE.sub("", line[: end + 1]) + re.sub(r" #\d+", "", tail)
        return re.sub(r"\bptx_(kernel|device) ", "", line)

    def _kernel(self, name: str, params: str, tail: str) -> Kernel:
        parts = split_list(params)
        types = [found[1] if (found := _BY_VALUE.search(part)) else leading_type(part) for part in parts]
        sizes = [type_bytes(type_) for type_ in types]
        if None in sizes or "byval" in _BY_VALUE.sub("", params):
            raise UnsupportedInstruction(f"kernel {name}: parameters ({params})")
        attributes = " ".join(self._attributes.get(group, "") for group in re.findall(r"#\d+", tail)) + tail
        return Kernel(name, types, _threads(attributes, "maxntid"), _threads(attributes, "reqntid"))

    def _declare(self, line: str) -> list[str]:
        found = _DECLARE.match(line)
        if found is None:
            raise UnsupportedInstruction(f"a declaration that cannot be read: {line}")
        name = found[2]
        end = closing(line, found.end() - 1)
        if name == "llvm.trap":
            return []
        if not name.startswith((intrinsics.PREFIX, "__nv")):
            return [line[: end + 1]]
        result = leading_type(_RESULT_WORDS.sub("", found[1].strip()))
        params = [leading_type(param) for param in split_list(line[found.end() : end])]
        if name.startswith("__nv"):
            self._replaced[name] = library_function(name, result, params, self._declarations)
        else:
            self._replaced[name] = intrinsics.replacement(name, result, params, self._declarations)
        return []

    def _inline_ptx(self, line: str, number: int) -> str:
        found = _ASM.search(line)
        if found is None:
            return line
        end = closing(line, found.end() - 1)
        args = line[found.end() : end]
        types = [leading_type(arg) for arg in split_list(args)]
        result = _call_result(line[: found.start()])
        key = (result, found[1], found[2], *types)
        if key not in self._ptx:
            symbol = f"emu.ptx.{len(self._ptx)}"
            self._ptx[key] = symbol
            function = PtxFunction(
                symbol, result, types, unescape(found[1]), found[2], self._declarations, self._checks
            )
            self._replaced[symbol] = function.text()
        arguments = ", ".join([f"i32 {number}", *([args] if args.strip() else [])])
        return f"{line[: found.start()]}@{self._ptx[key]}({arguments})"

    def _note_data(self, line: str) -> None:
        found = _DATA.match(line)
        if found is None:
            raise UnsupportedInstruction(f"a global that cannot be read: {line}")
        size = type_bytes(leading_type(found[2]))
        space = re.search(r"addrspace\((\d+)\)", line)
        if size is not None:
            self._data.append(DataVariable(found[1], int(space[1]) if space else 0, size))

    def _account_shared(self) -> None:
        """A kernel's static shared memory: what it names, and what functions name that it might call."""
        common = {
            name for function, names in self._uses.items() if function not in self._kernels for name in names
        }
        for kernel in self._kernels.values():
            named = self._uses[kernel.name] | common
            kernel.static_shared_bytes = sum(v.num_bytes for v in self._shared.variables if v.name in named)


def rewrite(llvm_ir: str) -> HostModule:
    """The host module of a GPU module's LLVM IR text.

    Raises:
        UnsupportedInstruction: it uses what the emulator does not know.
    """
    module = Rewriter(llvm_ir).run()
    if not module.kernels:
        raise UnsupportedInstruction("the module has no kernel: no function is a ptx_kernel")
    return module


def _with_line(intrinsic: str, close: str, number: int) -> str:
    return f"@{intrinsics.replacement_name(intrinsic)}(i32 {number}{')' if close else ', '}"


def _call_result(before: str) -> str:
    """The result type of a call, from the text before what is called."""
    text = before[before.rindex("call ") + len("call ") :]
    while word := re.match(
        r"(?:contract|fast|nnan|ninf|nsz|arcp|afn|reassoc|noundef|range\([^)]*\))\s+", text
    ):
        text = text[word.end() :]
    return leading_type(text)


def _threads(attributes: str, name: str) -> int:
    """Threads a block may have, or must have, by a function attribute: 0 if it has none."""
    found = re.search(rf'"nvvm\.{name}"="([\d,]+)"', attributes)
    product = 1
    for part in found[1].split(",") if found else ["0"]:
        product *= int(part)
    return product


def _missing_intrinsics(text: str) -> list[str]:
    """Declarations of LLVM's own intrinsics that replacements use and the module does not declare."""
    known = set(re.findall(r"^declare .*?@(llvm\.[\w.]+)\(", text, re.MULTILINE))
    scalar = {"f32": "float", "f64": "double", "f16": "half"}
    found = {}
    for name, args in re.findall(r"@(llvm\.(?:\w+)\.(?:f32|f64|f16|i\d+))\(([^()]*)\)", text):
        if name not in known:
            suffix = name.rsplit(".", 1)[1]
            type_ = scalar.get(suffix, suffix)
            found[name] = f"declare {type_} @{name}({', '.join([type_] * len(split_list(args)))})"
    return list(found.values())
