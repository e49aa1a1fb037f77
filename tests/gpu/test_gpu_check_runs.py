"""How parts, and calls of the check, are judged and put together; sanitizers among them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.gpu.check_folder import failed
from tests.support.processes import ends
from tools.gpu_check import (
    manifest,
    prepare,
    sanitizer,
)
from tools.gpu_check import run as run_module
from tools.gpu_check.places import MANIFEST, ROOT
from tools.gpu_check.record import Record

from bench import run as bench_run
from nanoserve.compiler.gpu.chip import parse_chip

CHIP = parse_chip("sm_90a")


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
    record = Record(tmp_path / "record.json", 8)
    begin = time.monotonic()
    sanitizer.check(record, tmp_path, sanitizing(tmp_path, code), "memcheck", "numerics")
    assert time.monotonic() - begin < 40
    (left_out,) = record.data["left_out"]
    assert re.fullmatch(r"memcheck of numerics, not done in \d s", left_out)
    assert record.data["checks"] == []
    assert ends(int(child.read_text()))


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
