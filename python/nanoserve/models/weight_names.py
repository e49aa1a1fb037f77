"""What checkpoints call their tensors, by layout: data, one row per way of naming.

A row maps the decoder's names (decoder.py) to the checkpoint's. Where a name stands for several tensors, they are joined
along their output rows in that order: q, k and v become one matrix, gate and up another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightNames:
    """How one layout names its tensors."""

    prefix: str  # what a checkpoint of the model with its head puts before all names but the head's
    top: Mapping[str, str]  # decoder name -> tensor, without .weight and .bias
    layer: str  # prefix of layer i
    parts: Mapping[str, tuple[str, ...]]  # of a layer: decoder name -> tensors
    transposed: bool = False  # matrices are stored [in, out]
    norm_offset: float = 0.0  # norms multiply by offset + weight


_TOP = {"embed": "embed_tokens", "final_norm": "norm", "head": "lm_head"}
_ATTENTION = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "out": ("self_attn.o_proj",),
}
_MLP = {"gate_up": ("mlp.gate_proj", "mlp.up_proj"), "up": ("mlp.up_proj",), "down": ("mlp.down_proj",)}
_PRE_NORMS = {"attn_norm": ("input_layernorm",), "mlp_norm": ("post_attention_layernorm",)}
_SANDWICH = {
    "attn_norm": ("input_layernorm",),
    "attn_post_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "mlp_post_norm": ("post_feedforward_layernorm",),
}
_POST_NORMS = {
    "attn_post_norm": ("post_attention_layernorm",),
    "mlp_post_norm": ("post_feedforward_layernorm",),
}
_LAYER = "layers.{i}."

WEIGHT_NAMES: dict[str, WeightNames] = {
    "gpt2": WeightNames(
        prefix="transformer.",
        top={"embed": "wte", "pos_embed": "wpe", "final_norm": "ln_f", "head": "lm_head"},
        layer="h.{i}.",
        parts={"attn_norm": ("ln_1",), "qkv": ("attn.c_attn",), "out": ("attn.c_proj",), "mlp_norm": ("ln_2",),
               "up": ("mlp.c_fc",), "down": ("mlp.c_proj",)},
        transposed=True,
    ),
    "llama": WeightNames("model.", _TOP, _LAYER, {**_PRE_NORMS, **_ATTENTION, **_MLP}),
    "phi3": WeightNames(
        "model.", _TOP, _LAYER,
        {**_PRE_NORMS, "qkv": ("self_attn.qkv_proj",), "out": ("self_attn.o_proj",), "gate_up": ("mlp.gate_up_proj",),
         "down": ("mlp.down_proj",)},
    ),
    "olmo2": WeightNames("model.", _TOP, _LAYER, {**_POST_NORMS, **_ATTENTION, **_MLP}),
    "gemma": WeightNames("model.", _TOP, _LAYER, {**_SANDWICH, **_ATTENTION, **_MLP}, norm_offset=1.0),
}  # fmt: skip
