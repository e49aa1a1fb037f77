"""out[row, j] = act(gate[j]) * up[j], where a row of gate_up is [gate | up]: SwiGLU and GeGLU.

Numerics: element by element, nothing is summed. Work units are rows.
"""

from __future__ import annotations

from typing import Any

from nanoserve.compiler.target import Target
from nanoserve.kernels.library import KernelSpec

ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf")


def gated_spec(cols: int, activation: str, ldx: int, ldo: int, *, dtype: str = "f32") -> KernelSpec:
    """Args: gate_up[.][ldx], out[.][ldo], begin, end over rows."""
    if cols < 1 or ldx < 2 * cols or ldo < cols:
        raise ValueError(
            f"gated: [gate | up] of {cols} columns each in rows of {ldx}, out in rows of {ldo} do not fit"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated: activation {activation!r} must be one of {ACTIVATIONS}")
    if dtype != "f32":
        raise ValueError(f"gated: dtype {dtype!r} is not supported, only 'f32'")
    return KernelSpec.make("gated", c=cols, activation=activation, ldx=ldx, ldo=ldo, dtype=dtype)


def build(symbol: str, target: Target, *, c: int, activation: str, ldx: int, ldo: int, dtype: str) -> None:
    from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop, over
    from nanoserve.compiler.vector_math import activate

    @kernel(symbol, gate_up=array(UNBOUNDED, ldx), out=array(UNBOUNDED, ldo), begin="index", end="index")
    def _(gate_up: Any, out: Any, begin: Any, end: Any) -> None:
        @loop(begin, end)
        def _(row: Any) -> None:
            @over(c)
            def _(at: Any, width: int) -> None:
                gate = gate_up.load(row, at, width=width)
                up = gate_up.load(row, at + c, width=width)
                out.store(activate(activation, gate) * up, row, at)
