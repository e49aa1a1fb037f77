"""A GPU by name, and what an engine needs of it: a pool of pages, an executor, both on one stream."""

from __future__ import annotations

import re
from typing import Any

from nanoserve.checks import shown
from nanoserve.cuda.executor import CudaExecutor
from nanoserve.models.config import ModelConfig
from nanoserve.models.weights import Tensors
from nanoserve.native import CudaDevice, CudaStream, KVCachePool, cuda_pool
from nanoserve.precision import Precision


class CudaBackend:
    """One device of this process.

    Raises:
        CudaDriverMissing: there is no driver, or none that can be used. IndexError: there is no such device.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self.device = CudaDevice(ordinal)
        self.stream = CudaStream(self.device)

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
        ValueError: the name is not one of a device. CudaDriverMissing, IndexError: as CudaBackend.
    """
    found = re.fullmatch(r"cuda(?::(\d{1,3}))?", name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"device: {shown(name)} must be cpu, cuda or cuda:N")
    return CudaBackend(int(found[1] or 0))
