"""Which kernel multiplies a weight: a plan of a few kernels by number of rows, whose outputs have the same bits.

    x f32, w f32, bf16 or f16   gemm_f32: IEEE float32, the CPU's bits
    x bf16, w bf16              gemm_mma: tensor cores; on Hopper, where asked for, gemm_tma for many rows

Kernels of one plan differ in the shape of their tiles, which no bit depends on: in all of them, an output is the same
chains along k, of one instruction, or of two that were found to sum alike. The shape follows from the weight and the chip; the
rows choose among shapes, never among arithmetics. What keeps a large GPU busy is the number of tiles: they are as large as leaves one for each
multiprocessor, and have so many stages that reading the weight is not waited for: its bytes on their way, over all
multiprocessors, are what memory delivers in the time of one access (some 3 MB on an H200). A weight of few outputs has few
tiles, each with a chain of products as long as k: it is cut in four, for any number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.kernels.cuda import gemm_f32, gemm_mma, gemm_tma, wgmma_tile
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm_tile import TILE_K

WEIGHTS_OF = {"f32": ("f32", "bf16", "f16"), "bf16": ("bf16",)}  # what x can be multiplied with
_MULTIPROCESSORS = 128  # of a large GPU, about
_LARGE = 2048  # rows; more are many, whatever the weight
# A weight of fewer outputs than this gives too few tiles of 32 for them.
_MANY_OUTPUTS = 32 * _MULTIPROCESSORS
_CUTS = 4  # of k, for those
FEW_ROWS = 64  # what multiplies more of them is bound by its arithmetic, or soon is


@dataclass(frozen=True, slots=True)
class GemmPlan:
    """Kernels for one product, with the most rows each is for, ascending; the last takes any number."""

    steps: tuple[tuple[int | None, GpuKernelSpec], ...]

    def spec_for(self, rows: int) -> GpuKernelSpec:
        return next(spec for most, spec in self.steps if most is None or rows <= most)

    @property
    def specs(self) -> tuple[GpuKernelSpec, ...]:
        return tuple(spec for _, spec in self.steps)


def gemm_plan(
    n_in: int, n_out: int, ldx: int, ldy: int, chip: Chip, *, x: str = "f32", dtype: str = "f32", y: str = "f32",
    bias: bool = False, activation: str | None = None, residual: bool = False, scale: float = 1.0,
    softcap: float = 0.0, gated: bool = False, wgmma: bool = False,
) -> GemmPlan:  # fmt: skip
    """y = cap(act(x w^T + bias) * scale) (+ y), or act(gate) * up, as kernels/gemm.py; arguments as the specs' own.

    Args:
        n_out: outputs; a gated weight has twice as many rows.
        x, dtype, y: element types of x, the weight and y.
        wgmma: Hopper's warpgroup products for more than FEW_ROWS rows, which may be asked for where cuda/same_bits.py says that
            their bits are mma.sync's.

    Raises:
        ValueError: sizes that do not fit, or an option that is not known.
    """
    if x not in WEIGHTS_OF:
        raise ValueError(f"gemm: x {x!r} must be one of {', '.join(WEIGHTS_OF)}")
    if dtype not in WEIGHTS_OF[x]:
        raise ValueError(f"gemm: dtype {dtype!r} with x {x!r} must be one of {', '.join(WEIGHTS_OF[x])}")
    if wgmma and not chip.wgmma:
        raise ValueError(f"gemm: wgmma: {chip.name} does not have it")
    epilogue = Epilogue(bias, activation, residual, scale, softcap, gated)
    sizes = (n_in, n_out, ldx, ldy)
    outputs = n_out * (1 + gated)
    steps: dict[int | None, GpuKernelSpec]
    if x == "f32":
        steps = {
            most: gemm_f32.gemm_f32_spec(*sizes, shape, epilogue, dtype=dtype, y=y)
            for most, shape in _f32_shapes(outputs >= _MANY_OUTPUTS, gated).items()
        }
    else:
        # Parts of k for a weight of few outputs, each a tile at least.
        cuts = 1 if outputs >= _MANY_OUTPUTS else min(_CUTS, -(-n_in // TILE_K["bf16"]))
        shapes = _mma_shapes(chip, outputs, gated) if cuts == 1 else _cut_shapes(chip, outputs, gated, cuts)
        steps = {
            most: gemm_mma.gemm_mma_spec(*sizes, shape, epilogue, y=y, cuts=cuts)
            for most, shape in shapes.items()
            if not wgmma or (most is not None and most <= FEW_ROWS)
        }
        if wgmma:
            steps |= {
                most: gemm_tma.gemm_tma_spec(*sizes, shape, epilogue, y=y, cuts=cuts)
                for most, shape in _tma_shapes(outputs, cuts).items()
            }
    return GemmPlan(tuple(steps.items()))


def _f32_shapes(has_many: bool, gated: bool) -> dict[int | None, gemm_f32.Shape]:
    """By the most rows. Of few rows, each thread has one output, or a gate and the other."""
    return {
        4: gemm_f32.Shape(4, 32 if has_many else 8, 1, 1 + gated, 8),
        16: gemm_f32.Shape(4, 32, 4, 1 + gated, 6),
        None: gemm_f32.Shape(8, 16, 8, 8, 3),
    }


def _mma_shapes(chip: Chip, outputs: int, gated: bool) -> dict[int | None, gemm_mma.Shape]:
    """By the most rows, of a weight with that many rows."""
    has_many = outputs >= _MANY_OUTPUTS
    is_wide = outputs >= 2 * _MANY_OUTPUTS  # enough for tiles of 64
    shapes: dict[int | None, gemm_mma.Shape] = {
        16: gemm_mma.Shape(1, 4 if has_many else 1, 1, 1 + gated, 6 if gated else 8),
        32: gemm_mma.Shape(2, 2, 1, 4 if is_wide else 2, 8),
        64: gemm_mma.Shape(2, 2, 2, 4, 6) if is_wide else gemm_mma.Shape(2, 2, 2, 2, 8),
    }
    enough = _enough_rows(outputs)
    if enough > 128:
        shapes[enough - 1] = gemm_mma.Shape(2, 2, 2, 4 if has_many else 2, 6)
    # A warp's 64 x 64 outputs: with fewer, reading them from shared memory takes longer than multiplying. Two blocks fit.
    shapes[None] = gemm_mma.Shape(2, 2, 4, 8, 3 if chip.capability >= 90 else 2)
    return shapes


def _cut_shapes(chip: Chip, outputs: int, gated: bool, cuts: int) -> dict[int | None, gemm_mma.Shape]:
    """The same where k is cut: up to 64 rows, a group of warps has a part; with more rows there are tiles enough.

    A block reads all of x for its columns. So the fewer columns, the more of the weight's blocks run at once and the more
    often x comes through the second cache, which with many rows takes longer than the weight from memory.
    """
    has_room = chip.shared_bytes > 128 * 1024
    is_wide = outputs >= _MANY_OUTPUTS // 2
    shapes: dict[int | None, gemm_mma.Shape] = {
        16: gemm_mma.Shape(1, 1, 1, 2 if is_wide or gated else 1, 5, cuts),
        32: gemm_mma.Shape(1, 1, 2, 4 if is_wide else 2, 4 if has_room else 2, cuts),
        64: gemm_mma.Shape(1, 1, 4, 4 if is_wide and has_room else 2, 2, cuts),
    }
    shapes[_enough_rows(outputs) - 1] = gemm_mma.Shape(2, 2, 2, 2, 6)
    # Two sums of each output take a warp's registers, so it has 64 x 32. Eight of them for the same tile read shared memory
    # for about as long as they multiply: what many rows pay for the cut.
    shapes[None] = gemm_mma.Shape(2, 4, 4, 4, 4 if has_room else 3)
    return shapes


def _tma_shapes(outputs: int, cuts: int) -> dict[int | None, wgmma_tile.Shape]:
    """By the most rows, of a weight with that many."""
    shapes: dict[int | None, wgmma_tile.Shape] = {}
    enough = _enough_rows(outputs)
    if enough > 128:
        shapes[enough - 1] = wgmma_tile.Shape(1, 64, 6)
    # Two blocks of 96 KiB fit a multiprocessor where a thread has no more than 96 registers (all but the largest epilogues), so
    # that one multiplies while the other stores. Where k is cut, two sums of each output take registers: one fits.
    shapes[None] = wgmma_tile.Shape(2, 128, 3 if cuts == 1 else 6)
    return shapes


def _enough_rows(outputs: int) -> int:
    """From how many rows on there is a tile of 128 x 128 for each multiprocessor."""
    return min(128 * (_MULTIPROCESSORS // -(-outputs // 128)), _LARGE)
