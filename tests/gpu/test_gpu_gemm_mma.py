"""The bfloat16 GEMM on tensor cores against float64; the same bits whatever the shape of tiles and the rows."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from gpu.llvm_kernel import without_call
from gpu.matrix_problem import MatrixProblem
from gpu.run_kernel import ORDERS, artifact
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.emulator import EmulatorError
from nanoserve.emulator.emulated_kernel import EmulatedKernel
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
CUT_SHAPES = {
    "few rows": Shape(1, 1, 1, 1, 5, 3),
    "some rows": Shape(1, 1, 2, 2, 2, 3),
    "more rows": Shape(1, 1, 4, 2, 3, 3),
    "groups of four": Shape(2, 2, 1, 1, 3, 3),
    "one after the other": Shape(2, 2, 2, 2, 6),
    "many rows": Shape(2, 4, 4, 4, 4),
}
CHIP = parse_chip("sm_90")


def spec_of(problem: MatrixProblem, shape: Shape, cuts: int = 1):
    return gemm_mma_spec(
        problem.k,
        problem.n,
        problem.ldx,
        problem.ldy,
        shape,
        Epilogue(**problem.options),
        y=problem.y_type,
        cuts=cuts,
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


@pytest.mark.parametrize("k", [64 * 3, 64 * 3 + 1, 64 * 7 + 40, 64 * 20])
def test_parts_of_k_taken_at_once_or_one_after_the_other(k: int) -> None:
    """In whatever tiles, by groups of warps or by all: the same sums, in the same order. Not those of one chain."""
    problem = bf16_problem(37, k, 43)
    specs = [spec_of(problem, shape, cuts=3) for shape in CUT_SHAPES.values()]
    results = [problem.run(spec, order=order) for spec in specs for order in ORDERS]
    np.testing.assert_allclose(results[0], problem.expected(), atol=1e-5, rtol=1e-5)
    for result in results[1:]:
        assert result.tobytes() == results[0].tobytes()
    parts = []
    for first, last in pairwise([0, *(part * -(-k // 64) // 3 * 64 for part in (1, 2)), k]):
        part = bf16_problem(37, k, 43)
        part.x[:, :first] = 0
        part.x[:, last:] = 0
        parts.append(part.run(spec_of(part, SHAPES["some rows"])))
    assert ((parts[0] + parts[1]) + parts[2]).tobytes() == results[0].tobytes()
    assert problem.run(spec_of(problem, SHAPES["some rows"])).tobytes() != results[0].tobytes()


def test_k_is_cut_for_weights_of_few_outputs_only() -> None:
    def cuts(k: int, n: int, **options) -> set:
        plan = gemm_plan(k, n, row_stride(k), row_stride(n), CHIP, x="bf16", dtype="bf16", **options)
        return {dict(spec.params)["cuts"] for spec in plan.specs}

    assert cuts(8192, 2048) == cuts(8192, 4088) == {4}
    assert cuts(130, 1024) == {3}
    assert cuts(64, 1024) == {1}
    assert cuts(8192, 4096) == cuts(2048, 2048, gated=True, activation="silu") == {1}


def test_as_many_parts_as_tiles_and_groups_as_parts() -> None:
    problem = bf16_problem(1, 128, 16)
    for cuts in (0, 3):
        with pytest.raises(ValueError, match=rf"cuts={cuts} must be in \[1, 2\]"):
            spec_of(problem, SHAPES["few rows"], cuts=cuts)
    with pytest.raises(ValueError, match="groups=3 must be 1, or cuts=2"):
        spec_of(problem, CUT_SHAPES["few rows"], cuts=2)


GROUPS, BLOCK = "llvm.nvvm.barrier.cta.sync.aligned.count", "llvm.nvvm.barrier.cta.sync.aligned.all"
MUTANTS = {
    "as it is": ("groups of four", lambda text: text),
    "nobody waits for the group": ("groups of four", without_call(GROUPS, 0)),
    "a lane does not wait for its warp": ("some rows", without_call(GROUPS, 0)),
    "sums are taken before they are there": ("groups of four", without_call(BLOCK, 0)),
    "nobody waits for the copies": ("groups of four", without_call("llvm.nvvm.cp.async.wait.group", 0)),
    "groups share a barrier": (
        "groups of four",
        lambda text: re.sub(rf"({re.escape(GROUPS)})\(i32 %\d+", r"\1(i32 1", text),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_groups_is_caught(name: str) -> None:
    shape, mutate = MUTANTS[name]
    # Parts of different lengths: 3, 3 and 4 tiles.
    problem = bf16_problem(37, 64 * 10 - 3, 43)
    spec = spec_of(problem, CUT_SHAPES[shape], cuts=3)
    whole = artifact(spec)
    text = mutate(whole.llvm_ir)
    broken = EmulatedKernel(spec, whole, text)

    def launch(_, *args, order: int, chip: str) -> None:
        broken(*args, order=order)

    wanted, found = problem.run(spec), []
    for order in (*ORDERS, 3, 4, 5):
        try:
            found.append(problem.run(spec, order=order, launch=launch).tobytes() == wanted.tobytes())
        except EmulatorError:
            found.append(False)
    assert all(found) == (text == whole.llvm_ir)


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
        shape = Shape(of["wm"], of["wn"], of["i"], of["j"], of["stages"], of["groups"])
        blocks = -(-m // shape.rows) * -(-rows // shape.columns)
        narrowest = 8 * (1 + gated) if m <= 16 else 32
        assert blocks >= min(96, -(-m // shape.rows) * rows // narrowest), m
        fits_alone = m <= 64 or spec.block == 256  # two blocks of 128 threads, or one of 256
        assert spec.shared_bytes <= (
            chip.shared_bytes if fits_alone else chip.shared_bytes // 2 + 16 * 1024
        ), m


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
