"""Machine code: lowered module -> object file -> shared object -> address.

LLVM's JIT compiles the module for this CPU and writes the object it made; a linker turns it into a shared object that the
cache keeps and dlopen maps. So the cold path and the warm path run the same bytes, and the warm one needs no compiler.
Where no linker is installed the JIT's own copy is used: everything works, nothing is kept for the next start.

Every kernel is called through `_mlir_<symbol>`, the wrapper MLIR adds: void f(void** args), args[i] pointing at argument i.
Libraries stay loaded for the life of the process: their addresses live on in native plans nobody here knows of.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from nanoserve.compiler.target import Target

_log = logging.getLogger("nanoserve.compiler")
_OPT_LEVEL = 3
_keep: list[Any] = []  # loaded libraries, and engines whose code runs in place


class CompileError(RuntimeError):
    """A kernel could not be turned into code that can be called."""


@cache
def linker() -> tuple[str, ...] | None:
    """The command that makes a shared object, up to the output; None when none is installed."""
    for name, options in (("ld", ("-shared",)), ("cc", ("-shared", "-nostdlib"))):
        path = shutil.which(name)
        if path is not None:
            return (path, *options)
    return None


@cache
def context() -> Any:
    """One MLIR context for all kernels of the process: making one costs as much as building a kernel in it."""
    from nanoserve.compiler.bindings import mlir

    return mlir().ir.Context()


def build_module(build: Callable[[], None]) -> Any:
    """A module holding what `build` emits."""
    from nanoserve.compiler.bindings import mlir

    ir = mlir().ir
    with context(), ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            build()
    return module


class Compilation:
    """A kernel on its way to a shared object; the linker runs beside the next kernel's compilation."""

    def __init__(self, symbol: str, build: Callable[[], None], target: Target) -> None:
        from nanoserve.compiler.bindings import mlir
        from nanoserve.compiler.lowering import lower

        self.symbol = symbol
        module = build_module(build)
        with context():
            lower(module, target)
            self._engine = mlir().ExecutionEngine(module, _OPT_LEVEL, enable_object_dump=True, enable_pic=True)
        self._linking: subprocess.Popen[bytes] | None = None
        command = linker()
        if command is None:
            _log.warning("no linker (ld or cc): kernel %s runs from memory and will be compiled again next time", symbol)
            return
        self._folder = tempfile.TemporaryDirectory(prefix="nanoserve-")
        source, self._object = Path(self._folder.name, "kernel.o"), Path(self._folder.name, "kernel.so")
        self._engine.raw_lookup(symbol)  # compiles; the dump is empty before
        self._engine.dump_to_object_file(str(source))
        self._linking = subprocess.Popen(
            [*command, "-o", str(self._object), str(source)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def shared_object(self) -> bytes | None:
        """The linked object; None where there is no linker, then `address_in_memory` is the kernel."""
        if self._linking is None:
            return None
        said = self._linking.communicate()[0].decode(errors="replace").strip()
        if self._linking.returncode != 0:
            raise CompileError(f"kernel {self.symbol}: the linker failed with status {self._linking.returncode}: {said}")
        data = self._object.read_bytes()
        self._folder.cleanup()
        return data

    def address_in_memory(self) -> int:
        """The wrapper's address in the JIT's own memory."""
        address = self._engine.raw_lookup(self.symbol)
        if not address:
            raise CompileError(f"kernel {self.symbol}: the compiled module has no such function")
        _keep.append(self._engine)
        return int(address)


def load(path: Path, symbol: str) -> int:
    """Map a shared object and return the address of the kernel's wrapper.

    Raises:
        CompileError: it cannot be loaded, or does not export the kernel.
    """
    try:
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        function = getattr(library, f"_mlir_{symbol}")
    except (OSError, AttributeError) as error:
        raise CompileError(f"kernel {symbol}: {path.name} cannot be used ({error})") from error
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    _keep.append(library)
    return address
