"""From the dialects GPU kernels are written in down to LLVM IR, as an ordered list of named stages.

As compiler/lowering.py: each stage has a purpose in one sentence, and the list is data that is part of every
artifact's key. What comes out is the text that both LLVM's NVPTX back end and the emulator read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanoserve.compiler.bindings import mlir, mlir_gpu
from nanoserve.compiler.gpu.llvm_text import readable
from nanoserve.compiler.gpu.tensor_copy import pass_maps_by_value
from nanoserve.compiler.lowering import Stage

STAGES = (
    Stage(
        "simplify",
        "Fold constants, merge equal expressions, and move what a loop does not change in front of it.",
        "canonicalize,cse,loop-invariant-code-motion",
    ),
    Stage(
        "tensor-cores",
        "Turn asynchronous copies, matrix loads and matrix products into NVIDIA's instructions.",
        "convert-nvgpu-to-nvvm",
    ),
    Stage(
        "control-flow",
        "Turn structured loops and conditions into blocks and branches.",
        "gpu.module(convert-scf-to-cf)",
    ),
    Stage(
        "threads",
        "Turn thread numbers, barriers and shuffles into NVIDIA's intrinsics, arrays into address arithmetic, and the "
        "function into a kernel of plain pointers.",
        "gpu.module(convert-gpu-to-nvvm{use-bare-ptr-memref-call-conv=1 allow-pattern-rollback=0})",
    ),
    Stage(
        "vectors",
        "Turn vector slices into LLVM's operations; reductions keep their written order.",
        "gpu.module(convert-vector-to-llvm{reassociate-fp-reductions=0},convert-nvvm-to-llvm)",
    ),
    Stage(
        "clean-up",
        "Remove the casts between the dialects' types, which all cancel by now, and merge equal expressions again.",
        "gpu.module(canonicalize,cse,reconcile-unrealized-casts)",
    ),
)


class NotLowered(RuntimeError):
    """A kernel holds an operation that no stage turns into LLVM's."""


def lower(module: Any, after_stage: Callable[[Stage, str], None] | None = None) -> str:
    """Run all stages on a module with one gpu.module, in place; the LLVM IR. `after_stage(stage, text)` as on the CPU.

    Raises:
        MLIRError (of the bindings): the module is not valid, or a stage failed.
        NotLowered: something is left that LLVM does not know.
    """
    pass_manager = mlir().PassManager
    module.operation.verify()
    for stage in STAGES:
        pass_manager.parse(f"builtin.module({stage.passes})").run(module.operation)
        if after_stage is not None:
            after_stage(stage, str(module))
    kernels = [op for op in module.body.operations if op.operation.name == "gpu.module"]
    if len(kernels) != 1:
        raise ValueError(f"a module of one gpu.module was expected, not of {len(kernels)}")
    check_lowered(kernels[0])
    pass_maps_by_value(kernels[0])
    return translate(kernels[0])


def check_lowered(kernels: Any) -> None:
    """Only LLVM's operations are left: on any other the translator crashes the process."""
    ir = mlir().ir
    left: set[str] = set()

    def visit(operation: Any) -> Any:
        if operation.name != "gpu.module" and operation.name.split(".")[0] not in ("llvm", "nvvm"):
            left.add(operation.name)
        return ir.WalkResult.ADVANCE

    kernels.operation.walk(visit)
    if left:
        raise NotLowered(f"no stage lowers {', '.join(sorted(left))}")


def translate(kernels: Any) -> str:
    """LLVM IR text of a lowered gpu.module."""
    return readable(mlir_gpu().translate(kernels.operation))
