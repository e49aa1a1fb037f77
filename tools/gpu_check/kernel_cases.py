"""The cases of every kind of kernel.

`CASES` maps a kind, a file of kernels/cuda/, to its cases: a new kind is a new entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from tools.gpu_check import choice_cases, row_cases
from tools.gpu_check.attention_cases import attention_cases
from tools.gpu_check.case import Case
from tools.gpu_check.product_cases import GEMMS, product_cases

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.kernels.cuda import library

CASES: dict[str, Callable[[Chip], Iterable[Case]]] = {
    "activation": row_cases.activation,
    "choose": choice_cases.choose,
    "embedding": row_cases.embedding,
    **{kind: product_cases(kind) for kind in (*GEMMS, "gemm_tma")},
    "kv_write": row_cases.kv_write,
    "logits": choice_cases.logits,
    "norm": row_cases.norm,
    "paged_attention": attention_cases,
}


def kinds() -> list[str]:
    """All there are, files of kernels/cuda/ that build kernels: first what every chip has, last what is likeliest to fault."""
    files = Path(library.__file__).parent.glob("*.py")
    found = [path.stem for path in files if library._is_kernel(path, path.read_bytes())]
    return sorted(
        (stem for stem in found if not stem.endswith("_triton")),
        key=lambda kind: (is_risky(kind), kind),
    )


def is_risky(kind: str) -> bool:
    """Whether it has instructions that no other has."""
    return kind == "gemm_tma"
