"""A GPU by name, and what an engine needs of it: a plan of its memory, a pool of pages, an executor, the two on one stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoserve.cuda.executor import CudaExecutor, chip_of
from nanoserve.cuda.memory_plan import DEFAULT_NUM_SEQS, plan_cuda_memory
from nanoserve.device_name import device_ordinal
from nanoserve.memory_plan import MemoryPlan
from nanoserve.models.config import ModelConfig
from nanoserve.models.weights import BoundWeight, Tensors
from nanoserve.native import CudaDevice, CudaDriverMissing, CudaStream, KVCachePool, cuda_pool
from nanoserve.precision import Precision


class CudaBackend:
    """One device of this process.

    Attributes:
        chip: what its kernels are made for. default_num_seqs: sequences at once, of who does not say how many.

    Raises:
        CudaDriverMissing: there is no driver, or none that can be used. ValueError: there is no such device, or it is too old.
    """

    default_num_seqs = DEFAULT_NUM_SEQS

    def __init__(self, ordinal: int = 0) -> None:
        try:
            there = CudaDevice.count()
        except CudaDriverMissing as error:
            raise CudaDriverMissing(f"{error}. Without a GPU, device='cpu' works") from error
        if ordinal >= there:
            known = ", ".join(f"cuda:{number}" for number in range(there)) or "none"
            raise ValueError(
                f"device: there is no cuda:{ordinal}; of CUDA devices there are {there}: {known}"
            )
        self.device = CudaDevice(ordinal)
        self.chip = chip_of(self.device)
        self.stream = CudaStream(self.device)

    @property
    def name(self) -> str:
        """As a person reads it: "cuda:0, NVIDIA H100 80GB HBM3 (sm_90a)"."""
        return f"cuda:{self.device.ordinal}, {self.device.name} ({self.chip.name})"

    def plan_memory(
        self, config: ModelConfig, weights: Mapping[str, BoundWeight], **options: Any
    ) -> MemoryPlan:
        """As plan_cuda_memory for this device and what is free of it now."""
        dtypes = {name: weight.dtype for name, weight in weights.items()}
        return plan_cuda_memory(
            config, dtypes, self.chip, self.device.total_bytes, free_bytes=self.device.free_bytes, **options
        )

    def make_pool(
        self, config: ModelConfig, precision: Precision, num_pages: int, page_size: int
    ) -> KVCachePool:
        """Raises MemoryError, with the numbers, when the device has not enough."""
        return cuda_pool(
            self.stream,
            num_pages,
            page_size,
            config.n_layer,
            config.kv_heads,
            config.dim_per_head,
            precision.kv_element,
        )

    def make_executor(
        self, config: ModelConfig, weights: Tensors, kv_pool: KVCachePool, **options: Any
    ) -> CudaExecutor:
        """Options as CudaExecutor's."""
        return CudaExecutor(config, weights, kv_pool, self.device, **options)


def open_device(name: str) -> CudaBackend:
    """The device "cuda", which is the first, or "cuda:1".

    Raises:
        ValueError, CudaDriverMissing: the name is not one of a device; as CudaBackend.
    """
    ordinal = device_ordinal(name)
    if ordinal is None:
        raise ValueError(f"device: {name!r} is no GPU")
    return CudaBackend(ordinal)
