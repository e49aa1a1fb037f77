"""Tensors and configs that do not fit the model: named errors, never a wrong model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoserve import CheckpointError, ModelConfig, random_weights
from nanoserve.models.weights import bind_weights, loaded_bytes

CONFIG = ModelConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=8, max_seq_len=16)


def test_missing_and_unexpected_tensors_are_listed() -> None:
    """Both directions of a mismatch name the tensors, shortened when there are many."""
    tensors = random_weights(CONFIG)
    without = {name: array for name, array in tensors.items() if "ln_f" not in name}
    with pytest.raises(CheckpointError, match=r"2 tensors are missing: ln_f\.weight, ln_f\.bias"):
        bind_weights(CONFIG, without)
    with pytest.raises(CheckpointError, match=r"1 tensors are unexpected: extra\.weight"):
        bind_weights(CONFIG, {**tensors, "extra.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"16 tensors are missing: .* and 11 more"):
        bind_weights(CONFIG, {})


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("wte.weight", np.zeros((11, 9), np.float32), r"shape \(11, 9\), the config needs \(11, 8\)"),
        (
            "h.0.attn.c_attn.weight",
            np.zeros((24, 8), np.float32),
            r"shape \(24, 8\), the config needs \(8, 24\)",
        ),
        ("h.0.mlp.c_fc.bias", np.zeros((32, 1), np.float32), r"shape \(32, 1\), the config needs \(32,\)"),
        ("wpe.weight", np.zeros((8, 8), np.float32), r"shape \(8, 8\), the config needs \(16, 8\)"),
        ("ln_f.weight", np.zeros(8, np.int64), "dtype int64, must be one of float16, bfloat16"),
    ],
)
def test_wrong_shapes_and_types_are_named(name: str, array: np.ndarray, words: str) -> None:
    """The message has the checkpoint's own name, what was found and what the config needs, in the file's orientation."""
    with pytest.raises(CheckpointError, match=words):
        bind_weights(CONFIG, {**random_weights(CONFIG), name: array})


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"self_attn.q_proj": (8, 16), "self_attn.k_proj": (16, 16)}, r"q_proj.weight' has shape \(8, 16\)"),
        ({"mlp.gate_proj": (30, 16), "mlp.up_proj": (10, 16)}, r"gate_proj.weight' has shape \(30, 16\)"),
        ({"self_attn.v_proj": (8, 8)}, r"v_proj.weight' has shape \(8, 8\), the config needs \(8, 16\)"),
    ],
)
def test_each_part_of_a_joined_weight_has_its_own_shape(
    shapes: dict[str, tuple[int, ...]], words: str
) -> None:
    """q|k|v and gate|up are joined: wrong parts whose sum is right would give wrong answers in silence."""
    config = ModelConfig(
        vocab_size=11, n_layer=1, n_head=4, n_kv_head=2, n_embd=16, intermediate_size=20, norm="rmsnorm",
        positions="rope", gated_mlp=True, activation="silu", qkv_bias=False, out_bias=False, mlp_bias=False, family="llama",
    )  # fmt: skip
    tensors = random_weights(config)
    bind_weights(config, tensors)
    wrong = {f"layers.0.{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(CheckpointError, match=words):
        bind_weights(config, {**tensors, **wrong})


def test_tied_head_must_equal_the_embedding() -> None:
    """A separate lm_head that contradicts tie_word_embeddings would silently be dropped; it is refused instead."""
    tensors = random_weights(CONFIG)
    bound = bind_weights(CONFIG, {**tensors, "lm_head.weight": tensors["wte.weight"]})
    assert "head.weight" not in bound
    bound["embed.weight"].check_twin()
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        bind_weights(CONFIG, {**tensors, "lm_head.weight": tensors["wte.weight"] + 1})[
            "embed.weight"
        ].check_twin()


def test_prefix_twice_is_refused() -> None:
    """With and without `transformer.` the same tensor would win by chance."""
    tensors = random_weights(CONFIG)
    with pytest.raises(CheckpointError, match="with and without the prefix"):
        bind_weights(CONFIG, {**tensors, "transformer.ln_f.bias": tensors["ln_f.bias"]})


GOOD = {"model_type": "gpt2", "vocab_size": 11, "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: gpt2, llama"),
        (
            {"model_type": "mamba", "conv_kernel": 4},
            "first of its fields that none of them has: 'conv_kernel'",
        ),
        ({"model_type": None}, "is not supported"),
        ({"sliding_window": 128}, "field 'sliding_window' is not understood"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True is not supported"),
        ({"activation_function": "relu"}, "activation_function: 'relu' is not supported"),
        ({"n_head": 3}, "n_embd: 8 must be a multiple of n_head=3"),
        ({"n_layer": 0}, r"n_layer: 0 must be in \[1,"),
        ({"n_layer": 1e3}, "n_layer: 1000.0 must be a whole number"),
        ({"n_layer": True}, "n_layer: True must be a whole number"),
        ({"vocab_size": 2**40}, "vocab_size: 1099511627776 must be"),
        ({"layer_norm_epsilon": -1}, r"layer_norm_epsilon: -1 must be a number in \(0,"),
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon: 'x' must be"),
        ({"layer_norm_epsilon": True}, "layer_norm_epsilon: True must be"),
        ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon: an integer of 1329 bits must be"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no' must be True or False"),
        ({"activation_function": []}, r"activation_function: \[\] is not supported"),
        ({"eos_token_id": "2"}, "eos_token_id: '2' must be"),
        ({"eos_token_id": [1, -1]}, "eos_token_id: -1 must be"),
        ({"eos_token_id": True}, "eos_token_id: True must be"),
    ],
)
def test_config_fields_are_understood_or_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """A config field that would change the result is never ignored; sizes are range-checked."""
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert ModelConfig.from_pretrained(tmp_path).n_embd == 8
    (tmp_path / "config.json").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(CheckpointError, match=words):
        ModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "rope_type: 'su' is not supported"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, r"rope_theta is 500000\.0, .* 10000\.0: which one"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2}}, "factor: is not understood for rope_type 'default'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 must divide n_head=4"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers: 1.5 must be a whole number"),
    ],
)  # fmt: skip
def test_llama_config_fields(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """The same for llama, whose rope settings come in two spellings."""
    good = {"model_type": "llama", "vocab_size": 11, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 16,
            "num_key_value_heads": 2, "intermediate_size": 20, "rope_theta": 5e5}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(good))
    config = ModelConfig.from_pretrained(tmp_path)
    assert (config.kv_heads, config.gated_mlp, config.tie_embeddings) == (2, True, False)
    (tmp_path / "config.json").write_text(json.dumps({**good, **change}))
    with pytest.raises(CheckpointError, match=words):
        ModelConfig.from_pretrained(tmp_path)


def test_config_json_that_is_not_json(tmp_path: Path) -> None:
    for content in ("", "[1]", "{", "[" * 100_000, '"text"'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError):
            ModelConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        ModelConfig.from_pretrained(tmp_path / "nowhere")


def test_planning_reads_no_weight() -> None:
    """A tied head that is stored, too, is compared when weights are packed, and not to count their bytes."""

    class Unreadable:
        dtype, shape = np.dtype(np.float32), (11, 8)

        def __getitem__(self, rows: slice) -> Any:
            raise AssertionError("a weight was read")

    tensors = {**random_weights(CONFIG), "lm_head.weight": Unreadable()}
    assert (
        loaded_bytes(CONFIG, bind_weights(CONFIG, tensors))
        == loaded_bytes(CONFIG, bind_weights(CONFIG, random_weights(CONFIG)))
        > 0
    )
    embedding = bind_weights(CONFIG, tensors)["embed.weight"]
    with pytest.raises(AssertionError, match="a weight was read"):
        embedding.check_twin()
