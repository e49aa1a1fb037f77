"""Where things lie in device memory: the strides and types that kernels, loaders and the pool agree on."""

from __future__ import annotations

from nanoserve.compiler.gpu.spec import UNBOUNDED, pointer

ELEMENT_BYTES = {"f32": 4, "bf16": 2, "f16": 2}
_LINE = 16  # bytes; where rows begin, and what a thread moves at once
ROW_ALIGNMENT = 8  # elements; rows of activations begin at a multiple, whatever their type


def row_stride(cols: int) -> int:
    """Elements from one row of activations to the next."""
    return -(-cols // ROW_ALIGNMENT) * ROW_ALIGNMENT


def weight_stride(cols: int, dtype: str) -> int:
    """Elements from one row of a weight or table to the next: `cols`, as checkpoints have it, up to whole lines."""
    line = _LINE // ELEMENT_BYTES[dtype]
    return -(-cols // line) * line


def pages(kv_heads: int, page_size: int, head_dim: int, dtype: str) -> str:
    """The keys of a layer, or the values: [page][kv_head][slot of the page][head_dim].

    A slot is page * page_size + slot of the page, as on the CPU; the keys are not transposed, because a GPU reads
    them in rows.
    """
    return pointer(UNBOUNDED, kv_heads, page_size, head_dim, element=dtype)


def check_stride(kernel: str, cols: int, **strides: int) -> None:
    """Whether rows of `cols` fit strides of activations.

    Raises:
        ValueError: they do not.
    """
    for name, ld in strides.items():
        if ld < cols or ld % ROW_ALIGNMENT:
            raise ValueError(
                f"{kernel}: {name}={ld} must be a multiple of {ROW_ALIGNMENT}, at least cols={cols}"
            )
