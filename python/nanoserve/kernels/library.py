"""Kernels by specification: data in, addresses out, compiled at most once per machine.

A KernelSpec is what a kernel depends on and nothing else. Its cache key covers the spec, the source text of the file that
builds it and of the compiler, the toolchain's version and the CPU: so a warm start reads a few small files, imports no
MLIR, builds no IR, and a change to any of them compiles anew.

`build(symbol, target, **params)` of `kernels/<kind>.py` emits the kernel; it is imported from there only on a miss.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nanoserve.compiler import bindings, jit
from nanoserve.compiler.object_cache import ObjectCache
from nanoserve.compiler.target import Target, host

if TYPE_CHECKING:
    from collections.abc import Mapping

Param = int | float | str | bool | None
OnProgress = Callable[[int, int, str], None]

# Compiler files that decide what code comes out; explain and the cache do not.
_COMPILER_SOURCES = ("builder.py", "control.py", "vector_math.py", "lowering.py", "jit.py", "target.py")


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One kernel: the file that builds it and its parameters, sorted by name."""

    kind: str
    params: tuple[tuple[str, Param], ...]

    @classmethod
    def make(cls, kind: str, /, **params: Param) -> KernelSpec:
        return cls(kind, tuple(sorted(params.items())))

    def __getitem__(self, name: str) -> Param:
        return dict(self.params)[name]

    @property
    def symbol(self) -> str:
        """A readable, deterministic C name: the kind, the sizes, and a digest that tells the rest apart."""
        digest = hashlib.sha256(repr(self.params).encode()).hexdigest()[:8]
        numbers = "_".join(f"{name}{value}" for name, value in self.params if type(value) is int and len(name) <= 2)
        return "_".join(part for part in (self.kind, numbers.lower(), digest) if part)

    def key(self, target: Target, toolchain: str) -> str:
        """sha256 over everything the compiled code depends on."""
        parts = (repr(self), _source_digest(self.kind), toolchain, target.name, target.digest, str(target.cpu))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@cache
def _source_digest(kind: str) -> str:
    kernels = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [kernels / f"{kind}.py", *(kernels.parent / "compiler" / name for name in _COMPILER_SOURCES)]:
        data = path.read_bytes()
        digest.update(b"%d\0" % len(data) + data)
    return digest.hexdigest()


@dataclass(slots=True)
class Stats:
    """Counts since the process started."""

    compiled: int = 0
    loaded_from_cache: int = 0
    reused_in_process: int = 0


_stats = Stats()
_loaded: dict[tuple[KernelSpec, Target], int] = {}
_lock = threading.Lock()


def stats() -> Mapping[str, int]:
    """Kernels compiled, loaded from the disk cache, and found already loaded, since the process started."""
    return {name: getattr(_stats, name) for name in Stats.__slots__}


def load_kernels(
    specs: Iterable[KernelSpec], on_progress: OnProgress | None = None, *, target: Target | None = None
) -> dict[KernelSpec, int]:
    """Addresses of kernels, each `void f(void** args)`; what is not cached is compiled.

    Args:
        specs: in any order, repeated or not.
        on_progress: called as (done, total, symbol) after each kernel that was not loaded yet.
        target: the CPU to compile for, this one by default.

    Raises:
        MlirMissing: something must be compiled and no bindings are installed.
        CacheRefused: the cache directory is not safe to execute code from.
    """
    wanted = list(dict.fromkeys(specs))
    cpu = host() if target is None else target
    with _lock:
        missing = [spec for spec in wanted if (spec, cpu) not in _loaded]
        _stats.reused_in_process += len(wanted) - len(missing)
        if missing:
            _load_missing(missing, cpu, on_progress)
        return {spec: _loaded[spec, cpu] for spec in wanted}


def _load_missing(missing: list[KernelSpec], target: Target, on_progress: OnProgress | None) -> None:
    cache = ObjectCache()
    toolchain = bindings.toolchain() or cache.last_toolchain() or "none"
    done = 0

    def finish(spec: KernelSpec, address: int) -> None:
        nonlocal done
        _loaded[spec, target] = address
        done += 1
        if on_progress is not None:
            on_progress(done, len(missing), spec.symbol)

    cold = []
    for spec in missing:
        path = cache.find(spec.key(target, toolchain))
        if path is None:
            cold.append(spec)
            continue
        address = jit.load(path, spec.symbol)
        _stats.loaded_from_cache += 1
        finish(spec, address)

    def keep(spec: KernelSpec, compilation: jit.Compilation) -> None:
        data = compilation.shared_object()
        if data is None:
            address = compilation.address_in_memory()
        else:
            address = jit.load(cache.store(spec.key(target, toolchain), spec.symbol, toolchain, data), spec.symbol)
        finish(spec, address)

    previous: tuple[KernelSpec, jit.Compilation] | None = None
    for spec in cold:
        compilation = jit.Compilation(spec.symbol, builder_of(spec, target), target)
        _stats.compiled += 1
        if previous is not None:
            keep(*previous)
        previous = (spec, compilation)
    if previous is not None:
        keep(*previous)


def builder_of(spec: KernelSpec, target: Target) -> Callable[[], None]:
    """The function that emits a kernel at the insertion point."""

    def build() -> None:
        module = importlib.import_module(f"nanoserve.kernels.{spec.kind}")
        module.build(spec.symbol, target, **dict(spec.params))

    return build
