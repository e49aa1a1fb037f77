"""numpy arrays in the emulated device's memory."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np

from nanoserve.emulator.errors import EmulatorError, IllegalAddress
from nanoserve.emulator.library import library

_WRITTEN_PAST_ITS_END = 2


class DeviceArray:
    """A copy of an array in device memory, between pages that fault; freed when it is collected.

    `host` is a numpy array over the same bytes: writing it writes the device's memory.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        lib = library()
        address = lib.nvemu_allocate(array.nbytes)
        if address is None:
            raise EmulatorError(f"no memory for an array of {array.nbytes} bytes")
        self.address: int = address
        self._free = weakref.finalize(self, lib.nvemu_free, address)
        # An array of no elements has no bytes to look at, but an address all the same.
        buffer: Any = (ctypes.c_byte * array.nbytes).from_address(address) if array.nbytes else bytearray()
        self.host: np.ndarray[Any, Any] = np.frombuffer(buffer, dtype=array.dtype).reshape(array.shape)
        self.host[...] = array

    def free(self) -> None:
        """Give the memory back: `host` must not be used any more.

        Raises:
            IllegalAddress: somebody wrote the bytes behind its end.
        """
        if self._free() == _WRITTEN_PAST_ITS_END:
            raise IllegalAddress(f"the bytes behind an array of {self.host.nbytes} bytes were written")
