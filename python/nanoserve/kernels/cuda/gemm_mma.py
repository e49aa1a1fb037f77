"""y[m, n] = epilogue(sum_k x[m, k] * w[n, k]) of bfloat16, sums in float32, on tensor cores (mma.sync, sm_80).

One instruction shape, m16n8k16, k ascending in steps of 16 into one accumulator per output, for any number of rows: a
tensor core's sum depends on the shape of its instruction, so that few rows have to take the same one, with the tile's
other rows unused. What hides the latency of reading a weight is how many of its tiles are on their way.

A block has WM x WN warps, a warp 16 * I rows and 8 * J columns. One kernel serves few rows and many, by its shape.

An output is one chain of such instructions, each of which waits for the one before: a weight of few outputs has no other work
meanwhile. So k may be cut, at places that follow from k alone; the sums of the parts are added up in their order. With
few rows, as many groups of warps take a part each; with many, all take one part after the other. The bits are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from nanoserve.compiler.gpu.chip import WARP, Chip
from nanoserve.compiler.gpu.spec import UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm_arguments import check_product, product_arguments
from nanoserve.kernels.cuda.gemm_tile import TILE_K, Tile, pipeline, prefetch_weight, total, weight_row
from nanoserve.kernels.cuda.layout import ELEMENT_BYTES, weight_stride

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value
    from nanoserve.compiler.gpu.memory import Array

_K_TILE = TILE_K["bf16"]
_M, _N, _K = 16, 8, 16  # of the instruction
_KNOWN_BEFORE = 8  # instructions' outputs of a warp: 32 registers of a thread


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a block: wm x wn warps with i x j instructions' outputs each, tiles of `stages` places. j is 1 or even.

    groups: of so many warps, which take a part of k each.
    """

    wm: int
    wn: int
    i: int
    j: int
    stages: int
    groups: int = 1

    @property
    def threads(self) -> int:
        """Of a group."""
        return self.wm * self.wn * WARP

    @property
    def rows(self) -> int:
        return self.wm * self.i * _M

    @property
    def columns(self) -> int:
        """Rows of the weight's tile."""
        return self.wn * self.j * _N


def gemm_mma_spec(
    n_in: int,
    n_out: int,
    ldx: int,
    ldy: int,
    shape: Shape,
    epilogue: Epilogue,
    *,
    y: str = "f32",
    cuts: int = 1,
) -> GpuKernelSpec:
    """Args: x[.][ldx] of bf16, w[n_out][weight_stride] of bf16, (bias[n_out]), y[.][ldy] of type y, m rows.

    cuts: parts of k, part of every output's bits.
    """
    check_product("gemm_mma", n_in, n_out, ldx, ldy, y, cuts)
    if (shape.j != 1 and shape.j % 2) or (epilogue.gated and shape.j % 2):
        raise ValueError(f"gemm_mma: j={shape.j} must be even, or 1 where not gated")
    if shape.groups not in (1, cuts):
        raise ValueError(f"gemm_mma: groups={shape.groups} must be 1, or cuts={cuts}")
    outputs = (1 + epilogue.gated) * n_out
    x, w = (pointer(UNBOUNDED, stride, element="bf16") for stride in (ldx, weight_stride(n_in, "bf16")))
    arguments = product_arguments(x, w, outputs, ldy, epilogue, y)
    grid = (Extent("m", shape.rows), Extent(times=-(-outputs // shape.columns)))
    size = sum(tile.bytes for tile in _tiles(shape, n_in)) + _sums_bytes(shape)
    return GpuKernelSpec.make(
        "gemm_mma", arguments, grid, shape.groups * shape.threads, size, k=n_in, n=n_out, wm=shape.wm, wn=shape.wn,
        i=shape.i, j=shape.j, stages=shape.stages, groups=shape.groups, cuts=cuts, **epilogue.params,
    )  # fmt: skip


def _tiles(shape: Shape, k: int) -> tuple[Tile, Tile]:
    """Of x and of the weight."""
    return (
        Tile(shape.rows, k, _K_TILE, "bf16", shape.groups * shape.stages),
        Tile(shape.columns, k, _K_TILE, "bf16", shape.groups * shape.stages),
    )


def _sums_bytes(shape: Shape) -> int:
    """What all groups but the first leave for it."""
    return (shape.groups - 1) * shape.i * shape.j * 4 * shape.threads * ELEMENT_BYTES["f32"]


def build(
    spec: GpuKernelSpec,
    chip: Chip,
    *,
    k: int,
    n: int,
    wm: int,
    wn: int,
    i: int,
    j: int,
    stages: int,
    groups: int,
    cuts: int,
    **options: Any,
) -> None:
    from nanoserve.compiler.builder import imin, index, shuffle, widen
    from nanoserve.compiler.control import when
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.memory import SharedMemory
    from nanoserve.compiler.gpu.tensor_core import (
        halves,
        load_matrices,
        mma_bf16,
        no_sums,
        row_pair,
        row_pairs,
    )
    from nanoserve.compiler.gpu.threads import barrier, barrier_of, block_id, thread_id

    epilogue, shape = Epilogue(**options), Shape(wm, wn, i, j, stages, groups)
    parts = 1 + epilogue.gated
    x_tile, w_tile = _tiles(shape, k)

    def first_output() -> Value:
        return block_id("y") * (shape.columns // parts)

    def weight_source(row: Value) -> Value:
        return weight_row(row, first_output(), _N, n, epilogue.gated)

    @device_kernel(
        spec, chip, early=lambda _, w, *__: prefetch_weight(w_tile, w, weight_source, thread_id(), groups)
    )
    def _(*values: Any) -> None:
        given = dict(zip(dict(spec.arguments), values, strict=True))
        x, w, y, m = given["x"], given["w"], given["y"], given["m"]
        shared = SharedMemory(spec.shared_bytes)
        x_shared, w_shared = x_tile.allocate(shared), w_tile.allocate(shared)
        thread, part = thread_id(), None
        if groups > 1:
            part, thread = thread // shape.threads, thread % shape.threads
        warp, lane = thread // WARP, thread % WARP
        warp_row, warp_column = warp // wn * (i * _M), warp % wn * (j * _N)  # in the tiles
        first_row = block_id("x") * shape.rows
        first_column = first_output()

        copy_x = x_tile.copier(x, lambda row: imin(first_row + row, m - 1), x_shared, thread, shape.threads)
        copy_w = w_tile.copier(w, weight_source, w_shared, thread, shape.threads)

        def place(stage: Value) -> Value:
            return stage if part is None else part * stages + stage

        def copy(k0: Value, stage: Value) -> None:
            copy_x(k0, place(stage))
            copy_w(k0, place(stage))

        def load(memory: Array, tile: Tile, stage: Value, row: Value, line: Value, count: int) -> Value:
            return load_matrices(memory, (stage, row, tile.place(row, line) * tile.line), count)

        def multiply(stage: Value, sums: list[Value]) -> list[Value]:
            sums, stage = [*sums], place(stage)
            for step in range(_K_TILE // _K):
                # Lane l names row l % 8 of matrix l / 8. Of x: rows 0-7 and 8-15, then the next 8 k; of w: the k first.
                of_x = [
                    load(x_shared, x_tile, stage, warp_row + (lane % 16 + at * _M), lane // 16 + 2 * step, 4)
                    for at in range(i)
                ]
                of_w = []
                for at in range(0, j, 2):
                    row, line = lane % 8 + warp_column + at * _N, lane // 8 % 2 + 2 * step
                    if j == 1:
                        of_w.append(load(w_shared, w_tile, stage, row, line, 2))
                    else:
                        of_w += halves(load(w_shared, w_tile, stage, row + lane // 16 * _N, line, 4))
                for a in range(i):
                    for b in range(j):
                        sums[a * j + b] = mma_bf16(of_x[a], of_w[b], sums[a * j + b])
            return sums

        # Lane l has columns 2 * (l % 4) and the next, of rows l / 4 and l / 4 + 8.
        in_pairs = n % 2 == 0

        def row_of(a: int, half: int) -> Value:
            return first_row + warp_row + (lane // 4 + (a * _M + half * 8))

        def column_of(b: int) -> Value:
            return first_column + warp_column // parts + (b // parts * _N) + lane % 4 * 2

        # What few sums are added to is asked for before the products, so that nobody waits for it behind them.
        before: dict[tuple[int, int, int], Value] = {}
        if epilogue.residual and in_pairs and i * j <= _KNOWN_BEFORE:
            for a, half, b in product(range(i), range(2), range(j)):
                at = imin(row_of(a, half), m - 1), imin(column_of(b), n - 2)
                before[a, half, b] = widen(y.load(*at, width=2))

        zeros = [no_sums() for _ in range(i * j)]
        sums = pipeline(
            k, _K_TILE, stages, copy, multiply, zeros, cuts=cuts, part=part,
            wait_for_all=None if part is None else lambda: barrier_of(part, shape.threads),
        )  # fmt: skip
        if part is not None:
            left = shared.array(groups - 1, i * j, 2, shape.threads, 2)

            @when(part > 0)
            def _() -> None:
                for at, value in enumerate(sums):
                    for half in range(2):
                        left.store(row_pair(value, half), part - 1, at, half, thread, 0)

            barrier()
            sums = total(zeros, sums)
            for group in range(groups - 1):
                more = [
                    row_pairs(*(left.load(group, at, half, thread, 0, width=2) for half in range(2)))
                    for at in range(i * j)
                ]
                sums = total(sums, more)

        def finished(pair: list[Value], row: Value, column: Value, before: Value | None = None) -> Value:
            ups = pair[1] if epilogue.gated else None
            return epilogue.finished(pair[0], ups, y, given.get("bias"), n, row, column, before)

        def write(pair: list[Value], row: Value, column: Value, before: Value | None) -> None:
            if in_pairs:
                y.store(finished(pair, row, column, before), row, column)
                return
            for at in range(2):
                one = [shuffle(v, v, [at]) for v in pair]

                @when(column + at < index(n))
                def _(at: int = at, one: list[Value] = one) -> None:
                    y.store(finished(one, row, column + at), row, column + at)

        for a, half in product(range(i), range(2)):
            row = row_of(a, half)
            here = row < m if part is None else (row < m) & (part < 1)

            @when(here)
            def _(a: int = a, half: int = half, row: Value = row) -> None:
                found = [
                    (
                        [row_pair(sums[a * j + b + at], half) for at in range(parts)],
                        column_of(b),
                        before.get((a, half, b)),
                    )
                    for b in range(0, j, parts)
                ]
                if n * parts % shape.columns == 0:  # all are inside
                    made = [finished(pair, row, column, known) for pair, column, known in found]
                    for value, (_, column, _) in zip(made, found, strict=True):
                        y.store(value, row, column)
                    return
                for pair, column, known in found:

                    def put(
                        pair: list[Value] = pair, column: Value = column, known: Value | None = known
                    ) -> None:
                        write(pair, row, column, known)

                    when(column < index(n))(put)
