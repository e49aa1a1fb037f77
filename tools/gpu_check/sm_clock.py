"""The clock of a device's multiprocessors right now, from NVIDIA's management library: a number of a slow clock is no limit."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_SM = 1  # NVML_CLOCK_SM


@cache
def _device() -> tuple[Any, ctypes.c_void_p] | None:
    """The library and its first device; None where there is no such library, or it knows none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device = ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
        return None
    return library, device


def sm_mhz() -> int | None:
    """None where it cannot be read."""
    found = _device()
    if found is None:
        return None
    library, device = found
    clock = ctypes.c_uint()
    failed = library.nvmlDeviceGetClockInfo(device, _SM, ctypes.byref(clock))
    return None if failed else int(clock.value)
