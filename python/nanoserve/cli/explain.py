"""`nanoserve explain`: a kernel from the Python that writes it to the machine code that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from nanoserve.checks import shown

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
    kernel: Annotated[str, typer.Argument(metavar="KERNEL", help=f"One of {', '.join(KERNELS)}.", show_default=False)],
    stage: Annotated[
        str | None,
        typer.Option("--stage", metavar="NAME", help="Only this stage, and only its text.", show_default=False),
    ] = None,
) -> None:  # fmt: skip
    """Print a kernel as it is written, after every lowering stage, and as machine code.

    The stages are those every kernel goes through before it runs. Needs the MLIR bindings; the last stage, assembly, also
    needs objdump and a linker.

    Examples:
      nanoserve explain gemm | less
      nanoserve explain norm --stage written
      nanoserve explain attention --stage assembly
    """
    if kernel not in KERNELS:
        raise ValueError(f"KERNEL: {shown(kernel)} must be one of {', '.join(KERNELS)}")
    from nanoserve.compiler.explain import explain as explained

    make, purpose = KERNELS[kernel]
    steps = explained(make())
    if stage is None:
        print(f"// {kernel}: {purpose}")
        for name, meaning, text in steps:
            print(f"\n// ---- {name}: {meaning}\n{text.strip()}")
        return
    for name, _, text in steps:
        if name == stage:
            print(text.strip())
            return
    if stage == "assembly":
        raise ValueError("--stage: assembly needs objdump and a linker (ld or cc) on the PATH")
    raise ValueError(f"--stage: {shown(stage)} must be one of {', '.join(name for name, _, _ in steps)}")
