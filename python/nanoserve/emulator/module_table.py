"""The table by which the emulator's library finds what a module has: constants of LLVM IR, laid out as src/emulator/abi.h says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoserve.emulator.ir_text import type_bytes
from nanoserve.emulator.shared_layout import SharedLayout

ABI_VERSION = 3
SYMBOL = "nvemu_module"


@dataclass
class Kernel:
    """An entry point.

    Attributes:
        param_types: of LLVM IR; an array is passed by value. max_threads: of a block, 0 for no limit of its own.
        required_threads: 0 for any number. awaits_previous: it has griddepcontrol.wait.
    """

    name: str
    param_types: list[str]
    max_threads: int
    required_threads: int
    static_shared_bytes: int = 0
    awaits_previous: bool = False


@dataclass(frozen=True)
class DataVariable:
    """A constant or global of the module, which kernels reach by pointer."""

    name: str  # as in the text
    space: int
    num_bytes: int


def module_table(
    kernels: Sequence[Kernel], shared: SharedLayout, data: Sequence[DataVariable], checks_proxies: bool
) -> list[str]:
    """Lines of LLVM IR: a wrapper per kernel that takes its parameters as cuLaunchKernel does, and the table."""
    lines: list[str] = []
    entries = []
    for i, kernel in enumerate(kernels):
        lines += _wrapper(i, kernel)
        sizes = ", ".join(f"i32 {type_bytes(type_)}" for type_ in kernel.param_types)
        num = len(kernel.param_types)
        lines.append(
            f"@emu.params.{i} = internal constant [{num} x i32] {f'[{sizes}]' if num else 'zeroinitializer'}"
        )
        lines.append(_string(f"emu.kernel.{i}", kernel.name))
        about = (
            num, kernel.static_shared_bytes, kernel.max_threads, kernel.required_threads, int(kernel.awaits_previous),
        )  # fmt: skip
        numbers = ", ".join(f"i32 {value}" for value in about)
        entries.append(f"ptr @emu.kernel.{i}, ptr @emu.call.{i}, ptr @emu.params.{i}, {numbers}")
    variables = [(v.name, f"i64 {v.offset}", v.num_bytes) for v in shared.variables if not v.is_dynamic]
    lines += _array("emu.kernels", "{ ptr, ptr, ptr, i32, i32, i32, i32, i32 }", entries)
    lines += _variables("emu.shared", variables)
    lines += _variables("emu.data", [(v.name, f"i64 {_address(v)}", v.num_bytes) for v in data])
    counts = f"i32 {len(variables)}, i32 {len(data)}, i32 {shared.dynamic_offset}, i32 {int(checks_proxies)}"
    head = f"i32 {ABI_VERSION}, i32 {len(kernels)}, ptr @emu.kernels, ptr @emu.shared, ptr @emu.data"
    type_ = "{ i32, i32, ptr, ptr, ptr, i32, i32, i32, i32 }"
    return [*lines, f"@{SYMBOL} = constant {type_} {{ {head}, {counts} }}"]


def _wrapper(index: int, kernel: Kernel) -> list[str]:
    lines = [f"define internal void @emu.call.{index}(ptr %params) {{"]
    passed = []
    for i, type_ in enumerate(kernel.param_types):
        lines.append(f"  %slot{i} = getelementptr ptr, ptr %params, i64 {i}")
        lines.append(f"  %at{i} = load ptr, ptr %slot{i}")
        if type_.startswith("["):
            passed.append(f"ptr %at{i}")
            continue
        lines.append(f"  %param{i} = load {type_}, ptr %at{i}, align 1")
        passed.append(f"{type_} %param{i}")
    args = ", ".join(passed)
    return [*lines, f'  call void @"{kernel.name}"({args})', "  ret void", "}"]


def _string(symbol: str, text: str) -> str:
    data = text.encode() + b"\0"
    escaped = "".join(f"\\{byte:02X}" for byte in data)
    return f'@{symbol} = internal constant [{len(data)} x i8] c"{escaped}"'


def _variables(symbol: str, variables: Sequence[tuple[str, str, int]]) -> list[str]:
    names = [_string(f"{symbol}.{i}", name.strip('@"')) for i, (name, _, _) in enumerate(variables)]
    rows = [f"ptr @{symbol}.{i}, {place}, i64 {size}" for i, (_, place, size) in enumerate(variables)]
    return [*names, *_array(symbol, "{ ptr, i64, i64 }", rows)]


def _array(symbol: str, type_: str, rows: Sequence[str]) -> list[str]:
    items = ", ".join(f"{type_} {{ {row} }}" for row in rows)
    value = f"[{items}]" if rows else "zeroinitializer"
    return [f"@{symbol} = internal constant [{len(rows)} x {type_}] {value}"]


def _address(variable: DataVariable) -> str:
    space = f" addrspace({variable.space})" if variable.space else ""
    return f"ptrtoint (ptr{space} {variable.name} to i64)"
