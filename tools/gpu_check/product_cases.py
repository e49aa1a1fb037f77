"""Cases of the matrix products: ragged in every direction, and of as many outputs as a real model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tools.gpu_check.case import MOST_ROWS, WIDE_ROWS, Array, Case, Launch, wide

from gpu.matrix_problem import MatrixProblem
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec
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


def tma_problems(chip: Chip) -> Iterable[tuple[str, MatrixProblem, GpuKernelSpec, GemmPlan, bool]]:
    """Of the kernels for many rows of Hopper's plans: a name, a problem, the kernel, mma's plan, whether it is wide."""
    if not chip.wgmma:
        return
    problems = [(name, options, False) for name, options in _OPTIONS.items()]
    problems += [(name, options, True) for name, options in _WIDE_OPTIONS.items()]
    for name, options, is_wide in problems:
        p = _problem("bf16", "bf16", name, options, is_wide)
        for most, spec in _plan(p, chip, wgmma=True).steps:
            if spec.kind == "gemm_tma":
                title = f"gemm_tma, {name}" if most is None else f"gemm_tma, {name}, of few tiles"
                yield title, p, spec, _plan(p, chip), is_wide


def tma_cases(chip: Chip) -> Iterable[Case]:
    """For every number of rows, though plans have it for many."""
    for title, p, spec, usual, is_wide in tma_problems(chip):

        def run(launch: Launch, m: int, p: MatrixProblem = p, spec: GpuKernelSpec = spec) -> list[Array]:
            return [wide(p.run(spec, m=m, launch=launch))]

        tolerance = 1e-2 if p.y_type == "bf16" else 2e-5
        yield Case(
            title, (spec, *usual.specs), run, lambda m, p=p: [p.expected()[:m]], tolerance, wide=is_wide
        )


def product_cases(kind: str) -> Callable[[Chip], Iterable[Case]]:
    def cases(chip: Chip) -> Iterable[Case]:
        for is_wide in (False, True):
            found = gemm_cases(kind, chip, is_wide=is_wide)
            for one in [*found, *_of_any_rows(found)]:
                tolerance = 1e-2 if one.problem.y_type == "bf16" else 2e-5
                yield Case(
                    one.name, one.plan.specs, one.outputs, lambda m, one=one: [one.problem.expected()[:m]], tolerance,
                    wide=is_wide,
                )  # fmt: skip

    return cases
