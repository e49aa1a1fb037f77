"""The decoder's operations with their kernels: what decoder.py names, bound to specs, buffers and weights.

An operation becomes a kernel specification (two for attention: few rows and many), the sources of its arguments in the
order of the kernel's signature, and how its work is cut. Nothing is compiled here and nothing runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanoserve.kernels import attention, embedding, gated, gemm, kv_write, logits, norm
from nanoserve.kernels.library import KernelSpec
from nanoserve.models.config import ModelConfig
from nanoserve.models.decoder import Attention, BlockMax, Embedding, Gated, Gemm, KvWrite, Norm, Op, buffers
from nanoserve.native import LOGITS_BLOCK, StepExecutor
from nanoserve.packed_weights import Arg, PackedWeights


@dataclass(frozen=True, slots=True)
class BoundOp:
    """An operation with its kernel(s) and native arguments."""

    name: str
    specs: tuple[KernelSpec, ...]
    args: list[Arg]
    domain: str
    options: dict[str, Any]

    def add_to(self, native: StepExecutor, addresses: Mapping[KernelSpec, int]) -> None:
        """Appends it to a plan."""
        first, o = addresses[self.specs[0]], self.options
        if self.domain == "attention":
            native.attention(
                self.name, first, o["small_rows"], addresses[self.specs[1]], o["large_rows"], self.args, o["group"],
                o["kv_heads"], o["window"],
            )  # fmt: skip
        else:
            native.op(self.name, first, self.args, self.domain, **o)


class OpBinder:
    """Binds one model's operations.

    Args:
        native: whose buffers they use; makes them.
        page_size: tokens per page of the pool.
        weights: the model's.
    """

    def __init__(
        self, config: ModelConfig, native: StepExecutor, page_size: int, weights: PackedWeights
    ) -> None:
        self._config = config
        self._page_size = page_size
        self._weights = weights
        self._buffers = {name: native.buffer(cols) for name, cols in buffers(config).items()}
        self._strides = {name: StepExecutor.stride(cols) for name, cols in buffers(config).items()}
        self._strides["logits"] = StepExecutor.logits_stride(config.vocab_size)

    def bind(self, op: Op) -> BoundOp:
        """The kernel of an operation and where each of its arguments comes from."""
        config, strides = self._config, self._strides
        match op:
            case Embedding():
                tied = config.tie_embeddings
                spec = embedding.embedding_spec(
                    config.n_embd, strides[op.out], positions=op.pos_table is not None, scale=op.scale,
                    panel=gemm.panel_width(config.vocab_size) if tied else 0, dtype=self._weights.dtype(op.table),
                )  # fmt: skip
                table = self._weights.matrix(op.table) if tied else self._weights.rows(op.table)
                args: list[Arg] = [("ids",), ("positions",), table]
                if op.pos_table:
                    args.append(self._weights.rows(op.pos_table))
                args.append(self._buffer(op.out))
                return BoundOp("embedding", (spec,), args, "rows", {"cost_per_unit": config.n_embd})
            case Norm():
                spec = norm.norm_spec(
                    op.kind, op.cols, strides[op.x], strides[op.out], config.norm_eps, bias=op.bias is not None,
                    gather=op.gather, residual=op.residual, first=op.first, groups=op.groups,
                )  # fmt: skip
                args = [
                    self._buffer(op.x),
                    *([("sample_rows",)] if op.gather else []),
                    self._weights.rows(op.weight),
                ]
                if op.bias:
                    args.append(self._weights.rows(op.bias))
                args.append(self._buffer(op.out))
                domain = "samples" if op.gather else "rows"
                return BoundOp(op.weight, (spec,), args, domain, {"cost_per_unit": 4 * op.cols * op.groups})
            case Gemm():
                return self._bind_gemm(op)
            case KvWrite():
                rotary = 0 if op.rope is None else op.rope.dims
                spec = kv_write.kv_write_spec(
                    config.n_head, config.kv_heads, config.dim_per_head, self._page_size, strides[op.qkv], rotary
                )  # fmt: skip
                args = [self._buffer(op.qkv)]
                if op.rope is not None:
                    args += [self._weights.rope(op.rope), ("positions",)]
                args += [("k", op.layer), ("v", op.layer), ("slots",)]
                cost = 2 * (config.n_head + 2 * config.kv_heads) * config.dim_per_head
                return BoundOp(f"layers.{op.layer}.kv_write", (spec,), args, "rows", {"cost_per_unit": cost})
            case Attention():
                return self._bind_attention(op)
            case Gated():
                spec = gated.gated_spec(op.cols, op.activation, strides[op.x], strides[op.out])
                return BoundOp(
                    "gated",
                    (spec,),
                    [self._buffer(op.x), self._buffer(op.out)],
                    "rows",
                    {"cost_per_unit": 16 * op.cols},
                )
            case BlockMax():
                spec = logits.block_max_spec(op.cols, strides["logits"])
                options = {
                    "panels": logits.num_ranges(op.cols),
                    "row_block": 1,
                    "over": "samples",
                    "cost_per_unit": 2 * min(op.cols, logits.BLOCKS_PER_UNIT * LOGITS_BLOCK),
                }
                args = [("logits",), ("block_max",), ("num_samples",)]
                return BoundOp("block_max", (spec,), args, "tiles", options)

    def _bind_gemm(self, op: Gemm) -> BoundOp:
        tied = op.weight == "head.weight" and self._config.tie_embeddings
        weight = "embed.weight" if tied else op.weight
        spec = gemm.gemm_spec(
            op.n_in, op.n_out, self._strides[op.x], self._strides[op.out], bias=op.bias is not None,
            activation=op.activation, residual=op.residual, scale=op.scale, softcap=op.softcap,
            dtype=self._weights.dtype(weight),
        )  # fmt: skip
        args: list[Arg] = [self._buffer(op.x), self._weights.matrix(weight)]
        if op.bias:
            args.append(self._weights.bias(op.bias))
        over = "samples" if op.x == "last" else "rows"
        args += [self._buffer(op.out), ("num_samples",) if over == "samples" else ("num_rows",)]
        width = gemm.panel_width(op.n_out)
        options = {
            "panels": -(-op.n_out // width),
            "row_block": gemm.ROW_BLOCK,
            "over": over,
            "cost_per_unit": op.n_in * width,
        }
        return BoundOp(op.weight, (spec,), args, "tiles", options)

    def _bind_attention(self, op: Attention) -> BoundOp:
        config = self._config
        group = config.n_head // config.kv_heads
        small, large = attention.row_tiles(group)
        specs = tuple(
            attention.attention_spec(
                config.n_head, config.kv_heads, config.dim_per_head, self._page_size,
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
        return BoundOp(f"layers.{op.layer}.attention", specs, args, "attention", options)

    def _buffer(self, name: str) -> Arg:
        return ("logits",) if name == "logits" else ("buffer", self._buffers[name])
