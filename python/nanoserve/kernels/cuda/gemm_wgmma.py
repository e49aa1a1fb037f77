"""y[m, n] = epilogue(sum_k x[m, k] * w[n, k]) of bfloat16, sums in float32, by Hopper's wgmma (sm_90a).

k ascends in steps of 16 into one accumulator per output, for any number of rows. Its bits need not be gemm_mma's, so one
weight is multiplied by one of the two for every m; they are gemm_tma's.

A block has `groups` warpgroups, each with 64 rows of the weight's tile, which share a tile of `columns` rows of x. All of
its threads copy (cp.async), then all multiply; gemm_tma has a warp that copies and others that multiply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import UNBOUNDED, GpuKernelSpec, pointer
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm_tile import pipeline, prefetch_weight, weight_row
from nanoserve.kernels.cuda.layout import weight_stride
from nanoserve.kernels.cuda.wgmma_tile import ALIGNMENT, GATES, K_TILE, Shape, multiplier, store_sums

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value


def gemm_wgmma_spec(
    n_in: int, n_out: int, ldx: int, ldy: int, shape: Shape, epilogue: Epilogue, *, y: str = "f32"
) -> GpuKernelSpec:
    """Args: x[.][ldx] of bf16, w[n_out][weight_stride] of bf16, (bias[n_out]), y[.][ldy] of type y, m rows."""
    x, w = (pointer(UNBOUNDED, stride, element="bf16") for stride in (ldx, weight_stride(n_in, "bf16")))
    return shape.spec("gemm_wgmma", n_in, n_out, ldx, ldy, epilogue, y, x=x, w=w)


def build(
    spec: GpuKernelSpec, chip: Chip, *, k: int, n: int, groups: int, columns: int, stages: int, **options: Any
) -> None:
    from nanoserve.compiler.builder import imin
    from nanoserve.compiler.gpu import warpgroup
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.memory import SharedMemory
    from nanoserve.compiler.gpu.threads import block_id, thread_id

    if not chip.wgmma:
        raise ValueError(f"{spec.symbol}: {chip.name} has no wgmma")
    epilogue, shape = Epilogue(**options), Shape(groups, columns, stages)
    w_tile, x_tile = shape.tiles(k)

    def first_output() -> Value:
        return block_id("y") * (shape.rows // (1 + epilogue.gated))

    def weight_source(row: Value) -> Value:
        return weight_row(row, first_output(), GATES, n, epilogue.gated)

    @device_kernel(spec, chip, early=lambda _, w, *__: prefetch_weight(w_tile, w, weight_source, thread_id()))
    def _(*values: Any) -> None:
        given = dict(zip(dict(spec.arguments), values, strict=True))
        x, w, y, m = given["x"], given["w"], given["y"], given["m"]
        shared = SharedMemory(spec.shared_bytes)
        w_shared, x_shared = w_tile.allocate(shared, ALIGNMENT), x_tile.allocate(shared, ALIGNMENT)
        thread = thread_id()
        first_row = block_id("x") * columns
        first_column = first_output()

        copy_w = w_tile.copier(w, weight_source, w_shared, thread, spec.block)
        copy_x = x_tile.copier(x, lambda row: imin(first_row + row, m - 1), x_shared, thread, spec.block)

        def copy(k0: Value, stage: Value) -> None:
            copy_w(k0, stage)
            copy_x(k0, stage)

        (sums,) = pipeline(
            k, K_TILE, stages, copy, multiplier(shape, w_shared, x_shared, thread),
            [warpgroup.no_sums(columns)], publish=warpgroup.publish,
        )  # fmt: skip
        store_sums(sums, shape, epilogue, y, given.get("bias"), n, m, first_row, first_column, thread)
