"""What becomes of a GPU kernel: as compiler/explain.py, down to the chip's instructions, with what they take of it.

Not in compiler/gpu: what lies there is part of every kernel's key, and this makes no kernel.
"""

from __future__ import annotations

import inspect

from nanoserve.compiler.gpu import cubin
from nanoserve.compiler.gpu.artifact import Artifact
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.compiler.gpu.triton_kernel import run_triton
from nanoserve.compiler.lowering import Stage
from nanoserve.kernels.cuda.library import build_module, compile_kernel, lower_kernel, triton_source_of

Step = tuple[str, str, str]

_TRITON = {
    "ttir": "Triton's own dialect: blocks of numbers, no threads yet.",
    "ttgir": "The same with a layout: which thread of which warp holds which number, and copies ahead of products.",
}


def explain(spec: GpuKernelSpec, chip: Chip) -> list[Step]:
    """(stage, purpose in one sentence, text) in order.

    The last are "usage" and, where NVIDIA's nvdisasm is installed, "sass".

    Raises:
        MlirMissing, TritonMissing, PtxCompilerMissing, AssemblerMissing: a compiler is not installed.
    """
    source = triton_source_of(spec, chip)
    steps: list[Step] = []
    if source is None:
        steps.append(
            (
                "written",
                "What the kernel's Python function built, before any pass.",
                str(build_module(spec, chip)),
            )
        )

        def record(stage: Stage, text: str) -> None:
            steps.append((stage.name, stage.purpose, text))

        lower_kernel(spec, chip, record)
    else:
        steps.append(("written", "The kernel as Triton reads it.", inspect.getsource(source.function.fn)))
        stages = run_triton(spec, source).asm
        steps += [(name, purpose, stages[name]) for name, purpose in _TRITON.items()]
    made = compile_kernel(spec, chip)
    steps.append(
        (
            "llvm-ir",
            "LLVM's language: what machine code is made from, and what the emulator runs.",
            made.llvm_ir,
        )
    )
    steps.append(("ptx", "NVIDIA's portable assembly, with registers without number.", made.ptx))
    steps.append(("usage", f"What it takes of {chip.name}, as ptxas tells.", usage(made)))
    instructions = cubin.disassemble(made.cubin)
    if instructions is not None:
        steps.append(("sass", f"The instructions of {chip.name} that ptxas made of it.", instructions))
    return steps


def usage(artifact: Artifact) -> str:
    """Registers, spills, shared memory and threads, a line each."""
    used, launch = artifact.usage, artifact.launch
    return (
        f"{used.registers} registers per thread\n{used.spilled_bytes} bytes of registers spilled to memory\n"
        f"{used.static_shared_bytes} bytes of static and {launch.shared_bytes} bytes of dynamic shared memory per block\n"
        f"{launch.block} threads per block"
    )
