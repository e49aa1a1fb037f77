"""Causal attention of ragged rows over paged keys and values: decode and prompt chunks are the same kernel.

    q, out  [.][ldq], [.][ldo]            query head h at column h * head_dim; out is float32 or bfloat16
    k       [page][kv_head][0][dim][slot]    keys transposed: a run of 16 tokens is one vector of scores
    v       [page][kv_head][0][slot][dim]    the values of a head lie behind its keys: k and v point into one array, and
                                             that of the constant index is as long as both
    table   the sequences' pages, each padded with its last page to (blocks + 1) * 64 tokens
    items   int32[16], see `Item`
    parts   where an item leaves the results of its segments when others walk the rest of them

bfloat16 keys and values lie in pairs, which one instruction multiplies and adds (vdpbf16ps): k [dim / 2][slot][2 dims],
v [slot / 2][dim][2 slots].

An item is a few rows of one KV head, whose K and V are then loaded once for all of them (GQA), or one token's rows of
several KV heads, so that a page is read from end to end. Row r of a head is flattened row r0 + r = token * G + g:
batch row q0 + token, position pos0 + token, query head kv_head * G + g. Rows go by in register tiles of `rows`;
blocks of 64 keys are the outer loop, so up to `tiles` tiles use the keys while they are in L1.

Numerics: the keys of a row go by in blocks of 64 and segments of 256 from token 0, whatever chunk or batch the row is
in. Within a block, scores are one fused chain over the dims (or pairs of them). Within a segment, the maximum, the
sum and the weighted values are kept per row (online softmax), values added token by token (or pair by pair). A
segment's three results are merged into those of the segments before it, in ascending order:

    m' = max(m, m_s)    a = exp(m - m')    b = exp(m_s - m')    l' = l * a + l_s * b    acc' = acc * a + acc_s * b

by the item that walked them all, or by a later one from `parts`: the same operations on the same numbers. A masked
token contributes an exact zero, a block or a segment wholly masked multiplies by exactly 1, and so does the first
merge. So a row's bits depend on the tokens up to its own position only, not on tiles, items, splits, the batch, or
the chunking. Page memory must be finite, because 0 * inf is not 0. Where vdpbf16ps is used, scaled queries and
weights are rounded to bfloat16 too (the weights' sum is not); elsewhere bfloat16 is widened, exactly.

With a sliding window the walk begins at the block of the first token that the item's first row sees, and costs the
window instead of the context. A later row of the item may see nothing of that block; such a block changes nothing
either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from nanoserve.compiler.target import Target, host
from nanoserve.kernels.library import KernelSpec

BLOCK = 64  # tokens
# Tokens whose results are merged as one: 256 of one head are 128 KiB and more to read, some microseconds, well above
# what an item costs by itself; and 2048 tokens of 8 heads still make 64 items.
SEGMENT = 256
KV_BYTES = {"f32": 4, "bf16": 2}  # per element, by dtype
OUT = ("f32", "bf16")
Item = (
    "table_off", "kv_head", "num_heads", "q0", "r0", "num_rows", "pos0", "first_segment", "end_segment",
    "part", "part_stride", "num_parts",
)  # fmt: skip
_MAX_ROWS = 16  # of a tile
_BLOCK_BYTES = (
    256 * 1024
)  # of keys and values of the heads of an item: with what is asked for ahead, half of a core's L2


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel cuts an item: `tiles` register tiles of `rows`, each of another KV head (`across` "heads"), or of one.

    An item "across" heads has exactly `rows` rows per head; one of "rows" has at most rows * tiles.
    """

    rows: int
    tiles: int = 1
    across: str = "rows"


def tilings(
    group: int, kv_heads: int, head_dim: int, dtype: str = "f32", target: Target | None = None
) -> tuple[Tiling, Tiling]:
    """(small, large): for one token of each of some heads, and for prompt chunks."""
    budget = (host() if target is None else target).budget
    large = max(1, min(8, budget - 2))
    small = min(group, large)
    block = 2 * BLOCK * head_dim * KV_BYTES[dtype]
    heads = max(1, min(kv_heads, _BLOCK_BYTES // block, 4 * large // small))
    heads = -(-kv_heads // -(-kv_heads // heads))  # as many items, of one size
    return Tiling(small, heads, "heads"), Tiling(large, max(1, min(4, 512 // head_dim)))


def attention_spec(
    heads: int, kv_heads: int, head_dim: int, page_size: int, ldq: int, ldo: int, tiling: Tiling, *,
    scale: float | None = None, window: int = 0, softcap: float = 0.0, dtype: str = "f32", out: str = "f32",
) -> KernelSpec:  # fmt: skip
    """Args: q[.][ldq], k, v of the layer, table, items, parts, out[.][ldo], begin, end over items.

    `scale` multiplies the scores, 1 / sqrt(head_dim) by default. With `window` > 0 a query sees that many keys, its own
    included. With `softcap` > 0 a scaled score s becomes softcap * tanh(s / softcap). `dtype` is that of K and V.
    """
    if min(heads, kv_heads, head_dim) < 1 or heads % kv_heads or min(ldq, ldo) < heads * head_dim:
        raise ValueError(
            f"attention: {heads} heads over {kv_heads} of {head_dim} do not fit in rows of {ldq} and {ldo}"
        )
    if page_size < 16 or page_size % 16:
        raise ValueError(
            f"attention: page_size={page_size} must be a multiple of 16, the width of a vector of scores"
        )
    if not 1 <= tiling.rows <= _MAX_ROWS:
        raise ValueError(f"attention: rows={tiling.rows} must be in [1, {_MAX_ROWS}]")
    if not 1 <= tiling.tiles <= 64 or tiling.across not in ("rows", "heads"):
        raise ValueError(f"attention: {tiling} must have 1 to 64 tiles across rows or heads")
    if not 0 <= window < 2**31:
        raise ValueError(f"attention: window={window} must be in [0, 2^31), 0 for none")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"attention: softcap={softcap} must be finite and at least 0, 0 for none")
    if dtype not in KV_BYTES:
        raise ValueError(f"attention: dtype {dtype!r} must be one of {', '.join(KV_BYTES)}")
    if dtype == "bf16" and head_dim % 2:
        raise ValueError(f"attention: head_dim={head_dim} must be even for bf16, whose dims lie in pairs")
    if out not in OUT:
        raise ValueError(f"attention: out {out!r} must be one of {', '.join(OUT)}")
    factor = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    return KernelSpec.make(
        "attention", h=heads, kv=kv_heads, d=head_dim, r=tiling.rows, t=tiling.tiles, across=tiling.across,
        page_size=page_size, ldq=ldq, ldo=ldo, scale=factor, window=window, softcap=float(softcap), dtype=dtype,
        out=out,
    )  # fmt: skip


def part_floats(head_dim: int, tiling: Tiling, rows: int) -> int:
    """The size of one segment's results of `rows` rows (whole tiles) in `parts`, as the kernel lays them out."""
    return 2 * _round_up(tiling.rows * tiling.tiles, 16) + _round_up(rows * head_dim, 16)


def _passes(vectors: int, rows: int, budget: int) -> list[range]:
    """Split `vectors` evenly so that rows * n accumulators, n operands and a broadcast fit in the registers."""
    most = max(1, (budget - 1) // (rows + 1))
    count = -(-vectors // most)
    edges = [vectors * i // count for i in range(count + 1)]
    return [range(*edge) for edge in pairwise(edges)]


def build(
    symbol: str, target: Target, *, h: int, kv: int, d: int, page_size: int, ldq: int, ldo: int, r: int, t: int,
    across: str, scale: float, window: int, softcap: float, dtype: str, out: str,
) -> None:  # fmt: skip
    from nanoserve.compiler.builder import (
        Value,
        add,
        ceildiv,
        const,
        fma,
        htree,
        i32,
        imax,
        imin,
        index,
        narrow,
        paired_lanes,
        select,
        zeros,
    )
    from nanoserve.compiler.control import UNBOUNDED, array, either, kernel, loop, scratch, when
    from nanoserve.kernels.attention_block import (
        GROUPS,
        MASKED,
        BlockShape,
        merge_helper,
        score_helper,
        softmax_helper,
        value_helper,
    )

    group, by_head = h // kv, across == "heads"
    s = BlockShape(symbol, target, r, t, by_head, d, kv, page_size, window, softcap, dtype)
    columns, dotted, most_rows = s.columns, s.dotted, s.most_rows
    vectors_of_rows, numbers_of_rows = s.vectors_of_rows, s.numbers_of_rows
    score_passes, value_passes = (_passes(n, r, target.budget) for n in (GROUPS, len(columns)))
    # The first tile of a head asks for what comes next; where others follow, it is on its way already.
    asking = (True,) if by_head else (True, False)
    score_parts = [(groups, [score_helper(s, groups, asks) for asks in asking]) for groups in score_passes]
    softmax_masked, softmax_whole = softmax_helper(s, True), softmax_helper(s, False)
    value_parts = [
        [value_helper(s, [columns[number] for number in numbers], asks) for asks in asking]
        for numbers in value_passes
    ]

    merge = merge_helper(s)

    @kernel(
        symbol, overlap=("k", "v"), q=array(UNBOUNDED, ldq), k=s.k_type, v=s.v_type, table=s.table_type,
        items=array(UNBOUNDED, 16, element="i32"), parts=array(UNBOUNDED), out=array(UNBOUNDED, ldo, element=out),
        begin="index", end="index",
    )  # fmt: skip
    def _(
        q: Any, k: Any, v: Any, table: Any, items: Any, parts: Any, out_rows: Any, begin: Value, end: Value
    ) -> None:
        query = scratch(most_rows, d // 2, element="i32") if dotted else scratch(most_rows, d)
        score, result, all_result = scratch(most_rows, BLOCK), scratch(most_rows, d), scratch(most_rows, d)
        weights = scratch(most_rows, BLOCK // 2, element="i32") if dotted else score
        position = scratch(most_rows, element="i32")
        # Per row: a segment's maximum so far, exp(the one before - this), the sum in 16 lanes; then those of the merge.
        top, scaled, total, sums = (
            scratch(numbers_of_rows), scratch(numbers_of_rows), scratch(most_rows, 16), scratch(numbers_of_rows),
        )  # fmt: skip
        all_top, all_sum, own = (scratch(numbers_of_rows) for _ in range(3))

        @loop(begin, end)
        def _(item: Value) -> None:
            field = {name: items[item, at] for at, name in enumerate(Item)}
            table_off, kv_head, num_heads, q0, r0, num_rows, pos0, part_stride, num_parts = (
                index(field[name])
                for name in (
                    "table_off", "kv_head", "num_heads", "q0", "r0", "num_rows", "pos0", "part_stride", "num_parts"
                )
            )  # fmt: skip
            is_part = field["part"] > -1
            part0 = index(field["part"]) * 16
            num_tiles = num_heads if by_head else ceildiv(num_rows, r)
            used = num_tiles * r if by_head else num_rows

            def flat_row(row: Value) -> Value:
                """Rows the item lacks repeat the last it has."""
                return r0 + (row % r if by_head else imin(row, num_rows - 1))

            def place(row: Value) -> tuple[Value, Value]:
                """Batch row and first column of a row of the item."""
                flat = flat_row(row)
                head = kv_head + row // r if by_head else kv_head
                return q0 + flat // group, (head * group + flat % group) * d

            def position_of(row: Value) -> Value:
                return pos0 + flat_row(row) // group

            @loop(0, num_tiles * r)
            def _(row: Value) -> None:
                batch_row, column = place(row)
                position[row] = i32(position_of(row))
                for at, width in columns:
                    value = q.load(batch_row, column + at, width=width) * scale
                    if dotted:
                        query.store(paired_lanes(narrow(value, "bf16")), row, at // 2)
                    else:
                        query.store(value, row, at)
                    all_result.store(zeros(width), row, at)

            for at in range(0, vectors_of_rows, 16):
                all_top.store(const(MASKED, "vector<16xf32>"), at)
                all_sum.store(zeros(), at)
            earliest, visible = (
                position_of(index(0)),
                position_of(used - 1) + 1,
            )  # `visible`: what the last row sees
            start: Value | int = 0
            if window:
                start = (earliest - imin(earliest, window - 1)) // BLOCK * BLOCK

            def head_of(tile: Value) -> Value:
                return kv_head + tile if by_head else kv_head

            def sees_of(tile: Value) -> Value:
                """How many tokens the last row of a tile sees."""
                return visible if by_head else position_of(imin(tile * r + (r - 1), used - 1)) + 1

            def block(first: Value) -> None:
                def scores(tile: Value, groups: range, helper: Any) -> None:
                    @when(sees_of(tile) > first + 16 * groups.start)
                    def _() -> None:
                        helper(query, k, v, table, score, table_off, head_of(tile), first, tile * r)

                def softmax(row0: Value, num_rows: Value) -> None:
                    is_masked = first + (BLOCK - 1) > earliest
                    if window:
                        is_masked = is_masked | (visible > first + window)
                    state = (score, weights, position, top, scaled, total, first, row0, num_rows)
                    either(is_masked, lambda: softmax_masked(*state), lambda: softmax_whole(*state))

                def values(tile: Value, helper: Any) -> None:
                    sees, next_head, next_first = sees_of(tile), kv_head, first + BLOCK
                    if by_head:
                        is_last = tile + 1 >= num_tiles
                        next_head = select(is_last, kv_head, kv_head + tile + 1)
                        next_first = select(is_last, first + BLOCK, first)

                    @when(sees > first)
                    def _() -> None:
                        groups = imin(ceildiv(sees - first, 16), GROUPS)
                        helper(
                            weights, scaled, k, v, table, result, table_off, head_of(tile), first, groups, tile * r,
                            next_head, next_first,
                        )  # fmt: skip

                if by_head:
                    # All of a head at once: its values are behind its keys, and the next head's keys behind these.
                    @loop(0, num_tiles)
                    def _(tile: Value) -> None:
                        for groups, helpers in score_parts:
                            scores(tile, groups, helpers[0])
                        softmax(tile * r, index(r))
                        for helpers in value_parts:
                            values(tile, helpers[0])

                    return
                for groups, (asking, plain) in score_parts:
                    scores(index(0), groups, asking)
                    loop(1, num_tiles)(lambda tile, groups=groups, plain=plain: scores(tile, groups, plain))
                softmax(index(0), used)
                for asking, plain in value_parts:
                    values(index(0), asking)
                    loop(1, num_tiles)(lambda tile, plain=plain: values(tile, plain))

            @loop(index(field["first_segment"]), index(field["end_segment"]))
            def _(segment: Value) -> None:
                for at in range(0, vectors_of_rows, 16):
                    top.store(const(MASKED, "vector<16xf32>"), at)

                @loop(0, num_tiles * r)
                def _(row: Value) -> None:
                    total.store(zeros(), row, 0)
                    for at, width in columns:
                        result.store(zeros(width), row, at)

                low = segment * SEGMENT
                loop(imax(low, start), imin(low + SEGMENT, visible), BLOCK)(block)

                @loop(0, used)
                def _(row: Value) -> None:
                    sums[row] = htree(total.load(row, 0), add)

                @when(field["part"] < 0)
                def _() -> None:
                    merge(top, sums, result, all_top, all_sum, all_result, scaled, own, used)

                @when(is_part)
                def _() -> None:
                    to = part0 + (segment - index(field["first_segment"])) * part_stride * 16
                    for at in range(0, vectors_of_rows, 16):
                        parts.store(top.load(at), to + at)
                        parts.store(sums.load(at), to + (vectors_of_rows + at))

                    @loop(0, used)
                    def _(row: Value) -> None:
                        for at, width in columns:
                            parts.store(
                                result.load(row, at, width=width), to + (2 * vectors_of_rows + at) + row * d
                            )

            @loop(0, num_parts)
            def _(number: Value) -> None:
                from_ = part0 + number * part_stride * 16
                for at in range(0, vectors_of_rows, 16):
                    top.store(parts.load(from_ + at), at)
                    sums.store(parts.load(from_ + (vectors_of_rows + at)), at)

                @loop(0, used)
                def _(row: Value) -> None:
                    for at, width in columns:
                        result.store(
                            parts.load(from_ + (2 * vectors_of_rows + at) + row * d, width=width), row, at
                        )

                merge(top, sums, result, all_top, all_sum, all_result, scaled, own, used)

            @when((field["part"] < 0) | (num_parts > 0))
            def _() -> None:
                @loop(0, used)
                def _(row: Value) -> None:
                    batch_row, column = place(row)
                    inverse = 1.0 / all_sum[row]
                    for at, width in columns:
                        # Adding 0 makes a zero positive: its sign could tell which masked tokens were multiplied.
                        value = fma(all_result.load(row, at, width=width), inverse, 0.0)
                        out_rows.store(narrow(value, out), batch_row, column + at)


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to
