"""Rotary tables against transformers' ROPE_INIT_FUNCTIONS, for every kind and for odd parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nanoserve.models.rope import KINDS, Rope, parse_rope
from support.families import LLAMA3, YARN

NUM_POSITIONS = 600


def factors(count: int, top: float) -> list[float]:
    return np.linspace(1.0, top, count).round(3).tolist()


# (rope_parameters, head size)
CASES: list[tuple[dict[str, Any], int]] = [
    ({"rope_type": "default"}, 64),
    ({"rope_type": "default"}, 2),
    ({"rope_type": "default", "rope_theta": 500000.0}, 80),
    ({"rope_type": "default", "rope_theta": 5000000}, 96),
    ({"rope_type": "default", "rope_theta": 1.5}, 48),
    ({"rope_type": "linear", "factor": 4.0}, 64),
    ({"rope_type": "linear", "factor": 1.0}, 48),
    ({"rope_type": "linear", "factor": 7.3, "rope_theta": 1e6}, 96),
    ({"rope_type": "linear", "factor": 3}, 6),
    ({"rope_type": "dynamic", "factor": 4.0}, 64),
    ({"rope_type": "dynamic", "factor": 1.0}, 80),
    ({"rope_type": "dynamic", "factor": 2.5, "rope_theta": 1e6}, 48),
    ({"rope_type": "llama3", **LLAMA3}, 64),
    ({"rope_type": "llama3", **LLAMA3, "factor": 32, "rope_theta": 5e5}, 80),
    ({"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 2.5}, 96),
    ({"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 8192}, 64),
    ({"rope_type": "yarn", **YARN}, 64),
    ({"rope_type": "yarn", **YARN, "rope_theta": 1e6}, 80),
    ({"rope_type": "yarn", **YARN, "factor": 1.0}, 64),
    ({"rope_type": "yarn", **YARN, "attention_factor": 0.7}, 64),
    ({"rope_type": "yarn", **YARN, "beta_fast": 20.0, "beta_slow": 2}, 48),
    ({"rope_type": "yarn", **YARN, "truncate": False}, 96),
    ({"rope_type": "yarn", **YARN, "mscale": 1.3, "mscale_all_dim": 0.6}, 64),
    ({"rope_type": "yarn", **YARN, "mscale": 0.707, "mscale_all_dim": 1.0, "factor": 40.0}, 64),
    ({"rope_type": "yarn", **YARN, "mscale": 1.3}, 64),  # one alone is without effect
    ({"rope_type": "yarn", **YARN, "mscale_all_dim": 1.3}, 64),
    ({"rope_type": "yarn", **YARN, "original_max_position_embeddings": 4}, 64),  # the ramp has no width
    ({"rope_type": "yarn", **YARN, "original_max_position_embeddings": 40960}, 16),
    ({"rope_type": "yarn", "factor": 4.0}, 64),  # the first training's length is max_position_embeddings
    ({"rope_type": "longrope", "original_max_position_embeddings": 100, "short_factor": factors(32, 2.0),
      "long_factor": factors(32, 64.0)}, 64),
    ({"rope_type": "longrope", "original_max_position_embeddings": 100, "short_factor": [1] * 24,
      "long_factor": factors(24, 8.0), "attention_factor": 1.25}, 48),
    ({"rope_type": "longrope", "original_max_position_embeddings": 100, "short_factor": factors(40, 0.5),
      "long_factor": factors(40, 8.0), "factor": 32.0}, 80),
    ({"rope_type": "longrope", "original_max_position_embeddings": 512, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
     16),
]  # fmt: skip
MAX_POSITIONS = 256


def transformers_config(parameters: dict[str, Any], dims: int) -> Any:
    return LlamaConfig(
        hidden_size=2 * dims, num_attention_heads=2, head_dim=dims, max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_theta": 10000.0, **parameters},
    )  # fmt: skip


def transformers_table(config: Any, positions: torch.Tensor, length: int) -> np.ndarray:
    """float32[positions, dims] as a sequence of `length` tokens has them: cosines of each angle, then sines."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":  # not in the table of functions
        frequencies, amplitude = LlamaRotaryEmbedding(config).inv_freq, 1.0
    else:
        seq_len = torch.tensor(length) if kind == "dynamic" else length  # as dynamic_rope_update calls them
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seq_len)
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).mul(amplitude).numpy()


@pytest.mark.parametrize(("parameters", "dims"), CASES, ids=lambda value: str(value)[:90])
def test_tables_equal_transformers(parameters: dict[str, Any], dims: int) -> None:
    """Every position's cosines and sines, attention factor included."""
    config = transformers_config(parameters, dims)
    rope = parse_rope(parameters, dims=dims, theta=10000.0, max_positions=MAX_POSITIONS)
    table = rope.table(NUM_POSITIONS)
    positions = torch.arange(NUM_POSITIONS)
    assert table.dtype == np.float32
    kind = parameters["rope_type"]
    if kind == "dynamic":
        # Token by token: the token at position p is fed when the sequence has p + 1 tokens.
        expected = np.concatenate(
            [transformers_table(config, positions[p : p + 1], p + 1) for p in range(NUM_POSITIONS)]
        )
    elif kind == "longrope":
        border = parameters["original_max_position_embeddings"]
        assert rope.switch_len == border
        expected = np.concatenate(
            [transformers_table(config, positions, border), transformers_table(config, positions, border + 1)]
        )
        assert np.abs(expected[:NUM_POSITIONS] - expected[NUM_POSITIONS:]).max() > 0.1
        np.testing.assert_allclose(rope.table(border), expected[:border], atol=2e-5)  # never longer: one half
    else:
        assert rope.switch_len is None
        expected = transformers_table(config, positions, NUM_POSITIONS)
    assert table.shape == expected.shape == (len(expected), dims)
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-4)


def test_every_kind_is_compared() -> None:
    assert {parameters["rope_type"] for parameters, _ in CASES} == set(KINDS)
    assert set(KINDS) >= set(ROPE_INIT_FUNCTIONS) - {"proportional"}  # of no family here


@pytest.mark.parametrize(("parameters", "dims"), [case for case in CASES if case[0]["rope_type"] != "default"],
                         ids=lambda value: str(value)[:90])  # fmt: skip
def test_each_kind_differs_from_the_default(parameters: dict[str, Any], dims: int) -> None:
    """Or the comparison above would not notice a kind that is ignored; a factor of 1 is the one exception."""
    table = parse_rope(parameters, dims=dims, theta=10000.0, max_positions=MAX_POSITIONS).table(NUM_POSITIONS)
    default = Rope(dims, parameters.get("rope_theta", 10000.0)).table(NUM_POSITIONS)
    same = np.abs(table[:NUM_POSITIONS] - default).max() < 1e-3 and len(table) == NUM_POSITIONS
    assert same == (parameters["rope_type"] in ("linear", "yarn") and parameters["factor"] == 1)


def test_far_positions_round_as_transformers_does() -> None:
    """Frequencies and angles in float32: at 130 000 tokens one unit in a frequency's last place moves an angle by 0.008.

    torch's pow is off by a unit here and there, depending on the machine; so a column in twenty may differ, not one in five.
    """
    for theta, dims in ((10000.0, 128), (500000.0, 64), (1e6, 128), (5e6, 128)):
        config = transformers_config({"rope_type": "default", "rope_theta": theta}, dims)
        table = Rope(dims, theta).table(131072)[-1000:]
        positions = torch.arange(131072)[-1000:]
        expected = transformers_table(config, positions, 131072)
        half = dims // 2
        exact = np.cos(positions.numpy()[:, None] * theta ** (-np.arange(half) / half))
        assert (
            np.abs(expected[:, :half] - exact).max() > 2e-3
        )  # float64 angles are not what models are trained with
        wrong = (np.abs(table - expected).max(axis=0) > 1e-4).sum()
        assert wrong <= dims // 20, f"theta {theta}: {wrong} of {dims} columns differ"


def test_partial_rotation_of_phi3_counts_dimensions_as_transformers_does() -> None:
    """head 80 * 0.75 = 60 dimensions; a longrope list has 30 factors."""
    fields = {"rope_type": "longrope", "partial_rotary_factor": 0.75, "short_factor": factors(30, 2.0),
              "long_factor": factors(30, 9.0), "rope_theta": 10000.0}  # fmt: skip
    config = Phi3Config(hidden_size=240, num_attention_heads=3, max_position_embeddings=400, rope_parameters=fields,
                        original_max_position_embeddings=100, pad_token_id=0)  # fmt: skip
    expected = transformers_table(config, torch.arange(300), 300)
    fields.pop("partial_rotary_factor")
    rope = parse_rope(
        {**fields, "original_max_position_embeddings": 100}, dims=60, theta=1.5, max_positions=400
    )
    np.testing.assert_allclose(rope.table(300)[300:], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_type": "proportional", "factor": 2.0}, "rope_type: 'proportional' is not supported"),
        ({"rope_type": ["linear"]}, "rope_type"),
        ({"rope_type": "linear"}, "factor: is missing"),
        ({"rope_type": "linear", "factor": 0}, "factor: 0 must be"),
        ({"rope_type": "linear", "factor": "4"}, "factor: '4' must be"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor: nan must be"),
        ({"rope_type": "linear", "factor": True}, "factor: True must be"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1}, "beta_fast: is not understood"),
        ({"rope_type": "linear", "factor": 2.0, "type": "yarn"}, "disagree"),
        ({"rope_type": "default", "rope_theta": -1.0}, "rope_theta: -1.0 must be"),
        ({"rope_type": "default", "factor": 2.0}, "factor: is not understood"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "llama3", **LLAMA3, "high_freq_factor": 0.5}, "high_freq_factor: 0.5 must be"),
        ({"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 0}, "original_max_position_embeddings: 0"),
        ({"rope_type": "yarn", **YARN, "truncate": 1}, "truncate: 1 must be"),
        ({"rope_type": "yarn", **YARN, "attention_factor": -2.0}, "attention_factor: -2.0 must be"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 31, "long_factor": [1.0] * 32}, "short_factor: .* 32 numbers"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1.0] * 31 + [0]}, r"long_factor\[31\]: 0 must"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 32}, "long_factor: None must be"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_rope(parameters, dims=64, theta=10000.0, max_positions=MAX_POSITIONS)
