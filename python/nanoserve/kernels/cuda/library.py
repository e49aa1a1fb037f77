"""GPU kernels by specification: specs in, artifacts out, compiled at most once per machine.

As kernels/library.py. `kernels/cuda/<kind>.py` has `build(spec, chip, **params)`, which emits a kernel as MLIR, or
`triton_source(spec, chip, **params)`, which names one written in Triton; compilers are imported only on a miss.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from nanoserve.compiler import bindings, jit
from nanoserve.compiler.gpu import cubin, ptx, triton_kernel
from nanoserve.compiler.gpu.artifact import Artifact, ArtifactStore, Usage, launch_of
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.ptx_order import check_early_start
from nanoserve.compiler.gpu.spec import GpuKernelSpec

_COMPILER_SOURCES = (
    "builder.py",
    "control.py",
    "vector_math.py",
    "lowering.py",
)  # of those of compiler/gpu: all


class KernelMissing(RuntimeError):
    """A kernel is not there, and neither is what compiles it."""


def toolchain(spec: GpuKernelSpec | None = None) -> str | None:
    """What compiles a kernel here (None: one written as MLIR), with versions; None where a part of it is not installed."""
    if spec is not None and hasattr(_module_of(spec), "triton_source"):
        return triton_kernel.toolchain()
    found = (bindings.toolchain(), ptx.version(), cubin.version())
    return None if None in found else ", ".join(str(part) for part in found)


@cache
def _source_digest(kind: str) -> str:
    """Of everything that decides what code comes out: of the files beside this one, all but those of other kernels."""
    kernels = Path(__file__).parent
    compiler = kernels.parent.parent / "compiler"
    beside = [(path, path.read_bytes()) for path in sorted(kernels.glob("*.py"))]
    own = (kind, f"{kind}_triton")
    sources = [(path, data) for path, data in beside if path.stem in own or not _is_kernel(path, data)]
    paths = [*(compiler / name for name in _COMPILER_SOURCES), *sorted((compiler / "gpu").glob("*.py"))]
    digest = hashlib.sha256()
    for path, data in [*sources, *((path, path.read_bytes()) for path in paths)]:
        digest.update(b"%s\0%d\0" % (path.name.encode(), len(data)) + data)
    return digest.hexdigest()


def _is_kernel(path: Path, source: bytes) -> bool:
    return path.stem.endswith("_triton") or b"\ndef build(" in source or b"\ndef triton_source(" in source


def key_of(spec: GpuKernelSpec, chip: Chip) -> str:
    """sha256 over what a kernel is made from."""
    return hashlib.sha256("\0".join((repr(spec), _source_digest(spec.kind), chip.name)).encode()).hexdigest()


def _module_of(spec: GpuKernelSpec) -> Any:
    return importlib.import_module(f"nanoserve.kernels.cuda.{spec.kind}")


def build_module(spec: GpuKernelSpec, chip: Chip) -> Any:
    """The kernel as it is written, before any stage.

    Raises:
        MlirMissing: no bindings are installed.
    """
    build = _module_of(spec).build
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


def triton_source_of(spec: GpuKernelSpec, chip: Chip) -> triton_kernel.TritonSource | None:
    """What Triton compiles; None of a kernel that is not written in it."""
    kernel = _module_of(spec)
    if not hasattr(kernel, "triton_source"):
        return None
    source: triton_kernel.TritonSource = kernel.triton_source(spec, chip, **dict(spec.params))
    return source


def compile_kernel(spec: GpuKernelSpec, chip: Chip) -> Artifact:
    """A kernel's artifact, made here and now.

    Raises:
        MlirMissing, TritonMissing, PtxCompilerMissing, AssemblerMissing: a compiler is not installed.
        NotLowered, AssemblyFailed, TooEarly: the kernel cannot be compiled.
    """
    source = triton_source_of(spec, chip)
    if source is not None:
        return triton_kernel.compile_source(spec, chip, source)
    text = lower_kernel(spec, chip)
    assembly = ptx.ptx_from_llvm(text, chip)
    if chip.starts_early:
        check_early_start(assembly, spec.symbol)
    made = cubin.assemble(assembly, chip, spec.symbol)
    usage = Usage(made.registers, made.spilled_bytes, made.static_shared_bytes)
    return Artifact(launch_of(spec, chip), usage, chip.name, toolchain() or "", made.code, assembly, text)


def load_artifacts(
    specs: Iterable[GpuKernelSpec],
    chip: Chip,
    store: ArtifactStore | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> dict[GpuKernelSpec, Artifact]:
    """Artifacts of kernels; what is not stored, or was made by other compilers than those here, is compiled.

    Raises:
        KernelMissing: one must be compiled, and a compiler is not installed.
        CacheRefused: the directory is not safe to run code from.
        NotLowered, AssemblyFailed, TooEarly: a kernel cannot be compiled.
    """
    kept = ArtifactStore() if store is None else store
    found: dict[GpuKernelSpec, Artifact] = {}
    wanted = list(dict.fromkeys(specs))
    for done, spec in enumerate(wanted):
        key, here = key_of(spec, chip), toolchain(spec)
        artifact = kept.find(key)
        if artifact is None and here is None:
            raise KernelMissing(
                f"{spec.symbol} for {chip.name} is not in {kept.directory}, and compiling it needs torch-mlir, llvmlite, "
                "triton and ptxas: install nanoserve[cuda], or copy the folder from a machine that has compiled this model's kernels"
            )
        if artifact is None or (here is not None and artifact.toolchain != here):
            if on_progress is not None:
                on_progress(done, len(wanted), spec.symbol)
            artifact = compile_kernel(spec, chip)
            kept.store(key, artifact)
        found[spec] = artifact
    return found
