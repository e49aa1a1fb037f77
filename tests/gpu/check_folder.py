"""A folder that `prepare` has filled for the emulator, once for all tests, the commands, and a record to check into."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tools.gpu_check.places import FOLDER, KERNELS, MANIFEST, ROOT
from tools.gpu_check.record import Record

WITHOUT_GPU = "environment,numerics,end_to_end,ceilings,engine_speed,kernel_speed,switches"


def command(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", *map(str, args)],
        cwd=ROOT, capture_output=True, text=True, timeout=700, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def prepared() -> Path:
    """A folder with all that the parts need at tiny sizes."""
    folder = FOLDER.with_name(f"gpu_check_{os.environ.get('PYTEST_XDIST_WORKER', 'test')}")
    done = command("prepare", "--tiny", "--folder", folder, "--only", WITHOUT_GPU, "--jobs", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kernels for sm_90a" in done.stdout
    return folder


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it, to do harm to."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    shutil.copytree(prepared / KERNELS, folder / KERNELS)
    shutil.copy(prepared / MANIFEST, folder)
    return folder


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "record.json", 60)


def failed(record: Record) -> list[str]:
    return [check["name"] for check in record.data["checks"] if not check["passed"]]
