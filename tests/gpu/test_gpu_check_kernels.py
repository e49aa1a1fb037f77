"""The check's cases of kernels at real widths, and how it times them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.gpu.check_folder import failed
from tools.gpu_check import (
    attention_cases,
    engines,
    gpu,
    kernel_cases,
    kernel_speed,
    product_speed,
)
from tools.gpu_check.ceilings import Ceilings
from tools.gpu_check.record import Record
from tools.gpu_check.shapes import models, products
from tools.gpu_check.tiny_models import BF16

from gpu.run_kernel import launch
from nanoserve.compiler.gpu.chip import parse_chip

CHIP = parse_chip("sm_90a")


def launch_there(spec: Any, *args: Any, order: int = 0, chip: str = "") -> None:
    """On the chip that has all instructions, whatever a problem asks for."""
    launch(spec, *args, order=order, chip=CHIP.name)


@pytest.mark.parametrize("kind", kernel_cases.kinds())
def test_kernels_of_real_widths_are_right(kind: str) -> None:
    cases = [case for case in kernel_cases.CASES[kind](CHIP) if case.wide]
    assert cases
    for case in cases:
        for out, wanted in zip(case.run(launch_there, 3), case.expected(3), strict=True):
            error = np.abs(out - wanted) / (1 + np.abs(wanted))
            assert np.nan_to_num(error, nan=np.inf).max() <= case.tolerance, case.name


def test_wide_attention_is_the_same_by_rows_and_by_segments() -> None:
    for _, problem in attention_cases.attention_problems(is_wide=True):
        assert problem.form.head_dim == 128
        rows = problem.attend((1,) * len(problem.lengths), launch=launch)
        assert rows[problem.last].tobytes() == problem.split(launch=launch)[problem.last].tobytes()


def test_the_kernels_of_decoding_real_models_have_cases() -> None:
    """Every shape of a tile that a real model's product takes with few rows, and the block of its choice of tokens."""

    def shape(spec: Any) -> tuple[Any, ...]:
        fields = dict(spec.params)
        return tuple(fields[name] for name in ("wm", "wn", "i", "j", "stages", "groups"))

    cased = {
        shape(spec)
        for case in kernel_cases.CASES["gemm_mma"](CHIP)
        for spec in case.specs
    }  # fmt: skip
    mma = engines.arithmetics(CHIP)["mma"]
    for config in models(False).values():
        for made, _ in products(config).values():
            assert {shape(spec) for spec in product_speed.plan_of(made, CHIP, mma).specs} <= cased
        taken = {
            spec.block for spec in engines.engine_specs(config, CHIP, BF16, "bf16") if spec.kind == "choose"
        }
        assert taken <= {spec.block for case in kernel_cases.CASES["choose"](CHIP) for spec in case.specs}


def test_a_graph_is_timed_behind_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """From an idle stream the host's launch would count; short graphs are timed many at once."""
    put: list[str] = []

    class Mark:
        def __init__(self, device: Any) -> None: ...

        def record(self, stream: Any) -> None:
            put.append("mark")

        def until(self, other: Mark) -> float:
            return 0.1 * (put[::-1][1:].index("mark"))  # ms: of the graphs between the last two

    class Graph:
        def __init__(self, stream: Any, work: Any) -> None:
            work()

        def launch(self, stream: Any) -> None:
            put.append("graph")

    monkeypatch.setattr(gpu, "CudaTimeMark", Mark)
    monkeypatch.setattr(gpu, "CudaGraph", Graph)
    it = SimpleNamespace(stream=SimpleNamespace(synchronize=lambda: None), device=None)
    seconds = gpu.Gpu.seconds(it, lambda i: None, 2, rounds=3)  # type: ignore[arg-type]
    assert seconds == pytest.approx(1e-4 / 2)
    assert put[:4] == ["graph", "mark", "graph", "mark"]  # how long one takes
    assert put[-13:] == ["graph", "mark", *["graph"] * 10, "mark"]  # a millisecond of them


def test_torchs_products_count_its_own_bytes_and_fail_nothing(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = products(models(False)["Llama-3.2-1B"])["out"]
    operands = SimpleNamespace(rows=[8], torch_seconds=lambda m: 1e-3)
    monkeypatch.setattr(product_speed, "ProductOperands", lambda *args: operands)
    it: Any = SimpleNamespace(chip=CHIP, torch=object(), tiny=False, results={})
    product_speed.measure(it, record, "it", made, product_speed.TORCH, Ceilings(1e12, 1e14))
    (row,) = record.data["tables"]["products"]
    size = 2 * (made.rows * made.op.n_in + 8 * made.op.n_in + 8 * made.rows)  # bfloat16, and no residual
    assert row["of_bandwidth"] == pytest.approx(size / 1e-3 / 1e12)
    assert made.op.residual
    assert made.bytes(8) > size
    operands.torch_seconds = lambda m: 1 // 0
    kernel_speed._products(it, record, product_speed.TORCH, None)
    assert failed(record) == []
    assert "ZeroDivisionError" in record.data["skips"][0]["reason"]
