"""Whether a device's wgmma sums as its mma.sync does: what a plan that has both rests on.

No document says it. It was found on Hopper that both add an instruction's 16 products, and the sum before, exactly to 25 bits
below the largest of them and cut off the rest (Xie et al., MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix
Cores, arXiv 2511.10909). So a device is asked before a model runs on it: millions of sums of numbers of unlike size, by the
kernels of a plan, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.cuda.launch import launch, placed
from nanoserve.kernels.cuda.gemm import gemm_plan
from nanoserve.kernels.panels import to_bfloat16
from nanoserve.native import CudaDevice, CudaKernel, CudaStream

_ROWS, _OUTPUTS, _K = 128, 256, 1024  # cut in four, 16 instructions a part
_POWERS = 6  # numbers are up to 2^6 times larger or smaller than usual ones
_CANCELLING, _ONES = 3, 3  # a row whose numbers cancel in pairs, times a row of ones
_ONE, _SIGN = np.uint16(0x3F80), np.uint16(0x8000)


class OtherBits(RuntimeError):
    """Two kernels that must agree do not, on this device."""


def specs(chip: Chip) -> tuple[GpuKernelSpec, ...]:
    """The kernels that are compared: a plan's for few rows, and those it has for many."""
    steps = gemm_plan(_K, _OUTPUTS, _K, _OUTPUTS, chip, x="bf16", dtype="bf16", wgmma=True).steps
    few = next(spec for _, spec in steps)
    return few, *(spec for _, spec in steps if spec.kind != few.kind)


def check_same_bits(device: CudaDevice, chip: Chip, kernel_of: Callable[[GpuKernelSpec], CudaKernel]) -> None:
    """Runs those kernels on the same numbers.

    Raises:
        OtherBits: a sum differs. CudaError: the device cannot run them.
    """
    stream, random = CudaStream(device), np.random.default_rng(0)
    x, w = (_numbers(random, rows) for rows in (_ROWS, _OUTPUTS))
    w[_ONES], x[_CANCELLING, 1::2] = _ONE, x[_CANCELLING, ::2] ^ _SIGN
    x_there, w_there = placed(stream, x), placed(stream, w)
    usual: NDArray[np.uint32] | None = None
    for spec in specs(chip):
        found = np.full((_ROWS, _OUTPUTS), np.nan, np.float32)
        y = placed(stream, found)
        launch(stream, kernel_of(spec), spec, [x_there, w_there, y, _ROWS])
        y.download(found)
        bits = found.view(np.uint32)
        usual = bits if usual is None else usual
        # What was not written is not a number.
        others = int(np.count_nonzero((bits != usual) | ~np.isfinite(found)))
        if others:
            raise OtherBits(
                f"gemm: wgmma: on {device.name} its bits are not those of mma ({others} of {found.size} sums differ), so that a "
                "row's would depend on how many run beside it: take mma, or cublas"
            )


def _numbers(random: np.random.Generator, rows: int) -> NDArray[np.uint16]:
    """Of bfloat16: normal ones times powers of two; a row of zeros, one of both kinds of zeros, one of subnormals."""
    values = random.standard_normal((rows, _K)) * 2.0 ** random.integers(-_POWERS, _POWERS + 1, (rows, _K))
    bits = to_bfloat16(values)
    bits[0] = 0
    bits[1] = random.integers(2, size=_K, dtype=np.uint16) * _SIGN
    bits[2] &= _SIGN | 0x7F
    return bits
