"""The native core, as Python sees it. Built from src/bind; a test compares this file with the module."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

LOGITS_BLOCK: int

class PoolExhausted(RuntimeError): ...

class KVCachePool:
    def __init__(
        self, num_pages: int, page_size: int = 16, num_layers: int = 1, num_heads: int = 1, head_dim: int = 16,
        element: str = "f32",
    ) -> None: ...  # fmt: skip
    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def element(self) -> str: ...
    @property
    def num_free_pages(self) -> int: ...
    @property
    def num_used_pages(self) -> int: ...
    @property
    def bytes_total(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    def allocate(self, num_tokens: int) -> list[int]: ...
    def allocate_pages(self, num_pages: int) -> list[int]: ...
    def ref(self, pages: Sequence[int]) -> None: ...
    def unref(self, pages: Sequence[int]) -> list[int]: ...
    def free(self, pages: Sequence[int]) -> list[int]: ...
    def ref_count(self, page: int) -> int: ...
    def pages_needed(self, num_tokens: int) -> int: ...
    def can_allocate(self, num_tokens: int) -> bool: ...
    def store_kv(
        self, k: NDArray[np.float32], v: NDArray[np.float32], slots: Sequence[int] | NDArray[Any], layer: int
    ) -> None: ...
    def get_layer_cache(self, layer: int) -> tuple[NDArray[Any], NDArray[Any]]: ...
    def copy_page(self, page: int) -> int: ...
    def populate(self) -> bool: ...
    def scrub(self, pages: Sequence[int]) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def audit(self, holders: Sequence[Sequence[int]] = ...) -> list[str]: ...

class PageTable:
    def __init__(self, pool: KVCachePool) -> None: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> int: ...
    @property
    def pool(self) -> KVCachePool: ...
    @property
    def pages(self) -> list[int]: ...
    @property
    def capacity(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    def grow_to(self, num_tokens: int) -> list[int]: ...
    def adopt(self, pages: Sequence[int]) -> None: ...
    def make_writable(self, index: int) -> bool: ...
    def release(self) -> None: ...
    def slots(self, start: int, count: int) -> NDArray[np.int32]: ...

class ThreadPool:
    def __init__(self, num_threads: int | None = None) -> None: ...
    @property
    def num_threads(self) -> int: ...

def default_num_threads() -> int: ...

class LogitsReader:
    def __init__(
        self,
        threads: ThreadPool | None = None,
        block_sums: int = 0,
        block_max: int = 0,
        vocab: int = 0,
        row_stride: int = 0,
        blocks_per_unit: int = 0,
    ) -> None: ...
    def block_max(self, values: NDArray[np.float32], may_forbid: bool = False) -> NDArray[np.float32]: ...
    def forbid(
        self,
        values: NDArray[np.float32],
        block_max: NDArray[np.float32],
        rows: Sequence[int],
        masks: NDArray[np.uint32],
    ) -> None: ...
    def sample(
        self,
        values: NDArray[np.float32],
        block_max: NDArray[np.float32],
        rows: Sequence[int],
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        uniform: Sequence[float],
    ) -> list[int]: ...
    def kept(
        self,
        values: NDArray[np.float32],
        block_max: NDArray[np.float32],
        row: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> list[int]: ...
    def score(
        self,
        values: NDArray[np.float32],
        block_max: NDArray[np.float32],
        rows: Sequence[int],
        tokens: Sequence[int],
        num_top: Sequence[int],
    ) -> list[tuple[float, int, list[tuple[int, float]]]]: ...

class StepExecutor:
    def __init__(
        self, pool: KVCachePool, threads: ThreadPool, max_tokens: int, max_positions: int | None = None
    ) -> None: ...
    @staticmethod
    def stride(cols: int, item_bytes: int = 4) -> int: ...
    @staticmethod
    def logits_stride(vocab: int) -> int: ...
    @staticmethod
    def shares(num_units: int, cost_per_unit: int, num_threads: int) -> list[tuple[int, int]]: ...
    @staticmethod
    def most_parts_bytes(
        small_tiling: tuple[int, int],
        large_tiling: tuple[int, int],
        group: int,
        kv_heads: int,
        head_dim: int,
        max_tokens: int,
        max_context: int,
        num_threads: int,
        window: int = 0,
    ) -> int: ...
    @property
    def parts_bytes(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    def buffer(self, cols: int, item_bytes: int = 4) -> int: ...
    def row_scales(self) -> int: ...
    def buffer_view(self, id: int) -> NDArray[Any]: ...
    def weight(self, array: NDArray[Any]) -> int: ...
    def op(
        self,
        name: str,
        address: int,
        args: Sequence[tuple[Any, ...]],
        domain: str,
        panels: int = 0,
        row_block: int = 0,
        over: str = "rows",
        cost_per_unit: int = 0,
    ) -> None: ...
    def attention(
        self,
        name: str,
        small_address: int,
        small_tiling: tuple[int, int],
        large_address: int,
        large_tiling: tuple[int, int],
        args: Sequence[tuple[Any, ...]],
        group: int,
        kv_heads: int,
        window: int = 0,
    ) -> None: ...
    def forward(
        self,
        input_ids: NDArray[np.int32] | Sequence[int],
        tables: Sequence[PageTable],
        starts: NDArray[np.int32] | Sequence[int],
        counts: NDArray[np.int32] | Sequence[int],
        sample_rows: NDArray[np.int32] | Sequence[int],
        vocab: int,
        position_offsets: NDArray[np.int32] | Sequence[int] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
    def profile(self, enable: bool) -> None: ...
    def timings(self) -> list[tuple[str, int, int]]: ...

class WeightArena:
    def __init__(self, num_bytes: int) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    def view(self, begin: int, num_bytes: int) -> NDArray[np.uint8]: ...
    def read(self, file: int, offset: int, begin: int, num_bytes: int, threads: ThreadPool) -> int: ...

def checksum(bytes: NDArray[np.uint8], threads: ThreadPool) -> int: ...
def paged_attention(
    pool: KVCachePool,
    layer: int,
    q: NDArray[np.float32],
    out: NDArray[np.float32],
    block_tables: NDArray[np.int32],
    starts: NDArray[np.int32] | Sequence[int],
    counts: NDArray[np.int32] | Sequence[int],
    small_address: int,
    small_tiling: tuple[int, int],
    large_address: int,
    large_tiling: tuple[int, int],
    threads: ThreadPool,
    window: int = 0,
) -> None: ...

class CudaDriverMissing(RuntimeError): ...
class CudaError(RuntimeError): ...
class CublasMissing(RuntimeError): ...
class CublasError(RuntimeError): ...

class CudaDevice:
    def __init__(self, ordinal: int = 0) -> None: ...
    @staticmethod
    def count() -> int: ...
    @property
    def ordinal(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def capability(self) -> int: ...
    @property
    def num_multiprocessors(self) -> int: ...
    @property
    def max_shared_bytes(self) -> int: ...
    @property
    def free_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...

class CudaStream:
    def __init__(self, device: CudaDevice) -> None: ...
    def synchronize(self) -> None: ...

class CudaKernel:
    def __init__(
        self, device: CudaDevice, image: bytes, entry: str, block: int, shared_bytes: int = 0
    ) -> None: ...
    @property
    def entry(self) -> str: ...
    @property
    def num_registers(self) -> int: ...
    @property
    def local_bytes(self) -> int: ...

class CudaStep:
    blas_workspace_bytes: ClassVar[int]
    def __init__(
        self,
        pool: KVCachePool,
        max_tokens: int,
        max_positions: int,
        max_sequences: int,
        max_samples: int,
        chunk_rows: int,
        segment: int,
        vocab: int,
        logits_stride: int,
        num_blocks: int,
        buckets: Sequence[int] = (),
    ) -> None: ...
    @staticmethod
    def own_bytes(
        page_size: int,
        max_tokens: int,
        max_positions: int,
        max_sequences: int,
        max_samples: int,
        chunk_rows: int,
        segment: int,
        vocab: int,
        logits_stride: int,
        num_blocks: int,
    ) -> int: ...
    def buffer(self, num_bytes: int) -> int: ...
    def weight(self, array: NDArray[Any]) -> int: ...
    def reserve_weight(self, num_bytes: int) -> int: ...
    def fill_weight(self, id: int, offset: int, array: NDArray[Any]) -> None: ...
    def op(
        self,
        name: str,
        variants: Sequence[tuple[int, CudaKernel, Sequence[tuple[Any, int, int]]]],
        args: Sequence[tuple[Any, ...]],
        over: tuple[Any, ...] = ("number",),
    ) -> None: ...
    def load_blas(self, paths: Sequence[str]) -> tuple[str, int]: ...
    def product(
        self,
        name: str,
        x: tuple[Any, ...],
        weight: tuple[Any, ...],
        y: tuple[Any, ...],
        rows: tuple[Any, ...],
        n: int,
        k: int,
        ldx: int,
        ldw: int,
        ldy: int,
        element: str,
        y_element: str,
        scale: float = 1.0,
        residual: bool = False,
    ) -> None: ...
    def start(
        self,
        input_ids: NDArray[np.int32] | Sequence[int],
        tables: Sequence[PageTable],
        starts: NDArray[np.int32] | Sequence[int],
        counts: NDArray[np.int32] | Sequence[int],
        sample_rows: NDArray[np.int32] | Sequence[int],
        vocab: int,
        position_offsets: NDArray[np.int32] | None = None,
        draws: NDArray[np.float32] | None = None,
        draw_ints: NDArray[np.int32] | None = None,
        sources: NDArray[np.int32] | Sequence[int] | None = None,
    ) -> int: ...
    def finish(self, number: int) -> NDArray[np.int32]: ...
    def read_logits(
        self, number: int, samples: NDArray[np.int32] | Sequence[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def counts(self) -> dict[str, int]: ...

def cuda_pool(
    stream: CudaStream,
    num_pages: int,
    page_size: int = 16,
    num_layers: int = 1,
    num_heads: int = 1,
    head_dim: int = 16,
    element: str = "f32",
) -> KVCachePool: ...
def cuda_layer_cache(pool: KVCachePool, layer: int, values: bool) -> NDArray[Any]: ...
