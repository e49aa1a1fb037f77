"""What a step needs of its logits: the largest of each block, as kernels/logits.py, and the largest of all.

block_max  out[row, block] = the largest logit of the block, NaN where one of them is not finite; a version lets -inf
           pass. A warp takes a block.
argmax     out[row] = the first column with the row's largest logit, -1 where one of the logits is not finite. It reads
           the block maxima, and then one block of logits. A block of threads takes a row.

Numerics: comparisons only, so the results are the CPU's to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanoserve.compiler.gpu.chip import WARP, Chip
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.kernels.cuda.layout import check_stride
from nanoserve.kernels.logits import num_blocks
from nanoserve.native import LOGITS_BLOCK

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value

_THREADS = 128
_LOWEST = -3.4028234663852886e38  # float32's


def block_max_spec(vocab: int, ld: int, *, may_forbid: bool = False) -> GpuKernelSpec:
    """Args: logits[.][ld], out[.][num_blocks(vocab)], m rows. With `may_forbid`, -inf is no bad number."""
    _check(vocab, ld)
    blocks = num_blocks(vocab)
    arguments = {"logits": pointer(UNBOUNDED, ld), "out": pointer(UNBOUNDED, blocks), "m": SCALAR}
    grid = (Extent("m"), Extent(times=-(-blocks // (_THREADS // WARP))))
    return GpuKernelSpec.make(
        "logits", arguments, grid, _THREADS, what="block_max", v=vocab, may_forbid=may_forbid
    )


def argmax_spec(vocab: int, ld: int) -> GpuKernelSpec:
    """Args: logits[.][ld], block_max[.][num_blocks(vocab)], out[m] of i32, m rows."""
    _check(vocab, ld)
    arguments = {
        "logits": pointer(UNBOUNDED, ld), "block_max": pointer(UNBOUNDED, num_blocks(vocab)),
        "out": pointer(UNBOUNDED, element="i32"), "m": SCALAR,
    }  # fmt: skip
    return GpuKernelSpec.make(
        "logits",
        arguments,
        (Extent("m"),),
        _THREADS,
        4 * 4 * _THREADS // WARP,
        what="argmax",
        v=vocab,
        may_forbid=False,
    )


def _check(vocab: int, ld: int) -> None:
    if vocab < 1:
        raise ValueError(f"logits: vocab={vocab} must be positive")
    check_stride("logits", vocab, ld=ld)


def build(spec: GpuKernelSpec, chip: Chip, *, what: str, v: int, may_forbid: bool) -> None:
    if what == "argmax":
        _build_argmax(spec, v)
    else:
        _build_block_max(spec, v, may_forbid)


def _build_block_max(spec: GpuKernelSpec, vocab: int, may_forbid: bool) -> None:
    from nanoserve.compiler.builder import add, const, fma, fmax, imin, index
    from nanoserve.compiler.control import loop, when
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.threads import block_id, over_warp, thread_id

    @device_kernel(spec)
    def _(logits: Any, out: Any, m: Value) -> None:
        row, lane = block_id("x"), thread_id() % WARP
        number = block_id("y") * (_THREADS // WARP) + thread_id() // WARP

        @when(number < index(num_blocks(vocab)))
        def _() -> None:
            first = number * LOGITS_BLOCK

            @loop(0, LOGITS_BLOCK, WARP, carry=[const(float("-inf"), "f32"), const(0.0, "f32")])
            def found(at: Value, carried: list[Value]) -> list[Value]:
                x = logits[row, imin(first + at + lane, vocab - 1)]  # the last one again does no harm
                # 0 * x is 0, or NaN where x is not finite.
                zero = fma(fmax(_LOWEST, x) if may_forbid else x, 0.0, carried[1])
                return [fmax(x, carried[0]), zero]

            largest, zero = over_warp(found[0], fmax), over_warp(found[1], add)

            @when(lane < 1)
            def _() -> None:
                out[row, number] = largest + zero


def _build_argmax(spec: GpuKernelSpec, vocab: int) -> None:
    from nanoserve.compiler.builder import add, const, fma, fmax, i32, imin, index, select
    from nanoserve.compiler.control import loop, when
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.memory import SharedMemory
    from nanoserve.compiler.gpu.threads import block_id, over_block, thread_id

    warps, blocks = _THREADS // WARP, num_blocks(vocab)

    def smaller(a: Value, b: Value) -> Value:
        return select(a < b, a, b)

    @device_kernel(spec)
    def _(logits: Any, block_max: Any, out: Any, m: Value) -> None:
        row, thread = block_id(), thread_id()
        shared = SharedMemory(spec.shared_bytes)

        @loop(0, blocks, _THREADS, carry=[const(float("-inf"), "f32"), const(0.0, "f32")])
        def found(at: Value, carried: list[Value]) -> list[Value]:
            x = block_max[row, imin(at + thread, blocks - 1)]  # the last one again does no harm
            return [fmax(x, carried[0]), fma(x, 0.0, carried[1])]

        largest = over_block(found[0], fmax, warps, shared.array(warps, alignment=4))
        is_bad = over_block(found[1], add, warps, shared.array(warps, alignment=4))

        def first_equal(source: Any, start: Value, count: int, end: int) -> Value:
            """The first column in [start, start + count) of source[row], below `end`, that holds the largest."""

            @loop(0, count, _THREADS, carry=[const(2**31 - 1, "i32")])
            def place(at: Value, best: list[Value]) -> list[Value]:
                column = imin(start + at + thread, end - 1)
                x = source[row, column]
                is_it = (x >= largest) & (largest >= x)
                return [select(is_it, smaller(i32(column), best[0]), best[0])]

            return over_block(place[0], smaller, warps, shared.array(warps, element="i32", alignment=4))

        # Where a number is bad, the largest may be NaN, which nothing equals: any block will do.
        block = imin(index(first_equal(block_max, index(0), blocks, blocks)), blocks - 1)
        column = first_equal(logits, block * LOGITS_BLOCK, LOGITS_BLOCK, vocab)

        @when(thread < 1)
        def _() -> None:
            is_finite = (is_bad >= 0.0) & (is_bad < 1.0)
            out[row] = select(is_finite, column, const(-1, "i32"))
