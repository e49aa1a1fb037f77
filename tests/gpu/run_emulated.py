"""Launching the kernels of emulated_kernels.py and comparing what they compute with numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu import emulated_kernels
from nanoserve.emulator import Emulator
from support.bfloat16 import from_bf16, to_bf16

Array = np.ndarray[Any, Any]
ORDERS = (0, 1, 2, 3)


def run_rms_norm(emulator: Emulator, rows: int, n: int, order: int) -> None:
    rng = np.random.default_rng(rows * 1000 + n)
    x, w = rng.standard_normal((rows, n), np.float32), rng.standard_normal(n, np.float32)
    y = np.full_like(x, np.nan)
    emulator.launch("rms_norm", rows, emulated_kernels.NORM_THREADS, 0, [x, w, y, n, 1e-5], order)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(
        y, wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * w, rtol=2e-6, atol=2e-6
    )


def run_gemm(emulator: Emulator, kernel: str, m: int, n: int, k: int, order: int) -> Array:
    """C as the kernel computes it, checked to be A B within float32 sums."""
    rng = np.random.default_rng(m + 100 * n + 10000 * k)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32)
    c = np.full((m, n), np.nan, np.float32)
    if kernel == "gemm_f32":
        tile, threads, shared = emulated_kernels.F32_TILE, emulated_kernels.F32_THREADS, 0
        args: list[Array] = [a, np.ascontiguousarray(b.T)]
    else:
        tile, threads = emulated_kernels.MMA_TILE, emulated_kernels.MMA_THREADS
        shared = (
            2 * emulated_kernels.WGMMA_STAGES * tile * emulated_kernels.WGMMA_TILE_K * 2
            if kernel == "gemm_wgmma"
            else 0
        )
        args = [to_bf16(a), to_bf16(b)]
        a, b = (from_bf16(bits) for bits in args)
    emulator.launch(kernel, (-(-n // tile), -(-m // tile)), threads, shared, [*args, c, m, n, k], order)
    np.testing.assert_allclose(
        c, a.astype(np.float64) @ b.astype(np.float64).T, rtol=1e-5, atol=1e-5 * k**0.5
    )
    return c
