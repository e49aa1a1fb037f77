"""NVVM intrinsics: for each `llvm.nvvm.*` that a module declares, the function that replaces it.

A table of patterns, tried in order. The names and operand orders are LLVM's (IntrinsicsNVVM.td, NVPTXUsage).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from nanoserve.emulator import instructions as gpu
from nanoserve.emulator.errors import UnsupportedInstruction
from nanoserve.emulator.function_text import Declarations, FunctionText
from nanoserve.emulator.ir_text import members, type_bits

PREFIX = "llvm.nvvm."
Writer = Callable[[FunctionText, re.Match[str]], None]
_RULES: list[tuple[re.Pattern[str], Writer]] = []


def _rule(pattern: str) -> Callable[[Writer], Writer]:
    def add(writer: Writer) -> Writer:
        _RULES.append((re.compile(pattern), writer))
        return writer

    return add


def replacement_name(intrinsic: str) -> str:
    return f"emu.{intrinsic.removeprefix('llvm.')}"


def replacement(intrinsic: str, result: str, params: Sequence[str], declarations: Declarations) -> str:
    """The text of the function that stands in for an intrinsic.

    Args:
        result, params: types, as the module declares them.

    Raises:
        UnsupportedInstruction: no rule is for it.
    """
    name = intrinsic.removeprefix(PREFIX)
    for pattern, writer in _RULES:
        match = pattern.fullmatch(name)
        if match is not None:
            f = FunctionText(replacement_name(intrinsic), result, params, declarations)
            writer(f, match)
            return f.text()
    raise UnsupportedInstruction(f"the emulator does not know the intrinsic {intrinsic}({', '.join(params)})")


def _args(f: FunctionText) -> list[str]:
    """All arguments as integers of their widths."""
    return [f.to_bits(type_, f.arg(i)) for i, type_ in enumerate(f.params)]


def _returns(f: FunctionText, words: Sequence[str]) -> None:
    """32-bit registers as whatever the function's result consists of."""
    types = members(f.result)
    f.ret([f.resize(word, 32, type_bits(t)) for word, t in zip(words, types, strict=True)])


@_rule(r"read\.ptx\.sreg\.(.+)")
def _special_register(f: FunctionText, match: re.Match[str]) -> None:
    f.ret([gpu.special_register(f, match[1])])


@_rule(r"(?:barrier0|barrier\.cta\.sync\.(aligned\.)?(all|count))")
def _barrier(f: FunctionText, match: re.Match[str]) -> None:
    args = _args(f)
    plain = match[0] == "barrier0"
    count = args[1] if match[2] == "count" else "0"
    gpu.barrier(f, "0" if plain else args[0], count, plain or match[1] is not None)
    f.ret()


@_rule(r"barrier\.cta\.arrive\.(?:aligned\.)?count")
def _barrier_arrive(f: FunctionText, _: re.Match[str]) -> None:
    id_, count = _args(f)
    f.call("void", "nvemu_barrier_arrive", [gpu.LINE, ("i32", id_), ("i32", count)])
    f.ret()


@_rule(r"barrier\.cta\.red\.(popc|and|or)\.aligned\.(all|count)")
def _barrier_reduce(f: FunctionText, match: re.Match[str]) -> None:
    args = _args(f)
    count = args[1] if match[2] == "count" else "0"
    op = str(gpu.BARRIER_REDUCE[match[1]])
    bit = f.resize(args[-1], 1, 32)
    operands = [("i32", args[0]), ("i32", count), ("i32", op), ("i32", bit)]
    _returns(f, [f.call("i32", "nvemu_barrier_reduce", [gpu.LINE, *operands])])


@_rule(r"bar\.warp\.sync")
def _warp_sync(f: FunctionText, _: re.Match[str]) -> None:
    f.call("void", "nvemu_warp_sync", [gpu.LINE, ("i32", f.arg(0))])
    f.ret()


@_rule(r"shfl\.sync\.(up|down|bfly|idx)\.(?:i32|f32)(p?)")
def _shuffle(f: FunctionText, match: re.Match[str]) -> None:
    mask, value, b, c = _args(f)
    moved, in_range = gpu.shuffle(f, match[1], mask, value, b, c)
    f.ret([moved, in_range] if match[2] else [moved])


@_rule(r"vote\.(all|any|uni|ballot)\.sync")
def _vote(f: FunctionText, match: re.Match[str]) -> None:
    _returns(f, [gpu.vote(f, match[1], f.arg(0), f.arg(1))])


@_rule(r"match\.any\.sync\.(i32|i64)")
def _match_any(f: FunctionText, match: re.Match[str]) -> None:
    value = f.resize(f.arg(1), int(match[1][1:]), 64)
    f.ret([f.call("i32", "nvemu_match_any", [gpu.LINE, ("i32", f.arg(0)), ("i64", value)])])


@_rule(r"redux\.sync\.(\w+)")
def _reduce(f: FunctionText, match: re.Match[str]) -> None:
    op = str(gpu.REDUCE_OPS[match[1]])
    f.ret([f.call("i32", "nvemu_warp_reduce", [gpu.LINE, ("i32", op), ("i32", f.arg(1)), ("i32", f.arg(0))])])


@_rule(r"elect\.sync")
def _elect(f: FunctionText, _: re.Match[str]) -> None:
    f.ret(list(gpu.elect(f, f.arg(0))))


@_rule(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.b16(?:\.p\d)?")
def _load_matrix(f: FunctionText, match: re.Match[str]) -> None:
    _returns(f, gpu.load_matrix(f, int(match[1]), match[2] is not None, _args(f)[0]))


@_rule(r"stmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.b16(?:\.p\d)?")
def _store_matrix(f: FunctionText, match: re.Match[str]) -> None:
    address, *registers = _args(f)
    gpu.store_matrix(f, match[1] is not None, address, registers)
    f.ret()


@_rule(r"mma\.(m16n8k\d+)\.row\.col\.(bf16|tf32|f32\.f32)")
def _mma(f: FunctionText, match: re.Match[str]) -> None:
    element = "f16" if match[2] == "f32.f32" else match[2]
    f.ret(gpu.mma(f, match[1], element, _args(f)))


@_rule(r"cp\.async\.c[ag]\.shared\.global\.(4|8|16)(?:\.s)?")
def _copy_async(f: FunctionText, match: re.Match[str]) -> None:
    args = _args(f)
    gpu.copy_async(f, args[0], args[1], int(match[1]), args[2] if len(args) > 2 else None)
    f.ret()


@_rule(r"cp\.async\.(commit\.group|wait\.all)")
def _copy_commit(f: FunctionText, match: re.Match[str]) -> None:
    f.call("void", "nvemu_copy_commit" if match[1] == "commit.group" else "nvemu_copy_wait_all", [])
    f.ret()


@_rule(r"cp\.async\.wait\.group")
def _copy_wait(f: FunctionText, _: re.Match[str]) -> None:
    f.call("void", "nvemu_copy_wait", [("i32", f.arg(0))])
    f.ret()


@_rule(r"wgmma\.(fence|commit_group)\.sync\.aligned")
def _wgmma_fence(f: FunctionText, match: re.Match[str]) -> None:
    f.call("void", "nvemu_wgmma_fence" if match[1] == "fence" else "nvemu_wgmma_commit", [gpu.LINE])
    f.ret()


@_rule(r"wgmma\.wait_group\.sync\.aligned")
def _wgmma_wait(f: FunctionText, _: re.Match[str]) -> None:
    count = f.resize(f.arg(0), type_bits(f.params[0]), 32)
    f.call("void", "nvemu_wgmma_wait", [gpu.LINE, ("i32", count)])
    f.ret()


@_rule(r"fence\.proxy\.async(?:\.shared_cta|\.shared::cta|\.shared_cluster)?")
def _proxy_fence(f: FunctionText, _: re.Match[str]) -> None:
    f.call("void", "nvemu_proxy_fence", [])
    f.ret()


@_rule(r"fence\.mbarrier_init\.release\.cluster")
def _mbarrier_fence(f: FunctionText, _: re.Match[str]) -> None:
    f.call("void", "nvemu_mbarrier_fence", [])
    f.ret()


@_rule(r"mbarrier\.init\.shared")
def _mbarrier_init(f: FunctionText, _: re.Match[str]) -> None:
    address, count = _args(f)
    f.call("void", "nvemu_mbarrier_init", [gpu.LINE, ("i64", address), ("i32", count)])
    f.ret()


@_rule(r"mbarrier\.arrive(?:\.shared|(\.expect\.tx)\.scope\.cta\.space\.cta)")
def _mbarrier_arrive(f: FunctionText, match: re.Match[str]) -> None:
    """What it returns, a state to wait for, no instruction that is emulated takes."""
    address, *num_bytes = _args(f)
    f.call("void", "nvemu_mbarrier_arrive", [gpu.LINE, ("i64", address), ("i32", (num_bytes or ["0"])[0])])
    f.ret(["0"])


@_rule(r"mbarrier\.try\.wait\.parity\.scope\.cta\.space\.cta")
def _mbarrier_try_wait(f: FunctionText, _: re.Match[str]) -> None:
    address, parity = _args(f)
    _returns(f, [f.call("i32", "nvemu_mbarrier_try_wait", [gpu.LINE, ("i64", address), ("i32", parity)])])


@_rule(r"cp\.async\.bulk\.tensor\.g2s\.tile\.([1-5])d")
def _tensor_copy(f: FunctionText, match: re.Match[str]) -> None:
    """(destination, mbarrier, map, coordinates, multicast mask, hint, has a mask, has a hint, group of blocks)"""
    rank, args = int(match[1]), _args(f)
    destination, mbarrier, *_, has_mask, _, group = args
    to_others = f.value(f"or i32 {f.resize(has_mask, 1, 32)}, {group}")
    places = [("i64", destination), ("i64", mbarrier), ("ptr", f.arg(2))]
    numbers = [("i32", to_others), ("i32", str(rank)), ("ptr", f.words(args[3 : 3 + rank]))]
    f.call("void", "nvemu_tensor_copy", [gpu.LINE, *places, *numbers])
    f.ret()


@_rule(r"griddepcontrol\.wait")
def _await_previous(f: FunctionText, _: re.Match[str]) -> None:
    f.call("void", "nvemu_await_previous", [])
    f.ret()


# Blocks run one after the other and threads one at a time: memory is always in order.
@_rule(r"membar\.\w+|fence\.(?!proxy).*|nanosleep|griddepcontrol\.launch\.dependents")
def _nothing(f: FunctionText, _: re.Match[str]) -> None:
    f.ret()


# The approximations of the special function unit have 1 to 2 units in the last place; here they are exact to one.
_UNARY = {
    "ex2.approx": "exp2",
    "lg2.approx": "log2",
    "sqrt.approx": "sqrt",
    "sqrt.rn": "sqrt",
    "tanh.approx": "tanh",
}
_UNARY |= {"sin.approx": "sin", "cos.approx": "cos", "fabs": "fabs", "sqrt": "sqrt", "saturate": "saturate"}


@_rule(
    r"(ex2\.approx|lg2\.approx|sqrt\.approx|sqrt\.rn|tanh\.approx|sin\.approx|cos\.approx|fabs)(\.ftz)?(\.[fd]\d*)?"
)
def _unary(f: FunctionText, match: re.Match[str]) -> None:
    type_ = f.result
    intrinsic = f"llvm.{_UNARY[match[1]]}.{'f64' if type_ == 'double' else 'f32'}"
    f.emit(f"  %result = call {type_} @{intrinsic}({type_} %a0)\n  ret {type_} %result")


@_rule(r"(rsqrt|rcp)\.(?:approx|rn)(?:\.ftz)?\.([fd])")
def _reciprocal(f: FunctionText, match: re.Match[str]) -> None:
    type_, suffix = (f.result, "f64" if match[2] == "d" else "f32")
    of = f.value(f"call {type_} @llvm.sqrt.{suffix}({type_} %a0)") if match[1] == "rsqrt" else "%a0"
    f.emit(f"  %result = fdiv {type_} 1.0, {of}\n  ret {type_} %result")


@_rule(r"(add|mul|div|fma)\.(?:rn|full|approx)(?:\.ftz)?(?:\.[fd])?")
def _arithmetic(f: FunctionText, match: re.Match[str]) -> None:
    type_ = f.result
    if match[1] == "fma":
        suffix = "f64" if type_ == "double" else "f32"
        expression = f"call {type_} @llvm.fma.{suffix}({type_} %a0, {type_} %a1, {type_} %a2)"
    else:
        expression = f"f{match[1]} {type_} %a0, %a1"
    f.emit(f"  %result = {expression}\n  ret {type_} %result")


@_rule(r"(fmin|fmax)(?:\.ftz)?(\.nan)?\.([fd])")
def _extremum(f: FunctionText, match: re.Match[str]) -> None:
    name = {"fmin": ("minnum", "minimum"), "fmax": ("maxnum", "maximum")}[match[1]][match[2] is not None]
    suffix = "f64" if match[3] == "d" else "f32"
    f.emit(f"  %result = call {f.result} @llvm.{name}.{suffix}({f.result} %a0, {f.result} %a1)")
    f.emit(f"  ret {f.result} %result")


@_rule(r"ff2(bf16|f16)x2\.rn")
def _pack(f: FunctionText, match: re.Match[str]) -> None:
    """Two floats as one register: the first goes into the upper half."""
    half = "bfloat" if match[1] == "bf16" else "half"
    high, low = (f.value(f"fptrunc float {f.arg(i)} to {half}") for i in (0, 1))
    one = f.value(f"insertelement <2 x {half}> poison, {half} {low}, i32 0")
    f.emit(f"  %result = insertelement <2 x {half}> {one}, {half} {high}, i32 1\n  ret <2 x {half}> %result")


@_rule(r"f2bf16\.rn")
def _to_bf16(f: FunctionText, _: re.Match[str]) -> None:
    f.emit("  %result = fptrunc float %a0 to bfloat")
    if f.result == "bfloat":
        f.emit("  ret bfloat %result")
    else:
        f.emit("  %bits = bitcast bfloat %result to i16\n  ret i16 %bits")


@_rule(r"prmt")
def _permute(f: FunctionText, _: re.Match[str]) -> None:
    f.ret([f.call("i32", "nvemu_permute_bytes", [("i32", f.arg(i)) for i in range(3)], pure=True)])
