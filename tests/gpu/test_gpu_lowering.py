"""Every kernel for every chip: it assembles, keeps to its registers, and has the instructions it was written for."""

from __future__ import annotations

import re

import pytest

from gpu.kernel_examples import examples
from gpu.run_kernel import artifact
from nanoserve.compiler import jit
from nanoserve.compiler.bindings import mlir
from nanoserve.compiler.gpu import cubin
from nanoserve.compiler.gpu.chip import CHIPS, Chip, parse_chip
from nanoserve.compiler.gpu.lowering import STAGES, NotLowered, lower
from nanoserve.compiler.gpu.ptx import ptx_from_llvm
from nanoserve.compiler.gpu.spec import SCALAR, UNBOUNDED, Extent, GpuKernelSpec, pointer
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm_f32 import Shape, gemm_f32_spec
from nanoserve.kernels.cuda.library import build_module, compile_kernel, lower_kernel

CHIP_NAMES = ("sm_80", "sm_90", "sm_90a")
# sm_90's code is sm_90a's without wgmma: of it, those short of registers will do.
CASES = [
    (chip, name)
    for chip in CHIP_NAMES
    for name in examples(parse_chip(chip))
    if chip != "sm_90" or "any rows" in name
]
# PTX rounds as IEEE says where it says so; without ".rn", ptxas may fuse, and ".approx" or ".ftz" is something else.
INEXACT = re.compile(
    r"^\s*(?:@%p\d+\s+)?"
    r"((?:add|sub|mul|fma|mad|div|sqrt|rcp|rsqrt|ex2|lg2|tanh)\.(?!rn\.(?:f\d|bf))[\w.]*f(?:32|64|16)\w*)",
    re.MULTILINE,
)


@pytest.mark.parametrize(("chip", "name"), CASES)
def test_kernel(chip: str, name: str) -> None:
    example = examples(parse_chip(chip))[name]
    made = artifact(example.spec, chip)
    assert made.usage.spilled_bytes == 0
    assert made.usage.static_shared_bytes == 0, "shared memory is dynamic, the spec's"
    assert made.usage.registers <= example.registers
    assert f".target {chip}" in made.ptx
    assert INEXACT.findall(made.ptx) == []
    code = cubin.disassemble(made.cubin)
    assert code is not None, "triton's wheel brings nvdisasm"
    for instruction in example.instructions:
        assert instruction in code, f"{name} has no {instruction}"
    assert not re.search(r"\b(LDL|STL|CALL\.ABS)\b", code), "local memory, or a library"


@pytest.mark.parametrize("chip", CHIPS.values(), ids=str)
def test_every_kernel_fits_the_shared_memory_of_every_chip(chip: Chip) -> None:
    for name, example in examples(chip).items():
        assert example.spec.shared_bytes <= chip.shared_bytes, name


def test_inexact_arithmetic_would_be_found() -> None:
    text = "\tadd.f32 \t%r1, %r2;\n\t@%p1 mul.rn.ftz.f32 %r1;\n\tdiv.full.f32 %r1;\n\tfma.rn.f32 %r1;\n\tadd.s32 %r1;\n"
    assert INEXACT.findall(text) == ["add.f32", "mul.rn.ftz.f32", "div.full.f32"]


def norm() -> GpuKernelSpec:
    return examples(parse_chip("sm_90"))["rmsnorm"].spec


def test_every_stage_is_seen_and_says_what_it_is_for() -> None:
    seen: list[tuple[str, str]] = []
    lower_kernel(norm(), parse_chip("sm_90"), lambda stage, text: seen.append((stage.name, text)))
    assert [name for name, _ in seen] == [stage.name for stage in STAGES]
    assert all(stage.purpose.endswith(".") for stage in STAGES)
    assert "gpu.thread_id" in seen[0][1]
    assert "scf." not in dict(seen)["control-flow"]
    assert "memref" not in seen[-1][1]


def test_stages_do_their_work_one_by_one() -> None:
    """Each changes the matrix product, so none is there for nothing."""
    spec = next(
        example.spec for name, example in examples(parse_chip("sm_90")).items() if name == "bf16, 16 rows"
    )
    texts: list[str] = []
    module = build_module(spec, parse_chip("sm_90"))
    texts.append(str(module))
    with jit.context():
        lower(module, lambda stage, text: texts.append(text))
    assert len(set(texts)) == len(STAGES) + 1


def test_what_no_stage_lowers_is_named() -> None:
    """The translator would crash the process."""
    context = mlir().ir.Context()
    context.allow_unregistered_dialects = True
    with context:
        module = mlir().ir.Module.parse(
            """gpu.module @kernels { gpu.func @f(%x: memref<4xf32>) kernel {
                 %0 = "test.unknown"() : () -> f32
                 %c = arith.constant 0 : index
                 memref.store %0, %x[%c] : memref<4xf32>
                 gpu.return } }"""
        )
        with pytest.raises(NotLowered, match=r"no stage lowers test\.unknown"):
            lower(module)


def test_a_kernel_of_a_module_of_two_is_refused() -> None:
    ir = mlir().ir
    with jit.context(), ir.Location.unknown():
        module = ir.Module.parse("gpu.module @a {}\ngpu.module @b {}")
        with pytest.raises(ValueError, match=r"one gpu\.module was expected, not of 2"):
            lower(module)


def test_spills_are_told() -> None:
    spec = gemm_f32_spec(64, 512, 64, 512, Shape(8, 16, 16, 16, 2), Epilogue())
    assert compile_kernel(spec, parse_chip("sm_90")).usage.spilled_bytes > 0


def test_more_shared_memory_than_the_chip_has_is_refused() -> None:
    spec = gemm_f32_spec(64, 512, 64, 512, Shape(8, 16, 8, 8, 5), Epilogue())
    small = Chip("sm_86", 86, 99 * 1024)
    with pytest.raises(ValueError, match="122880 bytes of shared memory, sm_86 has 101376"):
        compile_kernel(spec, small)


def test_what_ptxas_refuses_is_told() -> None:
    with pytest.raises(cubin.AssemblyFailed, match=r"broken for sm_90: ptxas says"):
        cubin.assemble(
            ".version 8.0\n.target sm_90\n.address_size 64\nnonsense", parse_chip("sm_90"), "broken"
        )


def test_without_ptxas_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubin, "ptxas", lambda: None)
    with pytest.raises(cubin.AssemblerMissing, match="install triton"):
        cubin.assemble("", parse_chip("sm_90"), "any")


def test_ptxas_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOSERVE_PTXAS", "/nowhere/ptxas")
    assert cubin.ptxas() == "/nowhere/ptxas"
    with pytest.raises(cubin.AssemblyFailed, match="/nowhere/ptxas cannot be run"):
        cubin.version()


def test_text_that_llvm_cannot_read_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="parsing error"):
        ptx_from_llvm("define nonsense", parse_chip("sm_90"))


def test_chips() -> None:
    assert parse_chip("sm_90a").wgmma
    assert not parse_chip("sm_90").wgmma
    assert parse_chip("sm_80").runs_on(86)
    assert not parse_chip("sm_80").runs_on(90)
    assert parse_chip("sm_90a").runs_on(90)
    assert not parse_chip("sm_90a").runs_on(91)
    with pytest.raises(ValueError, match="'sm_70' must be one of sm_80"):
        parse_chip("sm_70")
    assert all(name == chip.name for name, chip in CHIPS.items())


def test_a_grid_follows_from_scalars() -> None:
    spec = GpuKernelSpec.make(
        "any", {"x": pointer(UNBOUNDED, 8), "m": SCALAR, "layers": SCALAR},
        (Extent("m", 16), Extent("layers", 1, 3)), 64,
    )  # fmt: skip
    assert spec.pointers == (True, False, False)
    assert spec.grid_of({"m": 33, "layers": 2}) == (3, 6, 1)
    assert spec.grid_of({"m": 0, "layers": 1}) == (0, 3, 1)
    with pytest.raises(ValueError, match=r"grid\.y=90000 must be at most 65535"):
        spec.grid_of({"m": 1, "layers": 30000})
    with pytest.raises(ValueError, match="block=48 must be a multiple of 32"):
        GpuKernelSpec.make("any", {}, (), 48)
    with pytest.raises(ValueError, match="the grid depends on 'x', no integer argument"):
        GpuKernelSpec.make("any", {"x": pointer(8)}, (Extent("x"),), 32)
