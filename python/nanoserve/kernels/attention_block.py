"""The inner loops of attention, each a function of its own: scores, softmax and values of a block of keys, and the
merge.

What they compute, in which order, and what the arrays mean is attention.py's; here is how. Imports MLIR.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nanoserve.compiler.builder import (
    Value,
    bitcast,
    chunks,
    fma,
    fmax,
    htree,
    i32,
    index,
    lane_numbers,
    paired_lanes,
    select,
    splat,
    truncate,
    zeros,
)
from nanoserve.compiler.control import UNBOUNDED, array, helper, loop
from nanoserve.compiler.target import Target
from nanoserve.compiler.vector_math import bf16_pairs, dot_bf16, exp, soft_cap
from nanoserve.kernels.attention import BLOCK

GROUPS = BLOCK // 16
MASKED = -3.0e38  # below every score, and finite: the difference of two of them is 0, not NaN


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Sizes and array types that the helpers of one kernel share.

    Args:
        rows, tiles: of an item; by_head: whether tiles are KV heads.
        dim, kv_heads, page_size, dtype: of keys and values.
    """

    symbol: str
    target: Target
    rows: int
    tiles: int
    by_head: bool
    dim: int
    kv_heads: int
    page_size: int
    window: int
    softcap: float
    dtype: str

    @property
    def paired(self) -> bool:
        return self.dtype == "bf16"

    @property
    def dotted(self) -> bool:
        """Queries and weights are pairs as well, 32 bits each."""
        return self.paired and self.target.bf16_dot

    @property
    def step(self) -> int:
        """Dims of a key, tokens of a value that one 32-bit lane holds."""
        return 2 if self.paired else 1

    @property
    def lines(self) -> int:
        """Of 64 bytes: keys, or values, of 16 tokens of a head."""
        return self.dim // self.step

    @property
    def columns(self) -> list[tuple[int, int]]:
        return chunks(self.dim)

    @property
    def most_rows(self) -> int:
        return self.rows * self.tiles

    @property
    def vectors_of_rows(self) -> int:
        """A number per row, up to whole vectors."""
        return -(-self.most_rows // 16) * 16

    @property
    def numbers_of_rows(self) -> int:
        """The same with room for a vector that begins at any row: one head's few rows are handled as one."""
        return self.vectors_of_rows + (16 if self.by_head else 0)

    @property
    def queries(self) -> str:
        return array(self.most_rows, self.dim // 2, element="i32") if self.dotted else self.results

    @property
    def scores_type(self) -> str:
        return array(self.most_rows, BLOCK)

    @property
    def weights_type(self) -> str:
        return array(self.most_rows, BLOCK // 2, element="i32") if self.dotted else self.scores_type

    @property
    def results(self) -> str:
        return array(self.most_rows, self.dim)

    @property
    def per_row(self) -> str:
        return array(self.numbers_of_rows)

    @property
    def lanes_of_row(self) -> str:
        return array(self.most_rows, 16)

    @property
    def k_type(self) -> str:
        return array(UNBOUNDED, self.kv_heads, 2, self.lines, self.page_size, element=self._element)

    @property
    def v_type(self) -> str:
        return array(
            UNBOUNDED, self.kv_heads, 2, self.page_size // self.step, self.dim, element=self._element
        )

    @property
    def table_type(self) -> str:
        return array(UNBOUNDED, element="i32")

    @property
    def _element(self) -> str:
        return "i32" if self.paired else "f32"


def page_of(s: BlockShape, table: Any, table_off: Value, token: Value) -> tuple[Value, Value]:
    """Page id and offset of 16 tokens from `token`, a multiple of 16: they never straddle pages."""
    return index(table[table_off + token // s.page_size]), token % s.page_size


def products(s: BlockShape, acc: Value, a: list[Value], b: Value) -> Value:
    """acc + a * b, where b is one vector of keys or values and a what multiplies each half of its lanes."""
    if not s.paired:
        return fma(b, a[0], acc)
    if s.dotted:
        # The instruction is for whole registers; what is left of a row of values is multiplied one by one.
        target = s.target if b.width == 16 else replace(s.target, bf16_dot=False)
        return dot_bf16(acc, bf16_pairs(splat(a[0], b.width), target), bf16_pairs(b, target), target)
    acc = fma(bitcast(b << 16, "f32"), a[0], acc)
    return fma(bitcast(b & -65536, "f32"), a[1], acc)


def multipliers(s: BlockShape, buffer: Any, row: Value, at: Value) -> list[Value]:
    """What `products` needs of a row of queries or weights; `at` counts steps."""
    if s.dotted or not s.paired:
        return [buffer[row, at]]
    return [buffer[row, at * 2], buffer[row, at * 2 + 1]]


def score_helper(s: BlockShape, groups: range, asks: bool) -> Any:
    @helper(
        f"{s.symbol}_scores{groups.start}{'_ask' if asks else ''}", query=s.queries, k=s.k_type, v=s.v_type,
        table=s.table_type, score=s.scores_type, table_off="index", kv_head="index", first="index", row0="index",
    )  # fmt: skip
    def scores(
        query: Any, k: Any, v: Any, table: Any, score: Any, table_off: Value, kv_head: Value, first: Value,
        row0: Value,
    ) -> None:  # fmt: skip
        """score[row] = query[row] . keys of some groups of 16 of the block from token `first`; asks for its values."""
        pages = [page_of(s, table, table_off, first + 16 * j) for j in groups]
        rows = [row0 + row for row in range(s.rows)]

        @loop(0, s.lines, carry=[zeros() for _ in range(s.rows) for _ in groups])
        def dots(dim: Value, acc: list[Value]) -> list[Value]:
            keys = [k.load(page, kv_head, 0, dim, offset) for page, offset in pages]
            for page, offset in pages if asks else ():
                v.prefetch(page, kv_head, 0, offset // s.step, dim * 16)
            new = []
            for row in range(s.rows):
                a = multipliers(s, query, rows[row], dim)
                new += [products(s, acc[row * len(keys) + j], a, key) for j, key in enumerate(keys)]
            return new

        for row in range(s.rows):
            for j, at in enumerate(groups):
                score.store(dots[row * len(groups) + j], rows[row], 16 * at)

    return scores


def softmax_helper(s: BlockShape, masked: bool) -> Any:
    @helper(
        f"{s.symbol}_softmax{'_masked' if masked else ''}", overlap=("score", "weights"), score=s.scores_type,
        weights=s.weights_type, position=array(s.most_rows, element="i32"), top=s.per_row, scaled=s.per_row,
        total=s.lanes_of_row, first="index", row0="index", num_rows="index",
    )  # fmt: skip
    def softmax(
        score: Any, weights: Any, position: Any, top: Any, scaled: Any, total: Any, first: Value, row0: Value,
        num_rows: Value,
    ) -> None:  # fmt: skip
        """weights[row] = exp(score - maximum so far), 0 where masked; top, scaled and total follow."""
        lanes = lane_numbers()
        vectors = [row0 + at for at in range(0, 16 if s.by_head else s.vectors_of_rows, 16)]
        before = [top.load(at) for at in vectors]

        def seen(row: Value, j: int, value: Value, otherwise: float) -> Value:
            if not masked:
                return value
            token, own = lanes + i32(first + 16 * j), position[row]
            visible = token <= splat(own)
            if s.window:
                visible = visible & (token > splat(own - s.window))
            return select(visible, value, otherwise)

        def capped(row: Value, j: int) -> Value:
            value: Value = score.load(row, 16 * j)
            if s.softcap:
                value = soft_cap(value, s.softcap)
                score.store(value, row, 16 * j)
            return value

        @loop(row0, row0 + num_rows)
        def _(row: Value) -> None:
            visible = [seen(row, j, capped(row, j), MASKED) for j in range(GROUPS)]
            highest = htree(fmax(fmax(visible[0], visible[1]), fmax(visible[2], visible[3])), fmax)
            top[row] = fmax(highest, top[row])

        for at, top_before in zip(vectors, before, strict=True):
            scaled.store(exp(top_before - top.load(at), at_most_zero=True), at)

        @loop(row0, row0 + num_rows)
        def _(row: Value) -> None:
            highest, parts = splat(top[row]), []
            for j in range(GROUPS):
                weight = exp(score.load(row, 16 * j) - highest, at_most_zero=True)
                parts.append(seen(row, j, weight, 0.0))
                if s.dotted:
                    weights.store(paired_lanes(truncate(parts[j], "bf16")), row, 8 * j)
                else:
                    weights.store(parts[j], row, 16 * j)
            block_total = (parts[0] + parts[1]) + (parts[2] + parts[3])
            total.store(fma(total.load(row, 0), scaled[row], block_total), row, 0)

    return softmax


def value_helper(s: BlockShape, part: list[tuple[int, int]], asks: bool) -> Any:
    @helper(
        f"{s.symbol}_values{part[0][0]}{'_ask' if asks else ''}", weights=s.weights_type, scaled=s.per_row, k=s.k_type,
        v=s.v_type, table=s.table_type, result=s.results, table_off="index", kv_head="index", first="index",
        groups="index", row0="index", next_head="index", next_first="index",
    )  # fmt: skip
    def values(
        weights: Any, scaled: Any, k: Any, v: Any, table: Any, result: Any, table_off: Value, kv_head: Value,
        first: Value, groups: Value, row0: Value, next_head: Value, next_first: Value,
    ) -> None:  # fmt: skip
        """result[row] = result[row] * scaled[row] + the block's first `groups` * 16 values, each times its weight.

        Asks for the keys that are next: of next_head in the block from next_first on.
        """
        rows = [row0 + row for row in range(s.rows)]
        acc = [result.load(row, at, width=width) * scaled[row] for row in rows for at, width in part]

        @loop(0, groups, carry=acc)
        def sums(j: Value, acc: list[Value]) -> Any:
            page, offset = page_of(s, table, table_off, first + j * 16)
            slot, at_weight = offset // s.step, j * (16 // s.step)
            next_page, next_offset = page_of(s, table, table_off, next_first + j * 16)

            @loop(0, 16 // s.step, carry=acc)
            def inner(token: Value, acc: list[Value]) -> list[Value]:
                loaded = [v.load(page, kv_head, 0, slot + token, at, width=width) for at, width in part]
                for at, _ in part if asks else ():
                    k.prefetch(next_page, next_head, 0, token * (s.dim // 16) + at // 16, next_offset)
                new = []
                for row in range(s.rows):
                    a = multipliers(s, weights, rows[row], at_weight + token)
                    new += [products(s, acc[row * len(part) + c], a, value) for c, value in enumerate(loaded)]
                return new

            return inner

        for row in range(s.rows):
            for c, (at, _) in enumerate(part):
                result.store(sums[row * len(part) + c], rows[row], at)

    return values


def merge_helper(s: BlockShape) -> Any:
    @helper(
        f"{s.symbol}_merge", top=s.per_row, sum_=s.per_row, result=s.results, all_top=s.per_row, all_sum=s.per_row,
        all_result=s.results, scaled=s.per_row, own=s.per_row, num_rows="index",
    )  # fmt: skip
    def merge(
        top: Any, sum_: Any, result: Any, all_top: Any, all_sum: Any, all_result: Any, scaled: Any, own: Any,
        num_rows: Value,
    ) -> None:  # fmt: skip
        """One more segment joins those before it."""
        for at in range(0, s.vectors_of_rows, 16):
            before, new = all_top.load(at), top.load(at)
            highest = fmax(before, new)
            scaled.store(exp(before - highest, at_most_zero=True), at)
            own.store(exp(new - highest, at_most_zero=True), at)
            all_top.store(highest, at)
            all_sum.store(fma(sum_.load(at), own.load(at), all_sum.load(at) * scaled.load(at)), at)

        @loop(0, num_rows)
        def _(row: Value) -> None:
            a, b = scaled[row], own[row]
            for at, width in s.columns:
                kept = all_result.load(row, at, width=width) * a
                all_result.store(fma(result.load(row, at, width=width), b, kept), row, at)

    return merge
