"""config.json as published checkpoints have it, before transformers 5 rewrote the rope and layer fields.

Every field of the originals is kept, bookkeeping and leftovers included, with sizes and token ids made small. `older` turns
a config.json saved today into that spelling.
"""

from __future__ import annotations

from typing import Any

from support.families import ramp


def _hub(model_type: str, architecture: str, version: str, **fields: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, "initializer_range": 0.15, "torch_dtype": "bfloat16",
            "transformers_version": version, "use_cache": True, "vocab_size": 301, "num_hidden_layers": 2, **fields}  # fmt: skip


def _body(width: int, heads: int, kv_heads: int, inner: int, positions: int, eps: float) -> dict[str, Any]:
    return {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": inner,
            "max_position_embeddings": positions, "rms_norm_eps": eps}  # fmt: skip


_SILU = {"hidden_act": "silu"}
_ATTENTION = {"attention_bias": False, "attention_dropout": 0.0}
_PHI3_FACTORS = {"long_factor": ramp(8, 1.05, 60.0), "short_factor": ramp(8, 1.0, 2.8)}

HUB: dict[str, dict[str, Any]] = {
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 300,
        "embd_pdrop": 0.1, "eos_token_id": 300, "initializer_range": 0.15, "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2", "n_ctx": 512, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512,
        "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 301,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "distilgpt2": {
        "_num_labels": 1, "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 300, "embd_pdrop": 0.1, "eos_token_id": 300, "id2label": {"0": "LABEL_0"},
        "initializer_range": 0.15, "label2id": {"LABEL_0": 0}, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 512, "n_embd": 64, "n_head": 4, "n_layer": 1, "n_positions": 512, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 301,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "gpt2-medium-and-xl": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 300,
        "embd_pdrop": 0.1, "eos_token_id": 300, "initializer_range": 0.15, "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2", "n_ctx": 512, "n_embd": 80, "n_head": 5, "n_layer": 2, "n_positions": 512, "n_special": 0,
        "output_past": True, "predict_special_tokens": True, "resid_pdrop": 0.1, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True, "vocab_size": 301,
    },
    "SmolLM2-135M-Instruct": _hub(
        "llama", "LlamaForCausalLM", "4.42.3", **_body(72, 9, 3, 112, 512, 1e-05), **_SILU, **_ATTENTION, bos_token_id=1,
        eos_token_id=2, is_llama_config=True, mlp_bias=False, pad_token_id=2, pretraining_tp=1, rope_interleaved=False,
        rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
    ),
    "unsloth-Llama-3.2-1B": _hub(
        "llama", "LlamaForCausalLM", "4.51.3", **_body(64, 4, 2, 112, 1024, 1e-05), **_SILU, **_ATTENTION, bos_token_id=128,
        eos_token_id=129, head_dim=16, mlp_bias=False, pad_token_id=132, pretraining_tp=1, rope_theta=500000.0,
        rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                      "original_max_position_embeddings": 64, "rope_type": "llama3"}, tie_word_embeddings=True,
        unsloth_fixed=True, unsloth_version="2024.9",
    ),
    "Llama-2-7b-hf": _hub(
        "llama", "LlamaForCausalLM", "4.31.0.dev0", **_body(64, 4, 4, 112, 512, 1e-05), **_SILU, bos_token_id=1,
        eos_token_id=2, pretraining_tp=1, rope_scaling=None, tie_word_embeddings=False, _name_or_path="meta-llama/Llama-2-7b-hf",
    ),
    "Llama-3.2-1B-Instruct": _hub(
        "llama", "LlamaForCausalLM", "4.45.0.dev0", **_body(64, 4, 1, 112, 1024, 1e-05), **_SILU, **_ATTENTION,
        bos_token_id=128, eos_token_id=[129, 136, 137], head_dim=16, mlp_bias=False, pretraining_tp=1, rope_theta=500000.0,
        rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                      "original_max_position_embeddings": 64, "rope_type": "llama3"}, tie_word_embeddings=True,
    ),
    "vicuna-7b-16k": _hub(
        "llama", "LlamaForCausalLM", "4.31.0", **_body(64, 4, 4, 112, 512, 1e-05), **_SILU, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, pretraining_tp=1, max_sequence_length=2048, rope_scaling={"factor": 4.0, "type": "linear"}, tie_word_embeddings=False,
    ),
    "Mistral-7B-v0.1": _hub(
        "mistral", "MistralForCausalLM", "4.34.0.dev0", **_body(64, 4, 2, 112, 512, 1e-05), **_SILU, bos_token_id=1,
        eos_token_id=2, rope_theta=10000.0, sliding_window=64, tie_word_embeddings=False,
    ),
    "Mistral-Nemo-Base-2407": _hub(
        "mistral", "MistralForCausalLM", "4.43.0.dev0", **_body(80, 4, 1, 112, 512, 1e-05), **_SILU, attention_dropout=0.0,
        bos_token_id=1, eos_token_id=2, head_dim=16, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False,
    ),
    "Qwen2.5-0.5B": _hub(
        "qwen2", "Qwen2ForCausalLM", "4.40.1", **_body(56, 7, 1, 112, 512, 1e-06), **_SILU, attention_dropout=0.0,
        bos_token_id=298, eos_token_id=298, max_window_layers=2, rope_theta=1000000.0, sliding_window=32,
        tie_word_embeddings=True, use_mrope=False, use_sliding_window=False,
    ),
    "Qwen2.5-7B-Instruct-yarn": _hub(
        "qwen2", "Qwen2ForCausalLM", "4.43.1", **_body(64, 4, 2, 112, 128, 1e-06), **_SILU, attention_dropout=0.0,
        bos_token_id=298, eos_token_id=299, max_window_layers=2, rope_theta=1000000.0, sliding_window=1024,
        tie_word_embeddings=False, use_sliding_window=False,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 128, "type": "yarn"},
    ),
    "Qwen3-0.6B": _hub(
        "qwen3", "Qwen3ForCausalLM", "4.51.0", **_body(64, 4, 2, 112, 512, 1e-06), **_SILU, **_ATTENTION, bos_token_id=298,
        eos_token_id=299, head_dim=32, max_window_layers=2, rope_scaling=None, rope_theta=1000000, sliding_window=None,
        tie_word_embeddings=True, use_sliding_window=False,
    ),
    "SmolLM3-3B": _hub(
        "smollm3", "SmolLM3ForCausalLM", "4.54.0.dev0", **{**_body(64, 4, 1, 112, 512, 1e-06), "num_hidden_layers": 4},
        **_SILU, **_ATTENTION, bos_token_id=None, eos_token_id=299, layer_types=["full_attention"] * 4, max_window_layers=28,
        mlp_bias=False, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0], pad_token_id=298, pretraining_tp=2,
        rope_scaling=None, rope_theta=5000000.0, sliding_window=None, use_sliding_window=False,
    ),
    "Phi-3-mini-4k-instruct": _hub(
        "phi3", "Phi3ForCausalLM", "4.40.2", **_body(64, 4, 4, 112, 512, 1e-05), **_SILU, **_ATTENTION, bos_token_id=1,
        embd_pdrop=0.0, eos_token_id=299, original_max_position_embeddings=512, pad_token_id=299, resid_pdrop=0.0,
        rope_scaling=None, rope_theta=10000.0, sliding_window=127, tie_word_embeddings=False,
        _name_or_path="Phi-3-mini-4k-instruct", auto_map={"AutoConfig": "configuration_phi3.Phi3Config",
                                                          "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    ),
    "Phi-3-mini-128k-instruct": _hub(
        "phi3", "Phi3ForCausalLM", "4.40.2", **_body(64, 4, 4, 112, 2048, 1e-05), **_SILU, **_ATTENTION, bos_token_id=1,
        embd_pdrop=0.0, eos_token_id=299, original_max_position_embeddings=64, pad_token_id=299, resid_pdrop=0.0,
        rope_scaling={**_PHI3_FACTORS, "type": "longrope"}, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False,
        _name_or_path="Phi-3-mini-128k-instruct", auto_map={"AutoConfig": "configuration_phi3.Phi3Config",
                                                            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    ),
    "Phi-4-mini-instruct": _hub(
        "phi3", "Phi3ForCausalLM", "4.45.0", **_body(96, 4, 2, 112, 2048, 1e-05), **_SILU, **_ATTENTION, bos_token_id=299,
        embd_pdrop=0.0, eos_token_id=299, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False,
        original_max_position_embeddings=64, pad_token_id=299, partial_rotary_factor=0.75, resid_pdrop=0.0,
        rope_scaling={"long_factor": ramp(9, 1.0, 32.0), "short_factor": [1.0] * 9, "type": "longrope"},
        rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=True,
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
                  "AutoTokenizer": "Xenova/gpt-4o"},
    ),
    "OLMo-2-0425-1B": _hub(
        "olmo2", "Olmo2ForCausalLM", "4.47.0", **_body(64, 4, 4, 112, 512, 1e-06), **_SILU, **_ATTENTION, eos_token_id=299,
        pad_token_id=298, rope_scaling=None, rope_theta=500000, tie_word_embeddings=False,
    ),
    "granite-3.1-2b-instruct": _hub(
        "granite", "GraniteForCausalLM", "4.47.0.dev0", **_body(64, 4, 1, 112, 512, 1e-05), **_SILU, attention_bias=False,
        attention_dropout=0.1, attention_multiplier=0.09, bos_token_id=0, embedding_multiplier=3.0, eos_token_id=0,
        logits_scaling=0.5, mlp_bias=False, pad_token_id=0, residual_multiplier=0.9, rope_scaling=None,
        rope_theta=5000000.0, tie_word_embeddings=True,
    ),
    "gemma-2-9b": _hub(
        "gemma2", "Gemma2ForCausalLM", "4.42.0.dev0", **_body(64, 4, 2, 112, 512, 1e-06), **_ATTENTION,
        attn_logit_softcapping=5.0, bos_token_id=2, cache_implementation="hybrid", eos_token_id=1,
        final_logit_softcapping=3.0, head_dim=24, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
        pad_token_id=0, query_pre_attn_scalar=16, rope_theta=10000.0, sliding_window=40, sliding_window_size=40,
    ),
    "gemma-3-1b-it": _hub(
        "gemma3_text", "Gemma3ForCausalLM", "4.50.0.dev0",
        **{**_body(64, 4, 1, 112, 512, 1e-06), "num_hidden_layers": 7}, **_ATTENTION, attn_logit_softcapping=None,
        bos_token_id=2, cache_implementation="hybrid", eos_token_id=[1, 106], final_logit_softcapping=None, head_dim=24,
        hidden_activation="gelu_pytorch_tanh", pad_token_id=0, query_pre_attn_scalar=24, rope_local_base_freq=10000,
        rope_scaling=None, rope_theta=1000000, sliding_window=40, sliding_window_pattern=6,
    ),
    "gemma-3-270m": _hub(
        "gemma3_text", "Gemma3ForCausalLM", "4.55.0.dev0",
        **{**_body(60, 4, 1, 112, 512, 1e-06), "num_hidden_layers": 3}, **_ATTENTION, _sliding_window_pattern=3,
        attn_logit_softcapping=None, bos_token_id=2, eos_token_id=1, final_logit_softcapping=None, head_dim=24,
        hidden_activation="gelu_pytorch_tanh", layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        pad_token_id=0, query_pre_attn_scalar=24, rope_local_base_freq=10000.0, rope_scaling=None, rope_theta=1000000.0,
        sliding_window=40, use_bidirectional_attention=False,
    ),
    "gemma-3-4b-text": _hub(
        "gemma3_text", "Gemma3ForCausalLM", "4.50.0.dev0", **{**_body(64, 4, 2, 112, 512, 1e-06), "num_hidden_layers": 3},
        head_dim=24, query_pre_attn_scalar=24, rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window=40,
        sliding_window_pattern=2, eos_token_id=[1, 106],
    ),
}  # fmt: skip


def older(saved: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 in the spelling of transformers 4: rope_theta and rope_scaling beside the sizes."""
    config = dict(saved)
    rope = config.pop("rope_parameters", None)
    config["torch_dtype"] = config.pop("dtype")
    if rope is None:
        return config
    if config["model_type"] == "gemma3_text":
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    scaling = dict(rope)
    config["rope_theta"] = scaling.pop("rope_theta")
    partial = scaling.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        config["partial_rotary_factor"] = partial
    kind = scaling.pop("rope_type")
    key = (
        "rope_type" if config["model_type"] == "gemma3_text" else "type"
    )  # before Gemma 3 it was called type
    config["rope_scaling"] = None if kind == "default" else {**scaling, key: kind}
    if config["model_type"] in ("qwen2", "qwen3", "gemma2"):
        del config["layer_types"]  # follows from the other fields in every case here
    return config
