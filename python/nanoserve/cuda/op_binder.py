"""The decoder's operations with their GPU kernels: what decoder.py names, bound to specs, buffers and weights.

As bound_op.py for the CPU. A matrix product has several kernels, by number of rows; attention has three: the rows of prompts, and
for sequences of one row, a program per segment of their keys and one that merges what those found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.triton_kernel import SCRATCH
from nanoserve.cuda.bound_work import BoundLaunch, BoundProduct, BoundWork, by_name
from nanoserve.cuda.gemm_choice import product_of
from nanoserve.cuda.step_sizes import StepSizes
from nanoserve.kernels.cuda import activation, choose, embedding, gemm, kv_write, logits, norm
from nanoserve.kernels.cuda.layout import ELEMENT_BYTES, row_stride, weight_stride
from nanoserve.kernels.cuda.paged_attention import AttentionForm
from nanoserve.models.config import ModelConfig
from nanoserve.models.decoder import Attention, BlockMax, Convert, Embedding, Gemm, KvWrite, Norm, Op, buffers
from nanoserve.models.rope import Rope
from nanoserve.packed_weights import Arg
from nanoserve.precision import Precision

NULL: Arg = ("number", 0)


class Buffers(Protocol):
    """Of activations: CudaStep's, or those of a plan of memory (memory_plan.py)."""

    def buffer(self, num_bytes: int) -> int: ...


class Weights(Protocol):
    """Of a model: DeviceWeights, or those of a plan of memory."""

    def dtype(self, name: str) -> str: ...
    def rows(self, name: str, dtype: str | None = None) -> Arg: ...
    def rope(self, rope: Rope) -> Arg: ...


class CudaOpBinder:
    """Binds one model's operations.

    Args:
        precision: of the forward pass: float32 or bfloat16 arithmetic.
        native: whose buffers they use; makes them. weights: there.
        sizes: of the largest step.
        gemms: what each product runs by (gemm_choice.py).
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        chip: Chip,
        native: Buffers,
        page_size: int,
        weights: Weights,
        sizes: StepSizes,
        *,
        gemms: Mapping[str, str],
    ) -> None:
        self._config, self._precision, self._chip = config, precision, chip
        self._page_size, self._weights, self._gemms = page_size, weights, gemms
        self._native = native
        self._max_rows = {"num_rows": sizes.max_tokens, "num_samples": sizes.max_samples}
        self._scratch: dict[int, Arg] = {}  # by bytes
        self._buffers: dict[str, Arg] = {"logits": ("logits",)}
        self._strides = {"logits": sizes.logits_stride}
        self._elements = {"logits": "f32"}
        for name, buffer in buffers(config, precision.gemm_input).items():
            self._strides[name] = row_stride(buffer.cols)
            self._elements[name] = buffer.element
            rows = sizes.max_samples if name == "last" else sizes.max_tokens
            size = rows * self._strides[name] * ELEMENT_BYTES[buffer.element]
            self._buffers[name] = ("buffer", native.buffer(size))
        results = sizes.max_pieces * config.n_head
        self._parts: Arg = ("buffer", native.buffer(results * config.dim_per_head * 4))
        self._sums: Arg = ("buffer", native.buffer(results * 2 * 4))

    def bind(self, op: Op) -> Sequence[BoundWork]:
        """The work of an operation, in order."""
        match op:
            case Embedding():
                return [self._embedding(op)]
            case Norm():
                return [self._norm(op)]
            case Gemm():
                return self._gemm(op)
            case KvWrite():
                return [self._kv_write(op)]
            case Attention():
                return self._attention(op)
            case Convert():
                spec = activation.convert_spec(op.cols, self._strides[op.x], self._strides[op.out])
                return [
                    BoundLaunch.of(
                        f"convert.{op.x}", spec, self._buffers[op.x], self._buffers[op.out], ("num_rows",)
                    )
                ]
            case BlockMax():
                stride = self._strides["logits"]
                spec = logits.block_max_spec(op.cols, stride)
                maxima = BoundLaunch.of("block_max", spec, ("logits",), ("block_max",), ("num_samples",))
                if op.cols > choose.MAX_COLS:  # the host chooses
                    return [maxima]
                return [
                    maxima,
                    BoundLaunch.of(
                        "choose", choose.choose_spec(op.cols, stride), ("logits",), ("block_max",), ("draws",), ("draw_ints",),
                        ("tokens",), ("num_samples",),
                    ),
                ]  # fmt: skip

    def _embedding(self, op: Embedding) -> BoundLaunch:
        dtype = self._weights.dtype(op.table)
        if self._config.tie_embeddings:  # one copy, in what the head's product reads
            dtype = self._precision.gemm_weight(dtype)
        spec = embedding.embedding_spec(
            self._config.n_embd,
            self._strides[op.out],
            positions=op.pos_table is not None,
            scale=op.scale,
            dtype=dtype,
            chosen=True,
        )
        args: list[Arg] = [
            ("ids",),
            ("positions",),
            ("sources",),
            ("tokens",),
            self._weights.rows(op.table, dtype),
        ]
        if op.pos_table is not None:
            args.append(self._weights.rows(op.pos_table))
        return BoundLaunch.of("embedding", spec, *args, self._buffers[op.out], ("num_rows",))

    def _norm(self, op: Norm) -> BoundLaunch:
        spec = norm.norm_spec(
            op.kind, op.cols, self._strides[op.x], self._strides[op.out], self._config.norm_eps, bias=op.bias is not None,
            gather=op.gather, residual=op.residual, dtype=self._elements[op.out],
        )  # fmt: skip
        args = [self._buffers[op.x]]
        if op.gather:
            args.append(("sample_rows",))
        args.append(self._weights.rows(op.weight))
        if op.bias is not None:
            args.append(self._weights.rows(op.bias))
        return BoundLaunch.of(
            op.weight, spec, *args, self._buffers[op.out], ("num_samples",) if op.gather else ("num_rows",)
        )

    def _gemm(self, op: Gemm) -> Sequence[BoundWork]:
        tied = op.weight == "head.weight" and self._config.tie_embeddings
        weight = "embed.weight" if tied else op.weight
        dtype = self._precision.gemm_weight(self._weights.dtype(weight))
        x, gemm_by = self._elements[op.x], self._gemms[product_of(op.weight)]
        count: Arg = ("num_samples",) if op.x == "last" else ("num_rows",)
        if (gemm_by == "wgmma" and x != "bf16") or (gemm_by == "cublas" and dtype != x):
            raise ValueError(
                f"gemm: {gemm_by} for {product_of(op.weight)}: {x} times a weight of {dtype} is for mma only"
            )
        if gemm_by == "cublas":
            return self._cublas(op, self._weights.rows(weight, dtype), x, count)
        plan = gemm.gemm_plan(
            op.n_in, op.n_out, self._strides[op.x], self._strides[op.out], self._chip, x=x, dtype=dtype,
            y=self._elements[op.out], bias=op.bias is not None, activation=op.activation, residual=op.residual, scale=op.scale,
            softcap=op.softcap, gated=op.gated, wgmma=gemm_by == "wgmma",
        )  # fmt: skip
        args = [self._buffers[op.x], self._weights.rows(weight, dtype)]
        if op.bias is not None:
            args.append(self._weights.rows(op.bias))
        named = by_name(plan.steps[0][1], *args, self._buffers[op.out], count)
        return [BoundLaunch(op.weight, plan.steps, named, count)]

    def _cublas(self, op: Gemm, weight: Arg, x: str, count: Arg) -> Sequence[BoundWork]:
        """The product alone, where scaling and adding to y is all there is to do; else into float32 sums, finished row by row."""
        cols = op.n_out * (1 + op.gated)
        has_more = op.bias is not None or op.activation is not None or op.softcap != 0
        stride = row_stride(cols) if has_more else self._strides[op.out]
        sums = self._scratch_rows(count, stride) if has_more else self._buffers[op.out]
        options = {
            "n": cols, "k": op.n_in, "ldx": self._strides[op.x], "ldw": weight_stride(op.n_in, x), "ldy": stride, "element": x,
            "y_element": "f32" if has_more else self._elements[op.out], "scale": 1.0 if has_more else op.scale,
            "residual": op.residual and not has_more,
        }  # fmt: skip
        product = BoundProduct(op.weight, (self._buffers[op.x], weight, sums, count), options)
        if not has_more:
            return [product]
        spec = activation.activation_spec(
            op.n_out, stride, self._strides[op.out], bias=op.bias is not None, activation=op.activation, residual=op.residual,
            scale=op.scale, softcap=op.softcap, gated=op.gated, dtype=self._elements[op.out],
        )  # fmt: skip
        bias = [] if op.bias is None else [self._weights.rows(op.bias)]
        return [
            product,
            BoundLaunch.of(f"{op.weight}.finish", spec, sums, *bias, self._buffers[op.out], count),
        ]

    def _scratch_rows(self, count: Arg, stride: int) -> Arg:
        """As many float32 rows as a step can have; products share them, for each is finished before the next."""
        size = self._max_rows[count[0]] * stride * ELEMENT_BYTES["f32"]
        if size not in self._scratch:
            self._scratch[size] = ("buffer", self._native.buffer(size))
        return self._scratch[size]

    def _kv_write(self, op: KvWrite) -> BoundLaunch:
        config = self._config
        spec = kv_write.kv_write_spec(
            config.n_head, config.kv_heads, config.dim_per_head, self._page_size, self._strides[op.qkv],
            0 if op.rope is None else op.rope.dims, qk_norm=op.qk_norm, norm_eps=config.norm_eps,
            dtype=self._precision.kv_element,
        )  # fmt: skip
        args = [self._buffers[op.qkv]]
        if op.rope is not None:
            args += [self._weights.rope(op.rope), ("positions",)]
        if op.qk_norm is not None:
            args += [self._weights.rows(op.q_weight), self._weights.rows(op.k_weight)]
        args += [("k", op.layer), ("v", op.layer), ("slots",), ("num_rows",)]
        return BoundLaunch.of(f"layers.{op.layer}.kv_write", spec, *args)

    def form(self, op: Attention) -> AttentionForm:
        """What the attention of a layer depends on."""
        config, element = self._config, self._precision.kv_element
        return AttentionForm(
            config.n_head, config.kv_heads, config.dim_per_head, self._page_size, self._strides[op.qkv], self._strides[op.out],
            dtype=element, narrow=element == "bf16" and self._precision.gemm_input == "bf16", out=self._elements[op.out],
            scale=config.dim_per_head**-0.5 if config.attention_scale is None else config.attention_scale, softcap=config.attention_softcap, window=op.window,
        )  # fmt: skip

    def _attention(self, op: Attention) -> list[BoundLaunch]:
        form, name = self.form(op), f"layers.{op.layer}.attention"
        q, out = self._buffers[op.qkv], self._buffers[op.out]
        pages: list[Arg] = [("k", op.layer), ("v", op.layer), ("table",)]
        null = [NULL] * len(SCRATCH)
        return [
            BoundLaunch.of(
                f"{name}.attend", form.attend_spec(), q, *pages, ("chunks",), out, ("num_chunks",), *null
            ),
            BoundLaunch.of(
                f"{name}.split", form.split_spec(), q, *pages, ("pieces",), self._parts, self._sums, ("num_pieces",), *null,
            ),
            BoundLaunch.of(
                f"{name}.merge", form.merge_spec(), self._parts, self._sums, ("decodes",), out, ("num_decodes",), *null,
            ),
        ]  # fmt: skip
