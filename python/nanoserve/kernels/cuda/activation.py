"""out[row] = cap(act(x[row]) * scale), or act(gate) * up of rows [gate | up]; rounded to the type of out.

GEMMs do all this on their way out; this is for rows that come from elsewhere. With no activation at all it is
kernels/convert.py: float32 rounded to bfloat16. Numerics: compiler/vector_math.py's, the CPU's to the bit. A block
takes a row.
"""

from __future__ import annotations

import math
from typing import Any

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.kernels.cuda.layout import check_stride
from nanoserve.kernels.cuda.row_cover import RowCover, check_row
from nanoserve.kernels.gemm import ACTIVATIONS

DTYPES = ("f32", "bf16")  # of out


def activation_spec(
    cols: int, ldx: int, ldo: int, *, activation: str | None = None, gated: bool = False, scale: float = 1.0,
    softcap: float = 0.0, dtype: str = "f32",
) -> GpuKernelSpec:  # fmt: skip
    """Args: x[.][ldx], out[.][ldo] of dtype, m rows. Gated, the up half of x begins at column `cols`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: {activation!r} must be one of {ACTIVATIONS}")
    if dtype not in DTYPES:
        raise ValueError(f"activation: dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    if not math.isfinite(scale):
        raise ValueError(f"activation: scale={scale} must be finite")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"activation: softcap={softcap} must be finite and at least 0, 0 for none")
    check_row("activation", cols, ldo=ldo)
    check_stride("activation", cols * (1 + gated), ldx=ldx)
    arguments = {"x": pointer(UNBOUNDED, ldx), "out": pointer(UNBOUNDED, ldo, element=dtype), "m": SCALAR}
    return GpuKernelSpec.make(
        "activation", arguments, (Extent("m"),), RowCover(cols).threads, c=cols, activation=activation, gated=gated,
        scale=float(scale), softcap=float(softcap),
    )  # fmt: skip


def convert_spec(cols: int, ldx: int, ldo: int) -> GpuKernelSpec:
    """out = x rounded to bfloat16."""
    return activation_spec(cols, ldx, ldo, dtype="bf16")


def build(
    spec: GpuKernelSpec,
    chip: Chip,
    *,
    c: int,
    activation: str | None,
    gated: bool,
    scale: float,
    softcap: float,
) -> None:
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.memory import rounded
    from nanoserve.compiler.gpu.threads import block_id
    from nanoserve.compiler.vector_math import activate, soft_cap

    cover = RowCover(c)

    @device_kernel(spec, overlap=("x", "out"))
    def _(x: Any, out: Any, m: Any) -> None:
        row = block_id()
        for piece in cover.pieces():
            value = activate(activation, cover.load(x, row, piece))
            if gated:
                value = value * cover.load(x, row, piece, first=c)
            if scale != 1.0:
                value = value * scale
            if softcap:
                value = soft_cap(value, softcap)
            cover.store(rounded(value, out.element), out, row, piece)
