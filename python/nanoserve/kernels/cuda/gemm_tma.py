"""y[m, n] = epilogue(sum_k x[m, k] * w[n, k]) of bfloat16, sums in float32, for many rows on Hopper (sm_90a): products by
wgmma, tiles by the chip's copy engine (TMA), warps with a task each.

The chains along k are gemm_mma's, cut where it cuts them. That an instruction of 16 k has the same bits in both is what
was found on such chips (Xie et al., MMA-Sim, arXiv 2511.10909: both sum 16 exact products and the sum before, aligned to
the largest and cut off 25 bits below it); nobody documents it, so whoever puts both in one plan checks it on the device
(cuda/same_bits.py).

A block has one warp that copies, of which one thread asks for whole tiles, and `groups` warpgroups that multiply. They
meet at two mbarriers for each of the ring's `stages` places: `full`, when the tiles of a turn have come, and `empty`,
when every warp is done with them. Nobody else waits for anybody, so that one warpgroup multiplies while the other
waits, and the copies run ahead as far as there is room.

The tensor maps say the rest: the swizzle that wgmma reads, and zeros beyond k, beyond n, and beyond the rows that x has
memory for. Rows between m and those are whatever lies there: their sums are not stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanoserve.compiler.gpu.chip import WARP, Chip
from nanoserve.compiler.gpu.spec import Extent, GpuKernelSpec, TensorForm
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm_arguments import check_product, product_arguments
from nanoserve.kernels.cuda.gemm_tile import cut
from nanoserve.kernels.cuda.layout import weight_stride
from nanoserve.kernels.cuda.wgmma_tile import ALIGNMENT, GATES, GROUP, K_TILE, Shape, multiplier, store_sums

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Operand, Value

_SWIZZLE = 128  # bytes, a row of a tile
_BARRIER_BYTES = 8
# Rows of a gated weight's tile that are one box: gates, then the others of the same outputs.
_RUNS = 2 * GATES


def gemm_tma_spec(
    n_in: int, n_out: int, ldx: int, ldy: int, shape: Shape, epilogue: Epilogue, *, y: str = "f32", cuts: int = 1
) -> GpuKernelSpec:  # fmt: skip
    """Args, and `cuts`, as gemm_mma's, x and w by tensor maps."""
    check_product("gemm_tma", n_in, n_out, ldx, ldy, y, cuts)
    if shape.rows > 256:
        raise ValueError(f"gemm_tma: groups={shape.groups} must be at most 4, a box has 256 rows")
    if shape.columns % 8 or not 8 <= shape.columns <= 256:
        raise ValueError(f"gemm_tma: columns={shape.columns} must be a multiple of 8 in [8, 256]")
    outputs = (1 + epilogue.gated) * n_out
    stride = weight_stride(n_in, "bf16")
    w = TensorForm("bf16", (n_in,), (stride,), (K_TILE, shape.rows), _SWIZZLE)
    if epilogue.gated:  # [gates or others][output][k]
        w = TensorForm("bf16", (n_in, n_out), (stride, n_out * stride), (K_TILE, GATES, 2), _SWIZZLE)
    x = TensorForm("bf16", (n_in,), (ldx,), (K_TILE, shape.columns), _SWIZZLE)
    arguments = product_arguments(x, w, outputs, ldy, epilogue, y)
    grid = (Extent("m", shape.columns), Extent(times=-(-outputs // shape.rows)))
    size = sum(tile.bytes for tile in shape.tiles(n_in)) + 2 * shape.stages * _BARRIER_BYTES
    return GpuKernelSpec.make(
        "gemm_tma", arguments, grid, shape.groups * GROUP + WARP, size, k=n_in, n=n_out, groups=shape.groups,
        columns=shape.columns, stages=shape.stages, cuts=cuts, **epilogue.params,
    )  # fmt: skip


def build(
    spec: GpuKernelSpec, chip: Chip, *, k: int, n: int, groups: int, columns: int, stages: int, cuts: int, **options: Any
) -> None:  # fmt: skip
    from nanoserve.compiler.builder import const, index, select
    from nanoserve.compiler.control import either, loop, when
    from nanoserve.compiler.gpu import warpgroup
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.memory import SharedMemory
    from nanoserve.compiler.gpu.tensor_copy import Mbarriers, publish_barriers
    from nanoserve.compiler.gpu.threads import barrier, block_id, thread_id

    if not chip.wgmma:
        raise ValueError(f"{spec.symbol}: {chip.name} has no wgmma")
    epilogue, shape = Epilogue(**options), Shape(groups, columns, stages)
    w_tile, x_tile = shape.tiles(k)
    turns, stage_bytes = -(-k // K_TILE), (w_tile.bytes + x_tile.bytes) // stages
    copier = groups * GROUP  # the first thread of the last warp

    @device_kernel(spec, chip)
    def _(*values: Any) -> None:
        given = dict(zip(dict(spec.arguments), values, strict=True))
        x, w, y, m = given["x"], given["w"], given["y"], given["m"]
        shared = SharedMemory(spec.shared_bytes)
        w_shared, x_shared = w_tile.allocate(shared, ALIGNMENT), x_tile.allocate(shared, ALIGNMENT)
        full, empty = Mbarriers(shared, stages), Mbarriers(shared, stages)
        thread = thread_id()
        first_row = block_id("x") * columns
        first_column = block_id("y") * (shape.rows // (1 + epilogue.gated))

        @when(thread < 1)
        def _() -> None:
            full.make(1)
            empty.make(groups * GROUP // WARP)
            publish_barriers()

        barrier()

        def turns_of(
            first: Operand, last: Operand, place: list[Value], carry: list[Value], body: Callable[..., list[Value]]
        ) -> list[Value]:  # fmt: skip
            """body(turn, stage, parity, *carry): of the ring's places in turn; the parity changes each time around."""

            @loop(first, last, carry=[*place, *carry])
            def result(turn: Value, carried: list[Value]) -> list[Value]:
                stage, parity, *rest = carried
                rest = body(turn, stage, parity, *rest)
                has_next = stage < index(stages - 1)
                return [select(has_next, stage + 1, index(0)), select(has_next, parity, parity ^ 1), *rest]

            return list(result)

        begin = [index(0), const(0, "i32")]

        def copy_turn(turn: Value, stage: Value, parity: Value) -> list[Value]:
            empty.wait(stage, parity ^ 1)  # the round before
            full.arrive_expecting(stage, stage_bytes)
            place, k0 = warpgroup.integer(stage), turn * K_TILE
            w_to = warpgroup.address_of(w_shared) + place * (w_tile.bytes // stages)
            if epilogue.gated:
                for run in range(shape.rows // _RUNS):
                    at = (k0, first_column + run * GATES, 0)
                    w.copy(at, w_to + run * _RUNS * warpgroup.ROW_BYTES, full, stage)
            else:
                w.copy((k0, first_column), w_to, full, stage)
            x_to = warpgroup.address_of(x_shared) + place * (x_tile.bytes // stages)
            x.copy((k0, first_row), x_to, full, stage)
            return []

        def copy() -> None:
            @when(thread < copier + 1)
            def _() -> None:
                turns_of(0, turns, begin, [], copy_turn)

        def multiply() -> None:
            products = multiplier(shape, w_shared, x_shared, thread)

            def multiply_turn(turn: Value, stage: Value, parity: Value, sums: Value) -> list[Value]:
                full.wait(stage, parity)
                sums = products(stage, sums)

                @when(thread % WARP < 1)
                def _() -> None:
                    empty.arrive(stage)

                return [sums]

            zeros = warpgroup.no_sums(columns)

            def multiply_part(number: Value, carried: list[Value]) -> list[Value]:
                *place, totals = carried
                bounds = cut(number, k, K_TILE, cuts), cut(number + 1, k, K_TILE, cuts)
                *place, sums = turns_of(*bounds, place, [zeros], multiply_turn)
                return [*place, warpgroup.added(totals, sums, columns)]

            if cuts > 1:
                sums = loop(0, cuts, carry=[*begin, zeros])(multiply_part)[-1]
            else:
                sums = turns_of(0, turns, begin, [zeros], multiply_turn)[-1]
            store_sums(sums, shape, epilogue, y, given.get("bias"), n, m, first_row, first_column, thread)

        either(thread < copier, multiply, copy)
