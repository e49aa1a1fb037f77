"""The kernels under compute-sanitizer: memory, races on shared memory, barriers. Tiny problems, because it is slow."""

from __future__ import annotations

import shutil
import subprocess
import sys

from tools.gpu_check.gpu import Gpu
from tools.gpu_check.places import ROOT
from tools.gpu_check.record import Record
from tools.gpu_check.run import environment

# (tool, part), the most telling first.
RUNS = (
    ("memcheck", "numerics"),
    ("racecheck", "numerics"),
    ("memcheck", "end_to_end"),
    ("synccheck", "numerics"),
)
_FOUND = 99  # its exit code where it has found something
_CANNOT = ("Device not supported", "Unable to", "not supported on this", "failed to initialize", "error 999")


def run(gpu: Gpu, record: Record) -> None:
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None or gpu.fake:
        record.skip(
            "compute-sanitizer", "the emulator checks by itself" if gpu.fake else "it is not installed"
        )
        return
    for tool, part in RUNS:
        name = f"{tool} of {part}"
        if record.has_time(name, 10):
            _check(gpu, record, program, tool, part, name)


def _check(gpu: Gpu, record: Record, program: str, tool: str, part: str, name: str) -> None:
    out = record.path.with_name(f"{record.path.stem}.{tool}.{part}.json")
    seconds = record.seconds_left - 2
    command = [
        program, "--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "5", "--target-processes", "all",
        sys.executable, "-m", "tools.gpu_check", "part", part, "--folder", str(gpu.folder), "--out", str(out),
        "--seconds", f"{0.8 * seconds:.0f}", "--tiny",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(False), capture_output=True, text=True, timeout=seconds, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        record.skip(name, f"not done in {seconds:.0f} s")
        return
    finally:
        out.unlink(missing_ok=True)
    printed = done.stdout + done.stderr
    reason = next((line for line in printed.splitlines() if any(word in line for word in _CANNOT)), None)
    summary = [line for line in printed.splitlines() if "SUMMARY" in line]
    if done.returncode == 0:
        record.check(name, True, summary[-1] if summary else "")
    elif reason is not None and done.returncode != _FOUND:
        record.skip(name, f"it does not work here: {reason.strip()}")
    else:
        record.check(name, False, (summary or printed.strip().splitlines() or [""])[-1])
