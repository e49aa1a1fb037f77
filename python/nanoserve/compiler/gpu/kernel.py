"""Authoring layer for GPU kernels, part one: the function itself.

    @device_kernel(spec)
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
from nanoserve.compiler.gpu.memory import Array
from nanoserve.compiler.gpu.spec import SCALAR, Argument, GpuKernelSpec, TensorForm
from nanoserve.compiler.gpu.tensor_copy import MAP_ATTRIBUTES, MAP_TYPE, TensorMap

gpu = mlir_gpu().gpu
MODULE = "kernels"  # name of the gpu.module


def device_kernel(
    spec: GpuKernelSpec, *, overlap: Collection[str] = ()
) -> Callable[[Callable[..., None]], None]:
    """The kernel of a spec, at the insertion point. No pointers but those in `overlap` may share memory."""

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
                [ir.DictAttr.parse(_attributes(kind, name in overlap)) for name, kind in spec.arguments]
            )
            entry = function.regions[0].blocks.append(*types)
            with ir.InsertionPoint(entry):
                body(
                    *(
                        _argument(value, kind)
                        for value, (_, kind) in zip(entry.arguments, spec.arguments, strict=True)
                    )
                )
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
