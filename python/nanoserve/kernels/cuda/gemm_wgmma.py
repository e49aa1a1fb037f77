"""y[m, n] = epilogue(sum_k x[m, k] * w[n, k]) of bfloat16, sums in float32, by Hopper's wgmma (sm_90a).

The weight is the operand of 64 rows and x that of as many columns as the instruction has, so that few rows of x waste
little: what is computed is y transposed. k ascends in steps of 16 into one accumulator per output, for any number of
rows. Its bits need not be gemm_mma's, so one weight is multiplied by one of the two for every m.

A block has `groups` warpgroups, each with 64 rows of the weight's tile, which share a tile of `columns` rows of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanoserve.compiler.gpu.chip import WARP, Chip
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm_tile import TILE_K, Tile, pipeline, weight_row
from nanoserve.kernels.cuda.layout import check_stride, weight_stride

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value

_K_TILE = TILE_K["bf16"]
_ROWS = 64  # of the instruction
_GROUP = 128  # threads of a warpgroup
_GATES = 8  # a thread has rows r and r + 8 of the weight's tile: a gate and what it multiplies
_ALIGNMENT = 1024  # of tiles, for the hardware's swizzle


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a block: `groups` warpgroups, `columns` rows of x (a multiple of 8 up to 256), tiles of `stages` places."""

    groups: int
    columns: int
    stages: int


def gemm_wgmma_spec(
    n_in: int, n_out: int, ldx: int, ldy: int, shape: Shape, epilogue: Epilogue, *, y: str = "f32"
) -> GpuKernelSpec:
    """Args: x[.][ldx] of bf16, w[n_out][weight_stride] of bf16, (bias[n_out]), y[.][ldy] of type y, m rows."""
    if n_in < 1 or n_out < 1:
        raise ValueError(f"gemm_wgmma: n_in={n_in} and n_out={n_out} must be positive")
    check_stride("gemm_wgmma", n_in, ldx=ldx)
    check_stride("gemm_wgmma", n_out, ldy=ldy)
    if y not in ("f32", "bf16"):
        raise ValueError(f"gemm_wgmma: y {y!r} must be f32 or bf16")
    if shape.columns % 8 or not 8 <= shape.columns <= 256:
        raise ValueError(f"gemm_wgmma: columns={shape.columns} must be a multiple of 8 in [8, 256]")
    parts = 1 + epilogue.gated
    arguments = {
        "x": pointer(UNBOUNDED, ldx, element="bf16"),
        "w": pointer(UNBOUNDED, weight_stride(n_in, "bf16"), element="bf16"),
    }
    if epilogue.bias:
        arguments["bias"] = pointer(parts * n_out)
    arguments |= {"y": pointer(UNBOUNDED, ldy, element=y), "m": SCALAR}
    grid = (Extent("m", shape.columns), Extent(times=-(-n_out * parts // (shape.groups * _ROWS))))
    size = sum(tile.bytes for tile in _tiles(shape, n_in))
    return GpuKernelSpec.make(
        "gemm_wgmma", arguments, grid, shape.groups * _GROUP, size, k=n_in, n=n_out, groups=shape.groups,
        columns=shape.columns, stages=shape.stages, **epilogue.params,
    )  # fmt: skip


def _tiles(shape: Shape, k: int) -> tuple[Tile, Tile]:
    """Of the weight and of x."""
    return (
        Tile(shape.groups * _ROWS, k, _K_TILE, "bf16", shape.stages),
        Tile(shape.columns, k, _K_TILE, "bf16", shape.stages),
    )


def build(
    spec: GpuKernelSpec, chip: Chip, *, k: int, n: int, groups: int, columns: int, stages: int, **options: Any
) -> None:
    from nanoserve.compiler.builder import imin, index, splat
    from nanoserve.compiler.control import when
    from nanoserve.compiler.gpu import warpgroup
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.memory import SharedMemory
    from nanoserve.compiler.gpu.threads import block_id, only_where, thread_id

    if not chip.wgmma:
        raise ValueError(f"{spec.symbol}: {chip.name} has no wgmma")
    epilogue, shape = Epilogue(**options), Shape(groups, columns, stages)
    parts = 1 + epilogue.gated
    w_tile, x_tile = _tiles(shape, k)

    @device_kernel(spec)
    def _(*values: Any) -> None:
        given = dict(zip(dict(spec.arguments), values, strict=True))
        x, w, y, m = given["x"], given["w"], given["y"], given["m"]
        shared = SharedMemory(spec.shared_bytes)
        w_shared, x_shared = w_tile.allocate(shared, _ALIGNMENT), x_tile.allocate(shared, _ALIGNMENT)
        thread = thread_id()
        first_row = block_id("x") * columns
        first_column = block_id("y") * (groups * _ROWS // parts)

        copy_w = w_tile.copier(
            w,
            lambda row: weight_row(row, first_column, _GATES, n, epilogue.gated),
            w_shared,
            thread,
            spec.block,
        )
        copy_x = x_tile.copier(x, lambda row: imin(first_row + row, m - 1), x_shared, thread, spec.block)

        def copy(k0: Value, stage: Value) -> None:
            copy_w(k0, stage)
            copy_x(k0, stage)

        group_at = warpgroup.integer(thread // _GROUP) * (_ROWS * warpgroup.ROW_BYTES)
        w_address, x_address = warpgroup.address_of(w_shared) + group_at, warpgroup.address_of(x_shared)

        def multiply(stage: Value, sums: list[Value]) -> list[Value]:
            place = warpgroup.integer(stage)
            of_w = warpgroup.descriptor(w_address + place * (w_tile.bytes // stages))
            of_x = warpgroup.descriptor(x_address + place * (x_tile.bytes // stages))
            total = sums[0]
            warpgroup.begin()
            for step in range(_K_TILE // 16):
                total = warpgroup.multiply(
                    warpgroup.advanced(of_w, step), warpgroup.advanced(of_x, step), total, columns
                )
            warpgroup.finish()
            return [total]

        (sums,) = pipeline(
            k, _K_TILE, stages, copy, multiply, [warpgroup.no_sums(columns)], publish=warpgroup.publish
        )

        warp, lane = thread // WARP, thread % WARP
        tile_row = warp * 16 + lane // 4  # of the weight's tile; gated, of the first of two runs of outputs
        column_of = tile_row if parts == 1 else warp * 8 + lane // 4
        for at in range(0, columns // 2, 4):
            for side in range(2):
                row = first_row + lane % 4 * 2 + (at // 4 * 8 + side)
                low, high = (splat(warpgroup.sum_at(sums, at + half * 2 + side), 1) for half in range(2))

                @when(row < m)
                def _(row: Value = row, low: Value = low, high: Value = high) -> None:
                    pairs = [(low, high, 0)] if epilogue.gated else [(low, None, 0), (high, None, 8)]
                    for value, ups, ahead in pairs:
                        column = first_column + column_of + ahead

                        def put(
                            value: Value = value, ups: Value | None = ups, column: Value = column
                        ) -> None:
                            epilogue.store(value, ups, y, given.get("bias"), n, row, column)

                        only_where(None if n * parts % (groups * _ROWS) == 0 else column < index(n), put)
