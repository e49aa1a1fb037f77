"""The GEMM whose tiles the copy engine brings: float64's numbers, gemm_wgmma's bits, in every thread order."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from gpu.matrix_problem import MatrixProblem
from gpu.run_kernel import artifact
from nanoserve.compiler.gpu import cubin
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec, TensorForm
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm import gemm_plan
from nanoserve.kernels.cuda.gemm_tma import gemm_tma_spec
from nanoserve.kernels.cuda.gemm_wgmma import gemm_wgmma_spec
from nanoserve.kernels.cuda.library import compile_kernel
from nanoserve.kernels.cuda.wgmma_tile import Shape
from support.bfloat16 import from_bf16

CHIP = parse_chip("sm_90a")
ORDERS = (0, 1, 2, 3, 4)
SHAPES = {
    "as plans have it": Shape(2, 128, 3),
    "narrow": Shape(1, 8, 2),
    "wide": Shape(2, 256, 4),
    "one place": Shape(1, 16, 1),
}


def specs_of(problem: MatrixProblem, shape: Shape) -> tuple[GpuKernelSpec, GpuKernelSpec]:
    """gemm_tma's, and gemm_wgmma's, which needs two places."""
    p, epilogue = problem, Epilogue(**problem.options)
    sizes = (p.k, p.n, p.ldx, p.ldy)
    two = replace(shape, stages=max(shape.stages, 2))
    return (
        gemm_tma_spec(*sizes, shape, epilogue, y=p.y_type),
        gemm_wgmma_spec(*sizes, two, epilogue, y=p.y_type),
    )


def check(problem: MatrixProblem, shape: Shape) -> None:
    tma, wgmma = specs_of(problem, shape)
    expected = problem.run(wgmma, chip="sm_90a")
    for order in ORDERS:
        assert problem.run(tma, order=order, chip="sm_90a").tobytes() == expected.tobytes(), f"order {order}"
    wide = from_bf16(expected) if problem.y_type == "bf16" else expected
    tolerance = {"atol": 1e-2, "rtol": 5e-3} if problem.y_type == "bf16" else {"atol": 1e-5, "rtol": 1e-5}
    np.testing.assert_allclose(wide, problem.expected(), **tolerance)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (5, 33, 33), (17, 200, 70), (130, 128, 136), (150, 777, 301)]
)
def test_ragged_sizes(name: str, m: int, k: int, n: int) -> None:
    check(MatrixProblem(m, k, n, x="bf16", dtype="bf16"), SHAPES[name])


@pytest.mark.parametrize("n", [8, 77, 130])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True, "activation": "gelu_tanh", "scale": 1.5, "softcap": 2.5, "residual": True},
        {"bias": True, "activation": "silu", "gated": True},
        {"activation": "gelu_erf", "gated": True, "y": "bf16"},
        {"residual": True, "y": "bf16"},
    ],
    ids=str,
)
def test_epilogues(options: dict, n: int) -> None:
    """Of a gated weight, gates and the others of their outputs come in one box each, also where n is no multiple of 8."""
    check(MatrixProblem(70, 200, n, x="bf16", dtype="bf16", **options), Shape(2, 128, 3))


def test_rows_that_lie_behind_those_of_a_step_do_not_matter() -> None:
    """The map covers the buffer: other rows of the tile hold what some step before has left there."""
    problem = MatrixProblem(90, 136, 45, x="bf16", dtype="bf16")
    (spec, _), m = specs_of(problem, Shape(2, 128, 3)), 70
    alone = problem.run(spec, m=m, chip="sm_90a")

    def in_a_buffer(spec: GpuKernelSpec, x: np.ndarray, *rest: np.ndarray | int, **how: object) -> None:
        from gpu.run_kernel import launch

        buffer = np.full((128, problem.ldx), 0x7FC0, np.uint16)  # NaN
        buffer[: len(x)] = x
        launch(spec, buffer, *rest, **how)  # type: ignore[arg-type]

    assert problem.run(spec, m=m, launch=in_a_buffer, chip="sm_90a").tobytes() == alone.tobytes()


def test_what_the_machine_code_has() -> None:
    for gated in (False, True):
        epilogue = Epilogue(gated=gated, activation="silu" if gated else None)
        made = artifact(gemm_tma_spec(4096, 4096, 4096, 4096, Shape(2, 128, 3), epilogue), "sm_90a")
        assert made.usage.spilled_bytes == 0
        copies = f"cp.async.bulk.tensor.{2 + gated}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        for text in (
            copies, ".param .align 64 .b8", "fence.mbarrier_init.release.cluster", "mbarrier.arrive.expect_tx",
            "mbarrier.try_wait.parity", "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
        ):  # fmt: skip
            assert text in made.ptx
        boxes = re.findall(r"call void @llvm\.nvvm\.cp\.async\.bulk\.tensor\.g2s\.tile\.(\d)d", made.llvm_ir)
        assert sorted(boxes) == (["2"] + ["3"] * 8 if gated else ["2", "2"]), "of a turn"
        code = cubin.disassemble(made.cubin)
        assert code is not None
        assert "UTMALDG" in code
        assert "LDGSTS" not in code
        x, w = (dict(made.launch.tensors)[name] for name in "xw")
        assert x == TensorForm("bf16", (4096,), (4096,), (64, 128), 128)
        assert w.box == ((64, 8, 2) if gated else (64, 128))


def test_plans_have_it_for_many_rows() -> None:
    plan = gemm_plan(64, 64, 64, 64, CHIP, x="bf16", dtype="bf16", wgmma=True)
    assert [plan.spec_for(m).kind for m in (1, 64, 65, 5000)] == [
        "gemm_wgmma",
        "gemm_wgmma",
        "gemm_tma",
        "gemm_tma",
    ]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="sm_90 has no wgmma"):
        compile_kernel(gemm_tma_spec(64, 64, 64, 64, Shape(1, 8, 2), Epilogue()), parse_chip("sm_90"))
    with pytest.raises(ValueError, match="gemm_tma: groups=5 must be at most 4, a box has 256 rows"):
        gemm_tma_spec(64, 64, 64, 64, Shape(5, 8, 2), Epilogue())
    with pytest.raises(ValueError, match="gemm_tma: ldx=65"):
        gemm_tma_spec(64, 64, 65, 64, Shape(1, 8, 2), Epilogue())
