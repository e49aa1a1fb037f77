#!/usr/bin/env python3
"""The course's checks: phases 0 to 6, one line per check, honest counts.

    python3 test_all.py [--phase N] [-v]

It runs the very tests that pytest collects under tests/phase*. A check passes, fails or is skipped; a skip is never counted
as a pass, and a check whose code asserts nothing counts as failed. The exit code is 0 only when nothing failed.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent

try:
    import hypothesis  # noqa: F401  the tests need it: find out before they start
    import pytest
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as missing:
    venv = ROOT / ".venv" / "bin" / "python"
    if venv.exists() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        os.execv(venv, [str(venv), *sys.argv])
    sys.exit(
        f"test_all.py needs the test environment: {missing}\nRun `make test`, which installs it into .venv."
    )

PHASES = [
    "requests and batches",
    "the paged KV pool",
    "prefill and decode",
    "chunked prefill",
    "the radix tree",
    "continuous batching",
    "the engine",
]


def asserts_something(function: Any) -> bool:
    """The function, or a helper it calls by a name that says so, can fail."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "raises" or name.startswith(("assert_", "check_", "run_state_machine")):
                return True
    return False


class Report:
    """Collects one outcome per check and prints it."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.per_phase: dict[int, int] = {}
        self.about: dict[str, str] = {}
        self.empty: set[str] = set()
        self.failures: list[tuple[str, str]] = []
        self.phase = -1

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: phase_of(item.nodeid))
        for item in items:
            function = getattr(item, "obj", None)
            self.about[item.nodeid] = (inspect.getdoc(function) or "").split("\n")[0]
            case = getattr(function, "__self__", None)
            if case is None and not asserts_something(inspect.unwrap(function)):
                self.empty.add(item.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.line(report.nodeid, "failed", str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            if report.when == "teardown" and report.outcome == "passed":
                return
            if report.nodeid in self.empty and report.outcome == "passed":
                self.line(report.nodeid, "failed", "the check asserts nothing")
            else:
                self.line(report.nodeid, report.outcome, report.longreprtext)

    def line(self, nodeid: str, outcome: str, detail: str) -> None:
        phase = phase_of(nodeid)
        if phase != self.phase:
            self.phase = phase
            print(f"\nPhase {phase}: {PHASES[phase]}")
        self.counts[outcome] += 1
        self.per_phase[phase] = self.per_phase.get(phase, 0) + 1
        name = nodeid.split("::", 1)[-1].removeprefix("test_").replace("_", " ").replace("::test ", ": ")
        mark = {"passed": "pass", "failed": "FAIL", "skipped": "skip"}[outcome]
        print(f"  {mark}  {name}", flush=True)
        if self.verbose and self.about.get(nodeid):
            print(f"        {self.about[nodeid]}")
        if outcome == "failed":
            self.failures.append((nodeid, detail))
        elif outcome == "skipped":
            print(f"        {detail.splitlines()[-1] if detail else 'no reason given'}")


def phase_of(nodeid: str) -> int:
    return int(nodeid.split("tests/phase", 1)[1][0])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phase", type=int, choices=range(len(PHASES)), help="one phase only")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what each check is about")
    options = parser.parse_args()
    os.chdir(ROOT)
    chosen = range(len(PHASES)) if options.phase is None else [options.phase]
    report = Report(options.verbose)
    begin = time.perf_counter()
    # The report below replaces pytest's own, so options that shape that one must not be set.
    own = ["-p", "no:terminal", "-o", "addopts=--import-mode=importlib --strict-markers"]
    code = pytest.main([*own, *(f"tests/phase{phase}" for phase in chosen)], plugins=[report])
    for nodeid, detail in report.failures:
        print(f"\n--- {nodeid}\n{detail}")
    for phase in chosen:
        if not report.per_phase.get(phase):
            print(f"\nPhase {phase} has no checks")
            code = pytest.ExitCode.NO_TESTS_COLLECTED
    print(f"\n{sum(report.counts.values())} checks in {time.perf_counter() - begin:.1f} s")
    print(", ".join(f"{count} {outcome}" for outcome, count in report.counts.items()))
    return 1 if report.counts["failed"] or code != pytest.ExitCode.OK else 0


if __name__ == "__main__":
    sys.exit(main())
