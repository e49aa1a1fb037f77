"""ModelExecutor: binds the decoder's operations to compiled kernels once, then runs one native call per batch.

Construction packs every weight into the kernels' panel layout, one at a time and letting go of the file's pages behind it,
loads (or compiles) the kernels the model needs, and hands the native StepExecutor a plan: kernel addresses with their
arguments. `forward` passes a ragged batch to that plan with the GIL released; no Python runs per layer or per token.

Every output row's bits depend on its own tokens only: each GEMM output has one accumulator with k ascending, attention walks
absolute 64-token blocks, and work is split over outputs, never inside one. So batch mates, chunk borders, cache hits and
thread counts cannot change an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoserve.batch import Batch
from nanoserve.kernels import attention, embedding, gated, gemm, kv_write, norm
from nanoserve.kernels.library import KernelSpec, load_kernels
from nanoserve.models.checkpoint import load_weights
from nanoserve.models.config import ModelConfig
from nanoserve.models.decoder import (
    Attention,
    Embedding,
    Gated,
    Gemm,
    KvWrite,
    Norm,
    Op,
    buffers,
    forward_ops,
)
from nanoserve.models.rope import Rope
from nanoserve.models.weights import BoundWeight, Tensors, bind_weights, random_weights
from nanoserve.native import KVCachePool, StepExecutor, ThreadPool

__all__ = ["ModelConfig", "ModelExecutor", "load_weights", "random_weights"]

Arg = tuple[str, int] | tuple[str]
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class _Bound:
    """An operation with its kernel(s) and native arguments."""

    name: str
    specs: tuple[KernelSpec, ...]
    args: list[Arg]
    domain: str
    options: dict[str, Any]


class ModelExecutor:
    """Runs one model's forward pass over a KV pool.

    Args:
        config, weights: as NanoServingEngine's.
        kv_pool: must have the model's layers, KV heads and head size.
        max_num_batched_tokens: most rows of one forward; sizes the activation buffers.
        max_model_len: longest sequence; sizes the table of rotary positions. None takes the config's max_seq_len.
        num_threads: None takes the cores this process may use.
        on_progress: called as (done, total, kernel name) while kernels load.
        on_load: called as (bytes done, bytes in total, weight name) while weights are packed.

    Raises:
        ValueError: a size that does not fit. CheckpointError: weights that do not fit the config.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Tensors,
        kv_pool: KVCachePool,
        *,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        num_threads: int | None = None,
        on_progress: OnProgress | None = None,
        on_load: OnProgress | None = None,
    ) -> None:
        _check_pool(config, kv_pool)
        threads = ThreadPool(num_threads)
        self.config = config
        self.kv_pool = kv_pool
        self.num_threads = threads.num_threads
        self.max_model_len = config.max_seq_len if max_model_len is None else max_model_len
        self.last_finite: NDArray[np.bool_] = np.ones(0, dtype=np.bool_)
        # Longer sequences turn by the second half of the rotary table, which begins after max_model_len rows.
        self._switch_len = self.max_model_len if config.switch_len is None else config.switch_len
        halves = 2 if self.max_model_len > self._switch_len else 1
        self._native = StepExecutor(kv_pool, threads, max_num_batched_tokens, halves * self.max_model_len)
        self._tensors = bind_weights(config, weights)
        self._ropes: dict[Rope, Arg] = {}  # layers that turn alike share a table
        self._packed: dict[str, Arg] = {}
        self.weight_bytes = 0  # of everything packed
        self._on_load = on_load
        self._loaded_bytes, self._total_bytes = 0, sum(weight.num_bytes for weight in self._tensors.values())
        self._buffers = {name: self._native.buffer(cols) for name, cols in buffers(config).items()}
        self._strides = {name: StepExecutor.stride(cols) for name, cols in buffers(config).items()}
        self._strides["logits"] = StepExecutor.logits_stride(config.vocab_size)
        plan = [self._bind(op) for op in forward_ops(config)]
        del self._tensors, self._packed, self._ropes  # what they held lives in the native plan now
        self.kernels = load_kernels([spec for bound in plan for spec in bound.specs], on_progress)
        for bound in plan:
            self._emit(bound)

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Logits of the batch's sampling rows; writes the KV of every row.

        Returns:
            float32[R, vocab], a fresh array; `last_finite` tells which rows are finite throughout.
        """
        logits, self.last_finite = self._native.forward(
            batch.input_ids,
            batch.tables,
            batch.starts,
            batch.counts,
            batch.sample_rows,
            self.config.vocab_size,
            self._position_offsets(batch),
        )
        result: NDArray[np.float32] = logits
        return result

    def execute_prefill(self, batch: Batch) -> NDArray[np.float32]:
        """`forward` for a batch that computes prompt tokens."""
        if not batch.is_prefill:
            raise ValueError("execute_prefill: the batch is decode only")
        return self.forward(batch)

    def execute_decode(self, batch: Batch) -> NDArray[np.float32]:
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

    def _position_offsets(self, batch: Batch) -> NDArray[np.int32] | None:
        """Where each sequence's rows of the rotary table begin; None: at 0, all of them."""
        if self._switch_len >= self.max_model_len:
            return None
        long_contexts = [request.long_context for request in batch.requests]
        return np.where(long_contexts, self.max_model_len, 0).astype(np.int32)

    def _weight(self, array: NDArray[Any]) -> Arg:
        return ("weight", self._native.weight(array))

    def _vector(self, name: str) -> Arg:
        """A weight the kernels read as it is: norms and biases of norms, position tables."""
        return self._once(name, _copied)

    def _matrix(self, name: str) -> Arg:
        """A GEMM's weight, packed. A tied head and embedding are one matrix in memory."""
        return self._once(name, gemm.pack)

    def _once(self, name: str, pack: Callable[[BoundWeight], NDArray[np.float32]]) -> Arg:
        if name not in self._packed:
            weight = self._tensors[name]
            packed = pack(weight)
            self._packed[name] = self._weight(packed)
            weight.forget()
            self.weight_bytes += packed.nbytes
            self._loaded_bytes += weight.num_bytes
            if self._on_load is not None:
                self._on_load(self._loaded_bytes, self._total_bytes, name)
        return self._packed[name]

    def _buffer(self, name: str) -> Arg:
        return ("logits",) if name == "logits" else ("buffer", self._buffers[name])

    def _bind(self, op: Op) -> _Bound:
        """The kernel of an operation and where each of its arguments comes from."""
        config, strides = self.config, self._strides
        match op:
            case Embedding():
                tied = config.tie_embeddings
                spec = embedding.embedding_spec(
                    config.n_embd, strides[op.out], positions=op.pos_table is not None, scale=op.scale,
                    panel=gemm.panel_width(config.vocab_size) if tied else 0,
                )  # fmt: skip
                table = self._matrix(op.table) if tied else self._vector(op.table)
                args: list[Arg] = [("ids",), ("positions",), table]
                if op.pos_table:
                    args.append(self._vector(op.pos_table))
                args.append(self._buffer(op.out))
                return _Bound("embedding", (spec,), args, "rows", {"cost_per_unit": config.n_embd})
            case Norm():
                spec = norm.norm_spec(
                    op.kind, op.cols, strides[op.x], strides[op.out], config.norm_eps, bias=op.bias is not None,
                    gather=op.gather, residual=op.residual, first=op.first, groups=op.groups,
                )  # fmt: skip
                args = [
                    self._buffer(op.x),
                    *([("sample_rows",)] if op.gather else []),
                    self._vector(op.weight),
                ]
                if op.bias:
                    args.append(self._vector(op.bias))
                args.append(self._buffer(op.out))
                domain = "samples" if op.gather else "rows"
                return _Bound(op.weight, (spec,), args, domain, {"cost_per_unit": 4 * op.cols * op.groups})
            case Gemm():
                return self._bind_gemm(op)
            case KvWrite():
                rotary = 0 if op.rope is None else op.rope.dims
                spec = kv_write.kv_write_spec(
                    config.n_head, config.kv_heads, config.dim_per_head, self.kv_pool.page_size, strides[op.qkv], rotary
                )  # fmt: skip
                args = [self._buffer(op.qkv)]
                if op.rope is not None:
                    if op.rope not in self._ropes:
                        self._ropes[op.rope] = self._weight(self._rope_table(op.rope))
                    args += [self._ropes[op.rope], ("positions",)]
                args += [("k", op.layer), ("v", op.layer), ("slots",)]
                cost = 2 * (config.n_head + 2 * config.kv_heads) * config.dim_per_head
                return _Bound(f"layers.{op.layer}.kv_write", (spec,), args, "rows", {"cost_per_unit": cost})
            case Attention():
                return self._bind_attention(op)
            case Gated():
                spec = gated.gated_spec(op.cols, op.activation, strides[op.x], strides[op.out])
                return _Bound(
                    "gated",
                    (spec,),
                    [self._buffer(op.x), self._buffer(op.out)],
                    "rows",
                    {"cost_per_unit": 16 * op.cols},
                )

    def _bind_gemm(self, op: Gemm) -> _Bound:
        spec = gemm.gemm_spec(
            op.n_in, op.n_out, self._strides[op.x], self._strides[op.out],
            bias=op.bias is not None, activation=op.activation, residual=op.residual, scale=op.scale, softcap=op.softcap,
        )  # fmt: skip
        tied = op.weight == "head.weight" and self.config.tie_embeddings
        args: list[Arg] = [self._buffer(op.x), self._matrix("embed.weight" if tied else op.weight)]
        if op.bias:
            args.append(self._once(op.bias, lambda bias: gemm.pack_bias(bias[:])))
        over = "samples" if op.x == "last" else "rows"
        args += [self._buffer(op.out), ("num_samples",) if over == "samples" else ("num_rows",)]
        width = gemm.panel_width(op.n_out)
        options = {
            "panels": -(-op.n_out // width),
            "row_block": gemm.ROW_BLOCK,
            "over": over,
            "cost_per_unit": op.n_in * width,
        }
        return _Bound(op.weight, (spec,), args, "tiles", options)

    def _bind_attention(self, op: Attention) -> _Bound:
        config = self.config
        group = config.n_head // config.kv_heads
        small, large = attention.row_tiles(group)
        specs = tuple(
            attention.attention_spec(
                config.n_head, config.kv_heads, config.dim_per_head, self.kv_pool.page_size,
                self._strides[op.qkv], self._strides[op.out], rows, scale=config.attention_scale,
                window=op.window, softcap=config.attention_softcap,
            )
            for rows in (small, large)
        )  # fmt: skip
        args: list[Arg] = [
            self._buffer(op.qkv),
            ("k", op.layer),
            ("v", op.layer),
            ("table",),
            ("items",),
            self._buffer(op.out),
        ]
        options = {
            "small_rows": small, "large_rows": large, "group": group, "kv_heads": config.kv_heads, "window": op.window,
        }  # fmt: skip
        return _Bound(f"layers.{op.layer}.attention", specs, args, "attention", options)

    def _rope_table(self, rope: Rope) -> NDArray[np.float32]:
        """A row per position, and twice as many where some layer's table has a second half."""
        table = rope.table(self.max_model_len)
        if rope.switch_len is None and self._switch_len < self.max_model_len:
            table = np.concatenate([table, table])
        return table

    def _emit(self, bound: _Bound) -> None:
        addresses = [self.kernels[spec] for spec in bound.specs]
        if bound.domain == "attention":
            o = bound.options
            self._native.attention(
                bound.name,
                addresses[0],
                o["small_rows"],
                addresses[1],
                o["large_rows"],
                bound.args,
                o["group"],
                o["kv_heads"],
                o["window"],
            )
        else:
            self._native.op(bound.name, addresses[0], bound.args, bound.domain, **bound.options)


def _copied(weight: BoundWeight, step: int = 4096) -> NDArray[np.float32]:
    """The weight in memory of its own, some rows at a time: converting all of it at once would take it twice."""
    copy = np.empty(weight.shape, np.float32)
    for at in range(0, weight.shape[0], step):
        copy[at : at + step] = weight[at : at + step]
    return copy


def _check_pool(config: ModelConfig, pool: KVCachePool) -> None:
    for name, held, needed in (
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
