"""out[row] = cap(act(x[row] + bias) * scale) (+ out[row]), or act(gate) * up of rows [gate | up]: rounded to the type of out.

Our GEMMs do all this on their way out; this is for rows that come from elsewhere, such as the products of a library. With
nothing to do at all it is kernels/convert.py: float32 rounded to bfloat16. Numerics: epilogue.py's, to the bit. A block
takes a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.layout import check_stride
from nanoserve.kernels.cuda.row_cover import Piece, RowCover, check_row

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value

DTYPES = ("f32", "bf16")  # of out


def activation_spec(
    cols: int, ldx: int, ldo: int, *, bias: bool = False, activation: str | None = None, residual: bool = False,
    scale: float = 1.0, softcap: float = 0.0, gated: bool = False, dtype: str = "f32",
) -> GpuKernelSpec:  # fmt: skip
    """Args: x[.][ldx], bias[cols] (of both halves where gated) if there is one, out[.][ldo] of dtype, m rows.

    Gated, the up half of x begins at column `cols`. Options as Epilogue's.
    """
    epilogue = Epilogue(bias, activation, residual, scale, softcap, gated)
    if dtype not in DTYPES:
        raise ValueError(f"activation: dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    check_row("activation", cols, ldo=ldo)
    check_stride("activation", cols * (1 + gated), ldx=ldx)
    arguments = {"x": pointer(UNBOUNDED, ldx)}
    if bias:
        arguments["bias"] = pointer(cols * (1 + gated))
    arguments |= {"out": pointer(UNBOUNDED, ldo, element=dtype), "m": SCALAR}
    return GpuKernelSpec.make(
        "activation", arguments, (Extent("m"),), RowCover(cols).threads, 0, c=cols, **epilogue.params
    )


def convert_spec(cols: int, ldx: int, ldo: int) -> GpuKernelSpec:
    """out = x rounded to bfloat16."""
    return activation_spec(cols, ldx, ldo, dtype="bf16")


def build(spec: GpuKernelSpec, chip: Chip, *, c: int, **options: Any) -> None:
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.threads import block_id, only_where

    epilogue, cover = Epilogue(**options), RowCover(c)

    @device_kernel(spec, chip)
    def _(*values: Any) -> None:
        given = dict(zip(dict(spec.arguments), values, strict=True))
        x, out, row = given["x"], given["out"], block_id()

        def finished(piece: Piece) -> Value:
            ups = cover.load(x, row, piece, first=c) if epilogue.gated else None
            return epilogue.finished(cover.load(x, row, piece), ups, out, given.get("bias"), c, row, piece.at)

        pieces = cover.pieces()
        whole = [piece for piece in pieces if piece.inside is None]
        made = [finished(piece) for piece in whole]  # behind a store, loads would wait for each other
        for piece, value in zip(whole, made, strict=True):
            out.store(value, row, piece.at)
        for piece in pieces[len(whole) :]:

            def put(piece: Piece = piece) -> None:
                out.store(finished(piece), row, piece.at)

            only_where(piece.inside, put)
