"""generation_config.json: what is honoured, what is named as not applied, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig as TheirConfig

from nanoserve.errors import CheckpointError
from nanoserve.text import GenerationConfig

VOCAB = 100


def load(directory: Path, **values: Any) -> GenerationConfig:
    (directory / "generation_config.json").write_text(json.dumps(values))
    return GenerationConfig.load(directory, VOCAB)


def test_no_file(tmp_path: Path) -> None:
    assert GenerationConfig.load(tmp_path, VOCAB) == GenerationConfig((), {}, ())


@pytest.mark.parametrize(
    ("value", "ids", "not_applied"),
    [
        (5, (5,), ()),
        ([5, 7, 5], (5, 7), ()),
        ([], (), ()),
        (None, (), ()),
        (99, (99,), ()),
        (50256, (), ("eos_token_id=50256",)),  # never sampled: said, not fatal
        ([3, 100], (3,), ("eos_token_id=100",)),
    ],
)
def test_eos(tmp_path: Path, value: Any, ids: tuple[int, ...], not_applied: tuple[str, ...]) -> None:
    config = load(tmp_path, eos_token_id=value)
    assert (config.eos_token_ids, config.not_applied) == (ids, not_applied)


@pytest.mark.parametrize(
    ("values", "defaults"),
    [
        ({}, {}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
         {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1},
         {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.0}),
        ({"do_sample": True, "top_k": None}, {}),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"min_new_tokens": 3, "max_new_tokens": 9, "max_length": 20}, {"min_tokens": 3}),
    ],
)  # fmt: skip
def test_defaults(tmp_path: Path, values: dict[str, Any], defaults: dict[str, Any]) -> None:
    config = load(tmp_path, **values)
    assert config.defaults == defaults
    assert config.not_applied == ()


@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 4}, {"no_repeat_ngram_size": 3}, {"typical_p": 0.9}, {"suppress_tokens": [1, 2]},
        {"forced_bos_token_id": 3}, {"forced_eos_token_id": 0}, {"bad_words_ids": [[1]]}, {"stop_strings": ["x"]},
        {"guidance_scale": 1.5}, {"a_key_of_next_year": 1}, {"sequence_bias": [[[1], 2.0]]}, {"top_h": 0.4},
        {"min_length": 5}, {"dola_layers": "low"}, {"begin_suppress_tokens": [4]}, {"penalty_alpha": 0.6},
        {"exponential_decay_length_penalty": [3, 1.1]}, {"num_return_sequences": 2},
    ],
)  # fmt: skip
def test_what_changes_results_is_named(tmp_path: Path, values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    assert load(tmp_path, **values).not_applied == (f"{name}={value!r}",)


def test_neutral_values_are_not_named(tmp_path: Path) -> None:
    """A file that transformers writes with every default in it asks for nothing."""
    written = {key: value for key, value in TheirConfig().to_dict().items() if value is not None}
    neutral = {
        "num_beams": 1, "no_repeat_ngram_size": 0, "typical_p": 1.0, "suppress_tokens": None, "num_return_sequences": 1,
        "guidance_scale": 1.0, "early_stopping": False, "length_penalty": 1.0, "remove_invalid_values": False,
        "pad_token_id": 0, "bos_token_id": 1, "use_cache": True, "cache_implementation": "hybrid", "top_h": None,
        "transformers_version": "5.0.0", "_from_model_config": True, "forced_bos_token_id": None, "bad_words_ids": None,
    }  # fmt: skip
    assert load(tmp_path, **(written | neutral)) == GenerationConfig((), {}, ())


def test_every_key_of_transformers_is_classified(tmp_path: Path) -> None:
    """With a value that is neutral for none: applied, listed, or known not to change results."""
    for key in TheirConfig().to_dict():
        if key in (
            "eos_token_id",
            "do_sample",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "min_new_tokens",
        ):
            continue
        config = load(tmp_path, **{key: 0.123})
        silent = key not in " ".join(config.not_applied)
        result_changing = any(
            word in key
            for word in ("beam", "ngram_size", "typical", "cutoff", "bad_words", "suppress", "forced", "bias", "guidance",
                         "watermark", "stop_strings", "constraints", "force_words", "healing", "top_h", "alpha", "num_return")
        )  # fmt: skip
        assert not (silent and result_changing) or key == "max_matching_ngram_size", key


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": -1}, "eos_token_id: -1"),
        ({"eos_token_id": "x"}, "eos_token_id: 'x'"),
        ({"eos_token_id": [1, True]}, "eos_token_id: True"),
        ({"eos_token_id": [1, [2]]}, r"eos_token_id: \[2\]"),
        ({"eos_token_id": list(range(300))}, "eos_token_id: 300 ids, at most 256"),
        ({"do_sample": 1}, "do_sample: 1"),
        ({"do_sample": "yes"}, "do_sample: 'yes'"),
        ({"temperature": -0.1}, r"temperature: -0.1 must be a number in \[0, 100\]"),
        ({"temperature": "hot"}, "temperature: 'hot'"),
        ({"temperature": True}, "temperature: True"),
        ({"temperature": 10**400}, "temperature: an integer of 1329 bits"),
        ({"top_k": 2.5}, "top_k: 2.5 must be a whole number"),
        ({"top_k": -2}, "top_k: -2"),
        ({"top_p": 0}, r"top_p: 0 must be a number in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"min_p": 2}, "min_p: 2"),
        ({"repetition_penalty": 0}, "repetition_penalty: 0"),
        ({"min_new_tokens": -1}, "min_new_tokens: -1"),
    ],
)
def test_bad_values(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {message}"):
        load(tmp_path, **values)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"temperature": NaN}', b"\xff", b"[" * 10**5])
def test_bad_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        GenerationConfig.load(tmp_path, VOCAB)
