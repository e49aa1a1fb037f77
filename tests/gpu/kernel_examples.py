"""Every GPU kernel in the sizes that models have, with the registers it may use and the instructions it must have."""

from __future__ import annotations

from dataclasses import dataclass

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.kernels.cuda.activation import activation_spec, convert_spec
from nanoserve.kernels.cuda.choose import choose_spec
from nanoserve.kernels.cuda.embedding import embedding_spec
from nanoserve.kernels.cuda.gemm import gemm_plan
from nanoserve.kernels.cuda.kv_write import kv_write_spec
from nanoserve.kernels.cuda.logits import block_max_spec
from nanoserve.kernels.cuda.norm import norm_spec

# Three blocks of 128 threads, two of 128 use up 64 Ki registers at this many each.
LARGE_F32, LARGE_MMA = 168, 255
FEW_OUTPUTS = 216  # of 128 threads, few of whose blocks run at once: shared memory is what they are short of


def registers_left(spec: GpuKernelSpec) -> int:
    """For each thread of as many blocks, two at most, as a Hopper multiprocessor's shared memory has room for.

    Each of its four parts has 16 Ki of them, and every fourth warp.
    """
    blocks = min(2, 227 * 1024 // spec.shared_bytes)
    warps = -(-blocks * (spec.block // 32) // 4)
    return 16 * 1024 // (32 * warps) // 8 * 8


@dataclass(frozen=True)
class Example:
    spec: GpuKernelSpec
    registers: int
    instructions: tuple[str, ...]


def examples(chip: Chip) -> dict[str, Example]:
    row = ("LDG.E.128", "SHFL.BFLY")
    found = {
        "embedding": Example(embedding_spec(4096, 4096, dtype="bf16"), 40, ("LDG.E.64", "STG.E.128")),
        "embedding of any width": Example(embedding_spec(773, 776, positions=True, scale=2.0), 40, ("LDG.E", "FADD")),
        "embedding of chosen tokens": Example(
            embedding_spec(4096, 4096, dtype="bf16", chosen=True), 40, ("LDG.E.64", "STG.E.128")
        ),
        "rmsnorm": Example(norm_spec("rmsnorm", 4096, 4096, 4096, 1e-5, dtype="bf16"), 48, (*row, "BAR")),
        "layernorm": Example(norm_spec("layernorm", 768, 768, 768, 1e-5, bias=True, gather=True), 48, row),
        "gate": Example(
            activation_spec(11008, 22016, 11008, activation="silu", gated=True, dtype="bf16"), 48,
            ("LDG.E.128", "MUFU.RCP", "F2FP.BF16"),
        ),
        "gelu": Example(
            activation_spec(3072, 3072, 3072, activation="gelu_erf", softcap=30.0), 64, ("LDG.E.128", "STG.E.128")
        ),
        "convert": Example(convert_spec(4096, 4096, 4096), 40, ("LDG.E.128", "F2FP.BF16", "STG.E.64")),
        "kv_write": Example(
            kv_write_spec(32, 8, 128, 16, 48 * 128, 128, qk_norm="head", norm_eps=1e-6, dtype="bf16"), 56,
            ("SHFL.BFLY", "F2FP.BF16", "STG.E.U16"),
        ),
        "kv_write of whole rows": Example(
            kv_write_spec(12, 12, 80, 16, 36 * 80, 34, qk_norm="row", norm_eps=1e-6), 56, ("SHFL.BFLY", "BAR")
        ),
        "block_max": Example(block_max_spec(151936, 151936), 40, ("LDG.E", "SHFL.BFLY")),
        # A block of 1024 threads has 64 registers for each.
        "choose": Example(choose_spec(151936, 151936), 64, ("LDG.E.128", "SHFL.UP", "SHFL.BFLY", "BAR", "F2I.S64.TRUNC")),
        "choose of any size": Example(choose_spec(50257, 50264), 64, ("LDG.E.128", "SHFL.UP", "SHFL.BFLY", "BAR")),
        "choose of the largest": Example(choose_spec(262144, 262144), 64, ("LDG.E.128", "SHFL.UP", "BAR")),
    }  # fmt: skip
    f32 = ("FFMA", "LDS.128", "LDGSTS.E.BYPASS.128", "DEPBAR", "BAR")
    mma = ("HMMA.16816.F32.BF16", "LDSM.16.M88", "LDGSTS.E.BYPASS.128", "DEPBAR", "BAR")
    narrow = {"x": "bf16", "dtype": "bf16"}
    plans = {
        "f32": (f32, gemm_plan(4096, 4096, 4096, 4096, chip, residual=True)),
        "f32 of bf16": (f32, gemm_plan(2048, 2048, 2048, 2048, chip, dtype="bf16", bias=True)),
        "f32 gated": (f32, gemm_plan(4096, 11008, 4096, 11008, chip, gated=True, activation="silu")),
        "bf16": (mma, gemm_plan(4096, 4096, 4096, 4096, chip, residual=True, **narrow)),
        "bf16 of few outputs": (mma, gemm_plan(8192, 2048, 8192, 2048, chip, residual=True, **narrow)),
        "bf16 gated": (
            mma, gemm_plan(4096, 11008, 4096, 11008, chip, gated=True, activation="gelu_erf", bias=True, y="bf16",
            **narrow),
        ),
        "bf16 head": (mma, gemm_plan(768, 50257, 768, 50264, chip, softcap=30.0, **narrow)),
    }  # fmt: skip
    if chip.wgmma:
        # No thread copies (LDGSTS), and who waits for tiles asks an mbarrier (SYNCS), not all others (DEPBAR, BAR).
        tma = (
            "HGMMA.64x",
            "UTMALDG",
            "SYNCS.ARRIVE",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT",
            "WARPGROUP.DEPBAR",
        )
        narrow |= {"wgmma": True}
        hopper = {
            "bf16": gemm_plan(4096, 4096, 4096, 4096, chip, residual=True, **narrow),
            "bf16 of few outputs": gemm_plan(8192, 2048, 8192, 2048, chip, residual=True, **narrow),
            "bf16 gated": gemm_plan(
                4096, 11008, 4096, 11008, chip, gated=True, activation="silu", y="bf16", **narrow
            ),
        }
        for name, plan in hopper.items():
            for most, spec in plan.steps:
                if spec.kind == "gemm_tma":
                    found[f"{name} by wgmma, {most or 'any'} rows"] = Example(spec, registers_left(spec), tma)
    for name, (instructions, plan) in plans.items():
        large = LARGE_F32 if instructions is f32 else LARGE_MMA
        for most, spec in plan.steps:
            most_registers = large if most is None else FEW_OUTPUTS if "few" in name else 128
            found[f"{name}, {most or 'any'} rows"] = Example(spec, most_registers, instructions)
    return found
