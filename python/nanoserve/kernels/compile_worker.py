"""The other end of compile_pool.py: compiles kernels into the cache, one job per line of stdin, one answer per line of stdout.

    python -m nanoserve.kernels.compile_worker

A job is a JSON object: kind and params of a KernelSpec, the target's fields, toolchain, directory of the cache, and the key the
kernel is wanted under. A key that this process computes differently is refused: its sources are not the ones that were asked
for. It ends when stdin does, so it never outlives who started it by more than the kernel it is at.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from nanoserve.compiler import jit
from nanoserve.compiler.object_cache import ObjectCache
from nanoserve.compiler.target import Target
from nanoserve.kernels.library import KernelSpec


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    # A stray line of a library's on stdout must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        job = json.loads(line)
        answers.write(json.dumps({"key": job["key"], "error": _error_of(job)}).encode() + b"\n")


def _error_of(job: dict[str, Any]) -> str | None:
    try:
        _compile(job)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _compile(job: dict[str, Any]) -> None:
    spec = KernelSpec.make(job["kind"], **job["params"])
    target = Target(**job["target"])
    if spec.key(target, job["toolchain"]) != job["key"]:
        raise RuntimeError("this process has other sources")
    engine = jit.compile_kernel(lambda: spec.build(target), target)
    cache = ObjectCache(Path(job["directory"]))
    cache.store(job["key"], spec.symbol, job["toolchain"], jit.shared_object(engine, spec.symbol))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.exit(1)  # nobody waits for the answer any more
