"""out[row] = x[row] in the type that GEMMs read: rounded to bfloat16, or quantised to 8 bits with a scale per row.

For rows whose maker cannot write them so itself, because it sees only a part of each: a head's attention, a panel of a GEMM.
Numerics: compiler/row_output.py. Work units are rows.
"""

from __future__ import annotations

from typing import Any

from nanoserve.compiler.target import Target
from nanoserve.kernels.library import KernelSpec

DTYPES = ("bf16", "u8")


def convert_spec(cols: int, ldx: int, ldo: int, dtype: str) -> KernelSpec:
    """Args: x[.][ldx], out[.][ldo], (scales[.] for "u8"), begin, end over rows."""
    if not 1 <= cols <= min(ldx, ldo):
        raise ValueError(f"convert: cols={cols} must be in [1, {min(ldx, ldo)}], rows of {ldx} and {ldo}")
    if dtype not in DTYPES:
        raise ValueError(f"convert: dtype {dtype!r} must be one of {DTYPES}")
    return KernelSpec.make("convert", c=cols, ldx=ldx, ldo=ldo, dtype=dtype)


def build(symbol: str, target: Target, *, c: int, ldx: int, ldo: int, dtype: str) -> None:
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop
    from nanoserve.compiler.row_output import RowOutput, row_arguments

    arguments = {"x": array(UNBOUNDED, ldx), **row_arguments(dtype, ldo)}

    @kernel(symbol, **arguments, begin="index", end="index")
    def _(x: Any, *rest: Any) -> None:
        begin, end = rest[-2:]
        output = RowOutput(c, dtype, *rest[:-2])

        @loop(begin, end)
        def _(row: Any) -> None:
            output.write(row, lambda at, width: x.load(row, at, width=width))
