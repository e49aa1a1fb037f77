"""x[row] = table[ids[row]] * scale (+ pos_table[positions[row]]), as kernels/embedding.py; a block takes a row.

The table is a weight as it is stored; a tied head reads the same one. Numerics: a product and a sum per element where
there are any, not fused. Ids and positions must be in range; the caller checks them.

A step may follow the one that chooses its tokens without the host having seen them: a row whose source is zero or more
takes its id from tokens[source], and 0 where there is none (-1, of a row with a bad number), which its caller throws away.
"""

from __future__ import annotations

import math
from typing import Any

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.kernels.cuda.layout import ELEMENT_BYTES, weight_stride
from nanoserve.kernels.cuda.row_cover import RowCover, check_row


def embedding_spec(
    cols: int,
    ldx: int,
    *,
    positions: bool = False,
    scale: float = 1.0,
    dtype: str = "f32",
    chosen: bool = False,
) -> GpuKernelSpec:
    """Args: ids[m], positions[m], (sources[m], tokens[.] of i32: chosen), table[V][weight_stride] of dtype,
    (pos_table[S][weight_stride]), x[.][ldx], m.
    """
    if not math.isfinite(scale):
        raise ValueError(f"embedding: scale={scale} must be finite")
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"embedding: dtype {dtype!r} must be one of {', '.join(ELEMENT_BYTES)}")
    check_row("embedding", cols, ldx=ldx)
    arguments = {
        "ids": pointer(UNBOUNDED, element="i32"),
        "positions": pointer(UNBOUNDED, element="i32"),
    }
    if chosen:
        arguments |= {name: pointer(UNBOUNDED, element="i32") for name in ("sources", "tokens")}
    arguments["table"] = pointer(UNBOUNDED, weight_stride(cols, dtype), element=dtype)
    if positions:
        arguments["pos_table"] = pointer(UNBOUNDED, weight_stride(cols, "f32"))
    arguments |= {"x": pointer(UNBOUNDED, ldx), "m": SCALAR}
    return GpuKernelSpec.make(
        "embedding", arguments, (Extent("m"),), RowCover(cols).threads, c=cols, scale=float(scale)
    )


def build(spec: GpuKernelSpec, chip: Chip, *, c: int, scale: float) -> None:
    from nanoserve.compiler.builder import imax, index, widen
    from nanoserve.compiler.control import when
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.threads import block_id

    cover = RowCover(c)

    @device_kernel(spec, chip)
    def _(*values: Any) -> None:
        given = dict(zip(dict(spec.arguments), values, strict=True))
        row = block_id()
        token = index(given["ids"][row])
        position = index(given["positions"][row])
        if "sources" in given:
            source = index(given["sources"][row])

            @when(source >= 0, otherwise=[token])
            def known() -> list[Any]:
                return [imax(index(given["tokens"][source]), 0)]

            token = known[0]
        pieces, made = cover.pieces(), []
        for piece in pieces:
            value = widen(cover.load(given["table"], token, piece))
            if scale != 1.0:
                value = value * scale
            if "pos_table" in given:
                value = value + cover.load(given["pos_table"], position, piece)
            made.append(value)
        for piece, value in zip(pieces, made, strict=True):  # behind a store, loads would wait for each other
            cover.store(value, given["x"], row, piece)
