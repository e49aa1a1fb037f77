"""--help is a document, appears at once, and knows every sampling parameter."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nanoserve
from nanoserve.cli.options import ENGINE, SAMPLING
from nanoserve.sampling import SamplingParams

COMMANDS = ("generate", "chat", "bench", "plan", "doctor", "explain")
Run = Callable[..., Any]


def plain(text: str) -> str:
    """Help without the frames and line breaks that the terminal's width put there."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def test_version_is_the_packages(run: Run) -> None:
    assert run("--version").stdout == f"nanoserve {nanoserve.__version__}\n"


def test_help_lists_every_command_with_its_purpose(run: Run) -> None:
    text = plain(run("--help").stdout)
    for command in COMMANDS:
        assert re.search(rf" {command} [A-Z]", text), command


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_examples(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert re.search(r"\n +Examples:", result.stdout)
    assert result.stdout.count(f"nanoserve {command} ") >= 2 or command == "doctor"
    assert len(plain(result.stdout).split("Examples:")[0].split()) > 25, "a paragraph, not a label"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_narrow_terminal(run: Run, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERMINAL_WIDTH", "60")
    text = run(command, "--help").stdout
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 60
    assert "…" not in text.split("Options")[0]


def test_examples_show_a_backslash_as_it_is_typed(run: Run) -> None:
    assert "--stop $'\\n'" in plain(run("generate", "--help").stdout)


def test_no_arguments_is_help_not_an_error_message(run: Run) -> None:
    assert "Usage" in run().stdout + run().stderr


def test_every_sampling_parameter_has_exactly_one_option() -> None:
    fields = [option.field for option in SAMPLING]
    assert sorted(fields) == sorted(field.name for field in dataclasses.fields(SamplingParams))
    names = [name for option in (*SAMPLING, *ENGINE) for name in option.names]
    assert len(names) == len(set(names))


def test_help_of_an_option_is_the_parameters_own_documentation(run: Run) -> None:
    for option in SAMPLING:
        assert len(option.help) > 15, option.field
    text = plain(run("generate", "--help").stdout).lower()
    assert "keep the likeliest tokens until their mass reaches p. [1.0]" in text
    assert "0 is greedy, at most 100. [1.0]" in text


def test_help_shows_the_commands_own_defaults(run: Run) -> None:
    assert "Most output tokens. [128]" in plain(run("generate", "--help").stdout)
    assert "Most output tokens. [as many as the context has room for]" in plain(run("chat", "--help").stdout)


def test_help_needs_no_engine_and_no_compiler() -> None:
    """Start-up time, measured by what is not imported: numbers of seconds would depend on the machine."""
    code = """
import json, sys
from nanoserve.cli.app import app
try:
    app(["generate", "--help"])
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
    environment = {"PYTHONPATH": str(Path(nanoserve.__file__).parents[1]), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert "nanoserve.cli.generate" in loaded
    heavy = {
        "torch", "torch_mlir", "mlir", "transformers", "tokenizers", "jinja2", "huggingface_hub", "nanoserve._ch16",
        "nanoserve.native", "nanoserve.llm", "nanoserve.nano_engine", "nanoserve.models", "nanoserve.kernels",
    }  # fmt: skip
    assert not heavy & loaded


def test_running_the_package_is_the_command() -> None:
    environment = {"PYTHONPATH": str(Path(nanoserve.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "nanoserve", "--version"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout == f"nanoserve {nanoserve.__version__}\n"
