"""Runs the kernels of a GPU module on this machine."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanoserve.emulator.device_array import DeviceArray
from nanoserve.emulator.errors import BY_KIND, EmulatorError, InvalidLaunch
from nanoserve.emulator.image import compile_host
from nanoserve.emulator.library import Failure, LaunchRequest, library
from nanoserve.emulator.module_table import Kernel
from nanoserve.emulator.rewrite import rewrite
from nanoserve.emulator.tensor_map import TENSOR_MAP_BYTES, TensorArgument

Argument = np.ndarray[Any, Any] | DeviceArray | TensorArgument | int | float
_C_TYPES: dict[str, Any] = {
    "i1": ctypes.c_uint8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


class Emulator:
    """A GPU module: LLVM IR text as the NVPTX code generator gets it.

    Attributes:
        image: what the fake driver loads. kernels: by name.

    Raises:
        UnsupportedInstruction: it uses what the emulator does not know.
        EmulatorMissing: the native library, llvmlite or a linker is missing.
    """

    def __init__(self, llvm_ir: str) -> None:
        module = rewrite(llvm_ir)
        self.kernels: dict[str, Kernel] = module.kernels
        self.image = compile_host(module)
        message = ctypes.create_string_buffer(512)
        handle = library().nvemu_load_image(self.image, message, len(message))
        if handle is None:
            raise EmulatorError(message.value.decode())
        weakref.finalize(self, library().nvemu_unload_image, handle)
        self._table = library().nvemu_module_table(handle)
        table = self._table.contents
        entries = [table.kernels[i] for i in range(table.num_kernels)]
        self._entries = {entry.name.decode(): entry for entry in entries}

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        shared_bytes: int,
        args: Sequence[Argument],
        order: int = 0,
    ) -> None:
        """Run a grid to its end.

        Args:
            grid, block: up to three numbers each. shared_bytes: dynamic shared memory.
            args: as the kernel declares them. A numpy array is copied into memory of its own, between guard pages, and
                copied back if it may be written, and so is that of a TensorArgument, which is only read; a DeviceArray, or an
                address, is used as it is.
            order: of threads and blocks. 0 runs each warp as far as it gets, 1 does so backwards, others are random
                with this seed.

        Raises:
            EmulatorError: one of its kinds, with kernel, block, thread and address.
        """
        if kernel not in self._entries:
            raise InvalidLaunch(f"no kernel {kernel!r}, the module has {sorted(self._entries)}", kernel)
        types = self.kernels[kernel].param_types
        if len(args) != len(types):
            raise InvalidLaunch(f"{kernel}: {len(args)} arguments for {len(types)} parameters", kernel)
        arrays = [arg.array if isinstance(arg, TensorArgument) else arg for arg in args]
        copies = [DeviceArray(array) if isinstance(array, np.ndarray) else None for array in arrays]
        values = [
            _parameter(kernel, i, type_, arg, copy)
            for i, (type_, arg, copy) in enumerate(zip(types, args, copies, strict=True))
        ]
        pointers = [ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values]
        request = LaunchRequest(
            module=self._table,
            kernel=ctypes.pointer(self._entries[kernel]),
            params=(ctypes.c_void_p * max(1, len(pointers)))(*pointers),
            grid=_dimensions(kernel, grid),
            block=_dimensions(kernel, block),
            dynamic_shared_bytes=shared_bytes,
            order=order,
        )
        failure = Failure()
        if library().nvemu_launch(ctypes.byref(request), ctypes.byref(failure)) != 0:
            raise _error(kernel, failure, copies)
        for arg, copy in zip(args, copies, strict=True):
            if copy is not None:
                if isinstance(arg, np.ndarray) and arg.flags.writeable:
                    arg[...] = copy.host
                copy.free()


def _dimensions(kernel: str, numbers: int | Sequence[int]) -> Any:
    given = [numbers] if isinstance(numbers, int) else list(numbers)
    if not 1 <= len(given) <= 3 or any(not 0 <= number < 2**32 for number in given):
        raise InvalidLaunch(f"{kernel}: dimensions {given}, must be one to three numbers", kernel)
    return (ctypes.c_uint32 * 3)(*given, *[1] * (3 - len(given)))


def _parameter(kernel: str, index: int, type_: str, arg: Argument, copy: DeviceArray | None) -> Any:
    """The value of a parameter; `copy` is what an array became."""
    if isinstance(arg, TensorArgument):
        if type_ != f"[{TENSOR_MAP_BYTES} x i8]" or copy is None:
            raise InvalidLaunch(
                f"{kernel}: argument {index} is a tensor map, the kernel takes {type_}", kernel
            )
        return arg.encoded(copy.address)
    placed = arg if copy is None else copy
    if type_.startswith("ptr"):
        if isinstance(placed, float):
            raise InvalidLaunch(f"{kernel}: argument {index} is {placed}, the kernel takes a pointer", kernel)
        return ctypes.c_uint64(placed.address if isinstance(placed, DeviceArray) else int(placed))
    c_type = _C_TYPES.get(type_)
    if c_type is None or isinstance(placed, DeviceArray):
        raise InvalidLaunch(
            f"{kernel}: argument {index} is {type(placed).__name__}, the kernel takes {type_}", kernel
        )
    return c_type(placed)


def _error(kernel: str, failure: Failure, copies: Sequence[DeviceArray | None]) -> EmulatorError:
    kind = BY_KIND[failure.kind]
    block, thread = tuple(failure.block), tuple(failure.thread)
    text = failure.message.decode(errors="replace")
    if kind is InvalidLaunch:
        return InvalidLaunch(f"{kernel}: {text}", kernel)
    place = f"kernel {kernel}, block {block}, thread {thread}"
    if failure.line:
        place += f", line {failure.line}"
    if failure.address:
        place += f", address {failure.address:#x}{_nearest(failure.address, copies)}"
    return kind(f"{place}: {text}", kernel, block, thread, failure.address, failure.line)


def _nearest(address: int, copies: Sequence[DeviceArray | None]) -> str:
    """Where an address is in terms of the arguments, if it is near one."""
    for i, copy in enumerate(copies):
        if copy is not None and -4096 <= address - copy.address < copy.host.nbytes + 4096:
            return f" (byte {address - copy.address} of argument {i}, which has {copy.host.nbytes})"
    return ""
