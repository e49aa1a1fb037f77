"""Authoring layer for GPU kernels, part one: the function itself.

    @device_kernel(spec, chip)
    def _(x, out, rows): ...

builds a gpu.func named by the spec in a gpu.module of its own. Pointers arrive as Array, integers as Value, tensor maps
as TensorMap, in the order of the spec's arguments. The body runs once per thread; its values and loops are those of compiler/builder.py
and control.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from nanoserve.compiler.bindings import mlir_gpu
from nanoserve.compiler.builder import Value, ir, type_of
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.early_start import await_previous, start_next
from nanoserve.compiler.gpu.memory import Array
from nanoserve.compiler.gpu.spec import SCALAR, Argument, GpuKernelSpec, TensorForm
from nanoserve.compiler.gpu.tensor_copy import MAP_ATTRIBUTES, MAP_TYPE, TensorMap

gpu = mlir_gpu().gpu
MODULE = "kernels"  # name of the gpu.module


def device_kernel(
    spec: GpuKernelSpec,
    chip: Chip,
    *,
    overlap: Collection[str] = (),
    early: Callable[..., None] | None = None,
) -> Callable[[Callable[..., None]], None]:
    """The kernel of a spec, at the insertion point.

    Args:
        overlap: the pointers that may share memory; no others do.
        early: called with the body's arguments to emit what is done before the kernel in front has ended, on a chip that
            has that: nothing that touches memory other kernels write.
    """

    def define(body: Callable[..., None]) -> None:
        module = gpu.GPUModuleOp(MODULE)
        block = (
            module.regions[0].blocks[0]
            if len(module.regions[0].blocks)
            else module.regions[0].blocks.append()
        )
        with ir.InsertionPoint(block):
            types = [type_of(kind if isinstance(kind, str) else MAP_TYPE) for _, kind in spec.arguments]
            function = gpu.GPUFuncOp(
                ir.FunctionType.get(types, []), spec.symbol, kernel=True, known_block_size=[spec.block, 1, 1]
            )
            function.operation.attributes["arg_attrs"] = ir.ArrayAttr.get(
                [
                    # Memory that nothing else may reach could be read before the wait, or by a path that supposes it
                    # never changes while the kernel is there.
                    ir.DictAttr.parse(_attributes(kind, chip.starts_early or name in overlap))
                    for name, kind in spec.arguments
                ]
            )
            entry = function.regions[0].blocks.append(*types)
            with ir.InsertionPoint(entry):
                values = [
                    _argument(value, kind)
                    for value, (_, kind) in zip(entry.arguments, spec.arguments, strict=True)
                ]
                if chip.starts_early:
                    start_next()
                    if early is not None:
                        early(*values)
                    await_previous()
                body(*values)
                gpu.return_([])

    return define


def _attributes(kind: Argument, may_overlap: bool) -> str:
    if isinstance(kind, TensorForm):
        return MAP_ATTRIBUTES
    return "{}" if kind == SCALAR or may_overlap else "{llvm.noalias}"


def _argument(value: Any, kind: Argument) -> Array | Value | TensorMap:
    if isinstance(kind, TensorForm):
        return TensorMap(value, kind)
    return Value(value) if kind == SCALAR else Array(value)


def emit_text(build: Callable[[], Any]) -> str:
    """The text of the module that `build` emits into, for tests and explanations."""
    module = ir.Module.create()
    with ir.InsertionPoint(module.body):
        build()
    return str(module)
