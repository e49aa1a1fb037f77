"""Engines on the device under check, with executor options that the engine does not hand through, and their kernels in advance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
from bench.random_checkpoint import BLOCK
from tools.gpu_check.gpu import Gpu

from nanoserve import ModelConfig, NanoServingEngine
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.cuda import backend, executor
from nanoserve.kernels.panels import to_bfloat16
from nanoserve.models.stored_tensor import StoredTensor
from nanoserve.models.weights import checkpoint_shapes
from nanoserve.precision import Precision


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A way of multiplying bfloat16.

    Attributes:
        gemm: as the engine's option.
        plan: options of a plan of our kernels (gemm_plan); None: a library's. All of ours have the same bits.
        needs_wgmma: runs on chips with warpgroup instructions only.
    """

    gemm: str
    plan: dict[str, Any] | None
    needs_wgmma: bool = False


# The first is the default. What is the likeliest to fault comes last, here and so in every part: a fault ends its part.
ARITHMETICS = {
    "mma": Arithmetic("mma", {}),
    "cublas": Arithmetic("cublas", None),
    "wgmma": Arithmetic("wgmma", {"wgmma": True}, needs_wgmma=True),
}


def arithmetics(chip: Chip, *, ours: bool = False) -> dict[str, Arithmetic]:
    """Those the chip has; of our own kernels alone, whose bits depend on nothing but the row, if `ours`."""
    return {
        name: one
        for name, one in ARITHMETICS.items()
        if (chip.wgmma or not one.needs_wgmma) and (one.plan is not None or not ours)
    }


def make_engine(
    gpu: Gpu,
    config: ModelConfig,
    weights: Mapping[str, Any],
    precision: Precision,
    buckets: list[int] | None = None,
    start_early: bool = True,
    overlaps: bool = True,
    **options: Any,
) -> NanoServingEngine:
    """As NanoServingEngine on the GPU, with the folder's kernels.

    Args:
        buckets, start_early: the executor's. overlaps: the device chooses tokens and steps are started ahead, as ever; else neither.
    """
    make = backend.CudaBackend.make_executor

    def make_executor(self: Any, *args: Any, **given: Any) -> Any:
        made = make(
            self, *args, store=gpu.store, image=gpu.image, buckets=buckets, start_early=start_early, **given
        )
        made.chooses_tokens = made.chooses_tokens and overlaps
        return made

    with patch.object(backend.CudaBackend, "make_executor", make_executor):
        return NanoServingEngine(config, weights, precision=precision, **{"device": "cuda", **options})


class _Asked(Exception):
    """Ends the construction of an executor where it would load kernels."""


def engine_specs(
    config: ModelConfig, chip: Chip, precision: Precision, stored: str = "f32", **executor_options: Any
) -> Iterable[GpuKernelSpec]:
    """The kernels an executor loads, without a device or weights: `stored` is the type of its matrices."""

    def load_artifacts(specs: Iterable[GpuKernelSpec], *args: Any) -> None:
        raise _Asked(tuple(specs))

    weights = MagicMock()
    weights.dtype = lambda name: "f32" if name == "pos_embed.weight" else stored
    with patch.multiple(
        executor, CudaStep=MagicMock(), DeviceWeights=lambda *args: weights, bind_weights=MagicMock(),
        chip_of=lambda device: chip, load_artifacts=load_artifacts,
    ):  # fmt: skip
        try:
            executor.CudaExecutor(
                config,
                {},
                SimpleNamespace(page_size=16),
                MagicMock(),
                precision=precision,
                **executor_options,
            )  # type: ignore[arg-type]
        except _Asked as asked:
            return asked.args[0]
    raise AssertionError("the executor has loaded no kernels")


def random_bfloat16(config: ModelConfig, seed: int = 0) -> dict[str, StoredTensor]:
    """Weights as a bfloat16 checkpoint has them, in the memory of the largest: all are parts of one block of normals."""
    shapes = checkpoint_shapes(config)
    most = max(int(np.prod(shape)) for shape in shapes.values())
    values = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)
    block = np.resize(to_bfloat16(values), most + BLOCK).view(np.uint8)
    ones = np.resize(to_bfloat16(values + 1), max(shape[0] for shape in shapes.values())).view(np.uint8)
    starts = np.random.default_rng(seed + 1)
    made = {}
    for name, shape in shapes.items():
        is_norm = len(shape) == 1 and "norm" in name
        begin = 0 if is_norm else 2 * int(starts.integers(BLOCK))
        nbytes = 2 * int(np.prod(shape))
        made[name] = StoredTensor(
            "random", name, "bfloat16", shape, nbytes, ones if is_norm else block, begin
        )
    return made
