"""demo.py and test_all.py as a user runs them: exit codes, what they print, and what they say to bad input."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_demo_walks_through_all_phases_with_the_users_prompt() -> None:
    """Seven phases, the prompt given, a clean audit, exit code 0."""
    done = run("demo.py", "--non-interactive", "--prompt", "A compiler is ")
    assert done.returncode == 0, done.stderr
    for phase in range(7):
        assert f"Phase {phase}:" in done.stdout
    assert "A compiler is " in done.stdout
    assert "every page is accounted for" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--prompt", ""], ["--temperature", "-1"], ["--phase", "9"], ["--prompt", "x" * 600]]
)
def test_demo_refuses_bad_input_in_one_line(arguments: list[str]) -> None:
    """No traceback, an exit code, and the field's name."""
    done = run("demo.py", "--non-interactive", *arguments)
    assert done.returncode not in (0, 1) or "demo.py:" in done.stderr
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_test_all_counts_honestly() -> None:
    """One phase: every line counted, totals agree, exit code 0."""
    done = run("test_all.py", "--phase", "0", "-v")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = len(re.findall(r"^  pass  ", done.stdout, re.MULTILINE))
    assert passed >= 9
    assert re.search(rf"^{passed} passed, 0 failed, 0 skipped$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("body", "words", "code"),
    [
        ("assert 1 == 2", "1 failed", 1),
        ("x = 1 + 1", "the check asserts nothing", 1),
        ("import pytest; pytest.skip('no reason at all'); assert 1", "1 skipped", 0),
    ],
)
def test_test_all_reports_failures_skips_and_empty_checks(
    tmp_path: Path, body: str, words: str, code: int
) -> None:
    """A failing, an empty and a skipped check are told apart, and none of them is a pass."""
    (tmp_path / "tests" / "phase0").mkdir(parents=True)
    (tmp_path / "tests" / "phase0" / "test_one.py").write_text(
        f"def test_one():\n    {body}\n", encoding="utf-8"
    )
    (tmp_path / "test_all.py").write_text(
        (ROOT / "test_all.py").read_text(encoding="utf-8"), encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "test_all.py", "--phase", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert words in done.stdout
    assert "0 passed" in done.stdout
    assert done.returncode == code
