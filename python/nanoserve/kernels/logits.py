"""What a step leaves beside its logits, and what a draw needs of all of them: numbers for blocks of `LOGITS_BLOCK` logits.

block_max   out[row, block] = the largest logit of the block, NaN where one of them is not finite: the largest logit, the
            candidates of a filter and the check for bad numbers all begin with it. A second version lets -inf pass.
block_sums  out[i, block] = sum of exp((logit - largest[i]) * inverse[i]) over the block of row rows[i], as double;
            inverse is 1 / temperature, largest the row's largest logit.

Numerics: a sum runs in four accumulators of 16 float32 lanes, which are added as (0 + 1) + (2 + 3), widened to double and
halved lane-wise; what is left of a short last block is added chunk by chunk (16, 8, 4, 2, 1). Exponents are float32, so a
weight w has a relative error of some 1e-7 * (1 - ln w). A block whose largest weight is below exp(-80) gets 0: all that is lost that way weighs less than 2^-53 of the total many times
over, and a block of forbidden tokens (-inf) weighs nothing at all.

Work units are ranges of BLOCKS_PER_UNIT blocks of a row. block_max: unit t is range t // m of row t % m, so that a thread
reads columns it has just written. block_sums: unit t is range t % P of entry t // P, P ranges in a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanoserve.compiler.target import Target
from nanoserve.kernels.library import KernelSpec
from nanoserve.native import LOGITS_BLOCK

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value

BLOCKS_PER_UNIT = 16
_LOWEST = -3.4028234663852886e38  # float32's; a NaN stays one
_NOTHING = -80.0  # a block whose largest exponent is below


def num_blocks(vocab: int) -> int:
    """Blocks in a row, the last one maybe a short one."""
    return -(-vocab // LOGITS_BLOCK)


def num_ranges(vocab: int) -> int:
    """Work units in a row."""
    return -(-num_blocks(vocab) // BLOCKS_PER_UNIT)


def block_max_spec(vocab: int, ld: int, *, may_forbid: bool = False) -> KernelSpec:
    """Args: logits[.][ld], out[.][num_blocks], m, begin, end over num_ranges * m units.

    With `may_forbid`, -inf is the logit of a forbidden token, and not a bad number.
    """
    return _spec("max_or_forbidden" if may_forbid else "max", vocab, ld)


def block_sums_spec(vocab: int, ld: int) -> KernelSpec:
    """Args: logits[.][ld], block_max[.][num_blocks], rows[n], largest[n], inverse[n], out[n][num_blocks] of double, begin, end
    over n * num_ranges units.
    """
    return _spec("sums", vocab, ld)


def _spec(what: str, vocab: int, ld: int) -> KernelSpec:
    if vocab < 1 or ld < vocab:
        raise ValueError(f"logits: vocab={vocab} in rows of {ld} do not fit")
    return KernelSpec.make("logits", what=what, v=vocab, ld=ld, block=LOGITS_BLOCK)


def build(symbol: str, target: Target, *, what: str, v: int, ld: int, block: int) -> None:
    if what == "sums":
        _build_sums(symbol, v, ld, block)
    else:
        _build_max(symbol, v, ld, block, may_forbid=what == "max_or_forbidden")


def _for_each_block(part: Value, vocab: int, block: int, body: Any) -> None:
    """body(block's number, its first column, its width) for the blocks of a range; the width is a Python int."""
    from nanoserve.compiler.builder import imin, index
    from nanoserve.compiler.control import loop, when

    whole, rest = divmod(vocab, block)
    first = part * BLOCKS_PER_UNIT
    if whole:

        @loop(first, imin(first + BLOCKS_PER_UNIT, whole))
        def _(number: Value) -> None:
            body(number, number * block, block)

    if rest:
        in_range: Value = (first <= whole) & (index(whole) < first + BLOCKS_PER_UNIT)

        @when(in_range)
        def _() -> None:
            body(index(whole), index(whole * block), rest)


def _build_max(symbol: str, vocab: int, ld: int, block: int, *, may_forbid: bool) -> None:
    from nanoserve.compiler.builder import add, chunks, const, fma, fmax, htree, vector_of, zeros
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop

    @kernel(
        symbol, logits=array(UNBOUNDED, ld), out=array(UNBOUNDED, num_blocks(vocab)), m="index", begin="index",
        end="index",
    )  # fmt: skip
    def _(logits: Any, out: Any, m: Value, begin: Value, end: Value) -> None:
        @loop(begin, end)
        def _(unit: Value) -> None:
            row = unit % m

            def one(number: Value, start: Value, width: int) -> None:
                def product(values: Value, total: Value) -> Value:
                    return fma(fmax(_LOWEST, values) if may_forbid else values, 0.0, total)

                best = [const(float("-inf"), vector_of(16))] * 4
                bad = [zeros()] * 4  # 0 * x is 0, or NaN where x is not finite
                whole = width // 64 * 64
                for at in range(0, whole, 16):
                    values, j = logits.load(row, start + at), at // 16 % 4
                    best[j], bad[j] = fmax(values, best[j]), product(values, bad[j])
                largest = htree(fmax(fmax(best[0], best[1]), fmax(best[2], best[3])), fmax)
                check = htree((bad[0] + bad[1]) + (bad[2] + bad[3]), add)
                for at, size in chunks(width - whole):
                    values = logits.load(row, start + (whole + at), width=size)
                    largest = fmax(htree(values, fmax), largest)
                    check = check + htree(product(values, zeros(size)), add)
                out[row, number] = largest + check

            _for_each_block(unit // m, vocab, block, one)


def _build_sums(symbol: str, vocab: int, ld: int, block: int) -> None:
    from nanoserve.compiler.builder import add, chunks, const, double, htree, index, zeros
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop, when
    from nanoserve.compiler.vector_math import exp

    blocks, ranges = num_blocks(vocab), num_ranges(vocab)

    @kernel(
        symbol, logits=array(UNBOUNDED, ld), block_max=array(UNBOUNDED, blocks), rows=array(UNBOUNDED, element="i32"),
        largest=array(UNBOUNDED), inverse=array(UNBOUNDED), out=array(UNBOUNDED, blocks, element="f64"), begin="index",
        end="index",
    )  # fmt: skip
    def _(
        logits: Any, block_max: Any, rows: Any, largest: Any, inverse: Any, out: Any, begin: Value, end: Value
    ) -> None:
        @loop(begin, end)
        def _(unit: Value) -> None:
            entry = unit // ranges
            row, top, scale = index(rows[entry]), largest[entry], inverse[entry]

            def one(number: Value, start: Value, width: int) -> None:
                out[entry, number] = const(0.0, "f64")

                @when((block_max[row, number] - top) * scale > _NOTHING)
                def _() -> None:
                    def weights(at: int, size: int = 16) -> Value:
                        return exp(
                            (logits.load(row, start + at, width=size) - top) * scale, at_most_zero=True
                        )

                    sums = [zeros()] * 4
                    whole = width // 64 * 64
                    for at in range(0, whole, 16):
                        sums[at // 16 % 4] = sums[at // 16 % 4] + weights(at)
                    total = htree(double((sums[0] + sums[1]) + (sums[2] + sums[3])), add)
                    for at, size in chunks(width - whole):
                        total = total + htree(double(weights(whole + at, size)), add)
                    out[entry, number] = total

            _for_each_block(unit % ranges, vocab, block, one)
