"""Command-line options reach SamplingParams and LLM as they are meant, or are refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoserve.cli import generate as generate_module
from nanoserve.cli.byte_size import format_size, parse_size
from nanoserve.cli.options import sampling_params
from nanoserve.sampling import SamplingParams
from nanoserve.structured import StructuredOutputs

Run = Callable[..., Any]
# One use of every option, and the field it must become.
SCHEMA = Path(__file__).parent / "point.schema.json"
GIVEN: dict[str, tuple[list[str], Any]] = {
    "temperature": (["--temperature", "0.5"], 0.5),
    "top_k": (["--top-k", "7"], 7),
    "top_p": (["--top-p", "0.9"], 0.9),
    "min_p": (["--min-p", "0.1"], 0.1),
    "seed": (["--seed", "0"], 0),
    "repetition_penalty": (["--repetition-penalty", "1.5"], 1.5),
    "presence_penalty": (["--presence-penalty", "-0.5"], -0.5),
    "frequency_penalty": (["--frequency-penalty", "0.25"], 0.25),
    "logit_bias": (["--logit-bias", "42=-5", "--logit-bias", "7=1.5"], {42: -5.0, 7: 1.5}),
    "bad_words": (["--bad-word", "a", "--bad-word", "b c"], ("a", "b c")),
    "max_tokens": (["--max-tokens", "9"], 9),
    "min_tokens": (["--min-tokens", "3"], 3),
    "stop": (["--stop", "x", "--stop", "\n"], ("x", "\n")),
    "stop_token_ids": (["--stop-token-id", "5", "--stop-token-id", "6"], (5, 6)),
    "ignore_eos": (["--ignore-eos"], True),
    "include_stop_str_in_output": (["--include-stop"], True),
    "n": (["-n", "2"], 2),
    "logprobs": (["--logprobs", "0"], 0),
    "prompt_logprobs": (["--prompt-logprobs", "2"], 2),
    "skip_special_tokens": (["--keep-special"], False),
    "structured_outputs": (["--json-schema", str(SCHEMA)], StructuredOutputs(json=SCHEMA.read_text())),
}


class Opened(Exception):
    """Raised in place of loading a model."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a command wanted to load and to sample with."""
    got: dict[str, Any] = {}

    def open_model(model: str, engine: dict[str, Any], **options: Any) -> Any:
        got.update(model=model, engine=engine)
        return SimpleNamespace(sampling_defaults=got.get("defaults", {}), tokenizer=None)

    def record(defaults: dict[str, Any], given: dict[str, Any]) -> SamplingParams:
        got.update(given=given, params=sampling_params(defaults, given))
        params: SamplingParams = got["params"]
        return params

    monkeypatch.setattr(generate_module, "open_model", open_model)
    monkeypatch.setattr(generate_module, "sampling_params", record)
    return got


def test_the_table_above_is_complete() -> None:
    assert sorted(GIVEN) == sorted(field.name for field in dataclasses.fields(SamplingParams))


@pytest.mark.parametrize("field", GIVEN)
def test_an_option_becomes_its_field_and_nothing_else(run: Run, seen: dict[str, Any], field: str) -> None:
    words, value = GIVEN[field]
    run("generate", "model", "-p", "x", "--json", *words)
    assert list(seen["given"]) == [field]
    expected = dataclasses.replace(SamplingParams(), **{field: value})
    assert seen["params"] == expected
    assert getattr(seen["params"], field) == value != getattr(SamplingParams(), field)


def test_what_is_not_given_is_the_checkpoints(run: Run, seen: dict[str, Any]) -> None:
    seen["defaults"] = {"temperature": 0.7, "top_k": 20}
    run("generate", "model", "-p", "x", "--top-k", "5")
    assert (seen["params"].temperature, seen["params"].top_k, seen["params"].top_p) == (0.7, 5, 1.0)


def test_engine_options_become_keywords_of_llm(run: Run, seen: dict[str, Any]) -> None:
    words = (
        "--kv-cache 512MiB --max-model-len 64 --max-num-seqs 4 --threads 2 --dtype float32 --revision main"
    )
    run("generate", "model", "-p", "x", *words.split())
    assert seen["engine"] == {
        "kv_cache_bytes": 512 * 2**20, "max_model_len": 64, "max_num_seqs": 4, "num_threads": 2, "dtype": "float32",
        "revision": "main",
    }  # fmt: skip
    run("generate", "model", "-p", "x", "--no-weight-cache")
    assert seen["engine"] == {"weight_cache": False}
    run("generate", "model", "-p", "x")
    assert seen["engine"] == {}, "LLM's own defaults hold"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "101"], "--temperature: 101.0 must be in [0, 100]"),
        (["--top-p", "0"], "--top-p: 0.0 must be in (0, 1]"),
        (["--min-tokens", "9", "--max-tokens", "8"], "--min-tokens: 9 must be in [0, max_tokens = 8]"),
        (["--logit-bias", "42"], "--logit-bias: '42' must be ID=VALUE"),
        (["--logit-bias", "x=1"], "--logit-bias: 'x=1' must be ID=VALUE"),
        (["--logit-bias", "1=200"], "logit_bias[1]: 200.0 must be in [-100, 100]"),
        (["--logit-bias", "1=nan"], "logit_bias[1]: nan must be in [-100, 100]"),
        (["--stop", ""], "--stop: [''] must be a sequence of strings that are not empty"),
        (["--stop-token-id", "-1"], "stop_token_ids[0]: -1 must be in [0, 2147483647]"),
        (["-n", "0"], "--n: 0 must be in [1, 128]"),
        (["--kv-cache", "12parsecs"], "--kv-cache: '12parsecs' must be a size such as 512MiB"),
        (["--logprobs", "3"], "--logprobs: only --json shows them"),
    ],
)
def test_a_bad_value_is_one_sentence_before_anything_is_loaded(
    run: Run, tmp_path: Path, words: list[str], message: str
) -> None:
    result = run("generate", tmp_path / "no-such-model", "-p", "x", *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_a_word_for_a_number_is_a_usage_error(run: Run) -> None:
    result = run("generate", "model", "-p", "x", "--temperature", "warm")
    assert result.exit_code == 2
    assert "--temperature" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1), ("1000", 1000), ("1kB", 1000), ("1KiB", 1024), ("512MiB", 512 * 2**20), ("2GB", 2 * 10**9),
        (" 1.5 GiB ", 3 * 2**29), ("0.1kb", 100), ("1tib", 2**40), ("3 B", 3), ("9223372036854775807", 2**63 - 1),
    ],
)  # fmt: skip
def test_sizes_are_read_exactly(text: str, size: int) -> None:
    assert parse_size("--kv-cache", text) == size


@pytest.mark.parametrize(
    "text", ["", "-1", "0", "1M", "1 G", "GiB", "1e9", "0x10", "1..5GB", "1_000", "٣GB", "9223372036854775808", "9" * 30]
)  # fmt: skip
def test_what_is_not_a_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--kv-cache: '.*' must be "):
        parse_size("--kv-cache", text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (7709184, "7.35 MiB"), (120 * 2**30, "120.0 GiB")],
)
def test_sizes_are_shown_with_binary_units(size: int, text: str) -> None:
    assert format_size(size) == text
