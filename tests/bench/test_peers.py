"""The runner with engines that are scripts: who takes turns, what becomes of those that fail, and the arithmetic."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.limits import Machine, median_of
from bench.peers import comparison as comparison_module
from bench.peers import limits as limits_module
from bench.peers.__main__ import main
from bench.peers.comparison import Comparison, Settings, kv_cache_bytes
from bench.peers.engine_process import EngineFailed, EngineProcess
from bench.peers.installation import DEFAULT, NotInstalled, read_engines
from bench.peers.limits import PEAK_OF_WIDTH, LimitsProbe, measured
from bench.peers.roofline import ideal_timeline
from bench.peers.rows import against_best_peer, rows
from bench.peers.tables import peers_figure, peers_table
from tests.support.processes import ends

from nanoserve.compiler.target import Target, host
from nanoserve.kernels import peak
from nanoserve.models.config import ModelConfig
from nanoserve.workloads import Workload, WorkloadRequest

ROOT = Path(__file__).resolve().parents[2]
TINY_GPT = ROOT / "models" / "tiny-gpt"
FAKE = Path(__file__).parent / "fake_engine.py"
DECODE = {
    "description": "short", "metric": "decode_tokens_per_s", "seed": 1, "generator": "splitmix64", "requests": 3,
    "prompt_tokens": 4, "output_tokens": 5,
}  # fmt: skip


def installed(folder: Path, **behaviours: str) -> Path:
    """A peers folder with these engines and tiny-gpt as its model."""
    interpreter = folder / "python"
    interpreter.write_text(f"#!/bin/sh\nexec {sys.executable} {FAKE}\n")
    interpreter.chmod(0o755)
    shutil.copytree(TINY_GPT, folder / "models" / "tiny")
    everywhere = dict.fromkeys(("float32", "bfloat16"), "models/{model}")
    engines = {
        name: {
            "driver": "transformers", "python": "python", "checkpoints": everywhere,
            "environment": {"FAKE": behaviour, "FAKE_NAME": name, "FAKE_LOG": "{peers}/log"},
        } for name, behaviour in behaviours.items()
    }  # fmt: skip
    (folder / "engines.json").write_text(json.dumps(engines))
    for name in ("first", "second"):
        (folder / f"{name}.json").write_text(json.dumps(DECODE))
    return folder


def compared(folder: Path, rounds: int = 2, **settings: Any) -> Comparison:
    made = Comparison(
        list(read_engines(folder).values()), "tiny", folder / "models" / "tiny", "float32",
        [Workload.load(folder / "first.json"), Workload.load(folder / "second.json")],
        Settings(rounds, threads=1, **settings), say=lambda _: None,
    )  # fmt: skip
    made.run()
    return made


def log(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_module, "SETTLE_S", 0.0)


def test_engines_take_turns_and_stay_loaded(tmp_path: Path) -> None:
    compared(installed(tmp_path, nanoserve="100", other="50"))
    starts = [line for line in log(tmp_path) if line.endswith("starts")]
    assert starts == ["nanoserve starts", "other starts"]
    runs = [line.split()[0] for line in log(tmp_path) if line.endswith(" 3")]
    assert runs == ["nanoserve", "other"] * 4
    warm_ups = [line for line in log(tmp_path) if line.endswith(" 2")]
    assert len(warm_ups) == 4, "one for each engine and workload"


def test_without_memory_each_is_started_once_per_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_module, "available_memory", lambda: 2**30)
    compared(installed(tmp_path, nanoserve="100", other="50"))
    order = [line.split()[0] for line in log(tmp_path) if line.endswith(("starts", " 3"))]
    assert order == (["nanoserve"] * 3 + ["other"] * 3) * 2


def test_rows_have_rates_ratio_and_agreement(tmp_path: Path) -> None:
    made = rows(compared(installed(tmp_path, nanoserve="100", slow="50", fast="80")), {"commit": "c0ffee"})
    assert list(made) == ["tiny/float32/first", "tiny/float32/second"]
    row = made["tiny/float32/first"]
    assert (row["commit"], row["metric"], row["threads"]) == ("c0ffee", "decode_tokens_per_s", 1)
    assert row["engines"]["nanoserve"]["values"] == pytest.approx([300, 300])
    assert row["engines"]["fast"]["median"] == pytest.approx(240)
    assert row["engines"]["fast"]["wall_s"] == pytest.approx(5 / 80)
    assert row["best_peer"] == "fast"
    assert row["ratio"] == pytest.approx({"median": 1.25, "min": 1.25, "max": 1.25})
    assert row["engines"]["slow"]["same_first_token"] == 1.0
    assert row["failed"] == {}


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("dies", "other died with exit code 1: .*segmentation fault, or nearly"),
        ("garbage", "other answered garbage: b'Processed prompts"),
        ("lies", "other answered garbage: requests: 0 were answered, 2 were asked"),
    ],
)
def test_an_engine_that_fails_leaves_the_others_alone(tmp_path: Path, behaviour: str, reason: str) -> None:
    made = compared(installed(tmp_path, nanoserve="100", other=behaviour, third="10"))
    found = rows(made, {})
    for row in found.values():
        assert set(row["engines"]) == {"nanoserve", "third"}
        assert pytest.approx(10) == row["ratio"]["median"]
        with pytest.raises(RuntimeError, match=reason):
            raise RuntimeError(row["failed"]["other"])
    assert log(tmp_path).count("other starts") == 2, (
        "started anew for the second workload, given up in the second round"
    )
    assert "failed" in peers_table(results(found))


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("refuses", "other gave up: width: not here"),
        ("dies loading", "other died with exit code 1: .*no such library"),
    ],
)
def test_an_engine_that_does_not_come_up_is_left_out(tmp_path: Path, behaviour: str, reason: str) -> None:
    made = compared(installed(tmp_path, nanoserve="100", other=behaviour))
    with pytest.raises(RuntimeError, match=reason):
        raise RuntimeError(made.left_out["other"])
    assert log(tmp_path).count("other starts") == 1
    row = rows(made, {})["tiny/float32/first"]
    assert (row["best_peer"], row["ratio"]) == (None, None)


def test_an_engine_that_hangs_is_ended(tmp_path: Path) -> None:
    folder = installed(tmp_path, other="hangs")
    engine = read_engines(folder)["other"]
    process = EngineProcess("other", [str(engine.python)], engine.environment, {"model": "m"}, answer_s=0.2)
    with pytest.raises(EngineFailed, match=r"did not answer within 0.2 s"):
        process.serve([WorkloadRequest([1], 1)], 1)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_nothing_an_engine_started_stays(tmp_path: Path) -> None:
    folder = installed(tmp_path, other="has a child")
    engine = read_engines(folder)["other"]
    process = EngineProcess("other", [str(engine.python)], engine.environment, {"model": "m"})
    child = int(process.facts["child"])
    os.kill(child, 0)
    process.stop()
    assert ends(child)


def test_an_engine_that_is_not_installed_is_left_out(tmp_path: Path) -> None:
    folder = installed(tmp_path, nanoserve="100", other="50")
    engines = json.loads((folder / "engines.json").read_text())
    engines["other"]["python"] = "elsewhere/python"
    engines["wide"] = {**engines["nanoserve"], "checkpoints": {"int8": "models/{model}"}}
    engines["empty"] = {**engines["nanoserve"], "checkpoints": {"float32": "models/{model}-converted"}}
    (folder / "engines.json").write_text(json.dumps(engines))
    made = compared(folder)
    assert made.left_out == {
        "other": "there is no elsewhere/python",
        "wide": "it has no float32 checkpoints",
        "empty": "there is no models/tiny-converted",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"driver": "magic"}, "driver: there is no bench.peers.drivers.magic"),
        ({"pyhton": "x"}, "pyhton: no such field"),
        ({"python": 3}, "python: 3 must be a str"),
        ({"checkpoints": {"int4": "x"}}, "checkpoints: 'int4' must be one of float32, "),
    ],
)
def test_a_bad_engines_file_names_the_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = installed(tmp_path, other="1")
    engines = json.loads((folder / "engines.json").read_text())
    engines["other"] |= change
    (folder / "engines.json").write_text(json.dumps(engines))
    with pytest.raises(ValueError, match=f"engines.json: other: {message}"):
        read_engines(folder)


def test_the_default_layout_is_valid(tmp_path: Path) -> None:
    engines = read_engines(tmp_path)
    assert (
        set(engines) == set(json.loads(DEFAULT.read_text())) >= {"nanoserve", "vllm", "openvino", "llama.cpp"}
    )
    assert engines["vllm"].environment["LD_PRELOAD"].startswith(str(tmp_path))
    with pytest.raises(NotInstalled, match="there is no"):
        engines["vllm"].checkpoint("small", "float32")


def test_ratios_are_paired_by_round() -> None:
    """Both sides slow down in round 2: the ratios do not."""
    made = against_best_peer({"nanoserve": [20.0, 10.0, 30.0], "a": [10.0, 5.0, 10.0], "b": [9.0, 9.0, 9.0]})
    assert made == {"best_peer": "a", "ratio": {"median": 2.0, "min": 2.0, "max": 3.0}}
    assert against_best_peer({"nanoserve": [1.0], "a": [None]}) == {"best_peer": None, "ratio": None}
    partly = against_best_peer({"nanoserve": [None, 6.0], "a": [1.0, 2.0]})
    assert partly["ratio"] == {"median": 3.0, "min": 3.0, "max": 3.0}


def test_cache_memory_follows_the_largest_workload() -> None:
    config = ModelConfig(
        vocab_size=256, n_layer=32, n_head=32, n_embd=4096, max_seq_len=8192
    )  # 1 MiB a token
    settings = Settings(1, 1)
    assert kv_cache_bytes(config, "float32", [Workload.load("decode-1")], settings) == 2**30
    assert kv_cache_bytes(config, "float32", [Workload.load("decode-16")], settings) == 4 * 2**30
    assert kv_cache_bytes(config, "bfloat16", [Workload.load("decode-16")], settings) == 2 * 2**30
    assert kv_cache_bytes(config, "int8", [Workload.load("decode-16")], settings) == 2 * 2**30
    assert kv_cache_bytes(config, "int8", [Workload.load("mixed")], Settings(1, 1, kv_cache_bytes=7)) == 7


def test_the_roofline_by_hand() -> None:
    """One layer of width 4: 4*4*4 + 2*4*16 weights and a head of 4*8, all passed once per step."""
    config = ModelConfig(
        vocab_size=8, n_layer=1, n_head=1, n_embd=4, positions="rope", norm="rmsnorm",
        qkv_bias=False, out_bias=False, mlp_bias=False, family="llama", gated_mlp=False, max_seq_len=64,
    )  # fmt: skip
    limits = {
        "read_gb_per_s": 1e-9,
        "float32_gflop_per_s": 1.0,
        "bfloat16_gflop_per_s": None,
        "int8_gop_per_s": 1.0,
    }
    weights = 4 * 4 * 4 + 2 * 4 * 16 + 4 * 8
    requests = [WorkloadRequest([1, 2, 3], 2)]
    slow_memory = ideal_timeline(config, "float32", limits, requests, 1)
    assert slow_memory is not None
    step = 4 * weights + 3 * 2 * 4 * 4  # bytes, one a second: weights, and keys and values of 3 tokens
    assert slow_memory.requests[0].times_s == pytest.approx([step, 2 * step + 2 * 4 * 4])
    limits |= {"read_gb_per_s": 1e9, "float32_gflop_per_s": 1e-9}
    slow_arithmetic = ideal_timeline(config, "float32", limits, requests, 1)
    assert slow_arithmetic is not None
    first = 3 * 2 * (weights - 32) + (1 + 2 + 3) * 4 * 4 + 2 * 32
    second = 2 * (weights - 32) + 4 * 4 * 4 + 2 * 32
    assert slow_arithmetic.requests[0].times_s == pytest.approx([first, first + second])
    assert ideal_timeline(config, "bfloat16", limits, requests, 1) is None


def test_a_shared_prefix_is_computed_once_on_the_roofline() -> None:
    config = ModelConfig.from_pretrained(TINY_GPT)
    limits = {
        "read_gb_per_s": 1e9,
        "float32_gflop_per_s": 1e-9,
        "bfloat16_gflop_per_s": 1.0,
        "int8_gop_per_s": 1.0,
    }
    prefix = list(range(100))
    apart = [WorkloadRequest([key, *prefix], 1) for key in range(4)]
    shared = [WorkloadRequest([*prefix, key], 1) for key in range(4)]
    times = [ideal_timeline(config, "float32", limits, asked, 4) for asked in (apart, shared)]
    assert times[0] is not None
    assert times[1] is not None
    assert 3.5 < times[0].wall_s / times[1].wall_s < 4


def test_limits_are_measured_anew_each_time() -> None:
    with LimitsProbe(1) as probe:
        made = [probe.measure() for _ in range(5)]
    assert made[0] != made[1]
    assert list(made[0]) == ["read_gb_per_s", *PEAK_OF_WIDTH.values()]
    # Two instructions of 16, 32 or 64 lanes per cycle, at 6 GHz: a chain the compiler removed would be faster.
    limits = {
        "read_gb_per_s": 2000,
        "float32_gflop_per_s": 384,
        "bfloat16_gflop_per_s": 768,
        "int8_gop_per_s": 1536,
    }
    for name, most in limits.items():
        found = [one[name] or 0 for one in made]
        assert made[0][name] is None or 0.5 < max(found) < most, name


def test_a_width_without_an_instruction_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(limits_module, "median_of", lambda work, _: work())
    machine = type("Machine", (), {
        "read": lambda self, memory: lambda: 4e-9,
        "dots": lambda self, name: asked.append(name) or (lambda: 5e-9),
    })()  # fmt: skip
    memory = np.zeros(0, np.uint8)
    target = Target("none", 16, 32, "x", bf16_dot=False, int8_dot=True)
    assert measured(machine, memory, target) == {
        "read_gb_per_s": 0.25, "float32_gflop_per_s": 0.4, "bfloat16_gflop_per_s": None, "int8_gop_per_s": 0.4,
    }  # fmt: skip
    assert asked == ["f32", "int8"]


def test_a_probe_that_cannot_measure_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"exit code 1: .*num_threads is 0, must be in \[1, 1024\]"):
        LimitsProbe(0)
    with LimitsProbe(1) as probe:
        probe._process.kill()
        with pytest.raises(RuntimeError, match="exit code -9"):
            probe.measure()


def test_a_machine_reads_every_byte_and_counts_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, plans = Machine(2), []
    plan = Machine.plan

    def kept(self: Machine, spec: Any, calls: Any, panels: int) -> Any:
        run = plan(self, spec, calls, panels)
        plans.append((run, calls[0], panels))
        return lambda: 3.0

    monkeypatch.setattr(Machine, "plan", kept)
    memory = np.random.default_rng(0).integers(0, 2**31, 5 * peak.READ_BYTES // 4, dtype=np.int32)
    assert machine.read(memory)() == 3.0 / memory.nbytes
    run, (_, out), panels = plans.pop()
    run()
    assert panels == 5
    assert (out == np.bitwise_xor.reduce(memory.reshape(5, -1, 16), axis=1)).all()
    for arithmetic in peak.ARITHMETICS:
        rate = machine.dots(arithmetic)()
        run, (x, w, out), panels = plans.pop()
        rows, vectors = peak.tile(host())
        x[:], w[:] = (1, 1) if arithmetic == "f32" else (0, 0)
        run()
        per_unit = rows * vectors * 16 * peak.STEPS * peak.UNIT_PASSES
        assert rate == 3.0 / (panels * per_unit * peak.ARITHMETICS[arithmetic])
        if arithmetic == "f32":  # a product of ones is a count
            assert out.shape == (16, 16)
            assert (out.sum(axis=1) == per_unit).all()
    assert machine.read(memory) is machine.read(memory)
    assert machine.dots("f32") is machine.dots("f32")
    assert plans == []


def test_a_median_is_of_at_least_one_call() -> None:
    values = iter([5.0, 1.0, 2.0])
    assert median_of(lambda: next(values), 0) == 5
    values = iter([5.0, 1.0, 2.0])
    clock = iter([0, 0.1, 0.9, 1.1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.limits.time.perf_counter", lambda: next(clock))
        assert median_of(lambda: next(values), 1) == 2


def results(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "rows": found,
        "engines": {"nanoserve": {"float32": {"version": "1.0"}}},
        "machine": {"cores": 2, "cpu": "a CPU"},
    }


def test_table_and_figure_show_every_engine(tmp_path: Path) -> None:
    held = results(rows(compared(installed(tmp_path, nanoserve="100", other="50"), rounds=1), {}))
    held["rows"]["tiny/float32/first"]["engines"]["nanoserve"]["roofline"] = 0.421
    table = peers_table(held)
    assert "**tiny, float32**" in table
    assert "| first | decoded tokens/s | 300 (42%) | 150 | 2.00x other |" in table
    assert "2 cores of a CPU; nanoserve 1.0." in table
    figure = peers_figure(held)
    assert figure.startswith("<svg")
    assert "2.00x  300/s" in figure
    assert "1.00x  150/s" in figure


def test_the_command_writes_results_and_keeps_other_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = installed(tmp_path, nanoserve="100", other="50")
    output = tmp_path / "out.json"
    words = [
        "--peers",
        str(folder),
        "--model",
        "tiny",
        "--rounds",
        "1",
        "--output",
        str(output),
        "--threads",
        "1",
    ]
    for width, name in (("float32", "first"), ("bfloat16", "second")):
        main([*words, "--width", width, "--workload", str(folder / f"{name}.json")])
    held = json.loads(output.read_text())
    assert list(held["rows"]) == ["tiny/float32/first", "tiny/bfloat16/second"]
    assert held["command"] == "python -m bench.peers"
    row = held["rows"]["tiny/bfloat16/second"]
    assert row["command"].endswith(
        "--rounds 1 --threads 1 --model tiny --width bfloat16 --workload second.json"
    )
    assert str(tmp_path) not in output.read_text()
    assert held["engines"]["other"]["bfloat16"]["version"] == "1.0"
    assert output.with_suffix(".svg").read_text().startswith("<svg")
    assert "2.00x other" in capsys.readouterr().out
