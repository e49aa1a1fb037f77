"""Call a kernel the way the native executor does: void f(void** args), args[i] pointing at argument i."""

from __future__ import annotations

import ctypes
import math

import numpy as np

from nanoserve.compiler import jit
from nanoserve.compiler.target import Target, host
from nanoserve.kernels.library import KernelSpec, load_kernels

Argument = np.ndarray | int


def call_address(address: int, *args: Argument) -> None:
    values = [
        ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_int64(a) for a in args
    ]
    packed = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(packed))


def call(spec: KernelSpec, *args: Argument, target: Target | None = None) -> None:
    for a in args:
        assert not isinstance(a, np.ndarray) or a.flags.c_contiguous
    call_address(load_kernels([spec], target=target)[spec], *args)


def elementwise(name: str, function, x: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    """A vector function of the authoring layer applied to float32[n], n a multiple of 16."""

    def build() -> None:
        from nanoserve.compiler.control import UNBOUNDED, array, kernel, loop

        @kernel(name, x=array(UNBOUNDED), y=array(UNBOUNDED), n="index")
        def _(x, y, n):  # type: ignore[no-untyped-def]
            @loop(0, n, 16)
            def _(i):  # type: ignore[no-untyped-def]
                y.store(function(x.load(i)), i)

    x = np.ascontiguousarray(x, dtype=np.float32)
    y = np.empty_like(x)
    assert x.size % 16 == 0
    engine = jit.compile_kernel(build, host())
    call_address(jit.address_in_memory(engine, name), x, y, x.size)
    return y


def ulp_error(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Distance from the exact value (float64) in units of float32's last place there."""
    return np.abs(got.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(
        np.float64
    )


def padded(cols: int) -> int:
    """The native executor's row stride for activations."""
    return -(-cols // 64) * 64 + 16


def act64(name: str | None, x: np.ndarray) -> np.ndarray:
    """An activation in float64."""
    x = x.astype(np.float64)
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    if name == "gelu_erf":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    return x
