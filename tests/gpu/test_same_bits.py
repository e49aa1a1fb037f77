"""A plan with both of Hopper's instructions is run only where they were found to agree on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.gpu.emulated_images import image_of, load_images
from tests.gpu.test_cuda_engine import BF16, configs

from gpu.run_kernel import artifact
from nanoserve import NanoServingEngine
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.cuda import executor, same_bits
from nanoserve.cuda.launch import load_kernel
from nanoserve.cuda.same_bits import OtherBits, check_same_bits, specs
from nanoserve.models.weights import random_weights
from nanoserve.native import CudaDevice, CudaKernel

CHIP = parse_chip("sm_90a")


def kernel_of(spec: GpuKernelSpec, text: str | None = None) -> CudaKernel:
    made = artifact(spec, CHIP.name)
    image = image_of(made if text is None else replace(made, llvm_ir=text))
    return load_kernel(CudaDevice(), made, image)


def test_what_is_compared_is_a_plans() -> None:
    few, *many = specs(CHIP)
    assert few.kind == "gemm_mma"
    assert [spec.kind for spec in many] == ["gemm_tma"] * 2
    assert {dict(spec.params)["cuts"] for spec in (few, *many)} == {4}
    check_same_bits(CudaDevice(), CHIP, kernel_of)


@pytest.mark.parametrize("which", [1, 2])
def test_one_sum_that_differs_is_noticed(which: int) -> None:
    """Here because a part of k is added to the others with its sign changed in one of a thread's sums."""
    other = specs(CHIP)[which]

    def one_other(spec: GpuKernelSpec) -> CudaKernel:
        text = artifact(spec, CHIP.name).llvm_ir
        return kernel_of(spec, text.replace("fadd", "fsub", 1) if spec == other else text)

    with pytest.raises(
        OtherBits, match=r"gemm: wgmma: on nanoserve emulated GPU .* of mma \(\d+ of 32768 sums differ\)"
    ):
        check_same_bits(CudaDevice(), CHIP, one_other)


def test_sums_that_nobody_wrote_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_bits, "launch", lambda *args: None)
    with pytest.raises(OtherBits, match="32768 of 32768 sums differ"):
        check_same_bits(CudaDevice(), CHIP, kernel_of)


def test_an_engine_is_not_made_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    load_images(monkeypatch)
    config = configs()["llama"]
    weights = random_weights(config, 1)
    plan, asked = same_bits.gemm_plan, []

    def engine(gemm: Any) -> NanoServingEngine:
        return NanoServingEngine(config, weights, precision=BF16, device="cuda", kv_cache_pages=8, gemm=gemm)

    def one_chain(*args: Any, **options: Any) -> Any:
        """Not cut, in what has many rows."""
        made = plan(*args, **options)
        steps = [
            (
                most,
                replace(spec, params=tuple((k, 1 if k == "cuts" and spec.kind == "gemm_tma" else v) for k, v in spec.params)),
            )
            for most, spec in made.steps
        ]  # fmt: skip
        return replace(made, steps=tuple(steps))

    def counted(*args: Any) -> None:
        asked.append(args)
        check_same_bits(*args)

    monkeypatch.setattr(executor, "check_same_bits", counted)
    engine({"gate_up": "wgmma"})
    assert len(asked) == 1
    monkeypatch.setattr(same_bits, "gemm_plan", one_chain)
    engine("mma")
    assert len(asked) == 1
    with pytest.raises(OtherBits):
        engine({"gate_up": "wgmma"})
