"""LimitsProbe: what this machine can do at most at this moment, from limits.c.

Memory bandwidth of a shared machine drifts by a factor of two within an hour, so a limit is measured beside each run that
is compared with it, never once for all.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "limits.c"
PEAK_OF_WIDTH = {
    "float32": "float32_gflop_per_s",
    "bfloat16": "bfloat16_gflop_per_s",
    "int8": "int8_gop_per_s",
}

Limits = dict[str, float | None]


class LimitsProbe:
    """limits.c, compiled for this machine and kept running. A context manager.

    Raises:
        RuntimeError: no C compiler, or it does not compile here.
    """

    def __init__(self, threads: int) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            raise RuntimeError("there is no C compiler (cc) to measure the machine's limits with")
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "limits"
            flags = ["-O2", "-march=native", "-pthread"]
            made = subprocess.run(
                [compiler, *flags, str(SOURCE), "-o", str(program)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if made.returncode:
                raise RuntimeError(f"limits.c does not compile here: {made.stderr.strip()[:300]}")
            self._process = subprocess.Popen(
                [program, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self.measure()  # it has begun before its file is gone

    def measure(self) -> Limits:
        """Takes some tenths of a second of all threads."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the limits probe ended with exit code {self._process.wait()}")
        made: Limits = json.loads(line)
        return made

    def __enter__(self) -> LimitsProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
