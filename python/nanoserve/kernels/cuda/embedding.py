"""x[row] = table[ids[row]] * scale (+ pos_table[positions[row]]), as kernels/embedding.py; a block takes a row.

The table is a weight as it is stored; a tied head reads the same one. Numerics: a product and a sum per element where
there are any, not fused. Ids and positions must be in range; the caller checks them.
"""

from __future__ import annotations

import math
from typing import Any

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.kernels.cuda.layout import ELEMENT_BYTES, weight_stride
from nanoserve.kernels.cuda.row_cover import RowCover, check_row


def embedding_spec(
    cols: int, ldx: int, *, positions: bool = False, scale: float = 1.0, dtype: str = "f32"
) -> GpuKernelSpec:
    """Args: ids[m], positions[m], table[V][weight_stride] of dtype, (pos_table[S][weight_stride]), x[.][ldx], m."""
    if not math.isfinite(scale):
        raise ValueError(f"embedding: scale={scale} must be finite")
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"embedding: dtype {dtype!r} must be one of {', '.join(ELEMENT_BYTES)}")
    check_row("embedding", cols, ldx=ldx)
    arguments = {
        "ids": pointer(UNBOUNDED, element="i32"),
        "positions": pointer(UNBOUNDED, element="i32"),
        "table": pointer(UNBOUNDED, weight_stride(cols, dtype), element=dtype),
    }
    if positions:
        arguments["pos_table"] = pointer(UNBOUNDED, weight_stride(cols, "f32"))
    arguments |= {"x": pointer(UNBOUNDED, ldx), "m": SCALAR}
    return GpuKernelSpec.make(
        "embedding", arguments, (Extent("m"),), RowCover(cols).threads, c=cols, scale=float(scale)
    )


def build(spec: GpuKernelSpec, chip: Chip, *, c: int, scale: float) -> None:
    from nanoserve.compiler.builder import index, widen
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.threads import block_id

    cover = RowCover(c)

    @device_kernel(spec)
    def _(ids: Any, positions: Any, table: Any, *rest: Any) -> None:
        x = rest[-2]
        row = block_id()
        token = index(ids[row])
        position = index(positions[row])
        for piece in cover.pieces():
            value = widen(cover.load(table, token, piece))
            if scale != 1.0:
                value = value * scale
            if len(rest) == 3:
                value = value + cover.load(rest[0], position, piece)
            cover.store(value, x, row, piece)
