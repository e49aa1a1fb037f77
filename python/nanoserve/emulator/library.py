"""Finds and loads the native half, libnvemu, and describes its interface (src/emulator/abi.h) to ctypes.

It is built by `make emulator` (cmake --build build/x64-release --target nvemu fakecuda) and looked for in `build/<preset>/` of
the checkout; `NANOSERVE_EMULATOR=/path/to/directory` says where else.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path

from nanoserve.emulator.errors import EmulatorMissing

_ROOT = Path(__file__).resolve().parents[3]
_PRESETS = ("x64-release", "x64-debug")
EMULATOR = "libnvemu.so"
FAKE_DRIVER = "libfakecuda.so"


class KernelEntry(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("call", ctypes.c_void_p),
        ("param_bytes", ctypes.POINTER(ctypes.c_uint32)),
        ("num_params", ctypes.c_uint32),
        ("static_shared_bytes", ctypes.c_uint32),
        ("max_threads", ctypes.c_uint32),
        ("required_threads", ctypes.c_uint32),
        ("awaits_previous", ctypes.c_uint32),
    ]


class ModuleTable(ctypes.Structure):
    _fields_ = [
        ("abi_version", ctypes.c_uint32),
        ("num_kernels", ctypes.c_uint32),
        ("kernels", ctypes.POINTER(KernelEntry)),
    ]  # the rest is not looked at from here


class LaunchRequest(ctypes.Structure):
    _fields_ = [
        ("module", ctypes.POINTER(ModuleTable)),
        ("kernel", ctypes.POINTER(KernelEntry)),
        ("params", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared_bytes", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
    ]


class Failure(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("line", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("message", ctypes.c_char * 512),
    ]


class TensorMapRequest(ctypes.Structure):
    _fields_ = [
        ("data_type", ctypes.c_uint32),
        ("rank", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("dims", ctypes.POINTER(ctypes.c_uint64)),
        ("strides", ctypes.POINTER(ctypes.c_uint64)),
        ("box", ctypes.POINTER(ctypes.c_uint32)),
        ("element_strides", ctypes.POINTER(ctypes.c_uint32)),
        ("interleave", ctypes.c_uint32),
        ("swizzle", ctypes.c_uint32),
        ("l2_promotion", ctypes.c_uint32),
        ("oob_fill", ctypes.c_uint32),
    ]


def library_path(name: str = EMULATOR) -> Path:
    """Where a library of the emulator is.

    Raises:
        EmulatorMissing: it is not built, or cannot be built for this machine.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise EmulatorMissing(
            f"the CUDA emulator runs on x86-64 Linux only, this is {platform.machine()} {sys.platform}"
        )
    override = os.environ.get("NANOSERVE_EMULATOR")
    places = [Path(override)] if override else [_ROOT / "build" / preset for preset in _PRESETS]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise EmulatorMissing(
        f"{name} is not in {', '.join(map(str, places))}: build it with `cmake --preset x64-release && "
        "cmake --build build/x64-release --target nvemu fakecuda`"
    )


@cache
def library() -> ctypes.CDLL:
    """libnvemu, loaded once per process."""
    lib = ctypes.CDLL(str(library_path()))
    lib.nvemu_launch.argtypes = [ctypes.POINTER(LaunchRequest), ctypes.POINTER(Failure)]
    lib.nvemu_launch.restype = ctypes.c_int32
    lib.nvemu_allocate.argtypes = [ctypes.c_uint64]
    lib.nvemu_allocate.restype = ctypes.c_void_p
    lib.nvemu_free.argtypes = [ctypes.c_void_p]
    lib.nvemu_free.restype = ctypes.c_int32
    lib.nvemu_load_image.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64]
    lib.nvemu_load_image.restype = ctypes.c_void_p
    lib.nvemu_unload_image.argtypes = [ctypes.c_void_p]
    lib.nvemu_unload_image.restype = None
    lib.nvemu_module_table.argtypes = [ctypes.c_void_p]
    lib.nvemu_module_table.restype = ctypes.POINTER(ModuleTable)
    lib.nvemu_encode_tensor_map.argtypes = [
        ctypes.POINTER(TensorMapRequest), ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64,
    ]  # fmt: skip
    lib.nvemu_encode_tensor_map.restype = ctypes.c_int32
    return lib
