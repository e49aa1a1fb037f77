"""The decoder's operations with their kernels: what decoder.py names, bound to specs, buffers and weights.

An operation becomes a kernel specification (two for attention: few rows and many), the sources of its arguments in the
order of the kernel's signature, and how its work is cut. Nothing is compiled here and nothing runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanoserve.kernels import attention, convert, embedding, gemm, kv_write, logits, norm
from nanoserve.kernels.library import KernelSpec
from nanoserve.models.config import ModelConfig
from nanoserve.models.decoder import Attention, BlockMax, Convert, Embedding, Gemm, KvWrite, Norm, Op, buffers
from nanoserve.native import LOGITS_BLOCK, StepExecutor
from nanoserve.packed_weights import Arg, PackedWeights
from nanoserve.precision import ELEMENT_BYTES, Precision


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
                self.name, first, o["small_tiling"], addresses[self.specs[1]], o["large_tiling"], self.args, o["group"],
                o["kv_heads"], o["window"],
            )  # fmt: skip
        else:
            native.op(self.name, first, self.args, self.domain, **o)


class OpBinder:
    """Binds one model's operations.

    Args:
        precision: of the forward pass.
        native: whose buffers they use; makes them.
        page_size: tokens per page of the pool.
        weights: the model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        native: StepExecutor,
        page_size: int,
        weights: PackedWeights,
    ) -> None:
        self._config = config
        self._precision = precision
        self._page_size = page_size
        self._weights = weights
        self._buffers: dict[str, list[Arg]] = {}
        self._strides: dict[str, int] = {"logits": StepExecutor.logits_stride(config.vocab_size)}
        self._elements: dict[str, str] = {"logits": "f32"}
        for name, buffer in buffers(config, precision.gemm_input).items():
            item = ELEMENT_BYTES[buffer.element]
            self._buffers[name] = [("buffer", native.buffer(buffer.cols, item))]
            if buffer.element == "u8":
                self._buffers[name].append(("buffer", native.row_scales()))
            self._strides[name] = StepExecutor.stride(buffer.cols, item)
            self._elements[name] = buffer.element

    def bind(self, op: Op) -> BoundOp:
        """The kernel of an operation and where each of its arguments comes from."""
        match op:
            case Embedding():
                return self._bind_embedding(op)
            case Norm():
                return self._bind_norm(op)
            case Gemm():
                return self._bind_gemm(op)
            case KvWrite():
                return self._bind_kv_write(op)
            case Attention():
                return self._bind_attention(op)
            case Convert():
                strides = self._strides
                spec = convert.convert_spec(op.cols, strides[op.x], strides[op.out], self._elements[op.out])
                args = [*self._buffer(op.x), *self._buffer(op.out)]
                return BoundOp(f"convert.{op.x}", (spec,), args, "rows", {"cost_per_unit": 4 * op.cols})
            case BlockMax():
                return self._bind_block_max(op)

    def _bind_embedding(self, op: Embedding) -> BoundOp:
        config, stored = self._config, self._weights.dtype(op.table)
        tied = config.tie_embeddings
        dtype = self._precision.gemm_weight(stored) if tied else stored
        spec = embedding.embedding_spec(
            config.n_embd, self._strides[op.out], positions=op.pos_table is not None, scale=op.scale,
            panel=gemm.panel_width(config.vocab_size) if tied else 0, dtype=dtype,
        )  # fmt: skip
        table = self._weights.matrix(op.table, dtype)[:2] if tied else [self._weights.rows(op.table)]
        args: list[Arg] = [("ids",), ("positions",), *table]
        if op.pos_table:
            args.append(self._weights.rows(op.pos_table))
        args += self._buffer(op.out)
        return BoundOp("embedding", (spec,), args, "rows", {"cost_per_unit": config.n_embd})

    def _bind_norm(self, op: Norm) -> BoundOp:
        spec = norm.norm_spec(
            op.kind, op.cols, self._strides[op.x], self._strides[op.out], self._config.norm_eps,
            bias=op.bias is not None, gather=op.gather, residual=op.residual, dtype=self._elements[op.out],
        )  # fmt: skip
        gathered: list[Arg] = [("sample_rows",)] if op.gather else []
        args = [*self._buffer(op.x), *gathered, self._weights.rows(op.weight)]
        if op.bias:
            args.append(self._weights.rows(op.bias))
        args += self._buffer(op.out)
        domain = "samples" if op.gather else "rows"
        return BoundOp(op.weight, (spec,), args, domain, {"cost_per_unit": 4 * op.cols})

    def _bind_block_max(self, op: BlockMax) -> BoundOp:
        spec = logits.block_max_spec(op.cols, self._strides["logits"])
        options = {
            "panels": logits.num_ranges(op.cols),
            "row_block": 1,
            "over": "samples",
            "cost_per_unit": 2 * min(op.cols, logits.BLOCKS_PER_UNIT * LOGITS_BLOCK),
        }
        return BoundOp(
            "block_max", (spec,), [("logits",), ("block_max",), ("num_samples",)], "tiles", options
        )

    def _bind_gemm(self, op: Gemm) -> BoundOp:
        tied = op.weight == "head.weight" and self._config.tie_embeddings
        weight = "embed.weight" if tied else op.weight
        dtype = self._precision.gemm_weight(self._weights.dtype(weight))
        spec = gemm.gemm_spec(
            op.n_in, op.n_out, self._strides[op.x], self._strides[op.out], x=self._elements[op.x], dtype=dtype,
            y=self._elements[op.out], bias=op.bias is not None, activation=op.activation, residual=op.residual,
            scale=op.scale, softcap=op.softcap, gated=op.gated,
        )  # fmt: skip
        args = [*self._buffer(op.x), *self._weights.matrix(weight, dtype, gated=op.gated)]
        if op.bias:
            args.append(self._weights.bias(op.bias, gated=op.gated))
        over = "samples" if op.x == "last" else "rows"
        args += [*self._buffer(op.out), ("num_samples",) if over == "samples" else ("num_rows",)]
        width = gemm.panel_width(op.n_out)
        options = {
            "panels": -(-op.n_out // width),
            "row_block": gemm.ROW_BLOCK,
            "over": over,
            "cost_per_unit": op.n_in * width * (2 if op.gated else 1),
        }
        return BoundOp(op.weight, (spec,), args, "tiles", options)

    def _bind_kv_write(self, op: KvWrite) -> BoundOp:
        config, dim = self._config, self._config.dim_per_head
        rotary = 0 if op.rope is None else op.rope.dims
        spec = kv_write.kv_write_spec(
            config.n_head, config.kv_heads, dim, self._page_size, self._strides[op.qkv], rotary,
            qk_norm=op.qk_norm, norm_eps=config.norm_eps, dtype=self._precision.kv_element,
        )  # fmt: skip
        args = [*self._buffer(op.qkv)]
        if op.rope is not None:
            args += [self._weights.rope(op.rope), ("positions",)]
        if op.qk_norm:
            args += [self._weights.rows(op.q_weight), self._weights.rows(op.k_weight)]
        args += [("k", op.layer), ("v", op.layer), ("slots",)]
        cost = (6 if op.qk_norm else 2) * (config.n_head + 2 * config.kv_heads) * dim
        return BoundOp(f"layers.{op.layer}.kv_write", (spec,), args, "rows", {"cost_per_unit": cost})

    def _bind_attention(self, op: Attention) -> BoundOp:
        config = self._config
        group, element = config.n_head // config.kv_heads, self._precision.kv_element
        small, large = attention.tilings(group, config.kv_heads, config.dim_per_head, element)
        specs = tuple(
            attention.attention_spec(
                config.n_head, config.kv_heads, config.dim_per_head, self._page_size,
                self._strides[op.qkv], self._strides[op.out], tiling, scale=config.attention_scale,
                window=op.window, softcap=config.attention_softcap, dtype=element, out=self._elements[op.out],
            )
            for tiling in (small, large)
        )  # fmt: skip
        args: list[Arg] = [
            *self._buffer(op.qkv), ("k", op.layer), ("v", op.layer), ("table",), ("items",), ("parts",),
            *self._buffer(op.out),
        ]  # fmt: skip
        options = {
            "small_tiling": (small.rows, small.tiles), "large_tiling": (large.rows, large.tiles), "group": group,
            "kv_heads": config.kv_heads, "window": op.window,
        }  # fmt: skip
        return BoundOp(f"layers.{op.layer}.attention", specs, args, "attention", options)

    def _buffer(self, name: str) -> list[Arg]:
        """Where a buffer is; of quantised rows, and where their scales are."""
        return [("logits",)] if name == "logits" else self._buffers[name]
