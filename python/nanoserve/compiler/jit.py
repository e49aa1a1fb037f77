"""Machine code: a function that builds a kernel -> object file -> shared object -> address.

LLVM's JIT compiles the module for this CPU and writes the object it made; a linker turns it into a shared object that the
cache keeps and dlopen maps. So the cold path and the warm path run the same bytes, and the warm one needs no compiler.
Where no linker is installed the JIT's own copy is used: everything works, nothing is kept for the next start.

Every kernel is called through `_mlir_<symbol>`, the wrapper MLIR adds: void f(void** args), args[i] pointing at argument i.
The object is position independent, so the mapping needs no text relocations and stays within what hardened systems allow.
Libraries stay loaded for the life of the process: their addresses live on in native plans nobody here knows of.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from nanoserve.compiler.bindings import mlir
from nanoserve.compiler.target import Target

_OPT_LEVEL = 3
_keep: list[Any] = []  # loaded libraries, and engines whose code runs in place


def keep_forever(engine: Any) -> None:
    """Never free an engine: its code is in use from here on."""
    _keep.append(engine)


class CompileError(RuntimeError):
    """A kernel could not be turned into code that can be called."""


@cache
def linker() -> tuple[str, ...] | None:
    """The command that makes a shared object, up to its files; None when none is installed."""
    for name, options in (("ld", ("-shared",)), ("cc", ("-shared", "-nostdlib"))):
        path = shutil.which(name)
        if path is not None:
            return (path, *options)
    return None


@cache
def context() -> Any:
    """One MLIR context for all kernels of the process: making one costs as much as building a kernel in it."""
    return mlir().ir.Context()


def build_module(build: Callable[[], None]) -> Any:
    """A module holding what `build` emits."""
    ir = mlir().ir
    with context(), ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            build()
    return module


def compile_kernel(build: Callable[[], None], target: Target) -> Any:
    """An execution engine that holds the kernel's code.

    Raises:
        MlirMissing: no bindings are installed.
    """
    from nanoserve.compiler.lowering import lower  # with MLIR, so that a warm start does without

    module = build_module(build)
    with context():
        lower(module, target)
        return mlir().ExecutionEngine(module, _OPT_LEVEL, enable_object_dump=True, enable_pic=True)


def shared_object(engine: Any, symbol: str) -> bytes:
    """The engine's code as a shared object.

    Raises:
        CompileError: the linker failed.
    """
    command = linker()
    if command is None:
        raise CompileError(f"kernel {symbol}: no linker (ld or cc) is installed")
    address_in_memory(
        engine, symbol
    )  # compiles; a dump alone would look for wrappers of internal helpers, which have none
    with tempfile.TemporaryDirectory(prefix="nanoserve-") as folder:
        source, linked = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        engine.dump_to_object_file(str(source))
        run = subprocess.run(
            [*command, "-o", linked, source], capture_output=True, text=True, errors="replace"
        )
        if run.returncode != 0:
            said = (run.stdout + run.stderr).strip()
            raise CompileError(f"kernel {symbol}: {command[0]} failed with status {run.returncode}: {said}")
        return linked.read_bytes()


def address_in_memory(engine: Any, symbol: str) -> int:
    """The wrapper's address in the engine's own memory, good while the engine lives."""
    address = engine.raw_lookup(symbol)
    if not address:
        raise CompileError(f"kernel {symbol}: the compiled module has no such function")
    return int(address)


def load(path: Path, symbol: str) -> int:
    """Map a shared object and return the address of the kernel's wrapper.

    Raises:
        CompileError: it cannot be mapped, or does not export the kernel.
    """
    try:
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        function = getattr(library, f"_mlir_{symbol}")
    except (OSError, AttributeError) as error:
        raise CompileError(
            f"kernel {symbol}: {path} cannot be used ({error}); a cache on a file system mounted noexec does this, "
            "NANOSERVE_CACHE_DIR chooses another"
        ) from error
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    _keep.append(library)
    return address
