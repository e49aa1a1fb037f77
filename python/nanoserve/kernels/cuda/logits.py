"""out[row, block] = the largest logit of the block, NaN where one of them is not finite, as kernels/logits.py's; a version lets
-inf pass. A warp takes a block. Comparisons only, so the results are the CPU's to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanoserve.compiler.gpu.chip import WARP, Chip
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.kernels.cuda.layout import check_stride
from nanoserve.kernels.logits import num_blocks
from nanoserve.native import LOGITS_BLOCK

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Value

_THREADS = 128
_LOWEST = -3.4028234663852886e38  # float32's


def block_max_spec(vocab: int, ld: int, *, may_forbid: bool = False) -> GpuKernelSpec:
    """Args: logits[.][ld], out[.][num_blocks(vocab)], m rows. With `may_forbid`, -inf is no bad number."""
    if vocab < 1:
        raise ValueError(f"logits: vocab={vocab} must be positive")
    check_stride("logits", vocab, ld=ld)
    blocks = num_blocks(vocab)
    arguments = {"logits": pointer(UNBOUNDED, ld), "out": pointer(UNBOUNDED, blocks), "m": SCALAR}
    grid = (Extent("m"), Extent(times=-(-blocks // (_THREADS // WARP))))
    return GpuKernelSpec.make("logits", arguments, grid, _THREADS, v=vocab, may_forbid=may_forbid)


def build(spec: GpuKernelSpec, chip: Chip, *, v: int, may_forbid: bool) -> None:
    from nanoserve.compiler.builder import add, const, fma, fmax, imin, index
    from nanoserve.compiler.control import loop, when
    from nanoserve.compiler.gpu.kernel import device_kernel
    from nanoserve.compiler.gpu.threads import block_id, over_warp, thread_id

    @device_kernel(spec, chip)
    def _(logits: Any, out: Any, m: Value) -> None:
        row, lane = block_id("x"), thread_id() % WARP
        number = block_id("y") * (_THREADS // WARP) + thread_id() // WARP

        @when(number < index(num_blocks(v)))
        def _() -> None:
            first = number * LOGITS_BLOCK

            @loop(0, LOGITS_BLOCK, WARP, carry=[const(float("-inf"), "f32"), const(0.0, "f32")])
            def found(at: Value, carried: list[Value]) -> list[Value]:
                x = logits[row, imin(first + at + lane, v - 1)]  # the last one again does no harm
                # 0 * x is 0, or NaN where x is not finite.
                zero = fma(fmax(_LOWEST, x) if may_forbid else x, 0.0, carried[1])
                return [fmax(x, carried[0]), zero]

            largest, zero = over_warp(found[0], fmax), over_warp(found[1], add)

            @when(lane < 1)
            def _() -> None:
                out[row, number] = largest + zero
