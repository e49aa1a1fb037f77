"""Every kind of kernel against a reference, and the bits of a row for any number of rows.

Also whether different kernels for one thing agree to the bit: attention by whole rows and by segments, the float32 product and
the CPU's, the two products on tensor cores.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tools.gpu_check.attention_cases import attention_problems
from tools.gpu_check.case import Case
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.kernel_cases import CASES, is_risky, kinds
from tools.gpu_check.places import EXPECTED
from tools.gpu_check.product_cases import gemm_cases, tma_cases
from tools.gpu_check.record import Record

from gpu.attention_problem import numbers
from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec

ROWS = (1, 3, 16, 17, 64, 65, 300)
_TINY_ROWS = (1, 3, 17, 65)


def specs(chip: Chip, tiny: bool, folder: Path) -> Iterable[GpuKernelSpec]:
    for cases in CASES.values():
        for case in cases(chip):
            if not (tiny and case.wide):
                yield from case.specs


def run(gpu: Gpu, record: Record) -> None:
    """What is likeliest to fault comes after everything else: a fault ends the part."""
    _kinds(gpu, record, [kind for kind in kinds() if not is_risky(kind)])
    for name, compare in (
        ("attention by rows and by segments", _attention_ways),
        ("float32 products and the CPU's", _cpu_products),
    ):
        if record.has_time(name, 1):
            with record.attempt(name):
                compare(gpu, record)
    _kinds(gpu, record, [kind for kind in kinds() if is_risky(kind)])
    _tensor_cores(gpu, record)


def _kinds(gpu: Gpu, record: Record, chosen: list[str]) -> None:
    for kind in chosen:
        if kind not in CASES:
            record.skip(f"numerics of {kind}", "it has no case in tools/gpu_check/kernel_cases.py")
            continue
        for case in CASES[kind](gpu.chip):
            if not (gpu.tiny and case.wide) and record.has_time(case.name, 1):
                with record.attempt(case.name):
                    _check(gpu, record, case)


def _check(gpu: Gpu, record: Record, case: Case) -> None:
    counts = [m for m in (_TINY_ROWS if gpu.tiny else ROWS) if m <= case.most]
    most = counts[-1]
    whole = case.run(gpu.launch, most)
    worst = 0.0
    for found, wanted in zip(whole, case.expected(most), strict=True):
        if case.tolerance == 0:
            passed = found.shape == wanted.shape and found.tobytes() == wanted.astype(found.dtype).tobytes()
            record.check(
                case.name, passed, "" if passed else f"{int((found != wanted).sum())} elements differ"
            )
            continue
        error = np.abs(found - wanted) / (1 + np.abs(wanted))
        worst = max(worst, float(np.nan_to_num(error, nan=np.inf).max()))
    if case.tolerance:
        record.check(case.name, worst < case.tolerance, f"error {worst:.1e}, at most {case.tolerance:.0e}")
    if not case.row_by_row:
        again = case.run(gpu.launch, most)
        same = all(a.tobytes() == b.tobytes() for a, b in zip(again, whole, strict=True))
        record.check(f"{case.name}: twice the same bits", same)
        return
    differ = [
        m for m in counts[:-1]
        if any(a.tobytes() != b[:m].tobytes() for a, b in zip(case.run(gpu.launch, m), whole, strict=True))
    ]  # fmt: skip
    record.check(
        f"{case.name}: a row's bits", not differ, f"other bits with {differ} rows" if differ else f"m = {', '.join(map(str, counts))}"
    )  # fmt: skip


def _attention_ways(gpu: Gpu, record: Record) -> None:
    problems = [*attention_problems(), *([] if gpu.tiny else attention_problems(is_wide=True))]
    for name, problem in problems:
        rows = problem.attend((1,) * len(problem.lengths), launch=gpu.launch)
        parts = problem.split(launch=gpu.launch)
        same = (
            numbers(problem.form, rows[problem.last]).tobytes() == numbers(problem.form, parts[problem.last]).tobytes()
        )  # fmt: skip
        record.check(f"attention {name}: by rows and by segments the same bits", same)


def _cpu_products(gpu: Gpu, record: Record) -> None:
    path = gpu.folder / EXPECTED
    if not path.exists():
        record.skip("float32 products and the CPU's", f"{path.name} was not prepared")
        return
    with np.load(path) as prepared:
        for case in gemm_cases("gemm_f32", gpu.chip):
            m = 65 if gpu.tiny else 300
            found, wanted = case.outputs(gpu.launch, m)[0], prepared[case.name][:m]
            record.check_bits(f"{case.name}: the CPU's bits", found, wanted)


def _tensor_cores(gpu: Gpu, record: Record) -> None:
    for is_wide in (False,) if gpu.tiny else (False, True):
        for many, usual in tma_cases(gpu.chip, is_wide=is_wide):
            name = f"{many.name}: gemm_mma's bits"
            if record.has_time(name, 1):
                with record.attempt(name):
                    m = min((_TINY_ROWS if gpu.tiny else ROWS)[-1], many.problem.m)
                    found, wanted = (one.outputs(gpu.launch, m)[0] for one in (many, usual))
                    record.check_bits(name, found, wanted)
