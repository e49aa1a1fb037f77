"""out[row] (+)= norm(x[row]) * weight (+ bias): RMSNorm and LayerNorm, of rows or gathered rows.

Numerics: a row's sum has the order of compiler/control.py's sum_of_columns, which depends on the number of columns only.
LayerNorm subtracts the mean before it squares (two passes), so a large offset costs no digits.

With `gather`, row i of out is the norm of x[rows[i]]: only rows that sample reach the head. With `residual` it is added to
what out holds: one addition per element, not fused. x and out may be one buffer. Without `residual`, out may be of the type
GEMMs read, bfloat16 or quantised rows (compiler/row_output.py).

Work units are rows of out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanoserve.compiler.target import Target
from nanoserve.kernels.library import KernelSpec

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value

KINDS = ("rmsnorm", "layernorm")
DTYPES = ("f32", "bf16", "u8")  # of out


def norm_spec(
    kind: str, cols: int, ldx: int, ldo: int, eps: float, *, bias: bool = False, gather: bool = False,
    residual: bool = False, dtype: str = "f32",
) -> KernelSpec:  # fmt: skip
    """Args: x[.][ldx], (rows), weight[cols], (bias[cols]), out[.][ldo], (scales[.] for "u8"), begin, end over rows of out."""
    if kind not in KINDS:
        raise ValueError(f"norm: kind {kind!r} must be one of {KINDS}")
    if not 1 <= cols <= min(ldx, ldo):
        raise ValueError(f"norm: cols={cols} must be in [1, {min(ldx, ldo)}], rows of {ldx} and {ldo}")
    if dtype not in DTYPES:
        raise ValueError(f"norm: dtype {dtype!r} must be one of {DTYPES}")
    if dtype != "f32" and residual:
        raise ValueError(f"norm: dtype {dtype!r} cannot be added to what is there: leave residual out")
    return KernelSpec.make(
        "norm", kind=kind, c=cols, ldx=ldx, ldo=ldo, eps=float(eps), bias=bias, gather=gather, residual=residual,
        dtype=dtype,
    )  # fmt: skip


def build(
    symbol: str, target: Target, *, kind: str, c: int, ldx: int, ldo: int, eps: float, bias: bool, gather: bool,
    residual: bool, dtype: str,
) -> None:  # fmt: skip
    from nanoserve.compiler.builder import add, fma, index, sqrt
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop, sum_of_columns
    from nanoserve.compiler.row_output import RowOutput, row_arguments

    arguments = {"x": array(UNBOUNDED, ldx)}
    if gather:
        arguments["rows"] = array(UNBOUNDED, element="i32")
    arguments["weight"] = array(c)
    if bias:
        arguments["bias"] = array(c)
    arguments |= row_arguments(dtype, ldo)

    @kernel(symbol, overlap=("x", "out"), **arguments, begin="index", end="index")
    def _(x: Any, *rest: Any) -> None:
        given = dict(zip([*arguments, "begin", "end"], (x, *rest), strict=True))
        rows, weight, shift, out = given.get("rows"), given["weight"], given.get("bias"), given["out"]
        output = RowOutput(c, dtype, out, given.get("scales"))

        @loop(given["begin"], given["end"])
        def _(row: Value) -> None:
            source = index(rows[row]) if rows is not None else row

            def total(accumulate: Callable[[Value, Value], Value]) -> Value:
                """The sum over the columns of what accumulate(acc, x chunk) adds."""
                return sum_of_columns(
                    c, lambda acc, at, width: accumulate(acc, x.load(source, at, width=width))
                )

            mean = total(add) * (1.0 / c) if kind == "layernorm" else None

            def centred(v: Value) -> Value:
                return v if mean is None else v - mean

            squares = total(lambda acc, v: fma(centred(v), centred(v), acc))
            scale = 1.0 / sqrt(squares * (1.0 / c) + eps)

            def value(at: Any, width: int) -> Value:
                v: Value = centred(x.load(source, at, width=width)) * scale * weight.load(at, width=width)
                if shift is not None:
                    v = v + shift.load(at, width=width)
                if residual:
                    v = out.load(row, at, width=width) + v
                return v

            output.write(row, value)
