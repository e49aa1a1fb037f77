"""Where cuBLAS may be: nothing is linked, and nothing is installed for it.

The library is NVIDIA's; PyTorch for CUDA brings it in wheels of its own. NANOSERVE_CUBLAS names another file, and then that
alone will do.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

SONAMES = ("libcublas.so.13", "libcublas.so.12")
# Of the wheels nvidia-cublas (from CUDA 13 on) and nvidia-cublas-cu12, inside the package `nvidia`.
_WHEELS = (("cu13/lib", SONAMES[0]), ("cublas/lib", SONAMES[1]))


def cublas_paths() -> list[str]:
    """Files to try, in turn, and last the names for the system's loader to find."""
    named = os.environ.get("NANOSERVE_CUBLAS")
    if named:
        return [named]
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or ())
    files = (Path(root) / folder / soname for folder, soname in _WHEELS for root in roots)
    return [*(str(path) for path in files if path.exists()), *SONAMES]
