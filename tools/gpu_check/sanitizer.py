"""The kernels under compute-sanitizer: memory, races on shared memory, barriers. Tiny problems, because it is slow.

A tool that printed nothing, or whose program launched nothing, has found nothing: that is no pass.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.gpu_check.gpu import Gpu
from tools.gpu_check.places import ROOT
from tools.gpu_check.record import Record
from tools.gpu_check.run import environment, status_of

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
            with record.attempt(name):
                check(record, gpu.folder, program, tool, part)


def check(record: Record, folder: Path, program: str, tool: str, part: str) -> None:
    """One tool over one part, in the time that is left; the part gets four fifths of it."""
    name = f"{tool} of {part}"
    out = record.path.with_name(f"{record.path.stem}.{tool}.{part}.json")
    seconds = record.seconds_left - 2
    command = [
        program, "--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "5", "--target-processes", "all",
        sys.executable, "-m", "tools.gpu_check", "part", part, "--folder", str(folder), "--out", str(out),
        "--seconds", f"{0.8 * seconds:.0f}", "--tiny",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(False), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            # With what it runs, which would go on holding the device.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            record.leave_out(f"{name}, not done in {seconds:.0f} s")
            return
        finally:
            inner = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
            out.unlink(missing_ok=True)
    reason = next((line for line in printed.splitlines() if any(word in line for word in _CANNOT)), None)
    if process.returncode not in (0, _FOUND) and reason is not None:
        record.skip(name, f"it does not work here: {reason.strip()}")
        return
    passed, detail = verdict(process.returncode, printed, inner)
    if passed and inner["left_out"]:
        record.leave_out(f"{name}: {', '.join(inner['left_out'][:3])}")
    record.check(name, passed, detail)


def verdict(code: int, printed: str, inner: dict[str, Any]) -> tuple[bool, str]:
    """Whether a tool has found nothing wrong, and what it says.

    Args:
        inner: what the part under it has found: some, all of it right. What that had no time for is the caller's to tell.
    """
    summary = [line for line in printed.splitlines() if "SUMMARY" in line]
    told = (summary or printed.strip().splitlines() or ["it printed nothing"])[-1].strip()
    if code != 0 or not summary:
        return False, told
    status = status_of(inner, code, False)
    if status not in ("passed", "incomplete") or not inner["checks"]:
        return False, f"the part under it {status}, with {len(inner.get('checks', []))} checks; {told}"
    return True, f"{len(inner['checks'])} checks; {told}"
