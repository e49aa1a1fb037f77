"""CUDA's mathematical library (libdevice), by the functions of the C library.

Both are accurate to one or two units in the last place, and not to the same bits: a test that compares bits must not use them.
"""

from __future__ import annotations

from nanoserve.emulator.errors import UnsupportedInstruction
from nanoserve.emulator.function_text import Declarations

_NAMES = "acos asin atan atan2 cbrt ceil cos cosh erf erfc exp exp2 exp10 expm1 fabs floor fma fmax fmin fmod log log10 log1p"
_KNOWN = {*_NAMES.split(), *"log2 pow rint round sin sinh sqrt tan tanh trunc".split()}


def library_function(name: str, result: str, params: list[str], declarations: Declarations) -> str:
    """The definition of `__nv_<name>`.

    Raises:
        UnsupportedInstruction: there is no such function here.
    """
    typed = ", ".join(f"{type_} %a{i}" for i, type_ in enumerate(params))
    head = f"define internal {result} @{name}({typed}) alwaysinline {{\n"
    if name == "__nvvm_reflect":
        return f"{head}  ret i32 0\n}}"
    suffix = "f" if result == "float" else ""
    base = name.removeprefix("__nv_").removeprefix("fast_").removesuffix(suffix)
    if base == "rsqrt":
        kind = "f32" if result == "float" else "f64"
        root = f"  %root = call {result} @llvm.sqrt.{kind}({result} %a0)\n"
        return f"{head}{root}  %r = fdiv {result} 1.0, %root\n  ret {result} %r\n}}"
    if base not in _KNOWN or not name.startswith("__nv_"):
        raise UnsupportedInstruction(f"the emulator does not know the library function {name}")
    call = f"  %r = call {result} @{base}{suffix}({typed})\n  ret {result} %r\n}}"
    declarations.add(result, base + suffix, params, pure=True)
    return head + call
