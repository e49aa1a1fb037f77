"""nanoserve plan: the memory plan as a table or JSON, from config.json and headers alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanoserve import memory_plan
from nanoserve.llm import LLM
from nanoserve.memory_plan import plan_memory
from nanoserve.models.config import ModelConfig
from nanoserve.models.stored_tensor import StoredTensor

TINY_GPT = Path(__file__).resolve().parents[2] / "models" / "tiny-gpt"
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of one core with a GiB available, on terminals that do not break lines."""
    monkeypatch.setattr(memory_plan, "available_memory", lambda: 2**30)
    monkeypatch.setattr(memory_plan, "default_num_threads", lambda: 1)
    monkeypatch.setenv("COLUMNS", "160")


def test_the_table_has_what_a_user_must_know(run: Run) -> None:
    lines = {line[:21].strip(): line[21:] for line in run("plan", TINY_GPT).stdout.splitlines()}
    assert "1,927,296" in lines["parameters"]
    assert "4 layers, width 192, 6 heads, 6 of KV" in lines["parameters"]
    assert "3.68 MiB" in lines["weights on disk"]
    assert "3.88 MiB  as stored: 16 bits" in lines["weights in memory"]
    assert "96.00 MiB" in lines["KV cache"]
    assert "1,024 pages of 16 tokens, 96.00 KiB each" in lines["KV cache"]
    assert "6.00 KiB" in lines["KV per token"]
    assert "16,384" in lines["tokens in the cache"]
    assert "the model's limit is 512" in lines["longest sequence"]
    assert "11% of 1.00 GiB" in lines["total"]


def test_concurrency_is_told_per_context_length(run: Run) -> None:
    text = run("plan", TINY_GPT, "--max-num-seqs", "8", "--kv-cache", "96MiB").stdout
    rows = [line.split() for line in text.partition("tokens each")[2].splitlines()[1:]]
    assert [row[:2] for row in rows] == [["256", "64"], ["512", "32"]]
    assert rows[0][2:] == "at most 8 run: --max-num-seqs".split()
    text = run("plan", TINY_GPT, "--max-model-len", "256").stdout
    assert [line.split()[0] for line in text.partition("tokens each")[2].splitlines()[1:]] == ["256"]


def test_json_is_the_plan(run: Run) -> None:
    told = json.loads(run("plan", TINY_GPT, "--json", "--memory", "60MB", "--max-model-len", "300").stdout)
    plan = plan_memory(
        ModelConfig.from_pretrained(TINY_GPT),
        memory_bytes=60_000_000,
        max_model_len=300,
        stored_bytes=3_854_592,
        weight_bytes=4_071_936,  # float16 matrices stay so; positions, biases and norms are float32
    )
    assert told["num_pages"] == plan.num_pages
    assert told["total_bytes"] == plan.total_bytes <= 60_000_000
    assert (told["max_model_len"], told["stored_bytes"]) == (300, 3_854_592)
    assert told["concurrency_at"] == {"256": plan.num_pages // 16, "300": plan.num_pages // 19}


def test_the_plan_is_what_a_model_gets(run: Run) -> None:
    for words, keywords in (
        (["--kv-cache", "3MiB"], {"kv_cache_bytes": 3 * 2**20}),
        (["--max-model-len", "64", "--max-num-seqs", "3"], {"max_model_len": 64, "max_num_seqs": 3}),
        ([], {}),
    ):
        told = json.loads(run("plan", TINY_GPT, "--json", *words).stdout)
        llm = LLM(TINY_GPT, **keywords)  # type: ignore[arg-type]
        assert llm.engine.kv_pool.num_pages == told["num_pages"]
        assert llm.engine.executor.max_model_len == told["max_model_len"]


def test_weights_are_never_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoredTensor, "__getitem__", lambda *_: pytest.fail("a weight was read"))
    assert run("plan", TINY_GPT).exit_code == 0


def test_a_config_alone_is_enough(run: Run, tmp_path: Path) -> None:
    shutil.copy(TINY_GPT / "config.json", tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        result = run("plan", path)
        assert result.exit_code == 0
        assert "1,927,296" in result.stdout
        assert "unknown" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--memory", "5MB"],
            "memory_bytes: 5000000 is less than 4071936 of weights (1927296 parameters)",
        ),
        (["--memory", "40MB", "--kv-cache", "30MB"], "kv_cache_bytes: 30000000 + 4071936 of weights + "),
        (["--max-model-len", "9999"], "max_model_len: 9999 must be in [1, the model's 512]"),
        (
            ["--max-model-len", "512", "--kv-cache", "1MiB"],
            "max_model_len: 512 tokens need 32 KV pages of 98304 bytes",
        ),
        (["--memory", "much"], "--memory: 'much' must be a size"),
        (["--dtype", "float16"], "dtype: 'float16' must be one of auto, float32, bfloat16"),
        (["--quantization", "int4"], "quantization: 'int4' must be one of None, int8"),
        (["--kv-cache-dtype", "int8"], "kv_cache_dtype: 'int8' must be one of auto, float32, bfloat16"),
        (["--threads", "0"], "num_threads: 0 must be in [1, 4096]"),
        (["--no-weight-cache"], "--weight-cache: changes nothing about memory"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(run: Run, words: list[str], message: str) -> None:
    result = run("plan", TINY_GPT, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_threads_count_by_what_they_leave_for_each_other(run: Run) -> None:
    sizes = [
        json.loads(run("plan", TINY_GPT, "--json", "--threads", threads).stdout)["activation_bytes"]
        for threads in ("1", "2", "64")
    ]
    assert sizes == sorted(set(sizes))


def test_a_damaged_header_is_an_error_not_a_guess(run: Run, tmp_path: Path) -> None:
    shutil.copy(TINY_GPT / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    result = run("plan", tmp_path)
    assert result.exit_code == 2
    assert "model.safetensors" in result.stderr


@pytest.mark.parametrize(("dtype", "bytes_each"), [("bfloat16", 2), ("float32", 4), (None, 4)])  # of matrices
def test_without_weight_files_config_json_says_how_large_they_are(
    run: Run, tmp_path: Path, dtype: str | None, bytes_each: int
) -> None:
    config = json.loads((Path(TINY_GPT) / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config if dtype is None else {**config, "dtype": dtype}))
    told = json.loads(run("plan", str(tmp_path), "--json", "--memory", "1GB").stdout)
    vectors = 4 * ((512 + 4 * (9 + 4) + 2) * 192)  # positions; norms and biases of 4 layers; the last norm
    assert told["weight_bytes"] == bytes_each * (1_927_296 - vectors // 4) + vectors
    assert told["stored_bytes"] is None
