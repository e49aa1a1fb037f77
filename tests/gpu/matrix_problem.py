"""A matrix product with its operands as GPU kernels take them, and what it must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from compiler.gemm_problem import NarrowMatrix
from compiler.packed_call import call, padded
from gpu.run_kernel import launch as emulated
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.kernels import gemm as cpu_gemm
from nanoserve.kernels import panels
from nanoserve.kernels.cuda.layout import row_stride, weight_stride
from support.bfloat16 import from_bf16, to_bf16

NARROW = {
    "bf16": (to_bf16, from_bf16),
    "f16": (lambda v: v.astype(np.float16), lambda v: v.astype(np.float32)),
}


class MatrixProblem:
    """y = act(x w^T + b) (+ y), or act(gate) * up.

    Attributes:
        x, w: as they lie in memory, with bad numbers where no kernel may look; x64, w64: what they stand for.
        options: of the epilogue.
    """

    def __init__(
        self,
        m: int,
        k: int,
        n: int,
        *,
        x: str = "f32",
        dtype: str = "f32",
        y: str = "f32",
        seed: int = 0,
        **options: Any,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.m, self.k, self.n, self.y_type, self.x_type, self.dtype = m, k, n, y, x, dtype
        self.options = options
        self.gated = bool(options.get("gated"))
        self.ldx, self.ldy = row_stride(k) + 8, row_stride(n) + 8
        rows = (1 + self.gated) * n
        values = (
            np.random.default_rng(seed + 1).standard_normal((m, k)).astype(np.float32)
        )  # a prefix for any m
        self.x, self.x64 = self._stored(values, x, self.ldx)
        weight = (rng.standard_normal((rows, k)) / np.sqrt(k)).astype(np.float32)
        self.w, self.w64 = self._stored(weight, dtype, weight_stride(k, dtype))
        self.bias = rng.standard_normal(rows).astype(np.float32)
        self.y0 = np.random.default_rng(seed + 2).standard_normal((m + 2, self.ldy)).astype(np.float32)

    @staticmethod
    def _stored(values: np.ndarray, dtype: str, stride: int) -> tuple[np.ndarray, np.ndarray]:
        if dtype == "f32":
            stored = np.full((len(values), stride), np.nan, np.float32)
            stored[:, : values.shape[1]] = values
            return stored, values.astype(np.float64)
        narrow, wide = NARROW[dtype]
        bits = narrow(values)
        stored = np.full((len(values), stride), 0x7FC0 if dtype == "bf16" else np.nan, bits.dtype)
        stored[:, : values.shape[1]] = bits
        return stored, wide(bits).astype(np.float64)

    def run(
        self, spec: GpuKernelSpec, *, m: int | None = None, order: int = 0, chip: str = "sm_90",
        launch: Callable[..., None] = emulated,
    ) -> np.ndarray:  # fmt: skip
        """Rows of y; what lies beyond must be as it was."""
        count = self.m if m is None else m
        y = to_bf16(self.y0) if self.y_type == "bf16" else self.y0.copy()
        before = y.copy()
        bias = [self.bias] if self.options.get("bias") else []
        launch(spec, self.x[:count].copy(), self.w, *bias, y, count, order=order, chip=chip)
        assert y[count:].tobytes() == before[count:].tobytes(), "rows beyond m were written"
        assert y[:, self.n :].tobytes() == before[:, self.n :].tobytes(), "columns beyond n were written"
        return y[:count, : self.n].copy()

    def cpu(self) -> np.ndarray:
        """What the CPU's kernel gives."""
        m, k, n = self.m, self.k, self.n
        ldx, ldy = padded(k), padded(n)
        x, y = np.zeros((m, ldx), self.x.dtype), np.zeros((m, ldy), np.float32)
        x[:, :k], y[:, :n] = self.x[:, :k], self.y0[:m, :n]
        if self.y_type == "bf16":
            y = to_bf16(y)
        stored = np.ascontiguousarray(self.w[:, :k])
        if self.dtype == "f32":
            packed = panels.pack(stored, gated=self.gated)
        else:
            matrix = NarrowMatrix(stored) if self.dtype == "bf16" else _Halves(stored)
            packed = panels.pack(matrix, dtype=self.dtype, gated=self.gated)
        bias = [panels.pack_bias(self.bias, gated=self.gated)] if self.options.get("bias") else []
        spec = cpu_gemm.gemm_spec(
            k, n, ldx, ldy, x=self.x_type, dtype=self.dtype, y=self.y_type, **self.options
        )
        units = -(-n // cpu_gemm.panel_width(n)) * -(-m // cpu_gemm.ROW_BLOCK)
        call(spec, x, packed, *bias, y, m, 0, units)
        return y[:, :n].copy()

    def expected(self) -> np.ndarray:
        """In double."""
        import torch

        sums = self.x64 @ self.w64.T + (self.bias if self.options.get("bias") else 0)
        act = {
            None: lambda v: v,
            "silu": lambda v: np.asarray(torch.nn.functional.silu(torch.from_numpy(v))),
            "gelu_tanh": lambda v: np.asarray(
                torch.nn.functional.gelu(torch.from_numpy(v), approximate="tanh")
            ),
            "gelu_erf": lambda v: np.asarray(torch.nn.functional.gelu(torch.from_numpy(v))),
        }[self.options.get("activation")]
        if self.gated:
            return act(sums[:, : self.n].copy()) * sums[:, self.n :]
        value = act(sums) * self.options.get("scale", 1.0)
        cap = self.options.get("softcap", 0.0)
        if cap:
            value = np.tanh(value / cap) * cap
        return value + self.y0[: self.m, : self.n] if self.options.get("residual") else value


class _Halves(NarrowMatrix):
    """Of float16."""

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.bits[rows].astype(np.float32)

    def stored(self, begin: int, end: int) -> np.ndarray:
        return self.bits[begin:end].view(np.uint16)
