"""Fills the folder that a machine with a GPU and no kernel compiler needs: kernels, tiny checkpoints, the CPU's results."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from bench.run import commit
from tools.gpu_check import manifest
from tools.gpu_check.parts import BY_NAME, PARTS
from tools.gpu_check.places import EXPECTED, KERNELS, MANIFEST, MODELS

from nanoserve.compiler.gpu.artifact import Artifact, ArtifactStore
from nanoserve.compiler.gpu.chip import Chip, parse_chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.kernels.cuda.library import key_of, load_artifacts


def prepare(
    folder: Path, chips: Sequence[str], *, parts: Sequence[str] = (), tiny: bool = False, jobs: int = 2
) -> dict[str, int]:
    """Kernels per chip.

    Args:
        parts: whose kernels; none: all.
        tiny: of the small sizes alone, with the LLVM IR that the emulator runs; else it is left out, and PTX with it.
    """
    chosen = [BY_NAME[name] for name in parts] or list(PARTS)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / KERNELS, ignore_errors=True)
    if any(part.name == "end_to_end" for part in chosen):
        _write_models(folder / MODELS, tiny)
    store = ArtifactStore(folder / KERNELS)
    prepared: dict[str, dict[str, str]] = {}
    for chip in map(parse_chip, chips):
        specs = dict.fromkeys(
            spec for part in chosen if hasattr(part.module, "specs") for spec in part.module.specs(chip, tiny, folder)
        )  # fmt: skip
        prepared[chip.name] = {}
        for spec, artifact in _compiled(list(specs), chip, jobs):
            kept = artifact if tiny else replace(artifact, ptx="", llvm_ir="")
            store.store(key_of(spec, chip), kept)
            prepared[chip.name][artifact.launch.entry + _digest(spec, artifact)] = key_of(spec, chip)
    if any(part.name == "numerics" for part in chosen):
        _write_expected(folder / EXPECTED, parse_chip(chips[0]))
    manifest.write(folder, commit=commit(), tiny=tiny, kernels=prepared)
    return {chip: len(kernels) for chip, kernels in prepared.items()}


def folder_bytes(folder: Path) -> int:
    """What has to travel."""
    paths = [
        folder / MANIFEST,
        folder / EXPECTED,
        *(folder / KERNELS).rglob("*"),
        *(folder / MODELS).rglob("*"),
    ]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _digest(spec: GpuKernelSpec, artifact: Artifact) -> str:
    """Triton's functions have one entry name for all their kernels."""
    return "" if artifact.launch.entry == spec.symbol else " " + spec.symbol


def _compiled(specs: list[GpuKernelSpec], chip: Chip, jobs: int) -> list[tuple[GpuKernelSpec, Artifact]]:
    """By processes, because the compiler's bindings hold Python's lock; through the user's cache, so once."""
    if jobs > 1:
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            for done in pool.map(_warm, specs, [chip] * len(specs)):
                if sys.stdout.isatty():
                    print(f"\r{chip.name}: {done:60.60}", end="", flush=True)
    return list(load_artifacts(specs, chip).items())


def _warm(spec: GpuKernelSpec, chip: Chip) -> str:
    load_artifacts([spec], chip)
    return spec.symbol


def _write_models(folder: Path, tiny: bool) -> None:
    from tools.gpu_check.end_to_end import oracles

    from support.oracle import make_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    for name in oracles(tiny):
        make_checkpoint(name, folder)


def _write_expected(path: Path, chip: Chip) -> None:
    """The CPU's results of the float32 products: a machine with a GPU may have no compiler for the CPU's kernels."""
    from tools.gpu_check.product_cases import gemm_cases

    np.savez(path, **{case.name: case.problem.cpu() for case in gemm_cases("gemm_f32", chip)})
