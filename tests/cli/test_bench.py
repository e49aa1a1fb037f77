"""nanoserve bench: any checkpoint, workloads by name or file, a table and a JSON of every round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanoserve import LLM, SamplingParams
from nanoserve.workloads import Workload, play
from nanoserve.workloads.engine_server import EngineServer

TINY_GPT = Path(__file__).resolve().parents[2] / "models" / "tiny-gpt"
OWN = {
    "description": "a shared beginning", "metric": "output_tokens_per_s", "seed": 3, "generator": "splitmix64",
    "requests": 4, "shared_prefix_tokens": 64, "prompt_tokens": 16, "output_tokens": [2, 6], "concurrent": 2,
}  # fmt: skip
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.json"
    file.write_text(json.dumps(OWN))
    return file


def test_table_and_file_tell_the_same(run: Run, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = run(
        "bench",
        TINY_GPT,
        "--workload",
        own,
        "--workload",
        "decode-4",
        "--rounds",
        3,
        "--threads",
        1,
        "--json",
        out,
    )
    assert result.exit_code == 0, result.stderr
    held = json.loads(out.read_text())
    assert (held["model"], held["threads"]) == (str(TINY_GPT), 1)
    assert list(held["workloads"]) == ["own", "decode-4"]
    made = held["workloads"]["own"]
    assert (made["requests"], made["max_in_flight"], len(made["rounds"])) == (4, 2, 3)
    rates = [one["output_tokens_per_s"] for one in made["rounds"]]
    summary = made["summary"]["output_tokens_per_s"]
    assert summary == {"median": sorted(rates)[1], "min": min(rates), "max": max(rates)}
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines()[1:3]}
    assert lines["own"][5] == f"{summary['min']:,.0f}-{summary['max']:,.0f}"
    latencies = next(line for line in result.stdout.splitlines()[4:] if line.startswith("decode-4")).split()
    wait = held["workloads"]["decode-4"]["summary"]["itl_p90_ms"]["median"]
    assert latencies[5] == (f"{wait:,.0f}" if wait >= 100 else f"{wait:.1f}")
    assert "median of 3 rounds" in result.stdout


def test_the_cache_finds_what_a_round_shares_and_no_more(run: Run, own: Path, tmp_path: Path) -> None:
    """64 of 80 tokens are shared by four requests: three of four find them. Earlier rounds had other tokens."""
    out = tmp_path / "out.json"
    run("bench", TINY_GPT, "--workload", own, "--workload", "decode-1", "--rounds", 2, "--json", out)
    made = json.loads(out.read_text())["workloads"]
    assert [one["cache_hit_rate"] for one in made["own"]["rounds"]] == pytest.approx([0.75 * 64 / 80] * 2)
    assert [one["cache_hit_rate"] for one in made["decode-1"]["rounds"]] == [0, 0]
    assert all(0 < one["scheduler_share"] < 1 for one in made["own"]["rounds"])


def test_an_engine_answers_as_generate_does() -> None:
    """Every token the workload asks for, and the very ones."""
    llm = LLM(TINY_GPT, num_threads=1)
    requests = Workload.load("decode-4").draw(llm.config.vocab_size, 1)[:2]
    played = play(EngineServer(llm.engine), requests, 2)
    for one, times in zip(requests, played.requests, strict=True):
        params = SamplingParams(temperature=0, max_tokens=one.output_tokens, ignore_eos=True)
        assert llm.generate([one.prompt], params)[0].token_ids == times.tokens
    assert not llm.engine.has_unfinished


def test_default_workloads_are_those_that_fit(run: Run) -> None:
    result = run("bench", TINY_GPT, "--rounds", 1, "--scale", "0.1", "--max-model-len", 200)
    assert result.exit_code == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()[1:3]] == ["decode-1", "decode-16"]
    assert "note: left out prefill-512: has sequences of 513 tokens, this engine takes 200" in result.stderr
    assert "note: left out chatbot" in result.stderr


def test_scale_shrinks_a_workload(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run("bench", TINY_GPT, "--rounds", 1, "--scale", "0.125", "--workload", "decode-16", "--json", out)
    made = json.loads(out.read_text())["workloads"]["decode-16"]
    assert (made["requests"], made["scale"]) == (2, 0.125)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--workload", "fast"],
            "--workload: 'fast' is no workload: give a .json file, or one of chatbot, code, ",
        ),
        (["--workload", "rag"], "--workload: rag: has sequences of 2112 tokens, this engine takes 512"),
        (["--workload", "nowhere.json"], "--workload: nowhere.json: cannot be read"),
        (
            ["--workload", "decode-1", "--workload", "decode-1"],
            "--workload: there are two by the name of decode-1",
        ),
        (["--rounds", "0"], "--rounds: 0 must be in [1, 1000]"),
        (["--scale", "2"], "--scale: 2.0 must be a number in (0, 1]"),
        (["--json", "no/such/folder.json"], "--json: there is no folder no/such"),
        (["--max-model-len", "8"], "--workload: none of the default ones is short enough"),
    ],
)
def test_bad_options_are_named(run: Run, words: list[str], message: str) -> None:
    result = run("bench", TINY_GPT, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"error: {message}" in result.stderr


def test_a_bad_field_of_a_file_is_named(run: Run, own: Path) -> None:
    own.write_text(json.dumps({**OWN, "requests": -3}))
    result = run("bench", TINY_GPT, "--workload", own)
    assert result.exit_code == 2
    assert result.stderr == f"error: --workload: {own}: requests: -3 must be in [1, 100000]\n"
