"""tokens[row] = the token that a row's sampling parameters and its uniform number choose; a block takes a row.

The meaning is sampler.py's: temperature, top_k, top_p, min_p, then the first token, in vocabulary order, at which the running
weight exceeds uniform * total. The sampler on the CPU computes in float64. Here a weight is float32, rounded down to a multiple
of 2^-44 of the largest one, and sums are of integers: they have no order, so a row's token is the same bits in any batch.
A token below exp(-31) of the largest weighs nothing. Tokens may differ from the CPU's only where a draw, or a cut, is within 1e-6
of a border.

Every way to choose ends in the same draw, among the logits from a bar on: greedy puts the bar at the largest logit, and the
uniform number at 0; top_k and top_p raise it (block_search.py); where top_p keeps some of equal logits only, a last column
says which. A block of 256 logits whose largest is below the bar is not read: greedy reads few logits, top_k some, and
temperature alone all of them once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanoserve.compiler.gpu.chip import MAX_THREADS, WARP, Chip
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.kernels.cuda import block_search
from nanoserve.kernels.cuda.layout import check_stride
from nanoserve.kernels.logits import num_blocks
from nanoserve.native import LOGITS_BLOCK

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Operand, Value

MAX_COLS = MAX_THREADS * LOGITS_BLOCK  # a thread has one block's sum
_UNIT = 2.0**44  # the largest weight; MAX_COLS of them stay below 2^62
_NOTHING = 31.0  # exp(-31) is less than 1 / _UNIT
_ONE = 2.0**32  # of the fractions in fixed point


def choose_spec(cols: int, ldl: int) -> GpuKernelSpec:
    """Args: logits[.][ldl], block_max[.][num_blocks(cols)] as the kernel of that name leaves it (-inf may have passed), draws[m][4]
    = (1 / temperature or 0 for greedy, at most float32's largest; top_p, 1 is off; min_p, 0 is off; unused), draw_ints[m][4] of i32 =
    (top_k, 0 is off; floor(uniform * 2^32) as bits; unused; unused), tokens[m] of i32, m rows. A token is -1 where the row has a
    bad number.
    """
    if not 1 <= cols <= MAX_COLS:
        raise ValueError(f"choose: cols={cols} must be in [1, {MAX_COLS}]")
    check_stride("choose", cols, ldl=ldl)
    blocks = num_blocks(cols)
    arguments = {
        "logits": pointer(UNBOUNDED, ldl), "block_max": pointer(UNBOUNDED, blocks), "draws": pointer(UNBOUNDED, 4),
        "draw_ints": pointer(UNBOUNDED, 4, element="i32"), "tokens": pointer(UNBOUNDED, element="i32"), "m": SCALAR,
    }  # fmt: skip
    threads = LOGITS_BLOCK  # at least a thread for each logit of a block, and for each block
    while threads < MAX_THREADS and threads * 64 < cols:
        threads *= 2
    warps = threads // WARP
    shared = 12 * blocks + block_search.shared_bytes(warps) + 8 * warps
    return GpuKernelSpec.make("choose", arguments, (Extent("m"),), threads, shared, c=cols)


def build(spec: GpuKernelSpec, chip: Chip, *, c: int) -> None:
    from nanoserve.compiler.builder import add, const, fmax, i32, i64, imin, index, lane, select, to_i64
    from nanoserve.compiler.control import loop, when
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.memory import SharedMemory
    from nanoserve.compiler.gpu.threads import barrier, block_id, over_block, over_warp, thread_id
    from nanoserve.compiler.vector_math import exp

    blocks, warps = num_blocks(c), spec.block // WARP
    infinity = float("inf")

    @device_kernel(spec, chip)
    def _(logits: Any, block_max: Any, draws: Any, draw_ints: Any, tokens: Any, m: Value) -> None:
        row, thread = block_id(), thread_id()
        warp, place = thread // WARP, thread % WARP
        shared = SharedMemory(spec.shared_bytes)
        block_sums = shared.array(blocks, element="i64", alignment=8)
        first_beyond = block_search.FirstBeyond(warps, shared)
        search = block_search.BarSearch(warps, shared)
        maxima = shared.array(blocks, alignment=4)
        zero, one, lowest = const(0, "i64"), const(1, "i64"), const(-infinity, "f32")

        own_max = select(thread < blocks, block_max[row, imin(thread, blocks - 1)], lowest)

        @when(thread < blocks)
        def _() -> None:
            maxima[thread] = own_max

        is_bad = select(own_max >= -infinity, const(0, "i32"), 1)  # a NaN is not
        num_bad = over_block(is_bad, add, warps, shared.array(warps, element="i32", alignment=4))
        # Not -0, whose successor is 0, which equals it.
        top = over_block(own_max, fmax, warps, shared.array(warps, alignment=4)) + 0.0
        inverse, top_p, min_p = (draws[row, i] for i in range(3))
        top_k, uniform = draw_ints[row, 0], i64(draw_ints[row, 1], unsigned=True)
        is_drawn = inverse > 0.0

        def weight(x: Value) -> Value:
            """As a fraction of the largest; float32."""
            return exp((x - top) * inverse, at_most_zero=True)

        def fixed(fraction: Value) -> Value:
            return to_i64(fraction * _UNIT)

        def of_block(block: Value) -> list[list[tuple[Value, Value]]]:
            """This lane's (logit, column) of a block, in runs that are read together; -inf behind the row's end."""
            runs = []
            for start in range(0, LOGITS_BLOCK, 4 * WARP):
                at = block * LOGITS_BLOCK + (start + place * 4)
                run = logits.load(row, imin(at, (c - 1) // 4 * 4), width=4)
                columns = [at + i for i in range(4)]
                inside = [columns[i if c % 4 else 0] < c for i in range(4)]
                runs.append([(select(inside[i], lane(run, i), lowest), columns[i]) for i in range(4)])
            return runs

        def amounts(weigh: Callable[[Value], Value], x: Value, cuts: list[Value], end: Value) -> list[Value]:
            amount = select(x < end, weigh(x), zero)
            return [select(x >= cut, amount, zero) for cut in cuts]

        def scan_row(weigh: Callable[[Value], Value]) -> block_search.Scan:
            def scan(cuts: list[Value], end: Value) -> list[Value]:
                @loop(warp, blocks, warps, carry=[zero] * len(cuts))
                def total(block: Value, before: list[Value]) -> list[Value]:
                    @when(maxima[block] >= cuts[0], otherwise=before)
                    def after() -> list[Value]:
                        sums = before
                        for run in of_block(block):
                            for x, _ in run:

                                @when((x >= cuts[0]) & (x < end), otherwise=sums)
                                def more(x: Value = x, sums: list[Value] = sums) -> list[Value]:
                                    return [
                                        a + b for a, b in zip(sums, amounts(weigh, x, cuts, end), strict=True)
                                    ]

                                sums = list(more)
                        return sums

                    return list(after)

                return list(total)

            return scan

        def draw(
            can_matter: Callable[[Value], Value], weigh: Callable[[Value, Value], Value],
            target_of: Callable[[Value], Value],
        ) -> Value:  # fmt: skip
            """The first column at which the running sum of weigh(logit, column) exceeds target_of(total)."""

            @loop(warp, blocks, warps)
            def _(block: Value) -> None:
                @when(can_matter(maxima[block]), otherwise=[zero])
                def total() -> list[Value]:
                    own = zero
                    for run in of_block(block):
                        for x, column in run:
                            own = own + weigh(x, column)
                    return [over_warp(own, add)]

                @when(place < 1)
                def _() -> None:
                    block_sums[block] = total[0]

            barrier()
            own = select(thread < blocks, block_sums[imin(thread, blocks - 1)], zero)
            block, rest = first_beyond(own, target_of)
            column = block * LOGITS_BLOCK + thread
            x = logits[row, imin(column, c - 1)]
            # It is one of this block, so columns behind it may have weights.
            inner, _ = first_beyond(select(column < c, weigh(x, column), zero), lambda total: rest)
            return block * LOGITS_BLOCK + inner

        def kept_by_top_k(bar: Value) -> Value:
            def amount(x: Value) -> Value:
                return one

            def wanted(total: Value) -> Value:
                return i64(top_k)

            # The k-th largest of the blocks' maxima is reached by k logits, where there are so many.
            of_maxima = search(lambda cuts, end: amounts(amount, own_max, cuts, end), bar, top, wanted)
            return search(scan_row(amount), of_maxima.value, top, wanted).value

        def kept_by_top_p(bar: Value) -> list[Value]:
            """The bar, and the last column of those that equal it."""
            share = to_i64(top_p * _ONE)
            share = select(share < 1, one, share)
            found = search(scan_row(lambda x: fixed(weight(x))), bar, top, lambda total: _times(total, share))
            each = fixed(weight(found.value))
            keep = (found.target - found.above + (each - 1)) // each

            @when(keep * each < found.equal, otherwise=[index(c)])
            def last() -> list[Value]:
                def equals(x: Value, _: Operand) -> Value:
                    return select((x >= found.value) & (x <= found.value), one, zero)

                return [draw(lambda largest: largest >= found.value, equals, lambda total: keep - 1)]

            return [found.value, last[0]]

        @when((num_bad < 1) & (top > -infinity) & (top < infinity), otherwise=[const(-1, "i32")])
        def token() -> list[Value]:
            bar = select(is_drawn, top - const(_NOTHING, "f32") / inverse, top)

            @when(is_drawn & (top_k > 0) & (top_k < c), otherwise=[bar])
            def k_bar() -> list[Value]:
                return [kept_by_top_k(bar)]

            @when(is_drawn & (top_p < 1.0), otherwise=[k_bar[0], index(c)])
            def p_bar() -> list[Value]:
                return kept_by_top_p(k_bar[0])

            final, last = p_bar

            def weigh(x: Value, column: Value) -> Value:
                fraction = weight(x)
                is_kept: Value = (x >= final) & ((x > final) | (column <= last)) & (fraction >= min_p)
                return select(is_kept, fixed(fraction), zero)

            def can_matter(largest: Value) -> Value:
                matters: Value = (largest >= final) & (weight(largest) >= min_p)
                return matters

            def target_of(total: Value) -> Value:
                return select(is_drawn, _times(total, uniform), zero)

            return [i32(draw(can_matter, weigh, target_of))]

        @when(thread < 1)
        def _() -> None:
            tokens[row] = token[0]


def _times(total: Value, fraction: Value) -> Value:
    """total * fraction / 2^32 rounded down; the fraction is below 2^32, the total below 2^62."""
    return (total >> 32) * fraction + (((total & 0xFFFFFFFF) * fraction) >> 32)
