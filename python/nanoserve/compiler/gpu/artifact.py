"""What came out of the compilers, on disk: a machine with no compiler runs what another one made.

    <directory>/<key>.json      manifest: how the kernel is launched, what it uses, who made it, and its files' sha256
    <directory>/<sha256>.cubin  machine code
    <directory>/<sha256>.ptx    assembly, for a driver to compile where the cubin does not run
    <directory>/<sha256>.ll     the LLVM IR both came from, which the emulator runs

The key covers what a kernel is made from: its spec, its sources and the chip. It does not cover the compilers'
versions, which a machine without them cannot know; they stand in the manifest, and where compilers of other versions
are installed, the kernel is made anew. As with the CPU's cache (object_cache.py): files arrive by rename and whole,
the manifest last, nothing is used unverified, and the directory is one that only its user may write.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanoserve.compiler.cache_directory import CacheDirectory, default_directory
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import Extent, GpuKernelSpec, Grid, TensorForm

_MAX_MANIFEST_BYTES = 64 * 1024
_MAX_FILE_BYTES = 64 * 1024 * 1024
# (number of the argument, element, dims, strides, box, swizzle)
NativeTensor = tuple[int, str, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
_FILES = ("cubin", "ptx", "ll")


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is launched: what a launcher needs of its spec.

    Attributes:
        entry: name in the cubin.
        arguments: (name, is memory) in order; others are 64-bit integers.
        tensors: by name, the arguments that are a tensor map of the memory, not a pointer to it.
        block: threads along x. shared_bytes: dynamic, of a block.
        starts_early: it may be launched before the kernel in front has ended, for it waits for that itself.
    """

    entry: str
    arguments: tuple[tuple[str, bool], ...]
    grid: Grid
    block: int
    shared_bytes: int
    tensors: tuple[tuple[str, TensorForm], ...] = ()
    starts_early: bool = False

    @property
    def native_tensors(self) -> list[NativeTensor]:
        """CudaKernel's argument `tensors`."""
        names = [name for name, _ in self.arguments]
        return [(names.index(name), *form) for name, form in self.tensors]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a kernel takes of a chip, as ptxas tells it."""

    registers: int
    spilled_bytes: int
    static_shared_bytes: int


@dataclass(frozen=True, slots=True)
class Artifact:
    """One compiled kernel.

    Attributes:
        toolchain: the compilers' names and versions.
    """

    launch: Launch
    usage: Usage
    chip: str
    toolchain: str
    cubin: bytes
    ptx: str
    llvm_ir: str


def launch_of(spec: GpuKernelSpec, chip: Chip) -> Launch:
    """By the spec: of a kernel that device_kernel made, or that waits for those in front as it does."""
    arguments = tuple(zip((name for name, _ in spec.arguments), spec.pointers, strict=True))
    return Launch(
        spec.symbol, arguments, spec.grid, spec.block, spec.shared_bytes, spec.tensors, chip.starts_early
    )


class ArtifactStore:
    """Artifacts by key.

    Raises:
        CacheRefused: the directory is somebody else's, writable by others, or not a directory.
        OSError: it cannot be made or read.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        path = default_directory() / "cuda" if directory is None else directory
        self._files = CacheDirectory(path, "GPU kernel cache")
        self.directory = self._files.path

    def __len__(self) -> int:
        return sum(1 for _ in self.directory.glob("*.json"))

    def find(self, key: str) -> Artifact | None:
        """The verified artifact, None where there is none or a damaged one: storing it again repairs that.

        Raises:
            CacheRefused: a symbolic link or a file of another user sits in its place.
        """
        try:
            fields = json.loads(self._read(f"{key}.json", _MAX_MANIFEST_BYTES))
            content = {kind: self._verified(fields["files"][kind], kind) for kind in _FILES}
            return Artifact(
                launch=_launch_from(fields["launch"]), usage=Usage(**fields["usage"]), chip=fields["chip"],
                toolchain=fields["toolchain"], cubin=content["cubin"], ptx=content["ptx"].decode(),
                llvm_ir=content["ll"].decode(),
            )  # fmt: skip
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            return None

    def store(self, key: str, artifact: Artifact) -> None:
        content = {
            "cubin": artifact.cubin, "ptx": artifact.ptx.encode(), "ll": artifact.llvm_ir.encode(),
        }  # fmt: skip
        names = {kind: hashlib.sha256(data).hexdigest() for kind, data in content.items()}
        manifest = {
            "launch": asdict(artifact.launch), "usage": asdict(artifact.usage), "chip": artifact.chip,
            "toolchain": artifact.toolchain, "files": names,
        }  # fmt: skip
        with self._files.lock():
            for kind, data in content.items():
                self._write(f"{names[kind]}.{kind}", data)
            self._write(f"{key}.json", (json.dumps(manifest, indent=1) + "\n").encode())
            self._files.sync()

    def _verified(self, digest: Any, kind: str) -> bytes:
        if not isinstance(digest, str) or len(digest) != 64 or not digest.isalnum():
            raise ValueError(f"{digest!r} is no sha256")
        data = self._read(f"{digest}.{kind}", _MAX_FILE_BYTES)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{digest}.{kind} is not what was written")
        return data

    def _read(self, name: str, limit: int) -> bytes:
        with self._files.open(name) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ValueError(f"{name} is larger than {limit} bytes")
        return data

    def _write(self, name: str, data: bytes) -> None:
        with self._files.new_file(name) as file:
            file.write(data)


def _launch_from(fields: dict[str, Any]) -> Launch:
    x, y, z = (Extent(*extent) for extent in fields["grid"])
    arguments = tuple((str(name), bool(is_pointer)) for name, is_pointer in fields["arguments"])
    tensors = tuple((str(name), _tensor_from(form)) for name, form in fields["tensors"])
    return Launch(
        fields["entry"], arguments, (x, y, z), int(fields["block"]), int(fields["shared_bytes"]), tensors,
        bool(fields["starts_early"]),
    )  # fmt: skip


def _tensor_from(form: list[Any]) -> TensorForm:
    element, dims, strides, box, swizzle = form
    return TensorForm(str(element), tuple(dims), tuple(strides), tuple(box), int(swizzle))
