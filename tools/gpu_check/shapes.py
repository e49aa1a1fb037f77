"""The models whose shapes are measured, and what a step of each must read and compute at least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.shapes import SHAPES
from tools.gpu_check.engines import engine_specs
from tools.gpu_check.tiny_models import BF16, configs

from nanoserve import ModelConfig
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.kernels.cuda.layout import row_stride
from nanoserve.kernels.cuda.paged_attention import AttentionForm
from nanoserve.models.config_file import config_from_dict
from nanoserve.models.decoder import Gemm, buffers, forward_ops

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
    "torch_dtype": "bfloat16",
}  # fmt: skip
RAW = {"Llama-3.2-1B": SHAPES["Llama-3.2-1B"], "Qwen3-0.6B": SHAPES["Qwen3-0.6B"], "Llama-3.1-8B": LLAMA_8B}


def models(tiny: bool) -> dict[str, ModelConfig]:
    """By name, the most telling first."""
    if tiny:
        return {"tiny": configs()["llama"]}
    return {name: config_from_dict(raw) for name, raw in RAW.items()}


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product of a model as its executor has it.

    Attributes:
        rows: of the weight: outputs, twice as many where gated.
        ldx, ldy: strides. y: type of the results.
    """

    name: str
    op: Gemm
    ldx: int
    ldy: int
    y: str

    @property
    def rows(self) -> int:
        return self.op.n_out * (1 + self.op.gated)

    @property
    def weight_bytes(self) -> int:
        return 2 * self.rows * self.op.n_in

    def bytes(self, m: int) -> int:
        """Read and written, once each, for m rows."""
        y = (2 if self.y == "bf16" else 4) * m * self.op.n_out
        return self.weight_bytes + 2 * m * self.op.n_in + y * (1 + self.op.residual)

    def flops(self, m: int) -> int:
        return 2 * m * self.rows * self.op.n_in


def products(config: ModelConfig) -> dict[str, tuple[Product, int]]:
    """Those of one layer and the head, in bfloat16, with how many of each a step has."""
    held = buffers(config, "bf16")
    found: dict[str, tuple[Product, int]] = {}
    for op in forward_ops(config, "bf16"):
        if isinstance(op, Gemm):
            name = op.weight.split(".")[-2]
            is_logits = op.out == "logits"
            ldy = row_stride(config.vocab_size if is_logits else held[op.out].cols)
            y = "f32" if is_logits else held[op.out].element
            made = Product(name, op, row_stride(held[op.x].cols), ldy, y)
            found[name] = (made, found.get(name, (made, 0))[1] + 1)
    return found


def step_weight_bytes(config: ModelConfig) -> int:
    """Of all weights that a step multiplies with."""
    return sum(product.weight_bytes * count for product, count in products(config).values())


def kv_bytes(config: ModelConfig) -> int:
    """Of a token's keys and values, bfloat16."""
    return 2 * 2 * config.n_layer * config.kv_heads * config.dim_per_head


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Of a prompt from its start: the products, the head's for one row, and causal attention."""
    made = sum(
        product.flops(1 if name == "head" else tokens) * count for name, (product, count) in products(config).items()
    )  # fmt: skip
    return made + config.n_layer * attention_flops(config.n_head, config.dim_per_head, tokens)


def attention_flops(heads: int, dim: int, tokens: int) -> int:
    """Of causal attention over a whole prompt."""
    return 4 * heads * dim * (tokens * (tokens + 1) // 2)


def attention_form(config: ModelConfig, chip: Chip) -> AttentionForm:
    """Of a model's layers, as its executor has it."""
    for spec in engine_specs(config, chip, BF16, "bf16"):
        fields = dict(spec.params)
        if spec.kind == "paged_attention" and not fields["window"]:
            fields.pop("part")
            return AttentionForm(**fields)  # type: ignore[arg-type]
    raise ValueError("the model has no attention over all keys")
