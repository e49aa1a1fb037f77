"""Kernels compiled by other processes: the same code, no MLIR here, and whatever befalls a worker costs time only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nanoserve
from compiler.packed_call import call_address
from nanoserve.compiler import jit
from nanoserve.compiler.target import host
from nanoserve.kernels import compile_pool, library, norm
from nanoserve.kernels.library import KernelSpec, load_kernels, stats

PYTHON_PATH = str(Path(nanoserve.__file__).parent.parent)
COLUMNS = (16, 20, 24, 28)


def specs() -> list[KernelSpec]:
    return [norm.norm_spec("rmsnorm", cols, cols, cols, 1e-5) for cols in COLUMNS]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process, as if it had just started, with an empty cache and two cores."""
    monkeypatch.setenv("NANOSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_stats", library.Stats())
    monkeypatch.setattr(compile_pool, "MIN_KERNELS", 2)
    monkeypatch.setattr(compile_pool, "MIN_KERNELS_PER_FURTHER_CORE", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    return tmp_path / "cache"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The workers that were started."""
    processes: list[subprocess.Popen[bytes]] = []
    start = compile_pool._start

    def recorded() -> subprocess.Popen[bytes]:
        processes.append(start())
        return processes[-1]

    monkeypatch.setattr(compile_pool, "_start", recorded)
    return processes


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Another program in place of the worker."""
    monkeypatch.setattr(
        compile_pool,
        "_start",
        lambda: subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ),
    )


def check(addresses: dict[KernelSpec, int]) -> None:
    assert list(addresses) == specs()
    for cols, address in zip(COLUMNS, addresses.values(), strict=True):
        x, w, out = (np.ones((2, cols), dtype=np.float32) for _ in range(3))
        call_address(address, x, w, out, 0, 2)
        assert np.abs(out - 1).max() < 1e-4


def test_workers_compile_and_every_kernel_is_counted(
    fresh: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled_here(*_: object) -> None:
        raise AssertionError("compiled in this process")

    monkeypatch.setattr(jit, "compile_kernel", compiled_here)
    steps: list[tuple[int, int, str]] = []
    check(load_kernels(specs(), lambda *step: steps.append(step)))
    assert [step[:2] for step in steps] == [(done, 4) for done in (1, 2, 3, 4)]
    assert {step[2] for step in steps} == {spec.symbol for spec in specs()}
    assert (stats().compiled, stats().loaded_from_cache, stats().damaged) == (4, 0, 0)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)
    assert len(list(fresh.glob("*.json"))) == 4


def test_workers_make_the_code_this_process_makes(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_kernels(specs())
    theirs = {path.name for path in fresh.glob("*.json")} | {path.name for path in fresh.glob("*.so")}
    monkeypatch.setenv("NANOSERVE_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(compile_pool, "MIN_KERNELS", 99)
    load_kernels(specs())
    own = tmp_path / "own"
    assert {path.name for path in own.glob("*.json")} | {path.name for path in own.glob("*.so")} == theirs


DEATHS = {
    "ends at once": ("pass", "it ended without an answer"),
    "ends when asked": ("input()", "it ended without an answer"),
    "talks": ("input(); print('not JSON')", "it ended without an answer"),
    "answers something else": ("input(); print('{\"key\": 1, \"error\": null}'); input()", "answered another question"),
    "fails": (
        "import json\nwhile True: print(json.dumps({'key': json.loads(input())['key'], 'error': 'no luck'}), flush=True)",
        "no luck",
    ),
    "lies": ("import json\nwhile True: print(json.dumps({'key': json.loads(input())['key'], 'error': None}), flush=True)", ""),
}  # fmt: skip


@pytest.mark.parametrize("death", DEATHS)
def test_what_workers_do_not_deliver_is_compiled_here(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, death: str
) -> None:
    program, words = DEATHS[death]
    stand_in(monkeypatch, program)
    steps: list[int] = []
    check(load_kernels(specs(), lambda done, total, name: steps.append(done)))
    assert steps == [1, 2, 3, 4]
    assert stats().compiled == 4
    assert words in caplog.text


def test_a_worker_that_hangs_is_given_up(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(monkeypatch, "import time; time.sleep(600)")
    monkeypatch.setattr(compile_pool, "PATIENCE_S", 0.3)
    begin = time.monotonic()
    check(load_kernels(specs()))
    assert time.monotonic() - begin < 60
    assert "workers did not answer" in caplog.text


def test_workers_killed_halfway(
    fresh: Path,
    started: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each when it is asked for a second kernel."""
    steps: list[int] = []
    asked: set[int] = set()
    ask = compile_pool._ask

    def asking(stdin: Any, stdout: Any, request: dict[str, object]) -> str | None:
        if id(stdin) in asked:
            for process in started:
                process.kill()
        asked.add(id(stdin))
        return ask(stdin, stdout, request)

    monkeypatch.setattr(compile_pool, "_ask", asking)
    check(load_kernels(specs(), lambda done, total, name: steps.append(done)))
    assert steps == [1, 2, 3, 4]
    assert stats().compiled == 4
    assert "compiling it here" in caplog.text


def test_no_workers_can_be_started(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(compile_pool, "_start", refuse)
    check(load_kernels(specs()))
    assert "no workers could be started" in caplog.text


def test_an_interrupt_ends_the_workers(fresh: Path, started: list[subprocess.Popen[bytes]]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        load_kernels(specs(), interrupt)
    assert caught.value is not None
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_a_worker_leaves_ctrl_c_to_who_waits_for_it(fresh: Path) -> None:
    process = compile_pool._start()
    assert process.stdin is not None
    assert process.stdout is not None
    request = {
        "kind": "none",
        "params": {},
        "key": "k",
        "target": asdict(host()),
        "toolchain": "t",
        "directory": "/",
    }
    try:
        for _ in range(2):  # the second answer comes after the signal
            error = compile_pool._ask(process.stdin, process.stdout, request)
            assert error is not None
            assert "FileNotFoundError" in error
            process.send_signal(signal.SIGINT)
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


PROGRAM = """
import json, os, sys
os.sched_getaffinity = lambda pid: {0, 1}
from nanoserve.kernels import compile_pool, norm
from nanoserve.kernels.library import load_kernels, stats
compile_pool.MIN_KERNELS = compile_pool.MIN_KERNELS_PER_FURTHER_CORE = 2
print("begin", flush=True)
load_kernels([norm.norm_spec("rmsnorm", cols, cols, cols, 1e-5) for cols in range(16, 400, 4)][:int(sys.argv[1])])
mlir = sorted(name for name in sys.modules if name.split(".")[0] in ("mlir", "torch_mlir"))
print(json.dumps([stats().compiled, mlir]))
"""


def script(tmp_path: Path, *args: str) -> subprocess.Popen[str]:
    """A user's program without `if __name__`, in a process group of its own, in a directory with misleading names."""
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working directory')")
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": PYTHON_PATH, "NANOSERVE_CACHE_DIR": str(tmp_path / "cache")}
    return subprocess.Popen(
        [sys.executable, str(folder / "program.py"), *args], env=env, cwd=tmp_path, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Who runs the tests in the background may have left Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_a_script_without_a_guard_runs_once_and_imports_no_mlir(tmp_path: Path) -> None:
    process = script(tmp_path, "4")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines()[0] == "begin"
    assert json.loads(out.splitlines()[1]) == [4, []]
    assert len(out.splitlines()) == 2


def processes_of(group: int) -> list[int]:
    """Live members of a process group, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind(tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C reaches the whole group; a kill only the parent, whose workers then end by themselves."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc to look for processes in")
    process = script(tmp_path, "90")
    group = process.pid
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(processes_of(group)) >= 3
    if how == signal.SIGINT:
        os.killpg(group, how)
    else:
        process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count("KeyboardInterrupt") <= 1, "a worker was interrupted, too"
    while processes_of(group):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(list((tmp_path / "cache").glob("*.json"))) < 90


def test_how_many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert [compile_pool.num_workers(n) for n in (0, 1, 7, 8, 14, 100)] == [0, 0, 0, 4, 6, 6]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert compile_pool.num_workers(100) == compile_pool.MAX_WORKERS
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert compile_pool.num_workers(100) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3})
    assert [compile_pool.num_workers(n) for n in (14, 23, 24)] == [0, 0, 2]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(sys, "executable", "")
    assert compile_pool.num_workers(100) == 0
