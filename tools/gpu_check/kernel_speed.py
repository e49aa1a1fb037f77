"""The products and the attention of real shapes by themselves: right, their part of the ceilings, and PyTorch's beside them.

Weights, keys and values are more than the cache holds: launches take turns among copies. Times are medians of graphs of
several launches, so gaps between them count as they do in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from tools.gpu_check import attention_speed, product_speed
from tools.gpu_check.ceilings import Ceilings
from tools.gpu_check.engines import arithmetics
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.record import Record
from tools.gpu_check.shapes import attention_form, models, products

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.compiler.gpu.spec import GpuKernelSpec


def specs(chip: Chip, tiny: bool, folder: Path) -> Iterable[GpuKernelSpec]:
    for config in models(tiny).values():
        for made, _ in products(config).values():
            for one in arithmetics(chip, ours=True).values():
                yield from product_speed.plan_of(made, chip, one).specs
        form = attention_form(config, chip)
        yield from (form.attend_spec(), form.split_spec(), form.merge_spec())


def run(gpu: Gpu, record: Record) -> None:
    """One arithmetic after another, so that one that faults takes no other's numbers with it."""
    ceilings = Ceilings.of(gpu.results.get("ceilings"))
    if ceilings is None:
        record.skip("fractions of the ceilings", "they were not measured: times only")
    forms = {name: attention_form(config, gpu.chip) for name, config in models(gpu.tiny).items()}
    for name, form in forms.items():
        if record.has_time(f"attention of {name}", 4):
            attention_speed.measure(gpu, record, name, form, ceilings)
    usual, *others = arithmetics(gpu.chip, ours=True)
    _products(gpu, record, usual, ceilings)
    if gpu.torch is not None:
        for name, form in forms.items():
            _beside(
                record, f"attention of {name} by torch",
                lambda name=name, form=form: attention_speed.measure_torch(gpu, record, name, form, ceilings),
            )  # fmt: skip
        _products(gpu, record, product_speed.TORCH, ceilings)
    for by in others:
        _products(gpu, record, by, ceilings)


def _products(gpu: Gpu, record: Record, by: str, ceilings: Ceilings | None) -> None:
    for name, config in models(gpu.tiny).items():
        for key, (made, _) in products(config).items():
            told = f"{key} of {name} by {by}"
            if not record.has_time(told, 3):
                continue

            def measure(name: str = name, made: product_speed.Product = made) -> None:
                product_speed.measure(gpu, record, name, made, by, ceilings)

            if by == product_speed.TORCH:
                _beside(record, told, measure)
            else:
                with record.attempt(told):
                    measure()


def _beside(record: Record, name: str, measure: Callable[[], None]) -> None:
    """Another's trouble is told, and fails nothing of ours."""
    try:
        measure()
    except Exception as error:
        record.skip(name, f"{type(error).__name__}: {str(error)[:200]}")
