"""What a model takes of a GPU's memory, before any of it is taken.

    gpu_memory_utilization * total = weights + activations + KV pool

The sizes are no formula of their own: the binder binds the model's operations as for an executor, to weights and buffers that
are only counted, and the native step tells what it takes beside. What is not counted comes out of the rest: the driver's context,
the kernels' code, the graphs, and what the driver rounds up (some hundred MB together).
"""

from __future__ import annotations

from collections.abc import Mapping

from nanoserve.checks import shown, whole_number
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.cuda.device_weights import rope_bytes, weight_bytes
from nanoserve.cuda.gemm_choice import choose_gemms
from nanoserve.cuda.op_binder import CudaOpBinder
from nanoserve.cuda.step_sizes import StepSizes
from nanoserve.memory_plan import MAX_SLOTS, Budget, MemoryPlan, PoolRules
from nanoserve.models.config import ModelConfig
from nanoserve.models.decoder import forward_ops, weight_shapes
from nanoserve.models.rope import Rope
from nanoserve.native import CudaStep
from nanoserve.packed_weights import Arg
from nanoserve.precision import Precision

DEFAULT_UTILIZATION = 0.9
DEFAULT_NUM_SEQS = 256


def plan_cuda_memory(
    config: ModelConfig,
    dtypes: Mapping[str, str],
    chip: Chip,
    total_bytes: int,
    *,
    free_bytes: int | None = None,
    gpu_memory_utilization: float | None = None,
    kv_cache_bytes: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = DEFAULT_NUM_SEQS,
    page_size: int = 16,
    max_num_batched_tokens: int = 2048,
    precision: Precision,
    stored_bytes: int | None = None,
    gemm: str | Mapping[str, str] = "mma",
) -> MemoryPlan:
    """Divide a GPU's memory between weights, activations and the KV pool.

    Args:
        dtypes: how the checkpoint stores each weight, by the decoder's names: BoundWeight.dtype.
        total_bytes, free_bytes: of the device; None: nobody knows what is free, as with a device that is not here.
        gpu_memory_utilization: fraction of total_bytes that all of it may take; None: DEFAULT_UTILIZATION.
        kv_cache_bytes: for the pool, instead of a fraction for all.
        gemm: as CudaExecutor's. Others as plan_memory's.

    Raises:
        ValueError: sizes that contradict each other or do not fit, with the numbers.
    """
    pool = PoolRules(config, precision, page_size, max_num_seqs, max_model_len, kv_cache_bytes)
    whole_number("max_num_batched_tokens", max_num_batched_tokens, 1, MAX_SLOTS)
    share = utilization(gpu_memory_utilization, kv_cache_bytes)
    sizes = StepSizes.of(config, precision, max_num_batched_tokens, max_num_seqs, pool.longest)
    weights, activations = device_bytes(
        config, precision, dtypes, chip, page_size, sizes, choose_gemms(gemm, config)
    )
    activations += pool.page_bytes  # of zeros, which pages are cleared from
    if kv_cache_bytes is not None:
        room = total_bytes if free_bytes is None else free_bytes
        limit = (
            f"the device's {room} bytes"
            if free_bytes is None
            else f"{room} bytes of {total_bytes} that are free"
        )
        return pool.plan(weights, activations, stored_bytes, Budget(room, limit, ""))
    allowed = int(total_bytes * share)
    told = f"gpu_memory_utilization: {share:g} of {total_bytes} bytes is {allowed}"
    if free_bytes is not None and allowed > free_bytes:
        raise ValueError(
            f"{told}, of which only {free_bytes} are free: something else holds {total_bytes - free_bytes} bytes, "
            f"give at most {int(100 * free_bytes / total_bytes) / 100:g}"
        )
    return pool.plan(weights, activations, stored_bytes, Budget(allowed, "", f"{told},"))


def utilization(given: float | None, kv_cache_bytes: int | None) -> float:
    """The fraction to plan with.

    Raises:
        ValueError: it is none, or the pool's size is given, too.
    """
    if given is None:
        return DEFAULT_UTILIZATION
    if kv_cache_bytes is not None:
        raise ValueError(
            f"gpu_memory_utilization: {shown(given)} and kv_cache_bytes: {kv_cache_bytes} both say how large the KV pool is, "
            "give one of them"
        )
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= 1:
        raise ValueError(f"gpu_memory_utilization: {shown(given)} must be more than 0 and at most 1")
    return float(given)


def device_bytes(
    config: ModelConfig, precision: Precision, dtypes: Mapping[str, str], chip: Chip, page_size: int, sizes: StepSizes,
    gemms: Mapping[str, str],
) -> tuple[int, int]:  # fmt: skip
    """(of weights with rotary tables, of activations with inputs and logits): what an executor of these sizes allocates."""
    weights, buffers = _CountedWeights(config, dtypes, sizes), _CountedBuffers()
    binder = CudaOpBinder(config, precision, chip, buffers, page_size, weights, sizes, gemms=gemms)
    for op in forward_ops(config, precision.gemm_input):
        binder.bind(op)
    own = CudaStep.own_bytes(sizes.limits, page_size)
    workspace = CudaStep.blas_workspace_bytes if "cublas" in gemms.values() else 0
    return sum(weights.sizes.values()), sum(buffers.sizes) + own + workspace


class _CountedBuffers:
    """A step's buffers that take no memory."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def buffer(self, num_bytes: int) -> int:
        self.sizes.append(num_bytes)
        return len(self.sizes) - 1


class _CountedWeights:
    """DeviceWeights that copy nothing."""

    def __init__(self, config: ModelConfig, dtypes: Mapping[str, str], sizes: StepSizes) -> None:
        self._shapes, self._dtypes, self._step = weight_shapes(config), dtypes, sizes
        self.sizes: dict[tuple[str, str] | Rope, int] = {}

    def dtype(self, name: str) -> str:
        return self._dtypes[name]

    def rows(self, name: str, dtype: str | None = None) -> Arg:
        dtype = self.dtype(name) if dtype is None else dtype
        self.sizes[name, dtype] = weight_bytes(self._shapes[name], dtype)
        return ("weight", 0)

    def rope(self, rope: Rope) -> Arg:
        self.sizes[rope] = rope_bytes(rope, self._step.max_model_len, self._step.switch_len)
        return ("weight", 0)
