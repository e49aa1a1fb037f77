"""Kernels by specification: data in, addresses out, compiled at most once per machine.

A KernelSpec is what a kernel depends on and nothing else. Its cache key covers the spec, the source text of the file that
builds it and of the compiler, the toolchain's version and the CPU: so a warm start reads a few small files, imports no
MLIR, builds no IR, and a change to any of them compiles anew.

`build(symbol, target, **params)` of `kernels/<kind>.py` emits the kernel; it is imported from there only on a miss. Many
misses at once are compiled by several processes (compile_pool.py).
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from nanoserve.compiler import bindings, jit
from nanoserve.compiler.object_cache import ObjectCache
from nanoserve.compiler.target import Target, host

Param = int | float | str | bool | None
OnProgress = Callable[[int, int, str], None]
_log = logging.getLogger("nanoserve.kernels")

# Compiler files that decide what code comes out; explain and the cache do not.
_COMPILER_SOURCES = (
    "builder.py",
    "control.py",
    "vector_math.py",
    "row_output.py",
    "lowering.py",
    "jit.py",
    "target.py",
)


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
    own = [kernels / f"{kind}.py", *sorted(kernels.glob(f"{kind}_*.py"))]
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
            _load(missing, cpu, on_progress)
        return {spec: _loaded[spec, cpu] for spec in wanted}


def _load(missing: Sequence[KernelSpec], target: Target, on_progress: OnProgress | None) -> None:
    """Everything that is cached first; then the rest, compiled by workers or here."""
    cache = ObjectCache()
    toolchain = bindings.toolchain() or cache.last_toolchain() or "none"
    keys = {spec: spec.key(target, toolchain) for spec in missing}
    done = 0

    def have(spec: KernelSpec, address: int) -> None:
        nonlocal done
        _loaded[spec, target] = address
        done += 1
        if on_progress is not None:
            on_progress(done, len(missing), spec.symbol)

    for spec in missing:
        address = _cached(spec, keys[spec], cache)
        if address is not None:
            _stats.loaded_from_cache += 1
            have(spec, address)
    absent = [spec for spec in missing if (spec, target) not in _loaded]
    # closing: whatever ends the loop ends the workers, at once.
    with closing(_compiled_by_workers(absent, keys, target, toolchain, cache)) as compiled:
        for spec in compiled:
            address = _cached(spec, keys[spec], cache)
            if address is not None:
                _stats.compiled += 1
                have(spec, address)
    for spec in absent:
        if (spec, target) not in _loaded:
            address = _compiled(spec, keys[spec], target, toolchain, cache)
            _stats.compiled += 1
            have(spec, address)
    _stats.damaged += cache.damaged
    if absent and jit.linker() is not None:
        _trim(cache)


def _cached(spec: KernelSpec, key: str, cache: ObjectCache) -> int | None:
    path = cache.find(key)
    if path is None:
        return None
    try:
        return jit.load(path, spec.symbol)
    except jit.CompileError as error:
        # What was written, but not loadable here (another C library, say): compiling tells whether that helps.
        _log.warning("%s; compiling it again", error)
        cache.discard(key)
        return None


def _compiled_by_workers(
    absent: Sequence[KernelSpec],
    keys: Mapping[KernelSpec, str],
    target: Target,
    toolchain: str,
    cache: ObjectCache,
) -> Generator[KernelSpec]:
    from nanoserve.kernels import compile_pool  # as the compiler: only where something must be compiled

    workers = compile_pool.num_workers(len(absent))
    if workers and jit.linker() is not None and bindings.toolchain() is not None:
        jobs = [(spec, keys[spec]) for spec in absent]
        yield from compile_pool.compile_in_processes(jobs, target, toolchain, cache.directory, workers)


def _compiled(spec: KernelSpec, key: str, target: Target, toolchain: str, cache: ObjectCache) -> int:
    """Compiled by this process."""
    engine = jit.compile_kernel(lambda: spec.build(target), target)
    if jit.linker() is None:
        return _kept_in_memory(engine, spec, "no linker (ld or cc)")
    obj = jit.shared_object(engine, spec.symbol)
    try:
        stored = cache.store(key, spec.symbol, toolchain, obj)
    except OSError as error:
        return _kept_in_memory(engine, spec, f"the kernel cache cannot be written ({error})")
    try:
        return jit.load(stored, spec.symbol)
    except jit.CompileError:
        cache.discard(key)
        raise


def _kept_in_memory(engine: Any, spec: KernelSpec, reason: str) -> int:
    _log.warning("%s: kernel %s stays in memory and is compiled again next time", reason, spec.symbol)
    jit.keep_forever(engine)
    return jit.address_in_memory(engine, spec.symbol)


def _trim(cache: ObjectCache) -> None:
    try:
        cache.trim()
    except OSError as error:
        _log.warning("kernel cache: %s cannot be trimmed: %s", cache.directory, error)
