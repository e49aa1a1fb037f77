"""A GEMM with its operands in the kernel's layout, for each of its arithmetics, and what it must give."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from compiler.packed_call import act64, call_address, padded
from nanoserve.compiler.target import Target, host
from nanoserve.kernels import gemm, panels
from nanoserve.kernels.library import load_kernels
from support.bfloat16 import from_bf16, to_bf16

ARITHMETICS = {
    "f32": ("f32", "f32"),
    "bf16-weight": ("f32", "bf16"),
    "bf16": ("bf16", "bf16"),
    "int8": ("u8", "i8"),
}


@dataclass
class NarrowMatrix:
    """What panels.pack reads a 16-bit weight from."""

    bits: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def __getitem__(self, rows: slice) -> np.ndarray:
        return from_bf16(self.bits[rows])

    def stored(self, begin: int, end: int) -> np.ndarray:
        return self.bits[begin:end]


def quantised_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(u8 codes around 128, float32 scale per row)."""
    scale = (np.abs(x).max(axis=1) / 127).astype(np.float32)
    return (np.rint(x / scale[:, None]) + 128).astype(np.uint8), scale


class NarrowProblem:
    """y = act(x w^T + b) (+ y), or act(gate) * up, in one arithmetic.

    Attributes:
        x64, w64: what the operands stand for, float64: of int8 the integers without their scales.
    """

    def __init__(
        self, arithmetic: str, m: int, k: int, n: int, *, seed: int = 0, target: Target | None = None,
        y: str = "f32", gated: bool = False, bias: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        self.m, self.k, self.n, self.target, self.gated, self.y_type = m, k, n, target, gated, y
        x_type, dtype = ARITHMETICS[arithmetic]
        self.is_int8 = dtype == "i8"
        weight = (rng.standard_normal(((1 + gated) * n, k)) / np.sqrt(k)).astype(np.float32)
        self.bias = rng.standard_normal(len(weight)).astype(np.float32) if bias else None
        y0 = rng.standard_normal((m + 2, padded(n))).astype(np.float32)
        x = (
            np.random.default_rng(seed + 1).standard_normal((m, k)).astype(np.float32)
        )  # row by row: a prefix for any m
        self.options = options
        self.scale = np.float64(1)
        operands: list[np.ndarray]
        if self.is_int8:
            codes, scale = quantised_rows(x)
            stored = np.full((m, padded(k)), 201, np.uint8)
            packed = panels.pack_int8(weight, target, gated=gated)
            operands = [stored, scale, packed.panels, packed.scale, packed.sums]
            largest = np.abs(weight).max(axis=1) / np.float32(127)
            self.w64 = np.rint(weight / largest[:, None]).astype(np.float64)
            self.x64 = codes.astype(np.float64) - 128
            self.scale = scale.astype(np.float64)[:, None] * largest.astype(np.float64)
        elif x_type == "bf16":
            codes, stored = to_bf16(x), np.full((m, padded(k)), 0x7FC0, np.uint16)
            operands = [stored, panels.pack(NarrowMatrix(to_bf16(weight)), target, "bf16", gated=gated)]
            self.x64 = from_bf16(codes).astype(np.float64)
            self.w64 = from_bf16(to_bf16(weight)).astype(np.float64)
        else:
            codes, stored = x, np.full((m, padded(k)), np.nan, np.float32)
            rows: Any = weight if dtype == "f32" else NarrowMatrix(to_bf16(weight))
            operands = [stored, panels.pack(rows, target, dtype, gated=gated)]
            self.x64, self.w64 = x.astype(np.float64), np.asarray(rows[0 : len(weight)]).astype(np.float64)
        stored[:, :k] = codes
        if bias:
            assert self.bias is not None
            operands.append(panels.pack_bias(self.bias, target, gated=gated))
        self.operands, self.y0 = operands, to_bf16(y0) if y == "bf16" else y0
        self.width = gemm.panel_width(n, target)
        self.units = -(-n // self.width) * -(-m // gemm.ROW_BLOCK)
        self.spec = gemm.gemm_spec(
            k, n, padded(k), padded(n), x=x_type, dtype=dtype, y=y, bias=bias, gated=gated, **options
        )

    def run(self, *edges: int, m: int | None = None, first: int = 0) -> np.ndarray:
        """y after the units between successive edges, all by default; of `m` rows from `first` on, all by default."""
        m = self.m - first if m is None else m
        address = load_kernels([self.spec], target=self.target or host())[self.spec]
        y = self.y0[first : first + m].copy()
        units = self.units // -(-self.m // gemm.ROW_BLOCK) * -(-m // gemm.ROW_BLOCK)
        x, *rest = self.operands
        if self.is_int8:
            rest[0] = rest[0][first : first + m].copy()
        rows = x[first : first + m].copy()
        for begin, end in pairwise(edges or (0, units)):
            call_address(address, rows, *rest, y, m, begin, end)
        return y

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """(x w^T + b, the same of absolute values), float64."""
        exact, size = (
            (self.x64 @ self.w64.T) * self.scale,
            (np.abs(self.x64) @ np.abs(self.w64).T) * self.scale,
        )
        if self.bias is not None:
            exact, size = exact + self.bias, size + np.abs(self.bias)
        return exact, size

    def exact(self) -> np.ndarray:
        value, _ = self.sums()
        activation = self.options.get("activation")
        if self.gated:
            return act64(activation, value[:, : self.n]) * value[:, self.n :]
        return act64(activation, value)

    def values(self, y: np.ndarray) -> np.ndarray:
        """y[:, :n] as float64."""
        part = np.ascontiguousarray(y[:, : self.n])
        return (from_bf16(part) if self.y_type == "bf16" else part).astype(np.float64)
