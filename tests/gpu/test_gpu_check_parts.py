"""Pieces of the check by themselves: what no fault may slip through, and what a fault may not take along."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.gpu.check_folder import failed
from tools.gpu_check import (
    end_to_end,
    engine_work,
    engines,
    kernel_cases,
    parts,
    peer_transformers,
)
from tools.gpu_check import run as run_module
from tools.gpu_check.engine_answers import check_near
from tools.gpu_check.places import ROOT
from tools.gpu_check.record import Record
from tools.gpu_check.tiny_models import F32, configs

from nanoserve import NanoServingEngine, random_weights
from nanoserve.compiler.gpu.chip import parse_chip

CHIP = parse_chip("sm_90a")


@pytest.fixture
def engine() -> NanoServingEngine:
    """On the CPU."""
    config = configs()["llama"]
    return NanoServingEngine(
        config, random_weights(config, 1), kv_cache_pages=64, max_batch_size=4, max_model_len=256
    )


# ---- an engine that fails gives no numbers


def dies(engine: NanoServingEngine, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Its device, after so many steps."""
    forward, left = engine.executor.forward, [after]

    def step(batch: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("an illegal address")
        return forward(batch)

    monkeypatch.setattr(engine.executor, "forward", step)


@pytest.mark.parametrize("after", [0, 1, 6])
def test_decoding_ends_with_the_device(
    engine: NanoServingEngine, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    dies(engine, monkeypatch, after)
    with pytest.raises(RuntimeError, match="an illegal address"):
        engine_work.decode(engine, 2, 10, steps=4)


def test_prompts_and_workloads_end_with_the_device(
    engine: NanoServingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies(engine, monkeypatch, 0)
    with pytest.raises(RuntimeError, match="an illegal address"):
        engine_work.prefill(engine, 10)
    with pytest.raises(RuntimeError, match="an illegal address"):
        engine_work.mixed(engine, engine.config, True, 10)
    monkeypatch.undo()
    dies(engine, monkeypatch, 6)
    with pytest.raises(RuntimeError, match="an illegal address"):
        engine_work.mixed(engine, engine.config, True, 10)


def test_decoding_is_measured_for_its_time(
    engine: NanoServingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = engine_work.decode(engine, 2, 10, steps=3, warm_s=60, least_s=60)  # room is what ends it
    assert 100 < found["steps"] < 130
    step = engine.step

    def slow() -> Any:
        time.sleep(2e-3)
        return step()

    monkeypatch.setattr(engine, "step", slow)
    found = engine_work.decode(engine, 2, 10, steps=3, warm_s=0.02, least_s=0.5)
    assert 3 <= found["steps"] <= 250
    assert found["step_ms"] * found["steps"] > 100
    assert found["context"] > 10 + 3 + found["steps"] / 2
    assert engine_work.decode(engine, 2, 10, steps=3)["steps"] == 3


def test_an_engine_that_cannot_run_ahead_fails_the_overlap(
    engine: NanoServingEngine, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "_maker", lambda *args: lambda **options: engine)
    end_to_end._overlap(SimpleNamespace(tiny=True), record, "it", F32, "mma")  # type: ignore[arg-type]
    assert failed(record) == [
        f"it: {how}, running ahead, the host's tokens" for how in ("greedy", "temperature", "all at once")
    ]


def test_other_logits_are_noticed(engine: NanoServingEngine, record: Record) -> None:
    logits = np.random.default_rng(0).standard_normal((2, 300)).astype(np.float32)
    check_near(record, "near", logits + 0.01, logits)
    assert failed(record) == []
    check_near(record, "far", logits * 1.1, logits)
    check_near(record, "none", np.full_like(logits, np.nan), logits)
    assert failed(record) == ["far", "none"]


# ---- what is riskiest comes last, and says what it was


def test_risky_kernels_come_last() -> None:
    kinds = kernel_cases.kinds()
    risky = [kind for kind in kinds if kernel_cases.is_risky(kind)]
    assert risky == ["gemm_tma"] == kinds[-1:]
    assert list(engines.arithmetics(CHIP))[-1] == "wgmma"
    names = [part.name for part in parts.PARTS]
    assert names.index("peers") < min(names.index("switches"), names.index("sanitizer"))


def test_a_process_that_dies_has_said_at_what(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tools.gpu_check.record import Record\n"
        "record = Record(Path(sys.argv[1]), 9)\n"
        "with record.attempt('a'):\n    pass\n"
        "with record.attempt('b'):\n    with record.attempt('c'):\n        pass\n    os._exit(1)\n"
    )
    path = tmp_path / "record.json"
    subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, env=run_module.environment(False), check=False
    )
    assert json.loads(path.read_text())["at"] == "b"


# ---- other engines


class Manager:
    """In the place of transformers'."""

    continuous_batching_config = SimpleNamespace(use_cuda_graph=(False, True), use_async_batching=False)

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.told: list[Any] = []
        self.warmed, self.stopped = 0.0, {}

    def warmup(self) -> None:
        time.sleep(0.05)
        self.warmed = time.monotonic()

    def start(self) -> None: ...

    def is_running(self) -> bool:
        return True

    def add_request(self, prompt: list[int], request_id: str, **options: Any) -> None:
        tokens = [1] * options["max_new_tokens"]
        self.told.append(SimpleNamespace(request_id=request_id, error=None, generated_tokens=tokens))

    def get_result(self, timeout: float) -> Any:
        return self.told.pop() if self.told else None

    def stop(self, block: bool = True, timeout: float | None = None, hard_stop: bool = False) -> None:
        self.stopped = {"block": block, "timeout": timeout, "hard_stop": hard_stop}


def test_another_engine_says_how_it_computed_and_is_stopped_hard() -> None:
    manager, model = Manager(), SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    asked: list[float] = []

    def left() -> float:
        asked.append(time.monotonic())
        return 30.0

    row = peer_transformers.mixed(model, manager, 1000, left, 30.0)
    assert (row["attention"], row["use_cuda_graph"], row["use_async_batching"]) == (
        "sdpa",
        (False, True),
        False,
    )
    assert row["whole"]
    assert row["tokens"] > 256 * 100
    assert min(asked) > manager.warmed > 0  # the time that was left then, not before it was built
    assert manager.stopped == {"block": True, "timeout": 5.0, "hard_stop": True}


def test_an_older_engine_is_stopped_as_it_can_be() -> None:
    stopped: list[dict[str, Any]] = []
    peer_transformers._stop(
        SimpleNamespace(stop=lambda block=True, timeout=None: stopped.append({"block": block}))
    )
    assert stopped == [{"block": False}]
