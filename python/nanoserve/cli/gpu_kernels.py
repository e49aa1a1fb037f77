"""The GPU kernels that `nanoserve explain` shows: small sizes, for a kernel's text grows with them, its structure does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanoserve.compiler.gpu.chip import Chip
    from nanoserve.compiler.gpu.spec import GpuKernelSpec


def _gemm(chip: Chip, kind: str, **options: str | bool) -> GpuKernelSpec:
    from nanoserve.kernels.cuda.gemm import gemm_plan

    if options.get("wgmma") and not chip.wgmma:
        raise ValueError(f"--chip: {chip.name} has no warpgroup products, sm_90a has")
    specs = gemm_plan(256, 256, 256, 256, chip, **options).specs  # type: ignore[arg-type]
    return next(spec for spec in specs if spec.kind == kind)


def _gemm_f32(chip: Chip) -> GpuKernelSpec:
    return _gemm(chip, "gemm_f32")


def _gemm_mma(chip: Chip) -> GpuKernelSpec:
    return _gemm(chip, "gemm_mma", x="bf16", dtype="bf16")


def _gemm_tma(chip: Chip) -> GpuKernelSpec:
    return _gemm(chip, "gemm_tma", x="bf16", dtype="bf16", wgmma=True)


def _attention(part: str) -> GpuKernelSpec:
    from nanoserve.kernels.cuda.paged_attention import AttentionForm

    form = AttentionForm(4, 2, 64, 16, 512, 256, dtype="bf16", narrow=True, out="bf16")
    return {"attend": form.attend_spec, "split": form.split_spec, "merge": form.merge_spec}[part]()


def _attend(chip: Chip) -> GpuKernelSpec:
    return _attention("attend")


def _split(chip: Chip) -> GpuKernelSpec:
    return _attention("split")


def _merge(chip: Chip) -> GpuKernelSpec:
    return _attention("merge")


def _norm(chip: Chip) -> GpuKernelSpec:
    from nanoserve.kernels.cuda.norm import norm_spec

    return norm_spec("rmsnorm", 64, 64, 64, 1e-5)


def _embedding(chip: Chip) -> GpuKernelSpec:
    from nanoserve.kernels.cuda.embedding import embedding_spec

    return embedding_spec(64, 64)


def _kv_write(chip: Chip) -> GpuKernelSpec:
    from nanoserve.kernels.cuda.kv_write import kv_write_spec

    return kv_write_spec(4, 2, 64, 16, 512, 64)


def _activation(chip: Chip) -> GpuKernelSpec:
    from nanoserve.kernels.cuda.activation import activation_spec

    return activation_spec(64, 128, 64, activation="silu", gated=True)


def _convert(chip: Chip) -> GpuKernelSpec:
    from nanoserve.kernels.cuda.activation import convert_spec

    return convert_spec(64, 64, 64)


def _block_max(chip: Chip) -> GpuKernelSpec:
    from nanoserve.kernels.cuda.logits import block_max_spec

    return block_max_spec(512, 512)


def _choose(chip: Chip) -> GpuKernelSpec:
    from nanoserve.kernels.cuda.choose import choose_spec

    return choose_spec(512, 512)


GPU_KERNELS: dict[str, tuple[Callable[[Chip], GpuKernelSpec], str]] = {
    "gemm_f32": (_gemm_f32, "matrix product in float32, 256 by 256, a few rows"),
    "gemm_mma": (_gemm_mma, "matrix product in bfloat16 by tensor cores, 256 by 256, a few rows"),
    "gemm_tma": (
        _gemm_tma,
        "the same for many rows on sm_90a: a warp has the copy engine bring tiles, others multiply (wgmma)",
    ),
    "attend": (_attend, "paged attention of prompts' rows, 4 query and 2 KV heads of 64 (Triton)"),
    "split": (_split, "paged attention of single rows, a program per segment of keys (Triton)"),
    "merge": (_merge, "what the programs of split found, merged (Triton)"),
    "norm": (_norm, "RMS norm of 64 columns"),
    "embedding": (_embedding, "rows of a table, 64 columns"),
    "kv_write": (_kv_write, "rotary positions, and K and V into their pages"),
    "activation": (_activation, "SiLU of a gate, times the other half"),
    "convert": (_convert, "rows of 64 columns rounded to bfloat16"),
    "block_max": (_block_max, "the largest of each block of logits, NaN where one is not finite"),
    "choose": (_choose, "a token of each row, by its sampling parameters and its uniform number"),
}
