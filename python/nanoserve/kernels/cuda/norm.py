"""out[row] (+)= norm(x[row]) * weight (+ bias), as kernels/norm.py: RMSNorm and LayerNorm, of rows or gathered rows.

A block takes a row and keeps it in registers. Numerics: the order of a sum is row_cover's, which depends on the
number of columns only; LayerNorm subtracts the mean before it squares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanoserve.compiler.gpu.chip import WARP, Chip
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.kernels.cuda.row_cover import RowCover, check_row

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value

KINDS = ("rmsnorm", "layernorm")
DTYPES = ("f32", "bf16")  # of out


def norm_spec(
    kind: str, cols: int, ldx: int, ldo: int, eps: float, *, bias: bool = False, gather: bool = False,
    residual: bool = False, dtype: str = "f32",
) -> GpuKernelSpec:  # fmt: skip
    """Args: x[.][ldx], (rows[m]), weight[cols], (bias[cols]), out[.][ldo] of dtype, m rows of out."""
    if kind not in KINDS:
        raise ValueError(f"norm: kind {kind!r} must be one of {KINDS}")
    if dtype not in DTYPES:
        raise ValueError(f"norm: dtype {dtype!r} must be one of {DTYPES}")
    if dtype != "f32" and residual:
        raise ValueError(f"norm: dtype {dtype!r} cannot be added to what is there: leave residual out")
    check_row("norm", cols, ldx=ldx, ldo=ldo)
    arguments = {"x": pointer(UNBOUNDED, ldx)}
    if gather:
        arguments["rows"] = pointer(UNBOUNDED, element="i32")
    arguments["weight"] = pointer(cols)
    if bias:
        arguments["bias"] = pointer(cols)
    arguments |= {"out": pointer(UNBOUNDED, ldo, element=dtype), "m": SCALAR}
    threads = RowCover(cols).threads
    return GpuKernelSpec.make(
        "norm", arguments, (Extent("m"),), threads, 2 * 4 * threads // WARP, norm=kind, c=cols, eps=float(eps),
        residual=residual,
    )  # fmt: skip


def build(spec: GpuKernelSpec, chip: Chip, *, norm: str, c: int, eps: float, residual: bool) -> None:
    from nanoserve.compiler.builder import const, fma, index, sqrt
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.memory import SharedMemory, rounded
    from nanoserve.compiler.gpu.threads import block_id

    cover = RowCover(c)

    @device_kernel(spec, chip, overlap=("x", "out"))
    def _(*values: Any) -> None:
        given = dict(zip(dict(spec.arguments), values, strict=True))
        out = given["out"]
        shared = SharedMemory(spec.shared_bytes)
        slots = [shared.array(spec.block // WARP, alignment=4) for _ in range(2)]
        row = block_id()
        source = index(given["rows"][row]) if "rows" in given else row
        pieces = cover.pieces()
        x = [cover.load(given["x"], source, piece) for piece in pieces]
        # All is asked for before anything is written: behind a store, each load would wait for memory by itself.
        weight = [cover.load(given["weight"], None, piece) for piece in pieces]
        bias = [cover.load(given["bias"], None, piece) for piece in pieces] if "bias" in given else None
        before = [cover.load(out, row, piece) for piece in pieces] if residual else None

        def total(term: Callable[[Value, Value], Value]) -> Value:
            return cover.sum(pieces, lambda i, acc: term(x[i], acc), slots.pop())

        if norm == "layernorm":
            mean = total(lambda v, acc: acc + v) * (1.0 / c)
            x = [v - mean for v in x]
        scale = const(1.0, "f32") / sqrt(total(lambda v, acc: fma(v, v, acc)) * (1.0 / c) + eps)
        for i, piece in enumerate(pieces):
            v = x[i] * scale * weight[i]
            if bias is not None:
                v = v + bias[i]
            if before is not None:
                v = before[i] + v
            cover.store(rounded(v, out.element), out, row, piece)
