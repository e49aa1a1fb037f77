"""Host LLVM IR to an image: the bytes that stand in for a cubin.

    8 bytes "NVEMUIMG", 8 bytes length (little endian), an x86-64 shared object

llvmlite optimises and compiles for one fixed CPU, so the same text gives the same arithmetic on every machine; the system's
linker makes a shared object of it, which libnvemu maps (src/emulator/image.cpp). The emulator and the fake driver load the
same images, so what one runs the other runs too, and the process that runs them needs no compiler.
"""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from nanoserve.compiler.jit import linker
from nanoserve.emulator.errors import EmulatorError, EmulatorMissing, UnsupportedInstruction
from nanoserve.emulator.library import library_path
from nanoserve.emulator.rewrite import HostModule, rewrite

MAGIC = b"NVEMUIMG"
_TRIPLE = "x86_64-unknown-linux-gnu"
_CPU = "x86-64-v3"  # AVX2, FMA and half precision conversions: every x86-64 server of the last ten years
_OPT_LEVEL = 2


@cache
def _llvm() -> Any:
    try:
        import llvmlite.binding as llvm
    except ImportError as error:
        raise EmulatorMissing(
            "the CUDA emulator compiles with llvmlite: pip install 'llvmlite>=0.50'"
        ) from error
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


def compile_host(module: HostModule) -> bytes:
    """The image of a rewritten module.

    Raises:
        UnsupportedInstruction: LLVM cannot read the text, or it calls what nobody defines.
        EmulatorMissing: no compiler or linker is installed.
    """
    llvm = _llvm()
    command = linker()
    if command is None:
        raise EmulatorMissing("the CUDA emulator needs a linker: install binutils (ld) or a C compiler")
    machine = llvm.Target.from_triple(_TRIPLE).create_target_machine(
        cpu=_CPU, opt=_OPT_LEVEL, reloc="pic", codemodel="default"
    )
    try:
        parsed = llvm.parse_assembly(module.text)
        parsed.triple = _TRIPLE
        parsed.data_layout = str(machine.target_data)
        parsed.verify()
    except RuntimeError as error:
        raise UnsupportedInstruction(f"LLVM does not take the rewritten module: {error}") from error
    options = llvm.create_pipeline_tuning_options(speed_level=_OPT_LEVEL)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    with tempfile.TemporaryDirectory() as directory:
        obj, shared = Path(directory, "module.o"), Path(directory, "module.so")
        obj.write_bytes(machine.emit_object(parsed))
        args = [*command, "-z", "defs", "-o", str(shared), str(obj), str(library_path()), *_c_library()]
        done = subprocess.run(args, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UnsupportedInstruction(
                f"the module calls what the emulator does not have: {done.stderr.strip()}"
            )
        data = shared.read_bytes()
    return MAGIC + len(data).to_bytes(8, "little") + data


def image(llvm_ir: str) -> bytes:
    """The image of a GPU module's LLVM IR, as cuModuleLoadData of the fake driver takes it."""
    return compile_host(rewrite(llvm_ir))


@cache
def _c_library() -> list[str]:
    """The files of the C library that hold memcpy and expf: those that this process has mapped."""
    wanted = ("libm.so", "libc.so")
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "/" in line}
    found = [path for path in paths if Path(path).name.startswith(wanted)]
    if len(found) < len(wanted):
        raise EmulatorError(f"no {' and '.join(wanted)} among what this process has loaded")
    return sorted(found)
