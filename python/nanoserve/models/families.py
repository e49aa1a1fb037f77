"""The model families, one row each: what their config.json's fields mean. config_file.py reads by it.

A row says which of its fields feeds which of ours, which must hold one value because any other would change the result in a
way we do not compute, and which cannot matter. A field in none of the three is refused by name, never ignored: a silently
dropped option is a wrong answer with status 200. What a config.json leaves out means the family's default in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanoserve.models.rope import KINDS

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """How one `model_type` of config.json is read."""

    names: str  # row of WEIGHT_NAMES
    fields: Mapping[str, str]  # config.json name -> ModelConfig name
    defaults: Mapping[str, Any]  # config.json name -> value when it is left out
    fixed: Mapping[str, Any]  # ModelConfig values every member has
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # name -> values we compute
    harmless: frozenset[str] = frozenset()
    sliding: str | None = None  # rule of layer_kinds.py
    rope_kinds: frozenset[str] = frozenset(KINDS) - {"longrope"}


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Bookkeeping any config.json may carry; none of it changes a forward pass at inference.
BOOKKEEPING = words(
    """_name_or_path architectures model_type transformers_version dtype torch_dtype use_cache bos_token_id eos_token_id
    pad_token_id initializer_range return_dict return_dict_in_generate output_hidden_states output_attentions id2label
    label2id num_labels problem_type task_specific_params is_encoder_decoder chunk_size_feed_forward tokenizer_class
    torchscript use_bfloat16 attention_dropout auto_map cache_implementation attn_implementation is_decoder
    _attn_implementation_autoset transformers.js_config _num_labels output_past unsloth_fixed unsloth_version"""
)
# Ways of storing or computing that only the plain one of is known here.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
}
ACTIVATION_NAMES = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu_erf",
    "silu": "silu",
    "swish": "silu",
}
# Read by config_file._rope and layer_kinds, not copied.
ROPE_FIELDS = words("rope_parameters rope_scaling rope_theta partial_rotary_factor")
LAYER_FIELDS: dict[str | None, frozenset[str]] = {
    None: frozenset(),
    "every layer": words("sliding_window"),
    "upper layers": words("sliding_window use_sliding_window max_window_layers layer_types"),
    "layers without rope": words(
        "sliding_window use_sliding_window no_rope_layers no_rope_layer_interval layer_types max_window_layers"
    ),
    "all but every nth": words("sliding_window sliding_window_pattern layer_types"),
}

_SIZES = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_COMMON = {**_SIZES, "hidden_act": "activation"}
_ATTENTION_BIAS = {"attention_bias": "qkv_bias"}  # and of the output projection
_MLP_BIAS = {"mlp_bias": "mlp_bias"}
_DECODER: Values = {
    "norm": "rmsnorm", "positions": "rope", "gated_mlp": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False,
}  # fmt: skip
_DEFAULTS: Values = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}  # fmt: skip
_GEMMA = {
    **_SIZES, **_ATTENTION_BIAS,
    "hidden_activation": "activation",
    "final_logit_softcapping": "logits_softcap",
    "attn_logit_softcapping": "attention_softcap",
    "query_pre_attn_scalar": "attention_scale",
}  # fmt: skip
_GEMMA_FIXED = {**_DECODER, "post_norm": True}
_GEMMA_DEFAULTS: Values = {
    **_DEFAULTS, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "num_key_value_heads": 4,
}  # fmt: skip
_GEMMA_HARMLESS = words("hidden_act sliding_window_size")  # hidden_activation and sliding_window rule

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        names="gpt2",
        fields={
            "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
            "n_positions": "max_seq_len", "n_inner": "intermediate_size", "activation_function": "activation",
            "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tie_embeddings",
        },
        defaults={"tie_word_embeddings": True, "activation_function": "gelu_new"},
        fixed={},
        required={
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,),
        },
        harmless=words(
            """attn_pdrop embd_pdrop resid_pdrop n_ctx summary_activation summary_first_dropout summary_proj_to_labels
            summary_type summary_use_proj n_special predict_special_tokens"""
        ),
    ),
    "llama": Family(
        names="llama",
        fields={**_COMMON, **_ATTENTION_BIAS, **_MLP_BIAS},
        defaults=_DEFAULTS,
        fixed=_DECODER,
        required={"rope_interleaved": (False,)},
        harmless=words("pretraining_tp is_llama_config max_sequence_length"),
    ),
    "mistral": Family(
        names="llama",
        fields=_COMMON,
        defaults={**_DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        fixed=_DECODER,
        required={"attention_bias": (False,), "mlp_bias": (False,)},
        sliding="every layer",
    ),
    "qwen2": Family(
        names="llama",
        fields=_COMMON,
        defaults={**_DEFAULTS, "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096,
                  "max_window_layers": 28, "use_sliding_window": False},
        fixed={**_DECODER, "qkv_bias": True},
        required={"use_mrope": (False,), "attention_bias": (True,), "mlp_bias": (False,)},
        sliding="upper layers",
    ),
    "qwen3": Family(
        names="llama",
        fields={**_COMMON, **_ATTENTION_BIAS},
        defaults={**_DEFAULTS, "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096,
                  "max_window_layers": 28, "use_sliding_window": False, "head_dim": 128},
        fixed={**_DECODER, "qk_norm": "head"},
        required={"use_mrope": (False,), "mlp_bias": (False,)},
        sliding="upper layers",
    ),
    "smollm3": Family(
        names="llama",
        fields={**_COMMON, **_ATTENTION_BIAS, **_MLP_BIAS},
        defaults={**_DEFAULTS, "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True,
                  "use_sliding_window": False, "no_rope_layer_interval": 4, "rope_theta": 2000000.0},
        fixed=_DECODER,
        harmless=words("pretraining_tp"),
        sliding="layers without rope",
    ),
    "phi3": Family(
        names="phi3",
        fields=_COMMON,
        defaults={**_DEFAULTS, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                  "original_max_position_embeddings": 4096},
        fixed=_DECODER,
        required={"attention_bias": (False,), "mlp_bias": (False,), "lm_head_bias": (False,), "full_attn_mod": (1,),
                  "interpolate_factor": (1,)},
        harmless=words("embd_pdrop resid_pdrop original_max_position_embeddings"),
        sliding="every layer",
        rope_kinds=frozenset({"default", "longrope"}),
    ),
    "olmo2": Family(
        names="olmo2",
        fields={**_COMMON, **_ATTENTION_BIAS},
        defaults={**_DEFAULTS, "rms_norm_eps": 1e-5},
        fixed={**_DECODER, "pre_norm": False, "post_norm": True, "qk_norm": "row"},
    ),
    "granite": Family(
        names="llama",
        fields={**_COMMON, **_ATTENTION_BIAS, **_MLP_BIAS, "embedding_multiplier": "embedding_scale",
                "residual_multiplier": "residual_scale", "attention_multiplier": "attention_scale",
                "logits_scaling": "logits_scale"},
        defaults={**_DEFAULTS, "attention_multiplier": 1.0},
        fixed=_DECODER,
    ),
    "gemma2": Family(
        names="gemma",
        fields=_GEMMA,
        defaults={**_GEMMA_DEFAULTS, "max_position_embeddings": 8192, "final_logit_softcapping": 30.0,
                  "attn_logit_softcapping": 50.0, "sliding_window_pattern": 2},
        fixed=_GEMMA_FIXED,
        required={"use_bidirectional_attention": (False, None), "sliding_window_pattern": (2,)},
        harmless=_GEMMA_HARMLESS,
        sliding="all but every nth",
    ),
    "gemma3_text": Family(
        names="gemma",
        fields={name: ours for name, ours in _GEMMA.items() if name != "attn_logit_softcapping"},
        defaults={**_GEMMA_DEFAULTS, "max_position_embeddings": 131072, "sliding_window_pattern": 6,
                  "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
        fixed={**_GEMMA_FIXED, "qk_norm": "head"},
        required={"use_bidirectional_attention": (False, None), "attn_logit_softcapping": (None,)},
        harmless=_GEMMA_HARMLESS | {"rope_local_base_freq", "_sliding_window_pattern"},
        sliding="all but every nth",
        rope_kinds=frozenset({"default", "linear"}),
    ),
}  # fmt: skip
