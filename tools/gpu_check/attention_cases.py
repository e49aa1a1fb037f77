"""Cases of attention over pages: the last rows of sequences of several lengths."""

from __future__ import annotations

from collections.abc import Iterable

from tools.gpu_check.case import Array, Case, Launch

from gpu.attention_problem import FORMS, NARROW, AttentionProblem, form_of, numbers
from nanoserve.compiler.gpu.chip import Chip

_LENGTHS = (1, 37, 300, 1100)
_WIDE_FORMS = {
    "bf16, 128 dims": form_of(8, 4, 128, **NARROW),
    "bf16, 128 dims in pairs": form_of(8, 2, 128, **NARROW),
}


def attention_problems(*, is_wide: bool = False) -> Iterable[tuple[str, AttentionProblem]]:
    for name, form in (_WIDE_FORMS if is_wide else FORMS).items():
        yield name, AttentionProblem(form, _LENGTHS)


def attention_cases(chip: Chip) -> Iterable[Case]:
    """Of `m` rows of the longest."""
    for is_wide in (False, True):
        for name, problem in attention_problems(is_wide=is_wide):
            form = problem.form

            def counts(m: int) -> tuple[int, ...]:
                return (1, min(m, 37), min(m, 300), min(m, 70))

            def run(launch: Launch, m: int, problem: AttentionProblem = problem) -> list[Array]:
                out = problem.attend(counts(m), launch=launch)
                return [numbers(problem.form, out[problem.rows(counts(m))])]

            def expected(m: int, problem: AttentionProblem = problem) -> list[Array]:
                return [problem.reference(counts(m))]

            yield Case(
                f"attention {name}", (form.attend_spec(), form.split_spec(), form.merge_spec()), run, expected,
                1.5e-2 if form.narrow else 5e-6, row_by_row=False, wide=is_wide,
            )  # fmt: skip
