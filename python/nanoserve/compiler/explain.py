"""What becomes of a kernel: its text as it is written, after every lowering stage, and as machine code.

`nanoserve explain gemm` prints this. The stages are those of lowering.STAGES, so what is shown is what runs.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Protocol

from nanoserve.compiler import jit
from nanoserve.compiler.target import Target, host


class Buildable(Protocol):
    """A kernel that can emit itself: nanoserve.kernels.library.KernelSpec."""

    @property
    def symbol(self) -> str: ...

    def build(self, target: Target) -> None: ...


def explain(spec: Buildable, target: Target | None = None) -> list[tuple[str, str, str]]:
    """(stage, purpose in one sentence, text) in order.

    The last is "assembly" where objdump and a linker are installed.

    Raises:
        MlirMissing: no bindings are installed.
    """
    from nanoserve.compiler.lowering import Stage, lower

    cpu = host() if target is None else target
    module = jit.build_module(lambda: spec.build(cpu))
    steps = [("written", "What the kernel's Python function built, before any pass.", str(module))]

    def record(stage: Stage, text: str) -> None:
        steps.append((stage.name, stage.purpose, text))

    with jit.context():
        lower(module, cpu, record)
    assembly = _assembly(spec, cpu)
    if assembly is not None:
        steps.append(("assembly", f"The machine code LLVM made of it for this CPU ({cpu.name}).", assembly))
    return steps


def _assembly(spec: Buildable, target: Target) -> str | None:
    objdump = shutil.which("objdump")
    if objdump is None or jit.linker() is None:
        return None
    code = jit.shared_object(jit.compile_kernel(lambda: spec.build(target), target), spec.symbol)
    with tempfile.TemporaryDirectory(prefix="nanoserve-") as folder:
        path = Path(folder, "kernel.so")
        path.write_bytes(code)
        options = ["--disassemble", "--no-show-raw-insn", "--no-addresses"]
        run = subprocess.run([objdump, *options, str(path)], capture_output=True, text=True, errors="replace")
    return run.stdout if run.returncode == 0 else None
