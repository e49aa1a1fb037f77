"""Cases of the matrix products: ragged in every direction, and of as many outputs as a real model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tools.gpu_check.case import MOST_ROWS, WIDE_ROWS, Array, Case, Launch, wide

from gpu.matrix_problem import MatrixProblem
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.kernels.cuda.gemm import GemmPlan, gemm_plan

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
# By kind: types of x and of the weight.
GEMMS = {
    "gemm_f32": (("f32", "f32"), ("f32", "bf16"), ("f32", "f16")),
    "gemm_mma": (("bf16", "bf16"),),
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
    made = []
    for x, dtype in GEMMS[kind]:
        for name, options in (_WIDE_OPTIONS if is_wide else _OPTIONS).items():
            p = _problem(x, dtype, name, options, is_wide)
            made.append(GemmCase(f"{kind} {x} x {dtype}, {name}", p, _plan(p, chip)))
    return made


def _plan(p: MatrixProblem, chip: Chip, **asked: bool) -> GemmPlan:
    return gemm_plan(
        p.k, p.n, p.ldx, p.ldy, chip, x=p.x_type, dtype=p.dtype, y=p.y_type, **p.options, **asked
    )


def _of_any_rows(cases: list[GemmCase]) -> list[GemmCase]:
    """The first again, by the kernel for more rows than cases have."""
    return [
        GemmCase(f"{one.name}, the kernel for any rows", one.problem, GemmPlan(one.plan.steps[-1:]))
        for one in cases[:1]
    ]


def tma_cases(chip: Chip, *, is_wide: bool = False) -> list[tuple[GemmCase, GemmCase]]:
    """The kernels for many rows of Hopper's plans, for every number of rows, each beside gemm_mma's case of the problem."""
    made = []
    for usual in gemm_cases("gemm_mma", chip, is_wide=is_wide) if chip.wgmma else []:
        for most, spec in _plan(usual.problem, chip, wgmma=True).steps:
            if spec.kind == "gemm_tma":
                name = f"gemm_tma, {usual.name.partition(', ')[2]}" + (
                    "" if most is None else ", of few tiles"
                )
                made.append((GemmCase(name, usual.problem, GemmPlan(((None, spec),))), usual))
    return made


def _as_case(one: GemmCase, is_wide: bool) -> Case:
    tolerance = 1e-2 if one.problem.y_type == "bf16" else 2e-5
    return Case(
        one.name, one.plan.specs, one.outputs, lambda m: [one.problem.expected()[:m]], tolerance, wide=is_wide
    )


def product_cases(kind: str) -> Callable[[Chip], Iterable[Case]]:
    """Of one of GEMMS, or of gemm_tma."""

    def cases(chip: Chip) -> Iterable[Case]:
        for is_wide in (False, True):
            if kind == "gemm_tma":
                found = [many for many, _ in tma_cases(chip, is_wide=is_wide)]
            else:
                found = gemm_cases(kind, chip, is_wide=is_wide)
                found += _of_any_rows(found)
            yield from (_as_case(one, is_wide) for one in found)

    return cases
