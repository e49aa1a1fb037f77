"""The authoring layer: operators, loops, conditions, memory, and that nothing is reordered or fused behind its back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.packed_call import call_address, elementwise
from nanoserve.compiler import jit
from nanoserve.compiler.builder import Value, add, chunks, const, fma, fmax, fmin, htree, index, select, splat
from nanoserve.compiler.control import UNBOUNDED, array, helper, kernel, loop, over, scratch, when
from nanoserve.compiler.target import host

rng = np.random.default_rng(0)


def run(build: Callable[[], None], symbol: str, *args: Any) -> None:
    engine = jit.compile_kernel(build, host())
    call_address(jit.address_in_memory(engine, symbol), *args)


@given(st.integers(0, 5000))
def test_chunks_cover_exactly_once(size: int) -> None:
    covered = [i for at, width in chunks(size) for i in range(at, at + width)]
    assert covered == list(range(size))
    assert all(width in (16, 8, 4, 2, 1) for _, width in chunks(size))


def test_operators_take_numbers_on_either_side() -> None:
    x = rng.standard_normal(16).astype(np.float32)
    y = elementwise("ops", lambda v: (2.0 * v + 1.0) - (1.0 - v) / 4.0, x)
    one, two, four = np.float32(1), np.float32(2), np.float32(4)
    assert y.tobytes() == ((two * x + one) - (one - x) / four).tobytes()


def test_multiply_and_add_are_two_roundings_and_fma_is_one() -> None:
    x = (1 + rng.standard_normal(1 << 12)).astype(np.float32)
    apart, fused = (
        elementwise("apart", lambda v: v * v + v, x),
        elementwise("fused", lambda v: fma(v, v, v), x),
    )
    assert apart.tobytes() == (x * x + x).tobytes()
    wide = x.astype(np.float64)
    assert fused.tobytes() == (wide * wide + wide).astype(np.float32).tobytes()
    assert apart.tobytes() != fused.tobytes()


def test_htree_halves() -> None:
    x = (rng.standard_normal(32) * 1e4).astype(np.float32)

    def tree(part: np.ndarray) -> np.ndarray:
        while len(part) > 1:
            part = part[: len(part) // 2] + part[len(part) // 2 :]
        return part

    got = elementwise("tree", lambda v: splat(htree(v, add)), x)
    assert got.tobytes() == np.repeat([tree(x[:16])[0], tree(x[16:])[0]], 16).tobytes()


def test_maximum_and_minimum_keep_the_second_when_unordered() -> None:
    x = np.array([np.nan, 1, -3, np.inf] * 4, dtype=np.float32)
    assert np.isnan(elementwise("hi", lambda v: fmax(2.0, v), x)[0])
    assert elementwise("hi2", lambda v: fmax(v, 2.0), x)[:4].tolist() == [2, 2, 2, np.inf]
    assert elementwise("lo", lambda v: fmin(v, 2.0), x)[:4].tolist() == [2, 1, -3, 2]
    assert elementwise("pick", lambda v: select(v > 0.0, v, 0.0), x)[:4].tolist() == [0, 1, 0, np.inf]


def test_loops_conditions_helpers_and_scratch() -> None:
    """Prefix sums of even-numbered rows through a helper and stack memory; odd rows stay."""

    def build() -> None:
        @helper("prefix_add", x=array(UNBOUNDED, 21), total=array(21), row="index")
        def add_row(x: Any, total: Any, row: Value) -> None:
            @over(21)
            def _(at: Any, width: int) -> None:
                total.store(total.load(at, width=width) + x.load(row, at, width=width), at)
                x.store(total.load(at, width=width), row, at)

        @kernel("prefix", x=array(UNBOUNDED, 21), begin="index", end="index")
        def _(x: Any, begin: Value, end: Value) -> None:
            total = scratch(21)

            @over(21)
            def _(at: Any, width: int) -> None:
                total.store(const(0, f"vector<{width}xf32>"), at)

            @loop(begin, end)
            def _(row: Value) -> None:
                @when(row % 2 < 1)
                def _() -> None:
                    add_row(x, total, row)

    x = rng.standard_normal((9, 21)).astype(np.float32)
    before = x.copy()
    run(build, "prefix", x, 2, 9)
    expected, total = before.copy(), np.zeros(21, np.float32)
    for row in (2, 4, 6, 8):
        total = total + before[row]
        expected[row] = total
    assert x.tobytes() == expected.tobytes()


def test_carried_values() -> None:
    def build() -> None:
        @kernel("fibonacci", out=array(UNBOUNDED, element="i32"), n="index")
        def _(out: Any, n: Value) -> None:
            one = const(1, "i32")

            @loop(0, n, carry=[one, one])
            def pair(i: Value, pair: list[Value]) -> list[Value]:
                out[i] = pair[0]
                return [pair[1], pair[0] + pair[1]]

            out[n] = pair[0]

    out = np.zeros(8, dtype=np.int32)
    run(build, "fibonacci", out, 7)
    assert out.tolist() == [1, 1, 2, 3, 5, 8, 13, 21]


def test_what_makes_no_sense_is_refused() -> None:
    def build() -> None:
        @kernel("wrong", n="index")
        def _(n: Value) -> None:
            n / 2

    with pytest.raises(TypeError, match="no such operation on index"):
        jit.build_module(build)


def test_values_leave_the_bindings_as_they_are() -> None:
    from nanoserve.compiler.bindings import mlir

    with jit.context():
        assert "__floordiv__" not in vars(mlir().ir.Value)
    assert not hasattr(mlir().ir.Value, "width")
    assert callable(index)
