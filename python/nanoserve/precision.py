"""Which number formats a model computes in: of its matrix products, and of the keys and values it keeps.

    float32     products and sums in float32, weights as they are stored (bfloat16 and float16 are widened, exactly): the
                tokens of transformers in float32
    bfloat16    GEMM inputs and weights rounded to bfloat16, sums in float32; the residual stream stays float32
    int8        weights quantised per output channel when they are loaded, GEMM inputs per token; sums are exact integers

Whatever is chosen, a request's answer does not depend on its batch mates: a scale belongs to one token, and every sum has a
fixed order. Answers of different precisions differ, and so may bfloat16's of CPUs with and without its dot product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanoserve.checks import shown
from nanoserve.compiler.target import Target, host

DTYPES = ("auto", "float32", "bfloat16")
QUANTIZATIONS = (None, "int8")
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16")
ELEMENT_BYTES = {"f32": 4, "bf16": 2, "u8": 1}  # of activations, keys and values
_INPUTS = {"float32": "f32", "bfloat16": "bf16", "int8": "u8"}
_ELEMENTS = {"float32": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class Precision:
    """What one model computes in.

    Args:
        arithmetic: of the matrix products: "float32", "bfloat16" or "int8".
        kv_cache: element type of keys and values: "float32" or "bfloat16".
    """

    arithmetic: str = "float32"
    kv_cache: str = "float32"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("arithmetic", self.arithmetic, _INPUTS), ("kv_cache", self.kv_cache, _ELEMENTS),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name}: {shown(value)} must be one of {', '.join(known)}")

    @property
    def gemm_input(self) -> str:
        """Element type of the rows that GEMMs read: f32, bf16 or u8."""
        return _INPUTS[self.arithmetic]

    @property
    def kv_element(self) -> str:
        """f32 or bf16."""
        return _ELEMENTS[self.kv_cache]

    def gemm_weight(self, stored: str) -> str:
        """Element type of a GEMM's weight in memory that a checkpoint stores as `stored` (f32, bf16 or f16)."""
        return {"float32": stored, "bfloat16": "bf16", "int8": "i8"}[self.arithmetic]


def choose_precision(
    dtype: Any,
    quantization: Any,
    kv_cache_dtype: Any,
    stored: str,
    head_dim: int,
    target: Target | None = None,
    *,
    gpu: bool = False,
) -> Precision:
    """What a user's choice comes to.

    Args:
        dtype: "float32", "bfloat16", or "auto": bfloat16 for a checkpoint stored so on a CPU that multiplies it, or stored in
            bfloat16 or float16 on a GPU; else float32.
        quantization: None or "int8", which takes the place of dtype's arithmetic.
        kv_cache_dtype: "float32", "bfloat16", or "auto": float32 where the arithmetic is, or the head size odd.
        stored: how the checkpoint stores most of its weights: f32, bf16 or f16.
        head_dim: of the model's attention heads.
        target: the CPU, this one by default.
        gpu: the model runs on a GPU, which multiplies bfloat16 whichever it is (chip.CHIPS), and int8 not yet.

    Raises:
        ValueError: a choice that is not known, int8 on a GPU, or bfloat16 keys of an odd size (their numbers lie in pairs).
    """
    for name, value, known in (
        ("dtype", dtype, DTYPES), ("quantization", quantization, QUANTIZATIONS),
        ("kv_cache_dtype", kv_cache_dtype, KV_CACHE_DTYPES),
    ):  # fmt: skip
        if not (value is None or isinstance(value, str)) or value not in known:
            raise ValueError(f"{name}: {shown(value)} must be one of {', '.join(map(str, known))}")
    if gpu and quantization is not None:
        raise ValueError(
            f"quantization: {quantization} is for the CPU; on a GPU, float32 and bfloat16 are supported"
        )
    if quantization is not None:
        arithmetic = str(quantization)
    elif dtype == "auto" and gpu:
        arithmetic = "float32" if stored == "f32" else "bfloat16"
    elif dtype == "auto":
        has_dot = (host() if target is None else target).bf16_dot
        arithmetic = "bfloat16" if stored == "bf16" and has_dot else "float32"
    else:
        arithmetic = str(dtype)
    if kv_cache_dtype == "auto":
        return Precision(arithmetic, "float32" if arithmetic == "float32" or head_dim % 2 else "bfloat16")
    if kv_cache_dtype == "bfloat16" and head_dim % 2:
        raise ValueError(f"kv_cache_dtype: bfloat16 needs an even head size, the model's is {head_dim}")
    return Precision(arithmetic, kv_cache_dtype)
