"""Arguments that a kernel takes as a tensor map: an array, and how the copy engine sees it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanoserve.compiler.gpu.spec import TensorForm
from nanoserve.emulator.errors import InvalidLaunch
from nanoserve.emulator.library import TensorMapRequest, library

TENSOR_MAP_BYTES = 128
_ALIGNMENT = 64
_BFLOAT16 = 9  # CUtensorMapDataType
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle, by bytes
_ELEMENT_BYTES = 2


@dataclass(frozen=True)
class TensorArgument:
    """An argument of Emulator.launch. Its outermost dimension has as many elements as the array has room for."""

    array: np.ndarray[Any, Any]
    form: TensorForm

    def encoded(self, address: int) -> Any:
        """The 128 bytes for the array's copy at an address.

        Raises:
            InvalidLaunch: the driver would refuse it.
        """
        form = self.form
        strides = [stride * _ELEMENT_BYTES for stride in form.strides]
        dims = [*form.dims, self.array.nbytes // strides[-1]]
        rank = len(dims)
        bytes_ = (ctypes.c_char * (TENSOR_MAP_BYTES + _ALIGNMENT))()
        skipped = -ctypes.addressof(bytes_) % _ALIGNMENT
        out = (ctypes.c_char * TENSOR_MAP_BYTES).from_buffer(bytes_, skipped)
        message = ctypes.create_string_buffer(512)
        request = TensorMapRequest(
            data_type=_BFLOAT16, rank=rank, address=address, dims=(ctypes.c_uint64 * rank)(*dims),
            strides=(ctypes.c_uint64 * (rank - 1))(*strides), box=(ctypes.c_uint32 * rank)(*form.box),
            element_strides=(ctypes.c_uint32 * rank)(*[1] * rank), swizzle=_SWIZZLES[form.swizzle],
        )  # fmt: skip
        if library().nvemu_encode_tensor_map(ctypes.byref(request), out, message, len(message)):
            raise InvalidLaunch(f"no tensor map of {form}: {message.value.decode()}")
        return out
