"""Numbers in README.md are those of bench/results, and the report script can tell when they are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import report

ROOT = Path(__file__).resolve().parents[2]


def halve_numbers(value: Any) -> None:
    """Every float in a nest of dicts and lists."""
    for key, held in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(held, dict | list):
            halve_numbers(held)
        elif isinstance(held, float):
            value[key] = held * 0.5


def check() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.report", "--check"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_readme_shows_the_results_file() -> None:
    """`python -m bench.report` has nothing to change, in no document."""
    done = check()
    assert done.returncode == 0, done.stderr


def test_a_changed_number_is_noticed() -> None:
    """The table is made from the file: another number in it makes another table."""
    for document, blocks in report.DOCUMENTS.items():
        text = document.read_text(encoding="utf-8")
        for file, make in blocks.values():
            results = report.read(file)
            table = make(results)
            assert table in text
            if results is not None:
                halve_numbers(results)
                assert make(results) != table


@pytest.mark.parametrize("field", ["command", "commit", "machine"])
def test_results_say_where_they_come_from(field: str) -> None:
    """Every results file names its command, commit and machine."""
    for path in (ROOT / "bench" / "results").glob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8")).get(field), f"{path.name} has no {field}"
