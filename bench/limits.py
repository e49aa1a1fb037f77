"""Machine: what this machine's threads can do at most, measured by kernels that do nothing else (kernels/peak.py).

Every call goes through the native executor and its threads, as an engine's own work does: what a limit is compared with pays the
same barriers. Reading is of memory that no cache holds, multiply-adds are of operands in L1. Reported are medians, not the
best: what is compared with them is an average over a while, too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoserve.compiler.target import host
from nanoserve.kernels import peak
from nanoserve.kernels.library import KernelSpec, load_kernels
from nanoserve.native import KVCachePool, PageTable, StepExecutor, ThreadPool


class Machine:
    """Times plans of kernels on its threads.

    Args:
        max_rows: of a plan.
    """

    def __init__(self, num_threads: int, max_rows: int = 1) -> None:
        self.threads = ThreadPool(num_threads)
        self.num_threads = num_threads
        self._max_rows = max_rows
        self._pool = KVCachePool(-(-max_rows // 16), 16)
        self._table = PageTable(self._pool)
        self._table.grow_to(max_rows)
        self._limits: dict[object, Callable[[], float]] = {}

    def plan(
        self,
        spec: KernelSpec,
        calls: list[list[NDArray[Any]]],
        panels: int,
        row_block: int = 1,
        rows: int = 1,
    ) -> Callable[[], float]:
        """A function that runs every call once, over `rows` rows, and returns the seconds of one."""
        executor = StepExecutor(self._pool, self.threads, self._max_rows)
        address = load_kernels([spec])[spec]
        for arrays in calls:
            args: list[tuple[Any, ...]] = [("weight", executor.weight(array)) for array in arrays]
            if spec.kind == "gemm":
                args.append(("num_rows",))
            executor.op(spec.kind, address, args, "tiles", panels, row_block)
        ids = np.zeros(rows, np.int32)

        def once() -> float:
            begin = time.perf_counter()
            executor.forward(ids, [self._table], [0], [rows], [0], 1)
            return (time.perf_counter() - begin) / len(calls)

        return once

    def read(self, memory: NDArray[Any]) -> Callable[[], float]:
        """Seconds per byte of reading all of it, whole blocks of peak.READ_BYTES; it should be several times the last cache."""
        key = (memory.ctypes.data, memory.nbytes)
        if key not in self._limits:
            blocks = memory.nbytes // peak.READ_BYTES
            once = self.plan(peak.read_spec(), [[memory, np.zeros((blocks, 16), np.int32)]], blocks)
            self._limits[key] = lambda: once() / (blocks * peak.READ_BYTES)
        return self._limits[key]

    def dots(self, arithmetic: str) -> Callable[[], float]:
        """Seconds per multiply-add of all threads together, in one of peak.ARITHMETICS."""
        if arithmetic not in self._limits:
            units = 8 * self.num_threads
            x, w = np.ones((peak.STEPS, 8), np.float32), np.ones((peak.STEPS, 48), np.float32)
            once = self.plan(peak.dot_spec(arithmetic), [[x, w, np.zeros((units, 16), np.float32)]], units)
            count = units * peak.unit_dots(arithmetic, host())
            self._limits[arithmetic] = lambda: once() / count
        return self._limits[arithmetic]


def median_of(work: Callable[[], float], min_seconds: float) -> float:
    """What it returns, of the calls that began within so long; at least one."""
    begin, found = time.perf_counter(), []
    while not found or time.perf_counter() - begin < min_seconds:
        found.append(work())
    return statistics.median(found)
