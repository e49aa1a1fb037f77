"""The texts in deploy/: options exist, files exist, and systemd reads the unit where there is a systemd."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nanoserve.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
UNIT, DOCKERFILE = ROOT / "deploy" / "nanoserve.service", ROOT / "deploy" / "Dockerfile"
INSTRUCTIONS = {
    "FROM", "RUN", "CMD", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "WORKDIR", "ARG", "LABEL",
}  # fmt: skip


def known_options() -> set[str]:
    text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "400", "TERM": "dumb"}).output
    return set(re.findall(r"--[a-z][a-z-]+", text))


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    return parser


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", DOCKERFILE.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines]


def test_the_unit_starts_the_command_there_is() -> None:
    command = shlex.split(unit()["Service"]["ExecStart"])
    assert command[0].endswith("/nanoserve")
    assert command[1] == "serve"
    assert {word for word in command if word.startswith("--")} <= known_options()
    drain = int(command[command.index("--drain-timeout") + 1])
    assert int(unit()["Service"]["TimeoutStopSec"]) > drain


def test_systemd_reads_it(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    copy = tmp_path / "nanoserve.service"
    copy.write_text(UNIT.read_text().replace("/opt/nanoserve/bin/nanoserve", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if "nanoserve.service" in line]
    assert not complaints, complaints


def test_the_image_is_made_of_what_there_is() -> None:
    steps = dockerfile()
    assert {name for name, _ in steps} <= INSTRUCTIONS
    assert steps[0][0] == "FROM"
    for name, arguments in steps:
        if name == "COPY" and not arguments.startswith("--from"):
            for source in arguments.split()[:-1]:
                assert (ROOT / source).exists(), source
    entry = next(arguments for name, arguments in steps if name == "ENTRYPOINT")
    words = re.findall(r'"([^"]*)"', entry)
    assert words[:2] == ["nanoserve", "serve"]
    assert {word for word in words if word.startswith("--")} <= known_options()
    assert any(name == "USER" for name, _ in steps)
