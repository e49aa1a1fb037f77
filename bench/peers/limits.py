"""LimitsProbe: what this machine can do at most at this moment, in a process of its own.

Memory bandwidth of a shared machine drifts by a factor of two within an hour, so a limit is measured beside each run that
is compared with it, never once for all. The process is one of this interpreter that runs the kernels of bench/limits.py: the
one that compares engines then holds no threads that spin, and no memory for that. For a line it answers a JSON object:

    read_gb_per_s           10^9 bytes per second, of all threads, from memory well beyond the last cache, in huge pages
    float32_gflop_per_s, bfloat16_gflop_per_s, int8_gop_per_s
                            10^9 operations per second, two per multiply-add; null where the CPU has no such instruction
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.limits import Machine, median_of
from nanoserve.compiler.target import Target, host
from nanoserve.native import ThreadPool, WeightArena

ROOT = Path(__file__).resolve().parents[2]
PEAK_OF_WIDTH = {
    "float32": "float32_gflop_per_s",
    "bfloat16": "bfloat16_gflop_per_s",
    "int8": "int8_gop_per_s",
}
READ_SECONDS, DOTS_SECONDS = 0.1, 0.03  # of one measurement
LEAST_BYTES, THREAD_BYTES = 256 << 20, 64 << 20  # of memory that is read: well beyond the last cache
_TAIL_CHARS = 300

Limits = dict[str, float | None]


class LimitsProbe:
    """The process from its start to its end. A context manager.

    Raises:
        RuntimeError: it cannot measure here; the message says why.
    """

    def __init__(self, threads: int) -> None:
        paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bench.peers.limits", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
        )  # fmt: skip
        try:
            self.measure()  # kernels are compiled now, and memory is there
        except BaseException:
            self.__exit__()
            raise

    def measure(self) -> Limits:
        """Takes some tenths of a second of all threads."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            tail = " ".join(self._log.read().decode(errors="replace").split())[-_TAIL_CHARS:]
            raise RuntimeError(f"the limits probe ended with exit code {code}: {tail}")
        made: Limits = json.loads(line)
        return made

    def __enter__(self) -> LimitsProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


def measured(machine: Machine, memory: NDArray[np.uint8], target: Target) -> Limits:
    """The limits of now, as they are sent."""
    has = {"f32": True, "bf16": target.bf16_dot, "int8": target.int8_dot}
    limits: Limits = {"read_gb_per_s": round(1e-9 / median_of(machine.read(memory), READ_SECONDS), 2)}
    for (arithmetic, is_there), key in zip(has.items(), PEAK_OF_WIDTH.values(), strict=True):
        limits[key] = None
        if is_there:
            limits[key] = round(2e-9 / median_of(machine.dots(arithmetic), DOTS_SECONDS), 2)
    return limits


def touched(num_bytes: int, threads: ThreadPool) -> WeightArena:
    """Memory as a warm start leaves a model's weights: huge pages, each first written by one of the threads."""
    arena = WeightArena(num_bytes)
    with open("/dev/zero", "rb") as zeros:
        arena.read(zeros.fileno(), 0, 0, num_bytes, threads)
    return arena


def serve(num_threads: int) -> None:
    machine = Machine(num_threads)
    arena = touched(max(LEAST_BYTES, THREAD_BYTES * num_threads), machine.threads)
    memory = arena.view(0, arena.num_bytes)
    for _ in sys.stdin:
        print(json.dumps(measured(machine, memory, host())), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
