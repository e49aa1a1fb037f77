"""out[row] = norm(x[row]) * weight (+ bias): RMSNorm and LayerNorm, optionally of gathered rows.

Numerics: a row's sum runs in four accumulators of 16 lanes (64 columns a turn), then one accumulator per leftover chunk
of 16, 8, 4, 2, 1 columns; they are added in that order and halved lane-wise to a scalar. The pattern depends on the number
of columns only. LayerNorm subtracts the mean before it squares (two passes), so a large offset costs no digits.

With `gather`, row i of out is the norm of x[rows[i]]: only rows that sample reach the head. Work units are rows of out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanoserve.compiler.target import Target
from nanoserve.kernels.library import KernelSpec

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value

KINDS = ("rmsnorm", "layernorm")


def norm_spec(
    kind: str,
    cols: int,
    ldx: int,
    ldo: int,
    eps: float,
    *,
    bias: bool = False,
    gather: bool = False,
    dtype: str = "f32",
) -> KernelSpec:
    """Args: x[.][ldx], (rows), weight[cols], (bias[cols]), out[.][ldo], begin, end over rows of out."""
    if kind not in KINDS:
        raise ValueError(f"norm: kind {kind!r} must be one of {KINDS}")
    if not 1 <= cols <= min(ldx, ldo):
        raise ValueError(f"norm: cols={cols} must be in [1, min(ldx={ldx}, ldo={ldo})]")
    if dtype != "f32":
        raise ValueError(f"norm: dtype {dtype!r} is not supported, only 'f32'")
    return KernelSpec.make(
        "norm", kind=kind, c=cols, ldx=ldx, ldo=ldo, eps=float(eps), bias=bias, gather=gather, dtype=dtype
    )


def build(
    symbol: str,
    target: Target,
    *,
    kind: str,
    c: int,
    ldx: int,
    ldo: int,
    eps: float,
    bias: bool,
    gather: bool,
    dtype: str,
) -> None:
    from nanoserve.compiler.builder import add, chunks, fma, htree, index, sqrt, zeros
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop, over

    arguments = {"x": array(UNBOUNDED, ldx)}
    if gather:
        arguments["rows"] = array(UNBOUNDED, element="i32")
    arguments["weight"] = array(c)
    if bias:
        arguments["bias"] = array(c)

    @kernel(symbol, **arguments, out=array(UNBOUNDED, ldo), begin="index", end="index")
    def _(x: Any, *rest: Any) -> None:
        out, begin, end = rest[-3:]
        rows = rest[0] if gather else None
        weight = rest[1 if gather else 0]
        shift = rest[-4] if bias else None

        @loop(begin, end)
        def _(row: Value) -> None:
            source = index(rows[row]) if rows is not None else row

            def total(accumulate: Callable[[Value, Value], Value]) -> Value:
                """The sum over the row of what accumulate(acc, x chunk) adds, in the fixed order of the module head."""
                whole = c // 64 * 64

                def turn(at: Any, acc: list[Value]) -> list[Value]:
                    return [accumulate(acc[j], x.load(source, at + 16 * j)) for j in range(4)]

                acc = loop(0, whole, 64, carry=[zeros()] * 4)(turn) if whole else [zeros()] * 4
                result = htree((acc[0] + acc[1]) + (acc[2] + acc[3]), add)
                for at, width in chunks(c - whole):
                    result = result + htree(
                        accumulate(zeros(width), x.load(source, whole + at, width=width)), add
                    )
                return result

            mean = total(add) * (1.0 / c) if kind == "layernorm" else None

            def centred(v: Value) -> Value:
                return v if mean is None else v - mean

            squares = total(lambda acc, v: fma(centred(v), centred(v), acc))
            scale = 1.0 / sqrt(squares * (1.0 / c) + eps)

            @over(c)
            def _(at: Any, width: int) -> None:
                value = centred(x.load(source, at, width=width)) * scale * weight.load(at, width=width)
                if shift is not None:
                    value = value + shift.load(at, width=width)
                out.store(value, row, at)
