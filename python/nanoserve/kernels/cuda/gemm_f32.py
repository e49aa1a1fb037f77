"""y[m, n] = epilogue(sum_k x[m, k] * w[n, k]) in float32, one fused multiply-add per k and output.

x is float32; a bfloat16 or float16 weight is widened, exactly, on its way into the registers. One accumulator per
output, k ascending from zero: the sums are those of kernels/gemm.py to the bit, and no part of them depends on m, on
the tile's shape or on where in a tile a row lies.

A block has TY x TX threads; thread (ty, tx) has rows ty + TY * i and columns tx + TX * j of its tile, i < R, j < C.
One kernel serves few rows and many: a tile of few rows and columns has many blocks, with many tiles of the weight on
their way each, which is what reading a weight at the speed of memory takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm_arguments import check_product, product_arguments
from nanoserve.kernels.cuda.gemm_tile import TILE_K, Tile, pipeline, prefetch_weight, weight_row
from nanoserve.kernels.cuda.layout import ELEMENT_BYTES, weight_stride

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value

_K_TILE = TILE_K["f32"]
_UNROLLED_UP_TO = 16  # outputs of a thread


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a block: ty x tx threads with r x c outputs each, tiles of `stages` places."""

    ty: int
    tx: int
    r: int
    c: int
    stages: int

    @property
    def rows(self) -> int:
        return self.ty * self.r

    @property
    def columns(self) -> int:
        """Rows of the weight's tile."""
        return self.tx * self.c


def gemm_f32_spec(
    n_in: int,
    n_out: int,
    ldx: int,
    ldy: int,
    shape: Shape,
    epilogue: Epilogue,
    *,
    dtype: str = "f32",
    y: str = "f32",
) -> GpuKernelSpec:
    """Args: x[.][ldx], w[n_out][weight_stride] of dtype, (bias[n_out]), y[.][ldy] of type y, m rows."""
    check_product("gemm_f32", n_in, n_out, ldx, ldy, y)
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"gemm_f32: dtype {dtype!r} must be one of {', '.join(ELEMENT_BYTES)}")
    if epilogue.gated and shape.c % 2:
        raise ValueError(f"gemm_f32: c={shape.c} must be even where gated")
    outputs = (1 + epilogue.gated) * n_out
    w = pointer(UNBOUNDED, weight_stride(n_in, dtype), element=dtype)
    arguments = product_arguments(pointer(UNBOUNDED, ldx), w, outputs, ldy, epilogue, y)
    grid = (Extent("m", shape.rows), Extent(times=-(-outputs // shape.columns)))
    size = sum(tile.bytes for tile in _tiles(shape, n_in, dtype))
    return GpuKernelSpec.make(
        "gemm_f32", arguments, grid, shape.ty * shape.tx, size, k=n_in, n=n_out, dtype=dtype, ty=shape.ty, tx=shape.tx,
        r=shape.r, c=shape.c, stages=shape.stages, **epilogue.params,
    )  # fmt: skip


def _tiles(shape: Shape, k: int, dtype: str) -> tuple[Tile, Tile]:
    """Of x and of the weight."""
    return (
        Tile(shape.rows, k, _K_TILE, "f32", shape.stages),
        Tile(shape.columns, k, _K_TILE, dtype, shape.stages),
    )


def build(
    spec: GpuKernelSpec, chip: Chip, *, k: int, n: int, dtype: str, ty: int, tx: int, r: int, c: int, stages: int,
    **options: Any,
) -> None:  # fmt: skip
    from nanoserve.compiler.builder import const, fma, imin, index, lane, splat, widen
    from nanoserve.compiler.control import loop, when
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.memory import SharedMemory
    from nanoserve.compiler.gpu.threads import block_id, thread_id

    epilogue, shape = Epilogue(**options), Shape(ty, tx, r, c, stages)
    parts = 1 + epilogue.gated
    x_tile, w_tile = _tiles(shape, k, dtype)

    def first_output() -> Value:
        return block_id("y") * (shape.columns // parts)

    def weight_source(row: Value) -> Value:
        return weight_row(row, first_output(), tx, n, epilogue.gated)

    @device_kernel(spec, chip, early=lambda _, w, *__: prefetch_weight(w_tile, w, weight_source, thread_id()))
    def _(*values: Any) -> None:
        given = dict(zip(dict(spec.arguments), values, strict=True))
        x, w, y, m = given["x"], given["w"], given["y"], given["m"]
        shared = SharedMemory(spec.shared_bytes)
        x_shared, w_shared = x_tile.allocate(shared), w_tile.allocate(shared)
        thread = thread_id()
        row_of, column_of = thread // tx, thread % tx  # the first of this thread's
        first_row = block_id("x") * shape.rows
        first_column = first_output()

        copy_x = x_tile.copier(x, lambda row: imin(first_row + row, m - 1), x_shared, thread, spec.block)
        copy_w = w_tile.copier(w, weight_source, w_shared, thread, spec.block)

        def copy(k0: Value, stage: Value) -> None:
            copy_x(k0, stage)
            copy_w(k0, stage)

        def multiply_line(stage: Value, line: Value, sums: list[Value]) -> list[Value]:
            """Sums with the k of one line of the weight's tile."""
            sums = [*sums]
            x_lines = w_tile.line // x_tile.line
            of_x = [
                [
                    x_tile.read(x_shared, stage, row_of + ty * i, line * x_lines + part)
                    for part in range(x_lines)
                ]
                for i in range(r)
            ]
            for j in range(c):
                of_w = widen(w_tile.read(w_shared, stage, column_of + tx * j, line))
                for at in range(w_tile.line):
                    b = lane(of_w, at)
                    for i in range(r):
                        a = lane(of_x[i][at // x_tile.line], at % x_tile.line)
                        sums[i * c + j] = fma(a, b, sums[i * c + j])
            return sums

        def multiply(stage: Value, sums: list[Value]) -> list[Value]:
            # Unrolled, the next lines' loads would come early and take the registers of a large shape.
            unroll = 1 if r * c > _UNROLLED_UP_TO else w_tile.lines

            def lines_from(line: Value, sums: list[Value]) -> list[Value]:
                for i in range(unroll):
                    sums = multiply_line(stage, line + i, sums)
                return sums

            done: list[Value] = loop(0, w_tile.lines, unroll, carry=sums)(lines_from)
            return done

        sums = pipeline(k, _K_TILE, stages, copy, multiply, [const(0.0, "f32")] * (r * c))

        for i in range(r):
            row = first_row + row_of + ty * i

            @when(row < m)
            def _(i: int = i, row: Value = row) -> None:
                def finished(j: int, column: Value) -> Value:
                    out = [splat(sums[i * c + j + part], 1) for part in range(parts)]
                    ups = out[1] if epilogue.gated else None
                    return epilogue.finished(out[0], ups, y, given.get("bias"), n, row, column)

                columns = {j: first_column + column_of + tx * (j // parts) for j in range(0, c, parts)}
                if n * parts % shape.columns == 0:  # all are inside
                    made = [finished(j, column) for j, column in columns.items()]
                    for value, column in zip(made, columns.values(), strict=True):
                        y.store(value, row, column)
                    return
                for j, column in columns.items():

                    def store(j: int = j, column: Value = column) -> None:
                        y.store(finished(j, column), row, column)

                    when(column < index(n))(store)
