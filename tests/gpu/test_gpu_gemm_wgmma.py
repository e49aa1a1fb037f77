"""Hopper's warpgroup GEMM against float64; the same bits whatever the shape of tiles and the number of rows."""

from __future__ import annotations

import numpy as np
import pytest

from gpu.matrix_problem import MatrixProblem
from gpu.run_kernel import ORDERS
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm import gemm_plan
from nanoserve.kernels.cuda.gemm_wgmma import gemm_wgmma_spec
from nanoserve.kernels.cuda.library import compile_kernel
from nanoserve.kernels.cuda.wgmma_tile import Shape
from support.bfloat16 import from_bf16

SHAPES = {
    "few rows": Shape(1, 8, 8),
    "some rows": Shape(1, 32, 4),
    "many rows": Shape(2, 128, 3),
    "most": Shape(2, 256, 2),
}
CHIP = parse_chip("sm_90a")


def problem_of(m: int, k: int, n: int, **options) -> MatrixProblem:
    return MatrixProblem(m, k, n, x="bf16", dtype="bf16", **options)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 33, 33), (17, 200, 70), (130, 128, 136)])
def test_gemm(name: str, m: int, k: int, n: int) -> None:
    problem = problem_of(m, k, n)
    spec = gemm_wgmma_spec(k, n, problem.ldx, problem.ldy, SHAPES[name], Epilogue())
    results = [problem.run(spec, order=order, chip="sm_90a") for order in ORDERS]
    np.testing.assert_allclose(results[0], problem.expected(), atol=1e-5, rtol=1e-5)
    for result in results[1:]:
        assert result.tobytes() == results[0].tobytes()


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True, "activation": "gelu_tanh", "scale": 1.5, "softcap": 2.5, "residual": True},
        {"bias": True, "activation": "silu", "gated": True},
        {"activation": "gelu_erf", "gated": True, "y": "bf16"},
    ],
    ids=str,
)
def test_epilogues(options: dict) -> None:
    problem = problem_of(6, 72, 77, **options)
    plan = gemm_plan(72, 77, problem.ldx, problem.ldy, CHIP, x="bf16", dtype="bf16", wgmma=True, **options)
    results = [problem.run(spec, order=2, chip="sm_90a") for spec in plan.specs]
    for result in results[1:]:
        assert result.tobytes() == results[0].tobytes()
    tolerance = {"atol": 1e-2, "rtol": 5e-3} if problem.y_type == "bf16" else {"atol": 1e-5, "rtol": 1e-5}
    found = from_bf16(results[0]) if problem.y_type == "bf16" else results[0]
    np.testing.assert_allclose(found, problem.expected(), **tolerance)


def test_a_row_has_the_same_bits_for_every_number_of_rows() -> None:
    problem = problem_of(200, 136, 45, bias=True)
    plan = gemm_plan(136, 45, problem.ldx, problem.ldy, CHIP, x="bf16", dtype="bf16", bias=True, wgmma=True)
    assert len({plan.spec_for(m) for m in (1, 2, 17, 64, 200)}) > 2
    rows = {m: problem.run(plan.spec_for(m), m=m, chip="sm_90a") for m in (1, 2, 17, 64, 200)}
    for m, found in rows.items():
        assert found.tobytes() == rows[200][:m].tobytes(), f"m={m}"


def test_a_plan_never_mixes_arithmetics() -> None:
    for wgmma, kinds in ((False, {"gemm_mma"}), (True, {"gemm_wgmma", "gemm_tma"})):
        plan = gemm_plan(64, 64, 64, 64, CHIP, x="bf16", dtype="bf16", wgmma=wgmma)
        assert {spec.kind for spec in plan.specs} == kinds


def test_chips_without_it_refuse() -> None:
    with pytest.raises(ValueError, match="gemm: wgmma: sm_90 does not have it"):
        gemm_plan(64, 64, 64, 64, parse_chip("sm_90"), x="bf16", dtype="bf16", wgmma=True)
    with pytest.raises(ValueError, match="sm_90 has no wgmma"):
        compile_kernel(gemm_wgmma_spec(64, 64, 64, 64, Shape(1, 8, 2), Epilogue()), parse_chip("sm_90"))
    with pytest.raises(ValueError, match=r"columns=12 must be a multiple of 8 in \[8, 256\]"):
        gemm_wgmma_spec(64, 64, 64, 64, Shape(1, 12, 2), Epilogue())
