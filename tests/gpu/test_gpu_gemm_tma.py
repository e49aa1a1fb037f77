"""The GEMM for many rows on Hopper: float64's numbers, and in the emulator gemm_mma's bits, in every thread order."""

from __future__ import annotations

import re

import numpy as np
import pytest

from gpu.kernel_examples import registers_left
from gpu.matrix_problem import MatrixProblem
from gpu.run_kernel import artifact
from nanoserve.compiler.gpu import cubin
from nanoserve.compiler.gpu.artifact import Artifact
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec, TensorForm
from nanoserve.kernels.cuda import gemm_mma
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm import GemmPlan, gemm_plan
from nanoserve.kernels.cuda.gemm_tma import gemm_tma_spec
from nanoserve.kernels.cuda.layout import row_stride
from nanoserve.kernels.cuda.library import compile_kernel
from nanoserve.kernels.cuda.wgmma_tile import Shape
from support.bfloat16 import from_bf16

CHIP = parse_chip("sm_90a")
ORDERS = (0, 1, 2, 3, 4)
SHAPES = {
    "as plans have it": Shape(2, 128, 3),
    "of few tiles": Shape(1, 64, 6),
    "narrow": Shape(1, 8, 2),
    "wide": Shape(2, 256, 4),
    "one place": Shape(1, 16, 1),
}


def bf16_problem(m: int, k: int, n: int, **options: object) -> MatrixProblem:
    return MatrixProblem(m, k, n, x="bf16", dtype="bf16", **options)


def spec_of(p: MatrixProblem, shape: Shape, cuts: int = 1) -> GpuKernelSpec:
    return gemm_tma_spec(p.k, p.n, p.ldx, p.ldy, shape, Epilogue(**p.options), y=p.y_type, cuts=cuts)


def by_mma(p: MatrixProblem, cuts: int = 1) -> GpuKernelSpec:
    shape, epilogue = gemm_mma.Shape(2, 2, 1, 2, 4), Epilogue(**p.options)
    return gemm_mma.gemm_mma_spec(p.k, p.n, p.ldx, p.ldy, shape, epilogue, y=p.y_type, cuts=cuts)


def check(problem: MatrixProblem, shape: Shape, cuts: int = 1) -> None:
    expected = problem.run(by_mma(problem, cuts))
    spec = spec_of(problem, shape, cuts)
    for order in ORDERS:
        assert problem.run(spec, order=order, chip="sm_90a").tobytes() == expected.tobytes(), f"order {order}"
    wide = from_bf16(expected) if problem.y_type == "bf16" else expected
    tolerance = {"atol": 1e-2, "rtol": 5e-3} if problem.y_type == "bf16" else {"atol": 1e-5, "rtol": 1e-5}
    np.testing.assert_allclose(wide, problem.expected(), **tolerance)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (5, 33, 33), (17, 200, 70), (130, 128, 136), (150, 777, 301)]
)
def test_ragged_sizes(name: str, m: int, k: int, n: int) -> None:
    check(bf16_problem(m, k, n), SHAPES[name])


@pytest.mark.parametrize("shape", [Shape(2, 128, 6), Shape(1, 64, 6), Shape(1, 16, 1)], ids=str)
@pytest.mark.parametrize(("k", "cuts"), [(64 * 3, 3), (64 * 3 + 1, 4), (64 * 7 + 40, 3), (64 * 20, 4)])
def test_parts_of_k_are_added_up_in_their_order(shape: Shape, k: int, cuts: int) -> None:
    """Parts of one tile, and of different lengths; of a ring that is larger than a part, and of one place."""
    problem = bf16_problem(37, k, 43, residual=True)
    check(problem, shape, cuts)
    one_chain = problem.run(spec_of(problem, shape), chip="sm_90a")
    assert one_chain.tobytes() != problem.run(spec_of(problem, shape, cuts), chip="sm_90a").tobytes()


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
    check(bf16_problem(70, 200, n, **options), Shape(2, 128, 3))
    check(bf16_problem(70, 200, n, **options), Shape(1, 64, 6), 4)


def test_rows_that_lie_behind_those_of_a_step_do_not_matter() -> None:
    """The map covers the buffer: other rows of the tile hold what some step before has left there."""
    problem, m = bf16_problem(90, 136, 45), 70
    spec = spec_of(problem, Shape(2, 128, 3))
    alone = problem.run(spec, m=m, chip="sm_90a")

    def in_a_buffer(spec: GpuKernelSpec, x: np.ndarray, *rest: np.ndarray | int, **how: object) -> None:
        from gpu.run_kernel import launch

        buffer = np.full((128, problem.ldx), 0x7FC0, np.uint16)  # NaN
        buffer[: len(x)] = x
        launch(spec, buffer, *rest, **how)  # type: ignore[arg-type]

    assert problem.run(spec, m=m, launch=in_a_buffer, chip="sm_90a").tobytes() == alone.tobytes()


def check_products(made: Artifact) -> str:
    """A turn's products run one behind the other, and are waited for once; the machine code."""
    code = cubin.disassemble(made.cubin)
    assert code is not None
    assert (code.count("HGMMA"), code.count("WARPGROUP.DEPBAR")) == (4, 1)
    return code


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
        code = check_products(made)
        assert "UTMALDG" in code
        assert "LDGSTS" not in code
        x, w = (dict(made.launch.tensors)[name] for name in "xw")
        assert x == TensorForm("bf16", (4096,), (4096,), (64, 128), 128)
        assert w.box == ((64, 8, 2) if gated else (64, 128))


def plan_of(k: int, n: int, **options: object) -> GemmPlan:
    return gemm_plan(
        k, n, row_stride(k) + 8, row_stride(n) + 8, CHIP, x="bf16", dtype="bf16", wgmma=True, **options
    )


@pytest.mark.parametrize(("k", "n"), [(1024, 1024), (8192, 2048), (4096, 4096), (2048, 128256)])
def test_plans_have_it_for_many_rows(k: int, n: int) -> None:
    plan = plan_of(k, n)
    assert [plan.spec_for(m).kind for m in (1, 64, 65, 5000)] == ["gemm_mma"] * 2 + ["gemm_tma"] * 2
    assert len({dict(spec.params)["cuts"] for spec in plan.specs}) == 1
    for m in (128, 256, 1024, 2048):
        of = dict(plan.spec_for(m).params)
        shape = Shape(of["groups"], of["columns"], of["stages"])
        most = -(-m // 64) * -(-n // 64)
        assert -(-m // shape.columns) * -(-n // shape.rows) >= min(128, most), m


def test_a_row_has_the_same_bits_for_every_number_of_rows() -> None:
    """In an emulator whose two instructions sum alike; whether a device's do is checked there (test_same_bits.py)."""
    problem = bf16_problem(200, 264, 45, bias=True)
    plan = plan_of(problem.k, problem.n, bias=True)
    counts = (1, 2, 17, 40, 64, 65, 200)
    assert {plan.spec_for(m).kind for m in counts} == {"gemm_mma", "gemm_tma"}
    rows = {m: problem.run(plan.spec_for(m), m=m, chip="sm_90a") for m in counts}
    rows[5000] = problem.run(plan.spec_for(5000), m=200, chip="sm_90a")
    for m, found in rows.items():
        assert found.tobytes() == rows[200][:m].tobytes(), f"m={m}"


def test_two_sums_of_each_output_fit_a_threads_registers() -> None:
    spec = plan_of(8192, 2048, residual=True).specs[-1]
    made = artifact(spec, "sm_90a")
    assert made.usage.spilled_bytes == 0
    assert 128 < made.usage.registers <= registers_left(spec)
    check_products(made)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="sm_90 has no wgmma"):
        compile_kernel(gemm_tma_spec(64, 64, 64, 64, Shape(1, 8, 2), Epilogue()), parse_chip("sm_90"))
    with pytest.raises(ValueError, match="gemm_tma: groups=5 must be at most 4, a box has 256 rows"):
        gemm_tma_spec(64, 64, 64, 64, Shape(5, 8, 2), Epilogue())
    with pytest.raises(ValueError, match="gemm_tma: ldx=65"):
        gemm_tma_spec(64, 64, 65, 64, Shape(1, 8, 2), Epilogue())
    with pytest.raises(ValueError, match=r"columns=12 must be a multiple of 8 in \[8, 256\]"):
        gemm_tma_spec(64, 64, 64, 64, Shape(1, 12, 2), Epilogue())
    for cuts in (0, 3):
        with pytest.raises(ValueError, match=rf"gemm_tma: cuts={cuts} must be in \[1, 2\], a tile each"):
            gemm_tma_spec(128, 64, 128, 64, Shape(1, 8, 2), Epilogue(), cuts=cuts)
    with pytest.raises(ValueError, match="gemm: wgmma: sm_90 does not have it"):
        gemm_plan(64, 64, 64, 64, parse_chip("sm_90"), x="bf16", dtype="bf16", wgmma=True)
