"""Which of the decoder's matrix products runs by what: our kernels, Hopper's instructions, or cuBLAS.

Ours are the default, because their outputs are the same chains along k whatever the number of rows. cuBLAS chooses its algorithm
by that number, so with it a row's bits may depend on its batch mates.
"""

from __future__ import annotations

from collections.abc import Mapping

from nanoserve.checks import shown
from nanoserve.models.config import ModelConfig
from nanoserve.models.decoder import Gemm, forward_ops

# mma: kernels for every chip, tensor cores' mma.sync in bfloat16 and fused multiply-adds in float32. wgmma: the same for few
# rows of bfloat16, Hopper's warpgroup instructions for many, whose bits are the same. cublas: the library.
GEMMS = ("mma", "wgmma", "cublas")
REST = "*"


def product_of(weight: str) -> str:
    """A product's name, of its weight's: "qkv" of "layers.0.qkv.weight", "head" of "head.weight"."""
    return weight.removesuffix(".weight").rpartition(".")[2]


def products(config: ModelConfig) -> list[str]:
    """Those of a model: qkv, out, gate_up (or up), down, head."""
    names = (product_of(op.weight) for op in forward_ops(config) if isinstance(op, Gemm))
    return list(dict.fromkeys(names))


def choose_gemms(option: str | Mapping[str, str], config: ModelConfig) -> dict[str, str]:
    """What each of a model's products runs by.

    Args:
        option: one of GEMMS for all of them, or a mapping from products to those, "*" for the rest (without it: mma).

    Raises:
        ValueError: a name that is not one of them, with the list.
    """
    given = {REST: option} if isinstance(option, str) else dict(option)
    names = products(config)
    for name, value in given.items():
        if name != REST and name not in names:
            raise ValueError(f"gemm: product {shown(name)} must be one of {', '.join([*names, REST])}")
        if value not in GEMMS:
            raise ValueError(f"gemm: {shown(value)} for {name} must be one of {', '.join(GEMMS)}")
    rest = given.get(REST, GEMMS[0])
    return {name: given.get(name, rest) for name in names}
