"""What a GEMM does to its sums, as kernels/gemm.py: y = cap(act(sum + bias) * scale) (+ y), or act(gate) * up.

Each part only where the spec has it, each rounded by itself; a bfloat16 y is rounded to nearest even at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanoserve.compiler.gpu.spec import Param
from nanoserve.kernels.gemm import ACTIVATIONS

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Operand, Value
    from nanoserve.compiler.gpu.memory import Array


@dataclass(frozen=True, slots=True)
class Epilogue:
    """Options as decoder.Gemm's; `bias` is [n], or [2 * n] of a gated GEMM, its gates first."""

    bias: bool = False
    activation: str | None = None
    residual: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    gated: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"gemm: activation {self.activation!r} must be one of {ACTIVATIONS}")
        if not math.isfinite(self.scale):
            raise ValueError(f"gemm: scale={self.scale} must be finite")
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"gemm: softcap={self.softcap} must be finite and at least 0, 0 for none")
        if self.gated and (self.activation is None or self.residual or self.scale != 1.0 or self.softcap):
            raise ValueError("gemm: gated needs an activation, and excludes residual, scale and softcap")

    @property
    def params(self) -> dict[str, Param]:
        """For a spec; Epilogue(**params) is this again."""
        return {
            "bias": self.bias, "activation": self.activation, "residual": self.residual, "scale": float(self.scale),
            "softcap": float(self.softcap), "gated": self.gated,
        }  # fmt: skip

    def store(
        self, sums: Value, ups: Value | None, y: Array, bias: Array | None, n: int, row: Value, column: Value,
        before: Value | None = None,
    ) -> None:  # fmt: skip
        """Finishes neighbouring sums of a row and writes them, as `finished`."""
        y.store(self.finished(sums, ups, y, bias, n, row, column, before), row, column)

    def finished(
        self, sums: Value, ups: Value | None, y: Array, bias: Array | None, n: int, row: Value, column: Value,
        before: Value | None = None,
    ) -> Value:  # fmt: skip
        """Of neighbouring sums of a row, with those of `ups` where gated, what is written to y; all are inside.

        Who has several takes all of them before it writes any: behind a store, each load would wait for memory by itself.

        before: what is there, of an epilogue that adds it, where it is known already.
        """
        from nanoserve.compiler.builder import widen
        from nanoserve.compiler.gpu.memory import rounded
        from nanoserve.compiler.vector_math import activate, soft_cap

        def biased(value: Value, first: Operand) -> Value:
            return value if bias is None else value + bias.load(first, width=value.width)

        value = activate(self.activation, biased(sums, column))
        if ups is not None:
            value = value * biased(ups, column + n)
        if self.scale != 1.0:
            value = value * self.scale
        if self.softcap:
            value = soft_cap(value, self.softcap)
        if self.residual:
            value = value + widen(y.load(row, column, width=value.width) if before is None else before)
        return rounded(value, y.element)
