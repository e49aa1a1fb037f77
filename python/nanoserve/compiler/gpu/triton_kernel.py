"""Kernels written in Triton, compiled ahead of time: LLVM IR and PTX from Triton, machine code from ptxas like every other.

Triton is needed to compile, not to run: the cubin is launched by the driver, with the two pointers Triton appends to every
kernel's arguments (scratch memory that these kernels do not have) as null.

Code is made for compute capability 8.0, and assembled for the chip: on Hopper, Triton would use warpgroup instructions for large
tiles and others for small ones, and the bits of a row must not depend on the size of its tile.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanoserve.compiler.gpu import cubin
from nanoserve.compiler.gpu.artifact import Artifact, Usage, launch_of
from nanoserve.compiler.gpu.chip import WARP, Chip
from nanoserve.compiler.gpu.early_start import begin_early
from nanoserve.compiler.gpu.ptx_order import check_early_start
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, GpuKernelSpec, pointer

CAPABILITY = 80
ALIGNMENT = 16  # bytes; of every pointer, which Triton is told
# What Triton appends to the arguments.
SCRATCH = {name: pointer(UNBOUNDED, element="i8") for name in ("global_scratch", "profile_scratch")}
_ELEMENTS = {"f32": "fp32", "bf16": "bf16", "i32": "i32", "i8": "i8"}


class TritonMissing(RuntimeError):
    """Triton is not installed and a kernel had to be compiled."""


@dataclass(frozen=True, slots=True)
class TritonSource:
    """What is compiled.

    Attributes:
        function: decorated with triton.jit; its arguments are the spec's, without SCRATCH, then the constants.
        stages: of asynchronous copies ahead of the products.
    """

    function: Any
    constants: Mapping[str, Any]
    stages: int


def version() -> str | None:
    """Triton's, None where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return f"triton {importlib.metadata.version('triton')}"


def toolchain() -> str | None:
    """What compiles here, None where a part is missing."""
    found = (version(), cubin.version())
    return None if None in found else ", ".join(str(part) for part in found)


def run_triton(spec: GpuKernelSpec, source: TritonSource) -> Any:
    """What Triton makes of it: `asm`, the text of every stage by name, and `metadata`.

    Raises:
        TritonMissing: it is not installed.
    """
    if version() is None:
        raise TritonMissing("compiling this GPU kernel needs triton: install nanoserve[cuda]")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = {name: text for name, text in spec.arguments if isinstance(text, str) and name not in SCRATCH}
    signature = {name: _triton_type(text) for name, text in given.items()} | dict.fromkeys(
        source.constants, "constexpr"
    )
    aligned = {
        (i,): [["tt.divisibility", ALIGNMENT]] for i, text in enumerate(given.values()) if text != SCALAR
    }
    return triton.compile(
        ASTSource(fn=source.function, signature=signature, constexprs=dict(source.constants), attrs=aligned),
        target=GPUTarget("cuda", CAPABILITY, WARP),
        options={"num_warps": spec.block // WARP, "num_stages": source.stages, "enable_fp_fusion": False},
    )


def compile_source(spec: GpuKernelSpec, chip: Chip, source: TritonSource) -> Artifact:
    """A kernel's artifact.

    Raises:
        TritonMissing, AssemblerMissing: a compiler is not installed. AssemblyFailed: ptxas refuses it. TooEarly: as check_early_start.
        ValueError: more shared memory than the chip has.
    """
    made = run_triton(spec, source)
    about = made.metadata
    if about.global_scratch_size or about.profile_scratch_size:
        raise ValueError(f"{spec.symbol}: wants scratch memory, which nobody gives")
    if about.shared > chip.shared_bytes:
        raise ValueError(
            f"{spec.symbol}: {about.shared} bytes of shared memory, {chip.name} has {chip.shared_bytes}"
        )
    launch = replace(launch_of(spec, chip), entry=about.name, shared_bytes=about.shared)
    assembly, llvm_ir = made.asm["ptx"], made.asm["llir"]
    if chip.starts_early:
        assembly, llvm_ir = begin_early(assembly, llvm_ir, chip.name)
        check_early_start(assembly, spec.symbol)
    code = cubin.assemble(assembly, chip, spec.symbol)
    usage = Usage(code.registers, code.spilled_bytes, code.static_shared_bytes)
    return Artifact(launch, usage, chip.name, toolchain() or "", code.code, assembly, llvm_ir)


def _triton_type(text: str) -> str:
    if text == SCALAR:
        return "i64"
    return "*" + _ELEMENTS[text.removesuffix(">").rpartition("x")[2]]
