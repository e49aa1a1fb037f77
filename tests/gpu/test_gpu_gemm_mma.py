"""The bfloat16 GEMM on tensor cores against float64; the same bits whatever the shape of tiles and the rows."""

from __future__ import annotations

import numpy as np
import pytest

from gpu.matrix_problem import MatrixProblem
from gpu.run_kernel import ORDERS
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm import gemm_plan
from nanoserve.kernels.cuda.gemm_mma import Shape, gemm_mma_spec
from nanoserve.kernels.cuda.layout import row_stride
from support.bfloat16 import from_bf16

SHAPES = {
    "few rows": Shape(1, 4, 1, 1, 8),
    "few rows, few columns": Shape(1, 1, 1, 1, 8),
    "some rows": Shape(2, 2, 2, 2, 8),
    "more rows": Shape(2, 2, 2, 4, 6),
    "many rows": Shape(2, 2, 4, 8, 3),
    "two stages": Shape(1, 2, 1, 2, 2),
}
CHIP = parse_chip("sm_90")


def spec_of(problem: MatrixProblem, shape: Shape):
    return gemm_mma_spec(
        problem.k, problem.n, problem.ldx, problem.ldy, shape, Epilogue(**problem.options), y=problem.y_type
    )


def bf16_problem(m: int, k: int, n: int, **options) -> MatrixProblem:
    return MatrixProblem(m, k, n, x="bf16", dtype="bf16", **options)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (5, 33, 33), (17, 200, 70), (130, 128, 136), (3, 520, 40)]
)
def test_gemm(name: str, m: int, k: int, n: int) -> None:
    problem = bf16_problem(m, k, n)
    results = [problem.run(spec_of(problem, SHAPES[name]), order=order) for order in ORDERS]
    np.testing.assert_allclose(results[0], problem.expected(), atol=1e-5, rtol=1e-5)
    for result in results[1:]:
        assert result.tobytes() == results[0].tobytes()


@pytest.mark.parametrize(
    ("n", "options"),
    [
        (77, {"bias": True, "activation": "gelu_tanh", "scale": 1.5, "softcap": 2.5, "residual": True}),
        (77, {"bias": True, "activation": "silu", "gated": True}),
        (40, {"activation": "gelu_erf", "gated": True, "y": "bf16"}),
        (40, {"residual": True, "bias": True}),
        (77, {"y": "bf16", "bias": True}),
    ],
    ids=str,
)
def test_epilogues(n: int, options: dict) -> None:
    """Every kernel of a plan gives the same bits; even and odd n, because outputs are written in pairs or alone."""
    problem = bf16_problem(6, 72, n, **options)
    plan = gemm_plan(problem.k, n, problem.ldx, problem.ldy, CHIP, x="bf16", dtype="bf16", **options)
    results = [problem.run(spec, order=2) for spec in plan.specs]
    for result in results[1:]:
        assert result.tobytes() == results[0].tobytes()
    if problem.y_type == "bf16":
        np.testing.assert_allclose(from_bf16(results[0]), problem.expected(), atol=1e-2, rtol=5e-3)
    else:
        np.testing.assert_allclose(results[0], problem.expected(), atol=1e-5, rtol=1e-5)


def test_a_row_has_the_same_bits_for_every_number_of_rows() -> None:
    problem = bf16_problem(200, 136, 45, bias=True)
    plan = gemm_plan(problem.k, problem.n, problem.ldx, problem.ldy, CHIP, x="bf16", dtype="bf16", bias=True)
    counts = (1, 2, 17, 40, 64, 200)
    assert len({plan.spec_for(m) for m in counts}) == 4
    rows = {m: problem.run(plan.spec_for(m), m=m) for m in counts}
    rows[5000] = problem.run(plan.spec_for(5000), m=200)
    assert plan.spec_for(5000) not in {plan.spec_for(m) for m in counts}
    for m, found in rows.items():
        assert found.tobytes() == rows[200][:m].tobytes(), f"m={m}"


@pytest.mark.parametrize("name", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("n", "gated"),
    [(1024, False), (3072, False), (4096, False), (3072, True), (14336, True), (128256, False)],
)
def test_tiles_keep_a_large_gpu_busy(name: str, n: int, gated: bool) -> None:  # fmt: skip
    """As many as it has multiprocessors, where a weight of that many rows can give them; and what they share of one fits."""
    chip, rows = parse_chip(name), n * (1 + gated)
    plan = gemm_plan(
        4096,
        n,
        4096,
        row_stride(n),
        chip,
        x="bf16",
        dtype="bf16",
        gated=gated,
        activation="silu" if gated else None,
    )
    for m in (1, 16, 17, 33, 65, 128, 256, 500, 1000, 2048, 8192):
        spec = plan.spec_for(m)
        of = dict(spec.params)
        shape = Shape(of["wm"], of["wn"], of["i"], of["j"], of["stages"])
        blocks = -(-m // shape.rows) * -(-rows // shape.columns)
        narrowest = 8 * (1 + gated) if m <= 16 else 32
        assert blocks >= min(96, -(-m // shape.rows) * rows // narrowest), m
        assert spec.shared_bytes <= (chip.shared_bytes if m <= 64 else chip.shared_bytes // 2 + 16 * 1024), m


def test_a_row_has_the_same_bits_at_every_position() -> None:
    problem = bf16_problem(70, 136, 45)
    problem.x[:] = problem.x[0]
    plan = gemm_plan(problem.k, problem.n, problem.ldx, problem.ldy, CHIP, x="bf16", dtype="bf16")
    for spec in plan.specs:
        result = problem.run(spec)
        assert (result.view(np.uint32) == result[0].view(np.uint32)).all()


def test_columns_of_a_pair_stay_together() -> None:
    with pytest.raises(ValueError, match="j=3 must be even"):
        gemm_mma_spec(16, 16, 16, 16, Shape(1, 1, 1, 3, 2), Epilogue())
    with pytest.raises(ValueError, match="j=1 must be even"):
        gemm_mma_spec(16, 16, 16, 16, Shape(1, 1, 1, 1, 2), Epilogue(activation="silu", gated=True))
