"""From the dialects kernels are written in down to LLVM's, as an ordered list of named stages.

Each stage has a purpose in one sentence; `nanoserve explain` prints the text after each. The list is data: its text is
part of every cache key, and a test runs every stage by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanoserve.compiler.bindings import mlir
from nanoserve.compiler.target import Target


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    purpose: str
    passes: str  # MLIR's textual pass pipeline, run on the module


STAGES = (
    Stage(
        "simplify",
        "Fold constants, merge equal expressions, and move what a loop does not change in front of it.",
        "canonicalize,cse,loop-invariant-code-motion",
    ),
    Stage(
        "control-flow",
        "Turn structured loops and conditions into blocks and branches.",
        "convert-scf-to-cf",
    ),
    Stage(
        "vectors",
        "Turn vector loads, broadcasts and slices into LLVM's operations; reductions keep their written order.",
        "convert-vector-to-llvm{reassociate-fp-reductions=0}",
    ),
    Stage(
        "memory",
        "Turn array accesses into address arithmetic; the static strides become constants.",
        "finalize-memref-to-llvm",
    ),
    Stage(
        "arithmetic",
        "Turn arithmetic and the few math functions in use into LLVM's instructions, one for one.",
        "convert-math-to-llvm,convert-arith-to-llvm",
    ),
    Stage(
        "functions",
        "Turn branches and the function itself into LLVM's, with plain pointers as arguments.",
        "convert-cf-to-llvm,convert-func-to-llvm{use-bare-ptr-memref-call-conv=1},convert-index-to-llvm",
    ),
    Stage(
        "clean-up",
        "Remove the casts between the dialects' types, which all cancel by now, and merge equal expressions again.",
        "reconcile-unrealized-casts,canonicalize,cse",
    ),
)


def lower(module: Any, target: Target, after_stage: Callable[[Stage, str], None] | None = None) -> None:
    """Run all stages on a module in place; `after_stage(stage, text)` sees the module after each.

    Raises:
        MLIRError (of the bindings): the module is not valid, or something could not be lowered.
    """
    ir, pass_manager = mlir().ir, mlir().PassManager
    module.operation.verify()
    if after_stage is None:
        pass_manager.parse(f"builtin.module({','.join(stage.passes for stage in STAGES)})").run(
            module.operation
        )
    else:
        for stage in STAGES:
            pass_manager.parse(f"builtin.module({stage.passes})").run(module.operation)
            after_stage(stage, str(module))
    for operation in module.body.operations:
        if operation.operation.name != "llvm.func":
            continue
        # The execution engine adds a wrapper per function; inlined into it, every kernel would be compiled twice.
        operation.attributes["no_inline"] = ir.UnitAttr.get()
        if target.cpu is not None:
            operation.attributes["passthrough"] = ir.Attribute.parse(
                f'[["target-cpu", "{target.cpu}"], ["target-features", ""]]'
            )
