"""What the GPU's instructions do, said once for intrinsics and inline PTX alike.

Both spell the same machine: `llvm.nvvm.mma.m16n8k16.row.col.bf16` and `mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32`
are one instruction. The functions here take registers as integers and write the call of the run time library
(src/emulator/runtime.h) into the function that stands in for the instruction.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanoserve.emulator.errors import UnsupportedInstruction
from nanoserve.emulator.function_text import FunctionText

Args = list[tuple[str, str]]
LINE = ("i32", "%line")

SHUFFLE_MODES = {"up": 0, "down": 1, "bfly": 2, "idx": 3}
VOTE_MODES = {"all": 0, "any": 1, "uni": 2, "ballot": 3}
REDUCE_OPS = {"add": 0, "min": 1, "max": 2, "umin": 3, "umax": 4, "and": 5, "or": 6, "xor": 7}
BARRIER_REDUCE = {"popc": 0, "and": 1, "or": 2}
SPECIAL_REGISTERS = {
    "tid": "nvemu_thread_index",
    "ntid": "nvemu_block_dim",
    "ctaid": "nvemu_block_index",
    "nctaid": "nvemu_grid_dim",
}
# (shape, element): number in nvemu::MmaShape, registers of A and B.
_MMA = {
    ("m16n8k16", "bf16"): (0, 4, 2),
    ("m16n8k16", "f16"): (1, 4, 2),
    ("m16n8k8", "tf32"): (2, 4, 2),
    ("m16n8k8", "bf16"): (3, 2, 1),
    ("m16n8k8", "f16"): (4, 2, 1),
    ("m16n8k4", "tf32"): (5, 2, 1),
}
_WGMMA_ACCUMULATE, _WGMMA_NEGATE_A, _WGMMA_NEGATE_B = 1, 2, 4
_WGMMA_TRANSPOSED_A, _WGMMA_TRANSPOSED_B, _WGMMA_HALF = 8, 16, 32


def special_register(f: FunctionText, name: str) -> str:
    """tid.x, ntid.y, ..., laneid, warpid: as i32."""
    base, _, dim = name.partition(".")
    if base in SPECIAL_REGISTERS and dim in ("x", "y", "z"):
        return f.call("i32", SPECIAL_REGISTERS[base], [("i32", str("xyz".index(dim)))], pure=True)
    simple = {
        "laneid": "nvemu_lane",
        "warpid": "nvemu_warp",
        "dynamic_smem_size": "nvemu_dynamic_shared_bytes",
    }
    if name in simple:
        return f.call("i32", simple[name], [], pure=True)
    if name == "warpsize":
        return "32"
    raise UnsupportedInstruction(f"the special register %{name}")


def barrier(f: FunctionText, id_: str, count: str = "0", aligned: bool = True) -> None:
    f.call("void", "nvemu_barrier", [LINE, ("i32", id_), ("i32", count), ("i32", str(int(aligned)))])


def shuffle(f: FunctionText, mode: str, mask: str, value: str, b: str, c: str) -> tuple[str, str]:
    """The value as i32, and whether it is in range as i1."""
    out = f.array(2)
    args: Args = [LINE, ("i32", str(SHUFFLE_MODES[mode]))]
    args += [("i32", mask), ("i32", value), ("i32", b), ("i32", c), ("ptr", out)]
    f.call("void", "nvemu_shuffle", args)
    return f.load_word(out, 0), f.value(f"trunc i32 {f.load_word(out, 1)} to i1")


def vote(f: FunctionText, mode: str, mask: str, predicate: str) -> str:
    """predicate is an i1; the ballot, or the answer as 0 or 1: i32."""
    bit = f.resize(predicate, 1, 32)
    return f.call("i32", "nvemu_vote", [LINE, ("i32", str(VOTE_MODES[mode])), ("i32", mask), ("i32", bit)])


def elect(f: FunctionText, mask: str) -> tuple[str, str]:
    out = f.array(2)
    f.call("void", "nvemu_elect", [LINE, ("i32", mask), ("ptr", out)])
    return f.load_word(out, 0), f.value(f"trunc i32 {f.load_word(out, 1)} to i1")


def load_matrix(f: FunctionText, count: int, transposed: bool, address: str) -> list[str]:
    out = f.array(count)
    flags: Args = [("i32", str(count)), ("i32", str(int(transposed)))]
    f.call("void", "nvemu_load_matrix", [LINE, *flags, ("i64", address), ("ptr", out)])
    return [f.load_word(out, i) for i in range(count)]


def store_matrix(f: FunctionText, transposed: bool, address: str, registers: Sequence[str]) -> None:
    flags: Args = [("i32", str(len(registers))), ("i32", str(int(transposed)))]
    f.call("void", "nvemu_store_matrix", [LINE, *flags, ("i64", address), ("ptr", f.words(registers))])


def mma(f: FunctionText, shape: str, element: str, registers: Sequence[str]) -> list[str]:
    """D's four registers, from A's, B's and C's."""
    known = _MMA.get((shape, element))
    if known is None:
        raise UnsupportedInstruction(f"mma.sync of shape {shape} on {element}")
    number, num_a, num_b = known
    if len(registers) != num_a + num_b + 4:
        raise UnsupportedInstruction(
            f"mma.sync {shape} {element} with {len(registers)} registers: only f32 sums"
        )
    out = f.array(4)
    f.call("void", "nvemu_mma", [LINE, ("i32", str(number)), ("ptr", f.words(registers)), ("ptr", out)])
    return [f.load_word(out, i) for i in range(4)]


def copy_async(
    f: FunctionText, destination: str, source: str, num_bytes: int, copied: str | None = None
) -> None:
    """copied: how many bytes are read (i32), the rest become zero; all of them if None."""
    args: Args = [LINE, ("i64", destination), ("i64", source), ("i32", str(num_bytes))]
    f.call("void", "nvemu_copy_async", [*args, ("i32", copied if copied is not None else str(num_bytes))])


def wgmma(
    f: FunctionText,
    n: int,
    element: str,
    d: Sequence[str],
    a: Sequence[str],
    b: str,
    scale_d: str,
    modifiers: Sequence[str],
) -> list[str]:
    """D's n / 2 registers.

    Args:
        a: one i64 descriptor, or four i32 registers. b: a descriptor. scale_d: i1, whether to add to d.
        modifiers: i32 each: the scales of A and B (1 or -1), then whether they are MN-major (of B only, if A is
            in registers).
    """
    if element not in ("bf16", "f16"):
        raise UnsupportedInstruction(f"wgmma on {element}")
    from_registers = len(a) == 4
    flags = f.resize(scale_d, 1, 32)

    def add(flag: int, condition: str) -> None:
        nonlocal flags
        chosen = f.value(f"select i1 {condition}, i32 {flag}, i32 0")
        flags = f.value(f"or i32 {flags}, {chosen}")

    transposed = [_WGMMA_TRANSPOSED_B] if from_registers else [_WGMMA_TRANSPOSED_A, _WGMMA_TRANSPOSED_B]
    for modifier, flag in zip(modifiers[:2], (_WGMMA_NEGATE_A, _WGMMA_NEGATE_B), strict=True):
        add(flag, f.value(f"icmp eq i32 {modifier}, -1"))
    for modifier, flag in zip(modifiers[2:], transposed, strict=True):
        add(flag, f.value(f"icmp ne i32 {modifier}, 0"))
    if element == "f16":
        flags = f.value(f"or i32 {flags}, {_WGMMA_HALF}")
    registers = f.words(a) if from_registers else "null"
    sums = f.words(d)
    args: Args = [LINE, ("i32", str(n)), ("i32", flags), ("ptr", registers)]
    args += [("i64", "0" if from_registers else a[0]), ("i64", b), ("ptr", sums)]
    f.call("void", "nvemu_wgmma", args)
    return [f.load_word(sums, i) for i in range(len(d))]
