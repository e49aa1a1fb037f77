"""ModelExecutor: binds the decoder's operations to compiled kernels once, then runs one native call per batch.

Construction packs every weight into the kernels' panel layout, one at a time and letting go of the file's pages behind it (or
reads what an earlier start packed), loads (or compiles) the kernels the model needs, and hands the native StepExecutor a plan: kernel addresses with their
arguments. `forward` passes a ragged batch to that plan with the GIL released; no Python runs per layer or per token.

Every output row's bits depend on its own tokens only: each GEMM output has one accumulator with k ascending, attention walks
absolute 64-token blocks, and work is split over outputs, never inside one. So batch mates, chunk borders, cache hits and
thread counts cannot change an answer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nanoserve.batch import Batch
from nanoserve.bound_op import OpBinder
from nanoserve.kernels import logits as logits_kernels
from nanoserve.kernels.library import load_kernels
from nanoserve.logits import Logits
from nanoserve.models.checkpoint import load_weights
from nanoserve.models.config import ModelConfig
from nanoserve.models.decoder import forward_ops
from nanoserve.models.weights import Tensors, bind_weights, random_weights
from nanoserve.native import KVCachePool, LogitsReader, StepExecutor, ThreadPool
from nanoserve.packed_weights import OnProgress, PackedWeights
from nanoserve.precision import Precision
from nanoserve.weight_cache import WeightCache

__all__ = ["ModelConfig", "ModelExecutor", "load_weights", "random_weights"]


class ModelExecutor:
    """Runs one model's forward pass over a KV pool.

    Args:
        config, weights: as NanoServingEngine's.
        kv_pool: must have the model's layers, KV heads and head size, and the precision's element type.
        precision: number formats of the forward pass; None: float32.
        max_num_batched_tokens: most rows of one forward; sizes the activation buffers.
        max_model_len: longest sequence; sizes the table of rotary positions. None takes the config's max_seq_len.
        num_threads: None takes the cores this process may use.
        on_progress: called as (done, total, kernel name) while kernels load.
        on_load: called as (bytes done, bytes in total, weight name) while weights are packed, or read from the cache.
        weight_cache: keep packed weights of checkpoint files on disk, for a faster start the next time. They are written by
            a thread of its own once everything is ready; a process that ends before that waits for it.

    Attributes:
        weight_bytes: of the packed weights.
        weights_were_cached: whether they came from the cache.
        weight_writer: the thread that writes them there, None where none does.
        quantization_report: how far the int8 weights are from the checkpoint's; None where none is int8.

    Raises:
        ValueError: a size that does not fit. CheckpointError: weights that do not fit the config. MemoryError: or the memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Tensors,
        kv_pool: KVCachePool,
        *,
        precision: Precision | None = None,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        num_threads: int | None = None,
        on_progress: OnProgress | None = None,
        on_load: OnProgress | None = None,
        weight_cache: bool = True,
    ) -> None:
        self.precision = precision = Precision() if precision is None else precision
        _check_pool(config, precision, kv_pool)
        threads = ThreadPool(num_threads)
        self.config = config
        self.kv_pool = kv_pool
        self.num_threads = threads.num_threads
        self.max_model_len = config.max_seq_len if max_model_len is None else max_model_len
        # Longer sequences turn by the second half of the rotary table, which begins after max_model_len rows.
        self._switch_len = self.max_model_len if config.switch_len is None else config.switch_len
        halves = 2 if self.max_model_len > self._switch_len else 1
        self._native = StepExecutor(kv_pool, threads, max_num_batched_tokens, halves * self.max_model_len)
        packed = PackedWeights(
            self._native, bind_weights(config, weights), self.max_model_len, self._switch_len
        )
        binder = OpBinder(config, precision, self._native, kv_pool.page_size, packed)
        plan = [binder.bind(op) for op in forward_ops(config, precision.gemm_input)]
        self.weight_bytes = packed.num_bytes
        self.weight_writer = packed.load(threads, WeightCache.open() if weight_cache else None, on_load)
        self.weights_were_cached = packed.was_cached
        self.quantization_report = packed.quantization_report
        row_stride = StepExecutor.logits_stride(config.vocab_size)
        sums = logits_kernels.block_sums_spec(config.vocab_size, row_stride)
        largest = logits_kernels.block_max_spec(config.vocab_size, row_stride, may_forbid=True)
        specs = [spec for bound in plan for spec in bound.specs]
        self.kernels = load_kernels([*specs, sums, largest], on_progress)
        for bound in plan:
            bound.add_to(self._native, self.kernels)
        self._reader = LogitsReader(
            threads, self.kernels[sums], self.kernels[largest], config.vocab_size, row_stride,
            logits_kernels.BLOCKS_PER_UNIT,
        )  # fmt: skip
        if self.weight_writer is not None:
            self.weight_writer.start()

    def forward(self, batch: Batch) -> Logits:
        """Logits of the batch's `sample_rows`, in fresh memory; writes the KV of every row."""
        values, block_max = self._native.forward(
            batch.input_ids,
            batch.tables,
            batch.starts,
            batch.counts,
            batch.sample_rows,
            self.config.vocab_size,
            self._position_offsets(batch),
        )
        return Logits(values, block_max, self._reader)

    def execute_prefill(self, batch: Batch) -> Logits:
        """`forward` for a batch that computes prompt tokens."""
        if not batch.is_prefill:
            raise ValueError("execute_prefill: the batch is decode only")
        return self.forward(batch)

    def execute_decode(self, batch: Batch) -> Logits:
        """`forward` for a batch of one output token per request."""
        if not batch.is_decode:
            raise ValueError("execute_decode: the batch has prompt tokens to compute")
        return self.forward(batch)

    def profile(self, enable: bool) -> None:
        """Measure each operation of the following forwards; `timings` has the result."""
        self._native.profile(enable)

    def timings(self) -> list[tuple[str, int, int]]:
        """(operation, nanoseconds, calls) since profiling was enabled."""
        return list(self._native.timings())

    @property
    def parts_bytes(self) -> int:
        """Memory of what threads that share a long context's attention left for each other; it grows with the steps so far."""
        return self._native.parts_bytes

    def _position_offsets(self, batch: Batch) -> NDArray[np.int32] | None:
        """Where each sequence's rows of the rotary table begin; None: at 0, all of them."""
        if self._switch_len >= self.max_model_len:
            return None
        long_contexts = [request.long_context for request in batch.requests]
        return np.where(long_contexts, self.max_model_len, 0).astype(np.int32)


def _check_pool(config: ModelConfig, precision: Precision, pool: KVCachePool) -> None:
    held: str | int
    needed: str | int
    for name, held, needed in (
        ("element", pool.element, precision.kv_element),
        ("num_layers", pool.num_layers, config.n_layer),
        ("num_heads", pool.num_heads, config.kv_heads),
        ("head_dim", pool.head_dim, config.dim_per_head),
    ):
        if held != needed:
            raise ValueError(f"kv_pool: {name} is {held}, the model needs {needed}")
    if pool.page_size % 16:
        raise ValueError(
            f"kv_pool: page_size {pool.page_size} must be a multiple of 16, the width of a vector of scores"
        )
