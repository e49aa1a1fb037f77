"""`nanoserve explain`: a kernel from the Python that writes it to the machine code that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from nanoserve.checks import shown
from nanoserve.cli.gpu_kernels import GPU_KERNELS

if TYPE_CHECKING:
    from nanoserve.kernels.library import KernelSpec


def _gemm() -> KernelSpec:
    from nanoserve.kernels.gemm import gemm_spec

    return gemm_spec(64, 64, 80, 80)


def _attention() -> KernelSpec:
    from nanoserve.kernels.attention import Tiling, attention_spec

    return attention_spec(4, 2, 64, 16, 528, 272, Tiling(2))


def _norm() -> KernelSpec:
    from nanoserve.kernels.norm import norm_spec

    return norm_spec("rmsnorm", 64, 80, 80, 1e-5)


def _embedding() -> KernelSpec:
    from nanoserve.kernels.embedding import embedding_spec

    return embedding_spec(64, 80)


def _kv_write() -> KernelSpec:
    from nanoserve.kernels.kv_write import kv_write_spec

    return kv_write_spec(4, 2, 64, 16, 528, 64)


def _convert() -> KernelSpec:
    from nanoserve.kernels.convert import convert_spec

    return convert_spec(64, 80, 128, "u8")


def _logits() -> KernelSpec:
    from nanoserve.kernels.logits import block_max_spec

    return block_max_spec(512, 512)


def _peak() -> KernelSpec:
    from nanoserve.kernels.peak import dot_spec

    return dot_spec("f32")


# Small sizes: a kernel's text grows with them, its structure does not.
KERNELS: dict[str, tuple[Callable[[], KernelSpec], str]] = {
    "gemm": (_gemm, "matrix product, 64 by 64, weight in panels"),
    "attention": (_attention, "paged attention of 4 query and 2 KV heads of 64, tiles of 2 rows"),
    "norm": (_norm, "RMS norm of 64 columns"),
    "embedding": (_embedding, "rows of a table, 64 columns"),
    "kv_write": (_kv_write, "rotary positions, and K and V into their pages"),
    "convert": (_convert, "rows of 64 columns quantised to 8 bits, a scale for each"),
    "logits": (_logits, "the largest of each block of 256 logits, NaN where one is not finite"),
    "peak": (_peak, "multiply-adds in registers: what the CPU can do at most"),
}


def explain(
    kernel: Annotated[str | None, typer.Argument(metavar="KERNEL", help="One of those that --list shows.", show_default=False)] = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", metavar="NAME", help="Only this stage, and only its text.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, or cuda or cuda:N for a GPU's kernels.")] = "cpu",
    chip: Annotated[
        str | None,
        typer.Option("--chip", metavar="NAME", help="GPU's kernels for sm_80, sm_86, sm_89, sm_90 or sm_90a. [the GPU's here, or "
                     "else sm_80]", show_default=False),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the kernels.")] = False,
) -> None:  # fmt: skip
    """Print a kernel as it is written, after every lowering stage, and as machine code.

    The stages are those every kernel goes through before it runs. Needs the MLIR bindings; the last stage, assembly, also
    needs objdump and a linker. A GPU's kernel needs no GPU, but its compilers (nanoserve doctor names them): it is shown down to
    PTX, what it uses of the chip, and the chip's instructions where nvdisasm is there.

    Examples:
      nanoserve explain gemm | less
      nanoserve explain norm --stage written
      nanoserve explain attention --stage assembly
      nanoserve explain --device cuda --list
      nanoserve explain gemm_mma --chip sm_90a --stage ptx
    """
    from nanoserve.device_name import device_ordinal

    ordinal = device_ordinal(device)
    on_gpu = ordinal is not None or chip is not None
    purposes = {name: purpose for name, (_, purpose) in (GPU_KERNELS if on_gpu else KERNELS).items()}
    if show_list:
        for name, purpose in purposes.items():
            print(f"{name:<12}{purpose}")
        return
    if kernel is None or kernel not in purposes:
        given = "is missing, it" if kernel is None else shown(kernel)
        raise ValueError(f"KERNEL: {given} must be one of {', '.join(purposes)}")
    if on_gpu:
        steps, absent = _explain_gpu(kernel, chip, ordinal), ("sass", "nvdisasm, of a CUDA toolkit")
    else:
        from nanoserve.compiler.explain import explain as explained

        steps = explained(KERNELS[kernel][0]())
        absent = ("assembly", "objdump and a linker (ld or cc)")
    if stage is None:
        print(f"// {kernel}: {purposes[kernel]}")
        for name, meaning, text in steps:
            print(f"\n// ---- {name}: {meaning}\n{text.strip()}")
        return
    for name, _, text in steps:
        if name == stage:
            print(text.strip())
            return
    if stage == absent[0]:
        raise ValueError(f"--stage: {stage} needs {absent[1]} on the PATH")
    raise ValueError(f"--stage: {shown(stage)} must be one of {', '.join(name for name, _, _ in steps)}")


def _explain_gpu(kernel: str, chip: str | None, ordinal: int | None) -> list[tuple[str, str, str]]:
    from nanoserve.compiler.gpu.chip import CHIPS, parse_chip
    from nanoserve.cuda.executor import chip_of
    from nanoserve.cuda.explain import explain as explained
    from nanoserve.native import CudaDevice, CudaDriverMissing

    if chip is not None:
        made_for = parse_chip(chip)
    else:
        try:
            made_for = chip_of(CudaDevice(ordinal or 0))
        except (CudaDriverMissing, IndexError):
            made_for = CHIPS["sm_80"]
    return explained(GPU_KERNELS[kernel][0](made_for), made_for)
