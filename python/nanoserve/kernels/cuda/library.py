"""GPU kernels by specification: specs in, artifacts out, compiled at most once per machine.

As kernels/library.py. `build(spec, chip, **params)` of `kernels/cuda/<kind>.py` emits a kernel; it is imported only
on a miss.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from nanoserve.compiler import bindings, jit
from nanoserve.compiler.gpu import cubin, ptx
from nanoserve.compiler.gpu.artifact import Artifact, ArtifactStore, Usage, launch_of
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec

_COMPILER_SOURCES = (
    "builder.py",
    "control.py",
    "vector_math.py",
    "lowering.py",
)  # of those of compiler/gpu: all


class KernelMissing(RuntimeError):
    """A kernel is not there, and neither is what compiles it."""


def toolchain() -> str | None:
    """What compiles here: MLIR, LLVM's NVPTX and ptxas with their versions; None where one of them is not installed."""
    found = (bindings.toolchain(), ptx.version(), cubin.version())
    return None if None in found else ", ".join(str(part) for part in found)


@cache
def _source_digest(kind: str) -> str:
    """Of everything that decides what code comes out: of the files beside this one, all but those of other kernels."""
    kernels = Path(__file__).parent
    compiler = kernels.parent.parent / "compiler"
    beside = [(path, path.read_bytes()) for path in sorted(kernels.glob("*.py"))]
    sources = [(path, data) for path, data in beside if path.stem == kind or b"\ndef build(" not in data]
    paths = [*(compiler / name for name in _COMPILER_SOURCES), *sorted((compiler / "gpu").glob("*.py"))]
    digest = hashlib.sha256()
    for path, data in [*sources, *((path, path.read_bytes()) for path in paths)]:
        digest.update(b"%s\0%d\0" % (path.name.encode(), len(data)) + data)
    return digest.hexdigest()


def key_of(spec: GpuKernelSpec, chip: Chip) -> str:
    """sha256 over what a kernel is made from."""
    return hashlib.sha256("\0".join((repr(spec), _source_digest(spec.kind), chip.name)).encode()).hexdigest()


def build_module(spec: GpuKernelSpec, chip: Chip) -> Any:
    """The kernel as it is written, before any stage.

    Raises:
        MlirMissing: no bindings are installed.
    """
    build = importlib.import_module(f"nanoserve.kernels.cuda.{spec.kind}").build
    return jit.build_module(lambda: build(spec, chip, **dict(spec.params)))


def lower_kernel(
    spec: GpuKernelSpec, chip: Chip, after_stage: Callable[[Any, str], None] | None = None
) -> str:
    """A kernel's LLVM IR, which its machine code is made from and the emulator runs; `after_stage` as lowering.lower's.

    Raises:
        MlirMissing: no bindings are installed.
        NotLowered: something in it is not LLVM's.
        ValueError: it asks for more shared memory than the chip has.
    """
    from nanoserve.compiler.gpu.lowering import lower

    if spec.shared_bytes > chip.shared_bytes:
        raise ValueError(
            f"{spec.symbol}: {spec.shared_bytes} bytes of shared memory, {chip.name} has {chip.shared_bytes}"
        )
    module = build_module(spec, chip)
    with jit.context():
        return lower(module, after_stage)


def compile_kernel(spec: GpuKernelSpec, chip: Chip) -> Artifact:
    """A kernel's artifact, made here and now.

    Raises:
        MlirMissing, PtxCompilerMissing, AssemblerMissing: a compiler is not installed.
        NotLowered, AssemblyFailed: the kernel cannot be compiled.
    """
    text = lower_kernel(spec, chip)
    assembly = ptx.ptx_from_llvm(text, chip)
    made = cubin.assemble(assembly, chip, spec.symbol, spills=spec.spills)
    usage = Usage(made.registers, made.spilled_bytes, made.static_shared_bytes)
    return Artifact(launch_of(spec), usage, chip.name, toolchain() or "", made.code, assembly, text)


def load_artifacts(
    specs: Iterable[GpuKernelSpec], chip: Chip, store: ArtifactStore | None = None
) -> dict[GpuKernelSpec, Artifact]:
    """Artifacts of kernels; what is not stored, or was made by other compilers than those here, is compiled.

    Raises:
        KernelMissing: one must be compiled, and a compiler is not installed.
        CacheRefused: the directory is not safe to run code from.
        NotLowered, AssemblyFailed: a kernel cannot be compiled.
    """
    kept = ArtifactStore() if store is None else store
    here = toolchain()
    found: dict[GpuKernelSpec, Artifact] = {}
    for spec in dict.fromkeys(specs):
        key = key_of(spec, chip)
        artifact = kept.find(key)
        if artifact is None and here is None:
            raise KernelMissing(
                f"{spec.symbol} for {chip.name} is not in {kept.directory}, and compiling it needs torch-mlir, "
                "llvmlite and ptxas: install nanoserve[cuda], or copy the folder from a machine that has compiled this "
                "model's kernels"
            )
        if artifact is None or (here is not None and artifact.toolchain != here):
            artifact = compile_kernel(spec, chip)
            kept.store(key, artifact)
        found[spec] = artifact
    return found
