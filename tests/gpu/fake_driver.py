"""The driver API through ctypes, for tests of the fake one: every call raises what it returns, if that is not zero."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from nanoserve.emulator import FAKE_DRIVER, library_path
from nanoserve.emulator.library import library

NON_BLOCKING = 1
C_TYPES = {int: ctypes.c_int64, float: ctypes.c_float}


class CudaError(Exception):
    def __init__(self, function: str, code: int, message: str) -> None:
        super().__init__(f"{function}: error {code}: {message}")
        self.code = code


@cache
def own_library() -> ctypes.CDLL:
    """The driver's library a second time, from a copy: engines of other tests may hold the context of the first."""
    library()  # which the copy needs and does not find beside it: it is there already
    with TemporaryDirectory() as folder:
        return ctypes.CDLL(str(shutil.copy(library_path(FAKE_DRIVER), folder)))


class FakeDriver:
    """The library, or another copy of it, a retained primary context that is current, and shorthands."""

    def __init__(self, lib: ctypes.CDLL | None = None) -> None:
        self.lib = ctypes.CDLL(str(library_path(FAKE_DRIVER))) if lib is None else lib
        self.lib.fake_cuda_message.restype = ctypes.c_char_p
        self.lib.fake_cuda_num_launches.restype = ctypes.c_uint64

    def open(self) -> None:
        self.call("cuInit", 0)
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)

    def close(self) -> None:
        self.call("cuDevicePrimaryCtxRelease_v2", 0)

    def call(self, function: str, *args: Any) -> None:
        """Integers are passed as 64 bits: narrower parameters take their low half."""
        wide = [ctypes.c_uint64(arg & 2**64 - 1) if isinstance(arg, int) else arg for arg in args]
        code = getattr(self.lib, function)(*wide)
        if code != 0:
            raise CudaError(function, code, self.message)

    @property
    def message(self) -> str:
        text: bytes = self.lib.fake_cuda_message()
        return text.decode()

    @property
    def num_launches(self) -> int:
        return int(self.lib.fake_cuda_num_launches())

    def handle(self, function: str, *args: Any) -> int:
        """Calls what makes something and puts its handle, or number, first."""
        out = ctypes.c_uint64(0)
        self.call(function, ctypes.byref(out), *args)
        return out.value

    def number(self, function: str, *args: Any) -> int:
        out = ctypes.c_int(-1)
        self.call(function, ctypes.byref(out), *args)
        return out.value

    def stream(self, flags: int = NON_BLOCKING) -> int:
        return self.handle("cuStreamCreate", flags)

    def alloc(self, num_bytes: int) -> int:
        return self.handle("cuMemAlloc_v2", num_bytes)

    def upload(self, array: np.ndarray[Any, Any]) -> int:
        """A copy of an array on the device, there already."""
        address = self.alloc(array.nbytes)
        self.call("cuMemcpyHtoD_v2", address, array.ctypes.data, array.nbytes)
        self.call("cuCtxSynchronize")
        return address

    def download(self, address: int, count: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        out = np.zeros(count, dtype)
        self.call("cuMemcpyDtoH_v2", out.ctypes.data, address, out.nbytes)
        return out

    def pinned(self, count: int) -> np.ndarray[Any, Any]:
        """Page-locked host memory: count float32."""
        address = self.handle("cuMemHostAlloc", 4 * count, 0)
        return np.frombuffer((ctypes.c_float * count).from_address(address), np.float32)

    def load(self, image: bytes, kernel: str) -> int:
        return self.handle("cuModuleGetFunction", self.handle("cuModuleLoadData", image), kernel.encode())

    def launch(
        self,
        function: int,
        args: Sequence[int | float | bytes],
        stream: int = 0,
        grid: Sequence[int] = (1, 1, 1),
        block: Sequence[int] = (1, 1, 1),
        shared_bytes: int = 0,
    ) -> None:
        values = [
            ctypes.create_string_buffer(arg, len(arg)) if isinstance(arg, bytes) else C_TYPES[type(arg)](arg)
            for arg in args
        ]
        params = (ctypes.c_void_p * max(1, len(values)))(*[ctypes.addressof(value) for value in values])
        self.call("cuLaunchKernel", function, *grid, *block, shared_bytes, stream, params, 0)
        # What the driver took is what it uses: these may change now.
        for value in values:
            ctypes.memset(ctypes.addressof(value), 0xEE, ctypes.sizeof(value))

    def capture(self, stream: int, mode: int = 0) -> None:
        self.call("cuStreamBeginCapture_v2", stream, mode)

    def end_capture(self, stream: int) -> int:
        """The executable of what was captured; the graph itself is destroyed."""
        out = ctypes.c_uint64(0)
        self.call("cuStreamEndCapture", stream, ctypes.byref(out))
        executable = self.handle("cuGraphInstantiateWithFlags", out.value, 0)
        self.call("cuGraphDestroy", out.value)
        return executable


@contextmanager
def own_driver() -> Iterator[FakeDriver]:
    """Of own_library(), open; the device is what the environment says now."""
    driver = FakeDriver(own_library())
    driver.open()
    try:
        yield driver
    finally:
        driver.close()
