"""Causal attention of ragged rows over paged keys and values: decode and prompt chunks are the same kernel.

    q, out  [.][ldq], [.][ldo]            query head h at column h * head_dim
    k       [page][kv_head][dim][slot]    keys transposed: a run of 16 tokens is one vector of scores
    v       [page][kv_head][slot][dim]
    table   the sequences' pages, each padded with its last page to (blocks + 1) * 64 tokens
    items   int32[8]: table_off, kv_head, q0, r0, num_rows, pos0, 0, 0

An item is up to `rows` rows that share one KV head, so its K and V are loaded once for all of them (GQA). Row r of an
item is flattened row r0 + r = token * G + g: batch row q0 + token, position pos0 + token, query head kv_head * G + g.

Numerics: the keys of a row go by in blocks of 64 from token 0, whatever chunk or batch the row is in; within a block,
scores are one fused chain over the dims, the maximum and the sum are kept per row (online softmax), and values are added
token by token. A masked token contributes an exact zero, and a block wholly masked multiplies by exactly 1. So a row's
bits depend on the tokens up to its own position only, not on `rows`, the item, the batch, or the chunking. Page memory
must be finite, because 0 * inf is not 0.

With a sliding window the walk begins at the block of the first token that the item's first row sees, and costs the window
instead of the context. A later row of the item may see nothing of that block; such a block changes nothing either: the
maximum stays _MASKED, the factor exp(0) is exactly 1, and the sums stay exactly 0.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from nanoserve.compiler.target import Target, host
from nanoserve.kernels.library import KernelSpec

BLOCK = 64  # tokens
_GROUPS = BLOCK // 16
_MASKED = -3.0e38  # below every score, and finite: the difference of two of them is 0, not NaN
_MAX_ROWS = 16  # one vector holds a number per row


def row_tiles(group: int, target: Target | None = None) -> tuple[int, int]:
    """(small, large): rows per item for one token's `group` heads, and for prompt chunks."""
    budget = (host() if target is None else target).budget
    large = max(1, min(8, budget - 2))
    return min(group, large), large


def attention_spec(
    heads: int, kv_heads: int, head_dim: int, page_size: int, ldq: int, ldo: int, rows: int, *,
    scale: float | None = None, window: int = 0, softcap: float = 0.0, dtype: str = "f32",
) -> KernelSpec:  # fmt: skip
    """Args: q[.][ldq], k, v of the layer, table, items, out[.][ldo], begin, end over items.

    `scale` multiplies the scores, 1 / sqrt(head_dim) by default; `rows` is the most rows an item has. With `window` > 0 a
    query sees that many keys, its own included. With `softcap` > 0 a scaled score s becomes softcap * tanh(s / softcap).
    """
    if min(heads, kv_heads, head_dim) < 1 or heads % kv_heads or min(ldq, ldo) < heads * head_dim:
        raise ValueError(
            f"attention: {heads} heads over {kv_heads} of {head_dim} do not fit in rows of {ldq} and {ldo}"
        )
    if page_size < 16 or page_size % 16:
        raise ValueError(
            f"attention: page_size={page_size} must be a multiple of 16, the width of a vector of scores"
        )
    if not 1 <= rows <= _MAX_ROWS:
        raise ValueError(f"attention: rows={rows} must be in [1, {_MAX_ROWS}]")
    if not 0 <= window < 2**31:
        raise ValueError(f"attention: window={window} must be in [0, 2^31), 0 for none")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"attention: softcap={softcap} must be finite and at least 0, 0 for none")
    if dtype != "f32":
        raise ValueError(f"attention: dtype {dtype!r} is not supported, only 'f32'")
    factor = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    return KernelSpec.make(
        "attention", h=heads, kv=kv_heads, d=head_dim, r=rows, page_size=page_size, ldq=ldq, ldo=ldo, scale=factor,
        window=window, softcap=float(softcap), dtype=dtype,
    )  # fmt: skip


def _passes(vectors: int, rows: int, budget: int) -> list[range]:
    """Split `vectors` evenly so that rows * n accumulators, n operands and a broadcast fit in the registers."""
    most = max(1, (budget - 1) // (rows + 1))
    count = -(-vectors // most)
    edges = [vectors * i // count for i in range(count + 1)]
    return [range(*edge) for edge in pairwise(edges)]


def build(
    symbol: str, target: Target, *, h: int, kv: int, d: int, page_size: int, ldq: int, ldo: int, r: int, scale: float,
    window: int, softcap: float, dtype: str,
) -> None:  # fmt: skip
    from nanoserve.compiler.builder import (
        Value,
        add,
        ceildiv,
        chunks,
        const,
        fma,
        fmax,
        htree,
        i32,
        imin,
        index,
        lane_numbers,
        select,
        splat,
        zeros,
    )
    from nanoserve.compiler.control import UNBOUNDED, array, helper, kernel, loop, scratch
    from nanoserve.compiler.vector_math import exp, soft_cap

    group = h // kv
    columns = chunks(d)
    queries, weights = array(r, d), array(r, BLOCK)
    k_type, v_type = array(UNBOUNDED, kv, d, page_size), array(UNBOUNDED, kv, page_size, d)
    table_type = array(UNBOUNDED, element="i32")

    def page_of(table: Any, table_off: Value, token: Value) -> tuple[Value, Value]:
        """Page id and offset of 16 tokens from `token`, a multiple of 16: they never straddle pages."""
        return index(table[table_off + token // page_size]), token % page_size

    @helper(
        f"{symbol}_scores", query=queries, k=k_type, table=table_type, score=weights, table_off="index", kv_head="index",
        first="index",
    )  # fmt: skip
    def scores(
        query: Any, k: Any, table: Any, score: Any, table_off: Value, kv_head: Value, first: Value
    ) -> None:
        """score[row] = query[row] . keys of the block that begins at token `first`."""

        def some(groups: range) -> None:
            pages = [page_of(table, table_off, first + 16 * j) for j in groups]

            @loop(0, d, carry=[zeros() for _ in range(r) for _ in groups])
            def dots(dim: Value, acc: list[Value]) -> list[Value]:
                keys = [k.load(page, kv_head, dim, offset) for page, offset in pages]
                new = []
                for row in range(r):
                    a = splat(query[row, dim])
                    new += [fma(a, key, acc[row * len(keys) + j]) for j, key in enumerate(keys)]
                return new

            for row in range(r):
                for j, at in enumerate(groups):
                    score.store(dots[row * len(groups) + j], row, 16 * at)

        for groups in _passes(_GROUPS, r, target.budget):
            some(groups)

    @helper(
        f"{symbol}_softmax", score=weights, position=array(r, element="i32"), top=array(16), scaled=array(16),
        total=array(r, 16), first="index", num_rows="index",
    )  # fmt: skip
    def softmax(
        score: Any, position: Any, top: Any, scaled: Any, total: Any, first: Value, num_rows: Value
    ) -> None:
        """score[row] = exp(score - maximum so far), 0 where masked; top, scaled and total follow."""
        lanes = lane_numbers()
        before = top.load(0)

        def visible(row: Value, j: int) -> Value:
            token, own = lanes + i32(first + 16 * j), position[row]
            seen = token <= splat(own)
            return seen & (token > splat(own - window)) if window else seen

        def capped(row: Value, j: int) -> Value:
            value: Value = score.load(row, 16 * j)
            if softcap:
                value = soft_cap(value, softcap)
                score.store(value, row, 16 * j)
            return value

        @loop(0, num_rows)
        def _(row: Value) -> None:
            seen = [select(visible(row, j), capped(row, j), _MASKED) for j in range(_GROUPS)]
            top[row] = fmax(htree(fmax(fmax(seen[0], seen[1]), fmax(seen[2], seen[3])), fmax), top[row])

        scaled.store(exp(before - top.load(0), at_most_zero=True), 0)

        @loop(0, num_rows)
        def _(row: Value) -> None:
            highest, parts = splat(top[row]), []
            for j in range(_GROUPS):
                weight = exp(score.load(row, 16 * j) - highest, at_most_zero=True)
                parts.append(select(visible(row, j), weight, 0.0))
                score.store(parts[j], row, 16 * j)
            block_total = (parts[0] + parts[1]) + (parts[2] + parts[3])
            total.store(fma(total.load(row, 0), scaled[row], block_total), row, 0)

    @helper(
        f"{symbol}_values", score=weights, scaled=array(16), v=v_type, table=table_type, result=queries, table_off="index",
        kv_head="index", first="index", groups="index",
    )  # fmt: skip
    def values(
        score: Any, scaled: Any, v: Any, table: Any, result: Any, table_off: Value, kv_head: Value, first: Value,
        groups: Value,
    ) -> None:  # fmt: skip
        """result[row] = result[row] * scaled[row] + the block's first `groups` * 16 values, each times its weight."""

        def some(part: list[tuple[int, int]]) -> None:
            acc = [result.load(row, at, width=width) * scaled[row] for row in range(r) for at, width in part]

            @loop(0, groups, carry=acc)
            def sums(j: Value, acc: list[Value]) -> Any:
                page, offset = page_of(table, table_off, first + j * 16)

                @loop(0, 16, carry=acc)
                def inner(t: Value, acc: list[Value]) -> list[Value]:
                    loaded = [v.load(page, kv_head, offset + t, at, width=width) for at, width in part]
                    new = []
                    for row in range(r):
                        a = score[row, j * 16 + t]
                        new += [fma(value, a, acc[row * len(part) + c]) for c, value in enumerate(loaded)]
                    return new

                return inner

            for row in range(r):
                for c, (at, _) in enumerate(part):
                    result.store(sums[row * len(part) + c], row, at)

        for numbers in _passes(len(columns), r, target.budget):
            some([columns[number] for number in numbers])

    @kernel(
        symbol, q=array(UNBOUNDED, ldq), k=k_type, v=v_type, table=table_type, items=array(UNBOUNDED, 8, element="i32"),
        out=array(UNBOUNDED, ldo), begin="index", end="index",
    )  # fmt: skip
    def _(q: Any, k: Any, v: Any, table: Any, items: Any, out: Any, begin: Value, end: Value) -> None:
        query, score, result = scratch(r, d), scratch(r, BLOCK), scratch(r, d)
        position = scratch(r, element="i32")
        # Per row: the maximum so far, exp(the one before - this), and the sum in 16 lanes.
        top, scaled, total = scratch(16), scratch(16), scratch(r, 16)

        @loop(begin, end)
        def _(item: Value) -> None:
            table_off, kv_head, q0, r0, num_rows, pos0 = (index(items[item, field]) for field in range(6))

            def place(row: Value) -> tuple[Value, Value, Value]:
                """(batch row, position, first column) of a row of the item; rows it lacks repeat the last it has."""
                flat = r0 + imin(row, num_rows - 1)
                token = flat // group
                return q0 + token, pos0 + token, (kv_head * group + flat % group) * d

            @loop(0, r)
            def _(row: Value) -> None:
                batch_row, pos, column = place(row)
                position[row] = i32(pos)
                for at, width in columns:
                    query.store(q.load(batch_row, column + at, width=width) * scale, row, at)
                    result.store(zeros(width), row, at)
                total.store(zeros(), row, 0)

            top.store(const(_MASKED, "vector<16xf32>"), 0)
            visible = place(num_rows - 1)[1] + 1  # tokens the last row sees
            start: Value | int = 0
            if window:
                earliest = place(index(0))[1]
                start = (earliest - imin(earliest, window - 1)) // BLOCK * BLOCK

            @loop(start, visible, BLOCK)
            def _(first: Value) -> None:
                scores(query, k, table, score, table_off, kv_head, first)
                softmax(score, position, top, scaled, total, first, num_rows)
                values(
                    score, scaled, v, table, result, table_off, kv_head, first,
                    imin(ceildiv(visible - first, 16), _GROUPS),
                )  # fmt: skip

            @loop(0, num_rows)
            def _(row: Value) -> None:
                batch_row, _, column = place(row)
                inverse = 1.0 / htree(total.load(row, 0), add)
                for at, width in columns:
                    # Adding 0 makes a zero positive: its sign could tell which masked tokens were multiplied with 0.
                    value = fma(result.load(row, at, width=width), inverse, 0.0)
                    out.store(value, batch_row, column + at)
