"""PTX to machine code (a cubin), by NVIDIA's ptxas; and what ptxas tells of it.

ptxas is $NANOSERVE_PTXAS, or the one on PATH (a CUDA toolkit's), or the one in triton's wheel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nanoserve.compiler.gpu.chip import Chip

_TIMEOUT_S = 120


class AssemblerMissing(RuntimeError):
    """There is no ptxas and a kernel had to be compiled."""


class AssemblyFailed(RuntimeError):
    """ptxas refuses a kernel."""


@dataclass(frozen=True, slots=True)
class Cubin:
    """Machine code of one kernel.

    Attributes:
        registers: of a thread.
        spilled_bytes: registers kept in memory instead, stores and loads; slower, but right.
        static_shared_bytes: of a block, beside the dynamic ones.
    """

    code: bytes
    registers: int
    spilled_bytes: int
    static_shared_bytes: int


def _tool(name: str, variable: str | None = None) -> str | None:
    chosen = os.environ.get(variable) if variable else None
    if chosen:
        return chosen
    found = shutil.which(name)
    if found is not None:
        return found
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or []) if triton else []:
        path = Path(folder, "backends", "nvidia", "bin", name)
        if path.is_file():
            return str(path)
    return None


def ptxas() -> str | None:
    """The assembler's path, None where there is none."""
    return _tool("ptxas", "NANOSERVE_PTXAS")


def version() -> str | None:
    """Of the assembler, None where there is none."""
    path = ptxas()
    return None if path is None else _version_of(path)


@cache
def _version_of(path: str) -> str:
    said = _run([path, "--version"]).stdout
    found = re.search(r"\bV(\d+(\.\d+)+)", said)
    if found is None:
        raise AssemblyFailed(f"{path} --version tells no version: {said.strip()!r}")
    return f"ptxas {found[1]}"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise AssemblyFailed(f"{command[0]} cannot be run: {error}") from error


def assemble(ptx: str, chip: Chip, symbol: str) -> Cubin:
    """The machine code of a module with that kernel.

    Raises:
        AssemblerMissing: there is no ptxas.
        AssemblyFailed: it refuses the text.
    """
    path = ptxas()
    if path is None:
        raise AssemblerMissing(
            "compiling a GPU kernel needs ptxas: install triton (its wheel brings one) or a CUDA toolkit, or "
            "name it in NANOSERVE_PTXAS"
        )
    with tempfile.TemporaryDirectory(prefix="nanoserve-") as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        run = _run([path, "-v", "--fmad=false", f"-arch={chip.name}", str(source), "-o", str(target)])
        if run.returncode != 0:
            raise AssemblyFailed(f"{symbol} for {chip.name}: ptxas says {(run.stderr + run.stdout).strip()}")
        return Cubin(target.read_bytes(), *_usage(run.stderr + run.stdout, symbol))


def _usage(log: str, symbol: str) -> tuple[int, int, int]:
    """Registers, spilled bytes and static shared memory, from ptxas -v."""
    used = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if used is None or spilled is None:
        raise AssemblyFailed(f"{symbol}: ptxas does not tell what it used: {log.strip()!r}")
    shared = re.search(r"(\d+) bytes smem", log)
    return int(used[1]), int(spilled[1]) + int(spilled[2]), int(shared[1]) if shared else 0


def disassemble(code: bytes) -> str | None:
    """The instructions of a cubin, None where NVIDIA's disassembler is not installed."""
    tool = _tool("nvdisasm")
    if tool is None:
        return None
    with tempfile.TemporaryDirectory(prefix="nanoserve-") as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(code)
        run = _run([tool, "--print-code", str(path)])
    return run.stdout if run.returncode == 0 else None
