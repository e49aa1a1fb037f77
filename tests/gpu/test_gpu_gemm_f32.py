"""The float32 GEMM gives the CPU's bits, whatever the shape of its tiles, the rows and the order of threads."""

from __future__ import annotations

import numpy as np
import pytest

from gpu.matrix_problem import MatrixProblem
from gpu.run_kernel import ORDERS
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm import gemm_plan
from nanoserve.kernels.cuda.gemm_f32 import Shape, gemm_f32_spec

SHAPES = {
    "few rows": Shape(4, 32, 1, 1, 8),
    "few rows, few columns": Shape(4, 8, 1, 1, 8),
    "some rows": Shape(4, 32, 4, 1, 6),
    "many rows": Shape(8, 16, 8, 8, 3),
    "two stages": Shape(4, 16, 2, 2, 2),
}
CHIP = parse_chip("sm_90")


def spec_of(problem: MatrixProblem, shape: Shape):
    return gemm_f32_spec(
        problem.k, problem.n, problem.ldx, problem.ldy, shape, Epilogue(**problem.options), dtype=problem.dtype,
        y=problem.y_type,
    )  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (5, 31, 33), (17, 100, 70), (66, 128, 130), (3, 260, 40)]
)
def test_the_cpus_bits(name: str, m: int, k: int, n: int) -> None:
    problem = MatrixProblem(m, k, n)
    cpu = problem.cpu()
    for order in ORDERS:
        assert problem.run(spec_of(problem, SHAPES[name]), order=order).tobytes() == cpu.tobytes(), (
            f"order {order}"
        )
    np.testing.assert_allclose(cpu, problem.expected(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", SHAPES)
def test_narrow_weights_are_widened_exactly(dtype: str, name: str) -> None:
    problem = MatrixProblem(18, 100, 70, dtype=dtype)
    assert problem.run(spec_of(problem, SHAPES[name]), order=2).tobytes() == problem.cpu().tobytes()


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
def test_epilogues_give_the_cpus_bits(n: int, options: dict) -> None:
    problem = MatrixProblem(6, 68, n, **options)
    plan = gemm_plan(problem.k, n, problem.ldx, problem.ldy, CHIP, **options)
    for spec in plan.specs:
        assert problem.run(spec, order=2).tobytes() == problem.cpu().tobytes(), spec.symbol


def test_a_row_has_the_same_bits_for_every_number_of_rows() -> None:
    problem = MatrixProblem(200, 70, 45, bias=True)
    plan = gemm_plan(problem.k, problem.n, problem.ldx, problem.ldy, CHIP, bias=True)
    assert len({plan.spec_for(m) for m in (1, 2, 17, 64, 200)}) > 1
    rows = {m: problem.run(plan.spec_for(m), m=m) for m in (1, 2, 17, 64, 200)}
    for m, found in rows.items():
        assert found.tobytes() == rows[200][:m].tobytes(), f"m={m}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": "u8"}, "x 'u8' must be one of f32, bf16"),
        ({"x": "bf16", "dtype": "f32"}, "dtype 'f32' with x 'bf16' must be one of bf16"),
        ({"n_in": 0}, "n_in=0 and n_out=16 must be positive"),
        ({"ldx": 8}, "ldx=8 must be a multiple of 8, at least cols=16"),
        ({"y": "f16"}, "y 'f16' must be f32 or bf16"),
        ({"activation": "relu"}, "activation 'relu' must be one of"),
        ({"gated": True}, "gated needs an activation"),
        ({"scale": float("inf")}, "scale=inf must be finite"),
        ({"softcap": -1.0}, "softcap=-1.0 must be finite and at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    sizes = {"n_in": 16, "n_out": 16, "ldx": 16, "ldy": 16, "chip": CHIP}
    with pytest.raises(ValueError, match=message):
        gemm_plan(**{**sizes, **change})
