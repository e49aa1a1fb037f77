"""Kernels compiled by several processes at once, because the compiler's bindings hold Python's lock.

Workers are new interpreters (compile_worker.py), not forks: a fork of a process with threads may deadlock, and multiprocessing
would run a user's script a second time where it has no `if __name__` guard. A job goes in as a line of JSON, and the kernel
comes back through the cache on disk, verified like any other entry. So a worker is trusted with nothing, and one that dies, hangs
or disagrees costs time only: what it did not deliver is compiled by who asked. Workers end with the iterator, however it ends.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING

from nanoserve.compiler.target import Target

if TYPE_CHECKING:
    from nanoserve.kernels.library import KernelSpec

_log = logging.getLogger("nanoserve.kernels")

# Fewer are compiled sooner here: every worker starts with some 0.45 s of imports, this process has 0.3 s of them, and a kernel
# takes some 0.1 s. With two cores 14 kernels are still faster here (measured), so what counts is kernels times further cores.
MIN_KERNELS = 8
MIN_KERNELS_PER_FURTHER_CORE = 24
MAX_WORKERS = 8  # each takes some 150 MB
PATIENCE_S = 120.0  # without any answer; the largest kernel takes less than a second

Job = tuple["KernelSpec", str]  # and its key
_Answer = tuple[Job, str | None]  # what went wrong, None for nothing


def num_workers(num_kernels: int) -> int:
    """How many to start; 0: compile here."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    too_few = num_kernels < MIN_KERNELS or num_kernels * (cpus - 1) < MIN_KERNELS_PER_FURTHER_CORE
    if too_few or not sys.executable or getattr(sys, "frozen", False):
        return 0
    return min(cpus, num_kernels // 2, MAX_WORKERS)


def compile_in_processes(
    jobs: Sequence[Job], target: Target, toolchain: str, directory: Path, workers: int
) -> Generator[KernelSpec]:
    """The kernels in the order in which they arrive in the cache; one that fails is logged and left out."""
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    answers: queue.SimpleQueue[_Answer | None] = queue.SimpleQueue()
    processes: list[subprocess.Popen[bytes]] = []
    common = {"target": asdict(target), "toolchain": toolchain, "directory": str(directory)}
    try:
        for _ in range(workers):
            processes.append(_start())
            threading.Thread(
                target=_feed,
                args=(processes[-1], todo, answers, common),
                daemon=True,
                name="nanoserve-compile",
            ).start()
        at_work = workers
        while at_work:
            answer = answers.get(timeout=PATIENCE_S)
            if answer is None:
                at_work -= 1
                continue
            (spec, _), error = answer
            if error is None:
                yield spec
            else:
                _log.warning(
                    "a worker could not compile kernel %s (%s); compiling it here", spec.symbol, error
                )
    except queue.Empty:
        _log.warning("workers did not answer for %.0f s; compiling the other kernels here", PATIENCE_S)
    except OSError as error:
        _log.warning("no workers could be started (%s); compiling kernels here", error)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _start() -> subprocess.Popen[bytes]:
    """An interpreter that finds the modules this one finds, and (-P) none that happen to lie in the working directory."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "nanoserve.kernels.compile_worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def _feed(
    process: subprocess.Popen[bytes],
    todo: queue.SimpleQueue[Job],
    answers: queue.SimpleQueue[_Answer | None],
    common: dict[str, object],
) -> None:
    """In a thread per worker: a job, its answer, the next job."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        while True:
            spec, key = job = todo.get_nowait()
            request = {"kind": spec.kind, "params": dict(spec.params), "key": key, **common}
            error = _ask(process.stdin, process.stdout, request)
            answers.put((job, error))
            if error == _ENDED:
                return
    except queue.Empty:
        pass
    finally:
        answers.put(None)


_ENDED = "it ended without an answer"


def _ask(stdin: IO[bytes], stdout: IO[bytes], request: dict[str, object]) -> str | None:
    try:
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.flush()
        line = stdout.readline()
        if not line.endswith(b"\n"):
            return _ENDED
        answer = json.loads(line)
        error = answer["error"] if answer["key"] == request["key"] else "it answered another question"
    except (OSError, ValueError, LookupError, TypeError):
        return _ENDED
    return None if error is None else str(error)
