"""Kernels by specification: data in, addresses out, compiled at most once per machine.

A KernelSpec is what a kernel depends on and nothing else. Its cache key covers the spec, the source text of the file that
builds it and of the compiler, the toolchain's version and the CPU: so a warm start reads a few small files, imports no
MLIR, builds no IR, and a change to any of them compiles anew.

`build(symbol, target, **params)` of `kernels/<kind>.py` emits the kernel; it is imported from there only on a miss.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from nanoserve.compiler import bindings, jit
from nanoserve.compiler.object_cache import ObjectCache
from nanoserve.compiler.target import Target, host

Param = int | float | str | bool | None
OnProgress = Callable[[int, int, str], None]
_log = logging.getLogger("nanoserve.kernels")

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

    @property
    def symbol(self) -> str:
        """A readable, deterministic C name: the kind, the sizes, and a digest that tells the rest apart."""
        digest = hashlib.sha256(repr(self.params).encode()).hexdigest()[:8]
        numbers = "_".join(
            f"{name}{value}" for name, value in self.params if type(value) is int and len(name) <= 2
        )
        return "_".join(part for part in (self.kind, numbers.lower(), digest) if part)

    def key(self, target: Target, toolchain: str) -> str:
        """sha256 over everything the compiled code depends on."""
        parts = (repr(self), _source_digest(self.kind), toolchain, repr(target))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def build(self, target: Target) -> None:
        """Emit the kernel at the insertion point. Imports MLIR."""
        importlib.import_module(f"nanoserve.kernels.{self.kind}").build(
            self.symbol, target, **dict(self.params)
        )


@cache
def _source_digest(kind: str) -> str:
    kernels = Path(__file__).parent
    digest = hashlib.sha256()
    # A kernel of several files has its kind's name in front of each.
    own = sorted(kernels.glob(f"{kind}*.py"))
    for path in [*own, *(kernels.parent / "compiler" / name for name in _COMPILER_SOURCES)]:
        data = path.read_bytes()
        digest.update(b"%d\0" % len(data) + data)
    return digest.hexdigest()


@dataclass(slots=True)
class Stats:
    """Counts since the process started; a warm start has compiled == 0."""

    compiled: int = 0
    loaded_from_cache: int = 0
    reused_in_process: int = 0
    damaged: int = 0  # cache entries that did not verify, removed and compiled again


_stats = Stats()
_loaded: dict[tuple[KernelSpec, Target], int] = {}
_lock = threading.RLock()  # re-entrant: on_progress may look at kernels, too


def stats() -> Stats:
    """A copy of the process's counts."""
    with _lock:
        return replace(_stats)


def load_kernels(
    specs: Iterable[KernelSpec], on_progress: OnProgress | None = None, *, target: Target | None = None
) -> dict[KernelSpec, int]:
    """Addresses of kernels, each `void f(void** args)`; what is not cached is compiled.

    Args:
        specs: in any order, repeated or not.
        on_progress: called as (done, total, symbol) after each kernel this process had not loaded yet.
        target: the CPU to compile for, this one by default.

    Raises:
        MlirMissing: something must be compiled and no bindings are installed.
        CacheRefused: the cache directory is not safe to execute code from.
        CompileError: the linker or the loader failed.
    """
    wanted = list(dict.fromkeys(specs))
    cpu = host() if target is None else target
    with _lock:
        missing = [spec for spec in wanted if (spec, cpu) not in _loaded]
        _stats.reused_in_process += len(wanted) - len(missing)
        if missing:
            cache = ObjectCache()
            toolchain = bindings.toolchain() or cache.last_toolchain() or "none"
            for done, spec in enumerate(missing, start=1):
                _loaded[spec, cpu] = _load(spec, cpu, cache, toolchain)
                if on_progress is not None:
                    on_progress(done, len(missing), spec.symbol)
            _stats.damaged += cache.damaged
        return {spec: _loaded[spec, cpu] for spec in wanted}


def _load(spec: KernelSpec, target: Target, cache: ObjectCache, toolchain: str) -> int:
    key = spec.key(target, toolchain)
    path = cache.find(key)
    if path is not None:
        try:
            address = jit.load(path, spec.symbol)
        except jit.CompileError as error:
            # What was written, but not loadable here (another C library, say): compiling tells whether that helps.
            _log.warning("%s; compiling it again", error)
            cache.discard(key)
        else:
            _stats.loaded_from_cache += 1
            return address
    engine = jit.compile_kernel(lambda: spec.build(target), target)
    _stats.compiled += 1
    if jit.linker() is None:
        _log.warning(
            "no linker (ld or cc): kernel %s stays in memory and is compiled again next time", spec.symbol
        )
        jit.keep_forever(engine)
        return jit.address_in_memory(engine, spec.symbol)
    stored = cache.store(key, spec.symbol, toolchain, jit.shared_object(engine, spec.symbol))
    try:
        return jit.load(stored, spec.symbol)
    except jit.CompileError:
        cache.discard(key)
        raise
