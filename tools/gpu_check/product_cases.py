"""Cases of the matrix products: ragged in every direction, and of as many outputs as a real model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tools.gpu_check.case import MOST_ROWS, WIDE_ROWS, Array, Case, Launch, wide
from tools.gpu_check.engines import ARITHMETICS, arithmetics

from gpu.matrix_problem import MatrixProblem
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm import TMA_SHAPE, GemmPlan, gemm_plan
from nanoserve.kernels.cuda.gemm_tma import gemm_tma_spec
from nanoserve.kernels.cuda.gemm_wgmma import gemm_wgmma_spec

_OPTIONS: dict[str, dict[str, Any]] = {
    "bias, gelu and residual": {"bias": True, "activation": "gelu_erf", "residual": True},
    "gated": {"gated": True, "activation": "silu"},
    "cap": {"scale": 0.7, "softcap": 3.0},
}
# Plans have other kernels for few rows where there are many outputs, and where there are half as many.
_WIDE_OPTIONS: dict[str, dict[str, Any]] = {
    "wide, plain": {},
    "wide, residual": {"residual": True},
    "wide, gated": {"gated": True, "activation": "silu"},
    "half as wide, residual": {"residual": True},
}
_WIDE_OUTPUTS, _WIDE_INPUTS = 4120, 520
# By kind: types of x and of the weight, and what asks for it in a plan.
GEMMS: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "gemm_f32": (("f32", "f32", {}), ("f32", "bf16", {}), ("f32", "f16", {})),
    **{
        f"gemm_{name}": (("bf16", "bf16", one.plan),)
        for name, one in ARITHMETICS.items()
        if one.plan is not None
    },
}


@dataclass(frozen=True, slots=True)
class GemmCase:
    """A product's problem, its plan, and a name."""

    name: str
    problem: MatrixProblem
    plan: GemmPlan

    def outputs(self, launch: Launch, m: int) -> list[Array]:
        return [wide(self.problem.run(self.plan.spec_for(m), m=m, launch=launch))]


def _problem(x: str, dtype: str, name: str, options: dict[str, Any], is_wide: bool) -> MatrixProblem:
    """bfloat16 results of a gated one, as layers have it."""
    y = "bf16" if x == "bf16" and options.get("gated") else "f32"
    outputs = _WIDE_OUTPUTS // 2 if name.startswith("half") else _WIDE_OUTPUTS
    m, k, n = (WIDE_ROWS, _WIDE_INPUTS, outputs) if is_wide else (MOST_ROWS, 328, 157)
    return MatrixProblem(m, k, n, x=x, dtype=dtype, y=y, **options)


def gemm_cases(kind: str, chip: Chip, *, is_wide: bool = False) -> list[GemmCase]:
    """None where the chip has no such instructions."""
    name = kind.removeprefix("gemm_")
    if name in ARITHMETICS and name not in arithmetics(chip):
        return []
    made = []
    for x, dtype, asked in GEMMS[kind]:
        for name, options in (_WIDE_OPTIONS if is_wide else _OPTIONS).items():
            p = _problem(x, dtype, name, options, is_wide)
            plan = gemm_plan(p.k, p.n, p.ldx, p.ldy, chip, x=x, dtype=dtype, y=p.y_type, **options, **asked)
            made.append(GemmCase(f"{kind} {x} x {dtype}, {name}", p, plan))
    return made


def _without_tma(cases: list[GemmCase]) -> list[GemmCase]:
    """The plans that have the copy engine, with tiles that threads copy in its place: faults of the two are told apart."""
    made = []
    for one in cases:
        steps = [(most, spec) for most, spec in one.plan.steps if spec.kind != "gemm_tma"]
        if len(steps) < len(one.plan.steps):
            plan = GemmPlan((*steps, (None, _many_rows(one.problem, gemm_wgmma_spec))))
            made.append(GemmCase(f"{one.name}, cp.async", one.problem, plan))
    return made


def _of_any_rows(cases: list[GemmCase]) -> list[GemmCase]:
    """The first again, by the kernel for more rows than cases have."""
    return [
        GemmCase(f"{one.name}, the kernel for any rows", one.problem, GemmPlan(one.plan.steps[-1:]))
        for one in cases[:1]
        if one.plan.steps[-1][1].kind != "gemm_tma"
    ]


def _many_rows(p: MatrixProblem, make: Callable[..., GpuKernelSpec]) -> GpuKernelSpec:
    return make(p.k, p.n, p.ldx, p.ldy, TMA_SHAPE, Epilogue(**p.options), y=p.y_type)


def tma_cases(chip: Chip) -> Iterable[Case]:
    """For every number of rows, though plans have it for many; whether its bits are gemm_wgmma's is an output, too."""
    if not chip.wgmma:
        return
    problems = [(name, options, False) for name, options in _OPTIONS.items()]
    problems += [(name, options, True) for name, options in _WIDE_OPTIONS.items()]
    for name, options, is_wide in problems:
        p = _problem("bf16", "bf16", name, options, is_wide)
        spec, other = (_many_rows(p, make) for make in (gemm_tma_spec, gemm_wgmma_spec))

        def run(
            launch: Launch,
            m: int,
            p: MatrixProblem = p,
            spec: GpuKernelSpec = spec,
            other: GpuKernelSpec = other,
        ) -> list[Array]:
            found, same = (p.run(each, m=m, launch=launch) for each in (spec, other))
            return [wide(found), np.full(m, float(found.tobytes() == same.tobytes()))]

        def expected(m: int, p: MatrixProblem = p) -> list[Array]:
            return [p.expected()[:m], np.ones(m)]

        tolerance = 1e-2 if p.y_type == "bf16" else 2e-5
        yield Case(f"gemm_tma, {name}", (spec, other), run, expected, tolerance, wide=is_wide)


def product_cases(kind: str) -> Callable[[Chip], Iterable[Case]]:
    def cases(chip: Chip) -> Iterable[Case]:
        for is_wide in (False, True):
            found = gemm_cases(kind, chip, is_wide=is_wide)
            for one in [*_without_tma(found), *found, *_of_any_rows(found)]:
                tolerance = 1e-2 if one.problem.y_type == "bf16" else 2e-5
                yield Case(
                    one.name, one.plan.specs, one.outputs, lambda m, one=one: [one.problem.expected()[:m]], tolerance,
                    wide=is_wide,
                )  # fmt: skip

    return cases
