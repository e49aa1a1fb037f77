"""Kernels written in Python with the calling convention of the compiled ones: void f(void** args).

ctypes takes Python's lock for each call, which is what makes these safe: the executor calls them from its own threads
after it has released that lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Signature = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_void_p))


class Args:
    """The arguments of one call, read by index; the last two are the range of work units."""

    def __init__(self, raw: Any, count: int) -> None:
        self._raw = raw
        self.begin = self.integer(count)
        self.end = self.integer(count + 1)

    def integer(self, index: int) -> int:
        return ctypes.cast(self._raw[index], ctypes.POINTER(ctypes.c_int64))[0]

    def array(self, index: int, shape: tuple[int, ...], dtype: type = np.float32) -> NDArray[Any]:
        address = ctypes.cast(self._raw[index], ctypes.POINTER(ctypes.c_void_p))[0]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        buffer = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(buffer, dtype).reshape(shape)


class PythonKernel:
    """Keep this object for as long as the plan that has its address."""

    def __init__(self, body: Callable[[Args], None], num_args: int) -> None:
        self.errors: list[BaseException] = []
        self.ranges: list[tuple[int, int]] = []

        def call(raw: Any) -> None:
            try:
                args = Args(raw, num_args)
                self.ranges.append((args.begin, args.end))
                body(args)
            except BaseException as error:  # an exception cannot cross the C frames; the test looks here
                self.errors.append(error)

        self._callback = _Signature(call)
        self.address: int = ctypes.cast(self._callback, ctypes.c_void_p).value or 0
