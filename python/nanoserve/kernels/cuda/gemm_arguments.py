"""What the kernels of matrix products take alike, and which sizes of theirs fit."""

from __future__ import annotations

from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Argument, pointer
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm_tile import TILE_K
from nanoserve.kernels.cuda.layout import check_stride


def check_product(kind: str, n_in: int, n_out: int, ldx: int, ldy: int, y: str, cuts: int = 1) -> None:
    """Raises ValueError for what does not fit; cuts: parts of k."""
    if n_in < 1 or n_out < 1:
        raise ValueError(f"{kind}: n_in={n_in} and n_out={n_out} must be positive")
    check_stride(kind, n_in, ldx=ldx)
    check_stride(kind, n_out, ldy=ldy)
    if y not in ("f32", "bf16"):
        raise ValueError(f"{kind}: y {y!r} must be f32 or bf16")
    tiles = -(-n_in // TILE_K["bf16"])
    if not 1 <= cuts <= tiles:
        raise ValueError(f"{kind}: cuts={cuts} must be in [1, {tiles}], a tile each")


def product_arguments(
    x: Argument, w: Argument, outputs: int, ldy: int, epilogue: Epilogue, y: str
) -> dict[str, Argument]:
    """x and w as the kernel has them, (bias[outputs]), y[.][ldy] of type y, m rows."""
    bias = {"bias": pointer(outputs)} if epilogue.bias else {}
    return {"x": x, "w": w, **bias, "y": pointer(UNBOUNDED, ldy, element=y), "m": SCALAR}
