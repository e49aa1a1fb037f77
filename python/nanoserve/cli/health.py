"""The checks of `nanoserve doctor`: each looks at one thing and says what it means and what to do.

A check never raises and never needs another one's result. "bad" means that this machine cannot serve, "note" that something
optional is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nanoserve
from nanoserve.cli.byte_size import format_size

OK, NOTE, BAD = "ok", "note", "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check saw. `meaning` is why it matters; `fix` is empty when there is nothing to do."""

    name: str
    status: str
    value: str
    meaning: str
    fix: str = ""


def findings(run_model: bool = True) -> Iterator[Finding]:
    """Every check in turn; the last one compiles and runs a model in a process of its own."""
    for check in CHECKS:
        yield _guarded(check)
    if run_model:
        yield _guarded(end_to_end)


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # a doctor who dies of the disease helps nobody
        name = check.__name__.replace("_", " ")
        return Finding(name, BAD, f"the check failed: {type(error).__name__}: {error}", "unknown state")


def package() -> Finding:
    value = f"nanoserve {nanoserve.__version__} in {Path(nanoserve.__file__).parent}"
    return Finding("package", OK, value, "what runs here")


def python() -> Finding:
    value = f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Finding("python", OK, value, "3.11 or later")


def native_module() -> Finding:
    meaning = "owns the KV pool and runs the steps; nothing works without it"
    try:
        from nanoserve.native import KVCachePool
    except ImportError as error:
        return Finding("native module", BAD, "missing", meaning, str(error))
    return Finding("native module", OK, str(sys.modules[KVCachePool.__module__].__file__), meaning)


def mlir_bindings() -> Finding:
    from nanoserve.compiler.bindings import toolchain

    meaning = "compiles kernels; not needed to run kernels that are in the cache"
    found = toolchain()
    if found is None:
        return Finding("MLIR", NOTE, "missing", meaning, 'pip install "torch-mlir>=20261001"')
    return Finding("MLIR", OK, found, meaning)


def linker() -> Finding:
    from nanoserve.compiler import jit

    meaning = "puts compiled kernels into the cache; without one they are compiled at every start"
    found = jit.linker()
    if found is None:
        return Finding("linker", NOTE, "missing", meaning, "install binutils (ld) or a C compiler (cc)")
    return Finding("linker", OK, " ".join(found), meaning)


def cpu() -> Finding:
    from nanoserve.compiler.target import host

    target = host()
    value = f"{target.name}: {target.registers} vector registers of {target.lanes} floats"
    if target.name == "generic":
        return Finding("CPU", NOTE, value, "no AVX2, AVX-512 or NEON was found: slow, but right")
    return Finding("CPU", OK, value, "what kernels are compiled for")


def cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding(
        "cores", OK, f"{usable} of {os.cpu_count()}", "threads of a forward pass, unless --threads says less"
    )


def memory() -> Finding:
    from nanoserve.machine_memory import available_memory, cgroup_available

    limited = cgroup_available() is not None
    source = "the control group's limit" if limited else "no control group limits it"
    return Finding(
        "memory", OK, f"{format_size(available_memory())} available", f"weights and KV cache; {source}"
    )


def kernel_cache() -> Finding:
    from nanoserve.compiler.object_cache import CacheRefused, ObjectCache, default_directory

    meaning = "compiled kernels; its files are executed, so nobody else may write there"
    directory = default_directory()
    if not directory.exists():
        parent = next(folder for folder in directory.absolute().parents if folder.exists())
        if not os.access(parent, os.W_OK):
            fix = "set NANOSERVE_CACHE_DIR to a directory of your own"
            return Finding("kernel cache", BAD, f"{directory}: {parent} is not writable", meaning, fix)
        return Finding("kernel cache", OK, f"{directory}: not there yet, made at the first start", meaning)
    try:
        cache = ObjectCache(directory)
    except (CacheRefused, OSError) as error:
        return Finding("kernel cache", BAD, "refused", meaning, str(error))
    objects = list(cache.directory.glob("*.so"))
    size = sum(path.stat().st_size for path in objects)
    mode = stat.S_IMODE(cache.directory.stat().st_mode)
    value = f"{cache.directory}: {len(objects)} kernels, {format_size(size)}, mode {mode:04o}"
    if not os.access(cache.directory, os.W_OK):
        return Finding("kernel cache", NOTE, f"{value}, read only", meaning, "new kernels cannot be stored")
    return Finding("kernel cache", OK, value, meaning)


_NEEDED = {
    "numpy": "arrays",
    "tokenizers": "text to tokens",
    "jinja2": "chat templates",
    "huggingface_hub": "models by name",
}
_OPTIONAL = {"torch": "only to read .pt files, and for tests", "transformers": "only for tests"}


def needed_packages() -> Finding:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    meaning = "; ".join(f"{name}: {use}" for name, use in _NEEDED.items())
    if missing:
        return Finding(
            "packages", BAD, f"missing: {', '.join(missing)}", meaning, f"pip install {' '.join(missing)}"
        )
    return Finding("packages", OK, ", ".join(map(_versioned, _NEEDED)), meaning)


def optional_packages() -> Finding:
    there = [name for name in _OPTIONAL if importlib.util.find_spec(name) is not None]
    meaning = "; ".join(f"{name}: {use}" for name, use in _OPTIONAL.items())
    return Finding("optional packages", OK, ", ".join(map(_versioned, there)) or "none", meaning)


def _versioned(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return name


def cuda_driver() -> Finding:
    from nanoserve.native import CudaDevice, CudaDriverMissing

    meaning = "runs models on a GPU with --device cuda; without one they run on the CPU"
    where = os.environ.get("NANOSERVE_CUDA_DRIVER") or "libcuda.so.1"
    try:
        count = CudaDevice.count()
    except CudaDriverMissing as error:
        return Finding("CUDA driver", OK, f"none: {error}", meaning)
    return Finding("CUDA driver", OK, f"{where}: {count} devices", meaning)


def gpu() -> Finding:
    from nanoserve.cuda.executor import chip_of
    from nanoserve.native import CudaDevice, CudaDriverMissing, CudaError

    meaning = "each by number, compute capability and memory, and the chip its kernels are made for"
    try:
        count = CudaDevice.count()
    except CudaDriverMissing:
        count = 0
    status, told = OK, []
    for ordinal in range(count):
        try:
            device = CudaDevice(ordinal)
            about = f"cuda:{ordinal}: {device.name}, compute capability {device.capability / 10:.1f}"
            free, total = format_size(device.free_bytes), format_size(device.total_bytes)
            told.append(f"{about}, {free} of {total} free, kernels for {chip_of(device).name}")
        except (ValueError, CudaError, MemoryError) as error:  # too old, or in a state of its own
            status = NOTE
            told.append(f"cuda:{ordinal}: {error}")
    return Finding("GPU", status, "; ".join(told) or "none found", meaning)


def gpu_compilers() -> Finding:
    from nanoserve.compiler.bindings import toolchain
    from nanoserve.compiler.gpu import cubin, ptx, triton_kernel

    meaning = "compile kernels for a GPU, here or for a machine without compilers; kernels that are stored need none"
    parts = {
        "torch-mlir": toolchain(), "llvmlite": ptx.version(), "triton": triton_kernel.version(), "ptxas": cubin.version(),
    }  # fmt: skip
    missing = [name for name, found in parts.items() if found is None]
    value = ", ".join(found for found in parts.values() if found is not None)
    if missing:
        value = "; ".join(filter(None, [value, f"missing: {', '.join(missing)}"]))
    return Finding("GPU compilers", OK, value, meaning, "pip install 'nanoserve[cuda]'" if missing else "")


def gpu_kernels() -> Finding:
    from nanoserve.compiler.cache_directory import CacheRefused, default_directory
    from nanoserve.compiler.gpu.artifact import ArtifactStore

    meaning = "compiled kernels for GPUs; a machine without compilers needs the model's here"
    directory = default_directory() / "cuda"
    if not directory.exists():
        return Finding("GPU kernels", OK, f"{directory}: not there yet", meaning)
    try:
        kept = ArtifactStore(directory)
    except (CacheRefused, OSError) as error:
        return Finding("GPU kernels", NOTE, "refused", meaning, str(error))
    return Finding("GPU kernels", OK, f"{kept.directory}: {len(kept)} kernels", meaning)


def end_to_end() -> Finding:
    """In a child process with an empty kernel cache: an illegal instruction must be a finding, not the end of the doctor."""
    import tempfile

    from nanoserve.compiler.bindings import toolchain

    meaning = "a tiny random model, compiled from nothing and run"
    if toolchain() is None:
        return Finding("end to end", NOTE, "not tried: nothing can be compiled without MLIR", meaning)
    with tempfile.TemporaryDirectory(prefix="nanoserve-doctor-") as folder:
        environment = {**os.environ, "NANOSERVE_CACHE_DIR": str(Path(folder, "kernels"))}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(nanoserve.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        run = subprocess.run(
            [sys.executable, "-m", "nanoserve.cli.tiny_run"],
            capture_output=True, text=True, errors="replace", timeout=300, env=environment,
        )  # fmt: skip
    said = run.stdout.strip().splitlines()
    if run.returncode == 0 and said:
        return Finding("end to end", OK, said[-1], meaning)
    why = run.stderr.strip().splitlines()[-1:] or [f"exit status {run.returncode}"]
    if run.returncode < 0:
        why = [f"ended by signal {-run.returncode}"]
    return Finding(
        "end to end", BAD, why[0], meaning, "report this with the output of nanoserve doctor --json"
    )


CHECKS: tuple[Callable[[], Finding], ...] = (
    package, python, native_module, mlir_bindings, linker, cpu, cores, memory, kernel_cache, needed_packages,
    optional_packages, cuda_driver, gpu, gpu_compilers, gpu_kernels,
)  # fmt: skip
