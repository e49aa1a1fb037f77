"""Pieces of the check by themselves: what no fault may slip through, and what a fault may not take along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tools.gpu_check import (
    attention_cases,
    end_to_end,
    engine_work,
    engines,
    gpu,
    kernel_cases,
    kernel_speed,
    manifest,
    parts,
    peer_transformers,
    prepare,
    product_speed,
    sanitizer,
)
from tools.gpu_check import run as run_module
from tools.gpu_check.ceilings import Ceilings
from tools.gpu_check.engine_answers import check_near
from tools.gpu_check.places import MANIFEST, ROOT
from tools.gpu_check.record import Record
from tools.gpu_check.shapes import models, products
from tools.gpu_check.tiny_models import BF16, F32, configs

from bench import run as bench_run
from gpu.run_kernel import launch
from nanoserve import NanoServingEngine, random_weights
from nanoserve.compiler.gpu.chip import parse_chip

CHIP = parse_chip("sm_90a")


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "record.json", 60)


@pytest.fixture
def engine() -> NanoServingEngine:
    """On the CPU."""
    config = configs()["llama"]
    return NanoServingEngine(
        config, random_weights(config, 1), kv_cache_pages=64, max_batch_size=4, max_model_len=256
    )


def failed(record: Record) -> list[str]:
    return [check["name"] for check in record.data["checks"] if not check["passed"]]


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
    found = engine_work.decode(engine, 2, 10, steps=3, warm_s=0.02, least_s=0.05)
    assert 3 <= found["steps"] <= 25
    assert found["step_ms"] * found["steps"] > 40
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
    assert "gemm_wgmma" in risky
    assert kinds[-len(risky) :] == risky
    assert not {"gemm_f32", "gemm_mma", "norm"} & set(risky)
    assert kernel_cases.is_risky("gemm_tma")
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


# ---- what was not done is no pass


def found(**more: Any) -> dict[str, Any]:
    check = {"name": "a", "passed": True, "detail": ""}
    return {"finished": True, "checks": [check], "skips": [], "left_out": [], "facts": {}, "tables": {}, **more}  # fmt: skip


def test_a_part_with_something_left_out_is_incomplete() -> None:
    assert run_module.status_of(found(), 0, False) == "passed"
    assert run_module.status_of(found(left_out=["norm"]), 0, False) == "incomplete"
    bad = [{"name": "a", "passed": False, "detail": ""}]
    assert run_module.status_of(found(left_out=["norm"], checks=bad), 0, False) == "failed"


_GOOD = "========= ERROR SUMMARY: 0 errors"


@pytest.mark.parametrize(
    ("code", "printed", "inner", "passed"),
    [
        (0, _GOOD, found(), True),
        (0, "", found(), False),
        (0, "========= COMPUTE-SANITIZER", found(), False),
        (99, "========= ERROR SUMMARY: 3 errors", found(), False),
        (0, _GOOD, {}, False),
        (0, _GOOD, found(finished=False), False),
        (0, _GOOD, found(checks=[], facts={"a": 1}), False),
        (0, _GOOD, found(checks=[{"name": "a", "passed": False, "detail": ""}]), False),
    ],
)
def test_a_sanitizer_passes_only_what_ran(
    code: int, printed: str, inner: dict[str, Any], passed: bool
) -> None:
    assert sanitizer.verdict(code, printed, inner)[0] is passed


def sanitizing(tmp_path: Path, code: str) -> str:
    """A program in the place of compute-sanitizer; `out` is where the part under it writes."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, subprocess, sys, time\nout = sys.argv[sys.argv.index('--out') + 1]\n{code}\n"
    )
    program.chmod(0o700)
    return str(program)


def test_a_sanitizer_that_is_done_is_read(tmp_path: Path, record: Record) -> None:
    written = f"open(out, 'w').write({json.dumps(found())!r}); print({_GOOD!r})"
    sanitizer.check(record, tmp_path, sanitizing(tmp_path, written), "memcheck", "numerics")
    assert [check["detail"] for check in record.data["checks"]] == [f"1 checks; {_GOOD}"]
    assert failed(record) == record.data["left_out"] == []
    part = f"open(out, 'w').write({json.dumps(found(left_out=['norm']))!r}); print({_GOOD!r})"
    sanitizer.check(record, tmp_path, sanitizing(tmp_path, part), "memcheck", "numerics")
    assert record.data["left_out"] == ["memcheck of numerics: norm"]
    nothing = f"print({_GOOD!r})"
    sanitizer.check(record, tmp_path, sanitizing(tmp_path, nothing), "memcheck", "numerics")
    assert failed(record) == ["memcheck of numerics"]
    sanitizer.check(record, tmp_path, sanitizing(tmp_path, "print('Device not supported'); sys.exit(1)"), "racecheck", "numerics")  # fmt: skip
    assert [skip["name"] for skip in record.data["skips"]] == ["racecheck of numerics"]


def test_a_sanitizer_that_is_late_ends_with_what_it_runs(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"p = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(p.pid)); p.wait()"
    record = Record(tmp_path / "record.json", 4)
    begin = time.monotonic()
    sanitizer.check(record, tmp_path, sanitizing(tmp_path, code), "memcheck", "numerics")
    assert time.monotonic() - begin < 20
    assert record.data["left_out"] == ["memcheck of numerics, not done in 2 s"]
    assert record.data["checks"] == []
    stat = Path("/proc") / child.read_text() / "stat"
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


# ---- calls that go together


def test_a_later_call_adds_to_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = {"environment": "passed", "numerics": "failed", "ceilings": "passed"}

    def runner(command: str, seconds: float = 60, **changes: str) -> run_module.Runner:
        about = {"command": command, "commit": "abc", "kernels": "k", **changes}
        made = run_module.Runner(tmp_path, tmp_path / "out.json", seconds, fake=True, tiny=True, about=about)
        monkeypatch.setattr(made, "_own_kernels", lambda: None)
        monkeypatch.setattr(
            made, "_run", lambda part, seconds: {"status": statuses[part.name], "seconds": 1.0}
        )
        return made

    def told() -> dict[str, str]:
        results = json.loads((tmp_path / "out.json").read_text())
        return {name: part["status"] for name, part in results["parts"].items()}

    assert not runner("first").run(["numerics", "ceilings"])
    statuses["numerics"] = "passed"
    assert runner("second").run(["numerics"])
    assert told() == {"numerics": "passed", "ceilings": "passed"}
    assert runner("third").run(["environment"])
    assert list(told()) == ["environment", "numerics", "ceilings"]
    assert json.loads((tmp_path / "out.json").read_text())["command"] == "first; second; third"
    assert runner("late", seconds=1).run(["ceilings"])  # no time: what is known stays
    assert runner("other kernels", kernels="l").run(["ceilings"])
    assert told() == {"ceilings": "passed"}
    assert runner("other commit", commit="def").run(["environment"])
    assert told() == {"environment": "passed"}
    (tmp_path / "out.json").write_text("no JSON")
    assert runner("anew").run(["ceilings"])


def test_kernels_of_other_sources_are_refused_before_the_build(tmp_path: Path) -> None:
    prepare.prepare(tmp_path, ["sm_90a"], parts=["ceilings"], jobs=1)
    assert manifest.read(tmp_path)["sources"] == manifest.sources_digest()
    made = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**made, "sources": "0"}))
    env = {name: value for name, value in os.environ.items() if name != "NANOSERVE_NATIVE"}
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", "run", "--folder", str(tmp_path), "--out", str(tmp_path / "o.json")],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"{MANIFEST} was made from other sources than these: run" in done.stderr
    assert not (tmp_path / "native").exists()


def test_a_machine_without_git_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_run.commit() != "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench_run.commit() == "unknown"


# ---- kernels and time


@pytest.mark.parametrize("kind", [kind for kind in kernel_cases.kinds() if not kernel_cases.is_risky(kind)])
def test_kernels_of_real_widths_are_right(kind: str) -> None:
    cases = [case for case in kernel_cases.CASES[kind](CHIP) if case.wide]
    assert cases
    for case in cases:
        for out, wanted in zip(case.run(launch, 3), case.expected(3), strict=True):
            error = np.abs(out - wanted) / (1 + np.abs(wanted))
            assert np.nan_to_num(error, nan=np.inf).max() <= case.tolerance, case.name


def test_wide_attention_is_the_same_by_rows_and_by_segments() -> None:
    for _, problem in attention_cases.attention_problems(is_wide=True):
        assert problem.form.head_dim == 128
        rows = problem.attend((1,) * len(problem.lengths), launch=launch)
        assert rows[problem.last].tobytes() == problem.split(launch=launch)[problem.last].tobytes()


def test_the_kernels_of_decoding_real_models_have_cases() -> None:
    """Every shape of a tile that a real model's product takes with few rows, and the block of its choice of tokens."""

    def shape(spec: Any) -> tuple[Any, ...]:
        fields = dict(spec.params)
        return tuple(fields[name] for name in ("wm", "wn", "i", "j", "stages"))

    cased = {
        shape(spec)
        for case in kernel_cases.CASES["gemm_mma"](CHIP)
        for spec in case.specs
    }  # fmt: skip
    mma = engines.arithmetics(CHIP)["mma"]
    for config in models(False).values():
        for made, _ in products(config).values():
            assert {shape(spec) for spec in product_speed.plan_of(made, CHIP, mma).specs} <= cased
        taken = {
            spec.block for spec in engines.engine_specs(config, CHIP, BF16, "bf16") if spec.kind == "choose"
        }
        assert taken <= {spec.block for case in kernel_cases.CASES["choose"](CHIP) for spec in case.specs}


def test_a_graph_is_timed_behind_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """From an idle stream the host's launch would count; short graphs are timed many at once."""
    put: list[str] = []

    class Mark:
        def __init__(self, device: Any) -> None: ...

        def record(self, stream: Any) -> None:
            put.append("mark")

        def until(self, other: Mark) -> float:
            return 0.1 * (put[::-1][1:].index("mark"))  # ms: of the graphs between the last two

    class Graph:
        def __init__(self, stream: Any, work: Any) -> None:
            work()

        def launch(self, stream: Any) -> None:
            put.append("graph")

    monkeypatch.setattr(gpu, "CudaTimeMark", Mark)
    monkeypatch.setattr(gpu, "CudaGraph", Graph)
    it = SimpleNamespace(stream=SimpleNamespace(synchronize=lambda: None), device=None)
    seconds = gpu.Gpu.seconds(it, lambda i: None, 2, rounds=3)  # type: ignore[arg-type]
    assert seconds == pytest.approx(1e-4 / 2)
    assert put[:4] == ["graph", "mark", "graph", "mark"]  # how long one takes
    assert put[-13:] == ["graph", "mark", *["graph"] * 10, "mark"]  # a millisecond of them


def test_torchs_products_count_its_own_bytes_and_fail_nothing(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = products(models(False)["Llama-3.2-1B"])["out"]
    operands = SimpleNamespace(rows=[8], torch_seconds=lambda m: 1e-3)
    monkeypatch.setattr(product_speed, "ProductOperands", lambda *args: operands)
    it: Any = SimpleNamespace(chip=CHIP, torch=object(), tiny=False, results={})
    product_speed.measure(it, record, "it", made, product_speed.TORCH, Ceilings(1e12, 1e14))
    (row,) = record.data["tables"]["products"]
    size = 2 * (made.rows * made.op.n_in + 8 * made.op.n_in + 8 * made.rows)  # bfloat16, and no residual
    assert row["of_bandwidth"] == pytest.approx(size / 1e-3 / 1e12)
    assert made.op.residual
    assert made.bytes(8) > size
    operands.torch_seconds = lambda m: 1 // 0
    kernel_speed._products(it, record, product_speed.TORCH, None)
    assert failed(record) == []
    assert "ZeroDivisionError" in record.data["skips"][0]["reason"]


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
