"""Every supported family as tiny random models: which options are set, and what the model is with each of them off.

A case is a row of `CASES`: a transformers `model_type` and config fields on top of small common sizes. `off` lists, one by
one, values that switch one option of the case off without changing a weight's shape; the logits must change, or the case
would prove nothing about that option. Prompts reach 300 tokens: windows and original lengths are smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One tiny model. `steps` means its angles depend on the length a token was fed at (rope_type dynamic)."""

    family: str
    fields: Fields
    off: tuple[Fields, ...] = ()
    original: int | None = None  # longer sequences than this have other angles (longrope)
    steps: bool = False

    def config(self, **changes: Any) -> PreTrainedConfig:
        """The transformers config, with `changes` on top."""
        sizes = GPT2_SIZES if self.family == "gpt2" else SIZES
        return CONFIG_MAPPING[self.family](**{**sizes, **self.fields, **changes})


IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "initializer_range": 0.15}
SIZES = {"vocab_size": 301, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, **IDS}  # fmt: skip
GPT2_SIZES = {"vocab_size": 301, "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, **IDS}


def sizes(
    width: int, heads: int, kv_heads: int, layers: int, vocab: int, inner: int, **more: Any
) -> dict[str, Any]:
    return {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "num_hidden_layers": layers, "intermediate_size": inner, **more}  # fmt: skip


def rope(kind: str, theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def ramp(count: int, low: float, high: float) -> list[float]:
    """Factors as longrope checkpoints have them: growing along the frequencies."""
    return [round(low + (high - low) * i / max(1, count - 1), 3) for i in range(count)]


def longrope(count: int, original: int, partial: float = 1.0, **more: Any) -> dict[str, Any]:
    factors = {"short_factor": ramp(count, 1.0, 1.9), "long_factor": ramp(count, 1.1, 9.0)}
    return {"original_max_position_embeddings": original,
            **rope("longrope", partial_rotary_factor=partial, **factors, **more)}  # fmt: skip


DEFAULT_ROPE = rope("default")
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
WIDE_OPEN = {"sliding_window": 4096}


def gemma3_rope(full: Fields, sliding_theta: float = 1e4) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": dict(full),
                                "sliding_attention": {"rope_type": "default", "rope_theta": sliding_theta}}}  # fmt: skip


CASES: dict[str, Case] = {
    "gpt2": Case("gpt2", {}),
    "gpt2-odd": Case("gpt2", {"vocab_size": 97, "n_embd": 60, "n_layer": 1, "n_head": 3, "n_inner": 100,
                              "activation_function": "gelu"}, ({"activation_function": "gelu_new"},)),
    "gpt2-dim80": Case("gpt2", {"vocab_size": 211, "n_embd": 240, "n_layer": 1, "n_head": 3, "n_inner": 203,
                                "initializer_range": 0.08, "tie_word_embeddings": False}),
    "llama": Case("llama", {}, (rope("default", 2e4), {"rms_norm_eps": 0.1})),
    "llama-odd": Case("llama", sizes(72, 6, 2, 2, 131, 90, head_dim=20, attention_bias=True, mlp_bias=True,
                                     tie_word_embeddings=True)),
    "llama-mqa": Case("llama", sizes(96, 3, 1, 1, 131, 115, head_dim=80)),
    "llama-mha": Case("llama", sizes(144, 3, 3, 3, 257, 190, head_dim=48, initializer_range=0.1)),
    "llama-dim128": Case("llama", sizes(80, 5, 1, 1, 131, 96, head_dim=128)),
    "llama-group8": Case("llama", sizes(64, 16, 2, 2, 177, 96, head_dim=64)),
    "llama-linear": Case("llama", rope("linear", factor=4.0), (DEFAULT_ROPE,)),
    "llama-dynamic": Case("llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": 64}, (DEFAULT_ROPE,),
                          steps=True),
    "llama-llama3": Case("llama", rope("llama3", 5e5, **LLAMA3), (rope("default", 5e5),)),
    "llama-yarn": Case("llama", rope("yarn", **YARN), (DEFAULT_ROPE, rope("yarn", **YARN, attention_factor=1.0))),
    "llama-yarn-mscale": Case(
        "llama", {**rope("yarn", **YARN, mscale=1.3, mscale_all_dim=0.6, beta_fast=20.0, beta_slow=2.0, truncate=False),
                  "head_dim": 32},
        (rope("yarn", **YARN), rope("yarn", **YARN, mscale=1.3, mscale_all_dim=0.6),
         rope("yarn", **YARN, mscale=1.3, mscale_all_dim=0.6, beta_fast=20.0, beta_slow=2.0))),
    "mistral": Case("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": Case("mistral", {"sliding_window": 33}, (WIDE_OPEN, {"sliding_window": 34})),
    "mistral-odd": Case("mistral", sizes(72, 9, 3, 1, 197, 101, head_dim=96, sliding_window=100), (WIDE_OPEN,)),
    "mistral-window-1": Case("mistral", {"sliding_window": 1, "num_hidden_layers": 3}, (WIDE_OPEN, {"sliding_window": 2})),
    "qwen2": Case("qwen2", {"sliding_window": 20, "tie_word_embeddings": True}),
    "qwen2-window": Case("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1,
                                   "num_hidden_layers": 3},
                         (WIDE_OPEN, {"use_sliding_window": False}, {"max_window_layers": 0}, {"max_window_layers": 2})),
    "qwen2-yarn": Case("qwen2", rope("yarn", 1e6, **YARN), (rope("default", 1e6),)),
    "qwen2-odd": Case("qwen2", sizes(144, 3, 1, 1, 211, 150, initializer_range=0.1)),
    "qwen3": Case("qwen3", {"head_dim": 48}),
    "qwen3-window": Case("qwen3", {"head_dim": 24, "attention_bias": True, "use_sliding_window": True,
                                   "sliding_window": 29, "max_window_layers": 1}, (WIDE_OPEN, {"max_window_layers": 0})),
    "qwen3-odd": Case("qwen3", sizes(90, 9, 3, 1, 149, 77, head_dim=80, tie_word_embeddings=True)),
    "qwen3-yarn": Case("qwen3", {**rope("yarn", 1e6, **YARN), "head_dim": 16}, (rope("default", 1e6),)),
    "smollm3": Case("smollm3", {"no_rope_layer_interval": 2, "num_hidden_layers": 3},
                    ({"no_rope_layers": [1, 1, 1]}, {"no_rope_layers": [0, 1, 1]})),
    "smollm3-window": Case("smollm3", {"no_rope_layers": [1, 0, 0], "num_hidden_layers": 3, "use_sliding_window": True,
                                       "sliding_window": 24,
                                       "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
                           (WIDE_OPEN, {"layer_types": ["sliding_attention"] * 3},
                            {"no_rope_layers": [1, 1, 1]})),
    "smollm3-odd": Case("smollm3", sizes(72, 3, 3, 1, 149, 77, attention_bias=True, mlp_bias=True,
                                         tie_word_embeddings=False, no_rope_layer_interval=1)),
    "smollm3-yarn": Case("smollm3", rope("yarn", 5e6, **YARN), (rope("default", 5e6),)),
    "phi3": Case("phi3", {"sliding_window": 37}, (WIDE_OPEN, {"sliding_window": None})),
    "phi3-longrope": Case("phi3", longrope(8, 64),
                          (DEFAULT_ROPE, longrope(8, 300), longrope(8, 64, attention_factor=1.0)), original=64),
    "phi3-partial": Case("phi3", {**sizes(240, 3, 1, 1, 211, 150, initializer_range=0.08), **longrope(30, 100, 0.75),
                                  "tie_word_embeddings": True},
                         (rope("default", partial_rotary_factor=0.75),), original=100),
    "phi3-odd": Case("phi3", {**sizes(192, 2, 2, 2, 131, 115, initializer_range=0.09),
                              **rope("default", partial_rotary_factor=0.5), "sliding_window": 50},
                     (rope("default", partial_rotary_factor=1.0), {"sliding_window": None})),
    "olmo2": Case("olmo2", {}),
    "olmo2-odd": Case("olmo2", sizes(144, 3, 3, 1, 149, 77, initializer_range=0.1, attention_bias=True)),
    "olmo2-linear": Case("olmo2", {**sizes(72, 9, 3, 3, 97, 90, tie_word_embeddings=True), **rope("linear", factor=2.0)},
                         (DEFAULT_ROPE,)),
    "granite": Case("granite", {"embedding_multiplier": 3.0, "logits_scaling": 0.7, "residual_multiplier": 0.6,
                                "attention_multiplier": 0.11},
                    ({"embedding_multiplier": 1.0}, {"logits_scaling": 1.0}, {"residual_multiplier": 1.0},
                     {"attention_multiplier": 0.25})),
    "granite-odd": Case("granite", sizes(144, 3, 1, 1, 149, 77, initializer_range=0.1, attention_bias=True, mlp_bias=True,
                                         tie_word_embeddings=True, attention_multiplier=0.2, logits_scaling=2)),
    "gemma2": Case("gemma2", {"head_dim": 24, "num_hidden_layers": 3, "sliding_window": 30, "query_pre_attn_scalar": 11,
                              "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "tie_word_embeddings": False},
                   (WIDE_OPEN, {"query_pre_attn_scalar": 24}, {"attn_logit_softcapping": None},
                    {"final_logit_softcapping": None}, {"layer_types": ["sliding_attention"] * 3})),
    "gemma2-odd": Case("gemma2", sizes(72, 9, 3, 1, 149, 77, head_dim=80, attention_bias=True, query_pre_attn_scalar=80,
                                       attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=7,
                                       tie_word_embeddings=False), (WIDE_OPEN,)),
    "gemma3": Case("gemma3_text", {"head_dim": 24, "num_hidden_layers": 3, "sliding_window": 30, "query_pre_attn_scalar": 11,
                                   "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                                   **gemma3_rope({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6})},
                   (WIDE_OPEN, {"query_pre_attn_scalar": 24}, {"layer_types": ["sliding_attention"] * 3},
                    gemma3_rope({"rope_type": "default", "rope_theta": 1e6}),
                    gemma3_rope({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}),
                    gemma3_rope({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, 1e6))),
    "gemma3-dim256": Case("gemma3_text", sizes(64, 4, 1, 2, 149, 96, head_dim=256, sliding_window=70,
                                               layer_types=["sliding_attention", "full_attention"]), (WIDE_OPEN,)),
    "gemma3-odd": Case("gemma3_text", sizes(72, 3, 1, 2, 149, 77, head_dim=96, attention_bias=True, sliding_window=25,
                                            query_pre_attn_scalar=96, final_logit_softcapping=4.0,
                                            layer_types=["full_attention", "sliding_attention"]),
                       (WIDE_OPEN, {"final_logit_softcapping": None})),
}  # fmt: skip
FAMILIES = sorted({case.family for case in CASES.values()})
