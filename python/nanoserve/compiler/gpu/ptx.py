"""LLVM IR to PTX, NVIDIA's portable assembly, by LLVM's NVPTX back end: llvmlite carries it, no CUDA toolkit is needed.

Numerics: the back end fuses no multiplication and addition that the text does not fuse, divides and takes roots as
IEEE says, and keeps subnormals. Every instruction says so (".rn"), and ptxas adds nothing.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Any

from nanoserve.compiler.gpu.chip import Chip

TRIPLE = "nvptx64-nvidia-cuda"
_PTX_VERSION = "+ptx80"  # CUDA 12.0: the first with all that sm_90a has
_OPT_LEVEL = 3


class PtxCompilerMissing(ImportError):
    """llvmlite is not installed and a kernel had to be compiled."""


def version() -> str | None:
    """Of what makes PTX, None where it is not installed. Imports nothing."""
    try:
        return f"llvmlite {importlib.metadata.version('llvmlite')}"
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _llvm() -> Any:
    try:
        import llvmlite.binding as llvm
    except ImportError as error:
        raise PtxCompilerMissing(
            'compiling a GPU kernel needs llvmlite: pip install "llvmlite>=0.50"'
        ) from error
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm


def ptx_from_llvm(text: str, chip: Chip) -> str:
    """PTX of the kernels in a module of LLVM IR.

    Raises:
        PtxCompilerMissing: llvmlite is not installed.
        RuntimeError: LLVM cannot read the text, or not select instructions for it.
    """
    llvm = _llvm()
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(
        cpu=chip.name, features=_PTX_VERSION, opt=_OPT_LEVEL, reloc="default", codemodel="default"
    )
    module = llvm.parse_assembly(text)
    module.triple = TRIPLE
    module.data_layout = str(machine.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=_OPT_LEVEL)
    options.loop_vectorization = False  # threads are the vectors
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    ptx: str = machine.emit_assembly(module)
    return ptx
