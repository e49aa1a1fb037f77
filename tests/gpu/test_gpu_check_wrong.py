"""What the check is there to notice: kernels that compute something else, bits that depend on who else is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools.gpu_check import (
    attention_speed,
    attention_work,
    kernel_cases,
    numerics,
    product_speed,
)
from tools.gpu_check.case import Case
from tools.gpu_check.engine_answers import check_answers
from tools.gpu_check.engine_speed import engine_of
from tools.gpu_check.engines import ARITHMETICS
from tools.gpu_check.gpu import Gpu
from tools.gpu_check.places import KERNELS
from tools.gpu_check.record import Record
from tools.gpu_check.shapes import attention_form, models, products

from nanoserve.compiler.gpu.artifact import ArtifactStore
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.kernels.cuda import library
from nanoserve.kernels.cuda.library import key_of, load_artifacts

CHIP = parse_chip("sm_90a")


@pytest.mark.parametrize(
    ("kind", "right", "wrong", "told"),
    [
        ("norm", "fmul", "fadd", "error"),
        ("embedding", "fadd", "fsub", "elements differ"),
    ],
)
def test_a_kernel_that_computes_something_else_fails_and_is_named(
    damaged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    right: str,
    wrong: str,
    told: str,
) -> None:
    monkeypatch.setattr(library, "toolchain", library.toolchain)
    case = next(iter(kernel_cases.CASES[kind](CHIP)))
    (spec,) = case.specs
    made = load_artifacts([spec], CHIP)[spec]
    assert right in made.llvm_ir
    changed = replace(made, llvm_ir=made.llvm_ir.replace(right, wrong))
    ArtifactStore(damaged / KERNELS).store(key_of(spec, CHIP), changed)
    record = Record(tmp_path / "record.json", 60)
    monkeypatch.setattr(numerics, "CASES", {kind: lambda chip: [case]})
    monkeypatch.setattr(numerics, "kinds", lambda: [kind])
    monkeypatch.setattr(record, "has_time", lambda name, seconds=0.0: name == case.name)
    numerics.run(Gpu(damaged, fake=True), record)
    (bad,) = [check for check in record.data["checks"] if not check["passed"]]
    assert bad["name"] == case.name
    assert told in bad["detail"]


def test_bits_that_depend_on_the_number_of_rows_are_noticed(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "toolchain", library.toolchain)

    def run(launch: Any, m: int) -> list[np.ndarray]:
        return [np.full((m, 2), 1 + (m == 17) * 2**-23, np.float32)]

    case = Case("invented", (), run, lambda m: [np.ones((m, 2))], 1e-5)
    record = Record(tmp_path / "record.json", 60)
    numerics._check(Gpu(prepared, fake=True), record, case)
    assert [(check["name"], check["passed"]) for check in record.data["checks"]] == [
        ("invented", True), ("invented: a row's bits", False),
    ]  # fmt: skip
    assert "other bits with [17] rows" in record.data["checks"][1]["detail"]


def test_a_product_of_a_real_model_that_is_wrong_fails_and_is_named(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what PyTorch has for it, before its time is taken."""
    monkeypatch.setattr(library, "toolchain", library.toolchain)
    made, _ = products(models(True)["tiny"])["out"]
    record = Record(tmp_path / "record.json", 60)
    product_speed.measure(Gpu(damaged, fake=True), record, "tiny", made, "mma", None)
    spec = product_speed.plan_of(made, CHIP, ARITHMETICS["mma"]).spec_for(17)
    right = load_artifacts([spec], CHIP)[spec]
    assert "fadd" in right.llvm_ir  # of what is there
    ArtifactStore(damaged / KERNELS).store(
        key_of(spec, CHIP), replace(right, llvm_ir=right.llvm_ir.replace("fadd", "fsub"))
    )
    product_speed.measure(Gpu(damaged, fake=True), record, "tiny", made, "mma", None)
    assert [(check["name"], check["passed"]) for check in record.data["checks"]] == [
        ("out of tiny by mma: PyTorch's, nearly", True), ("out of tiny by mma: PyTorch's, nearly", False),
    ]  # fmt: skip


def test_attention_that_is_wrong_fails_and_is_named(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here because it looks at one key less."""
    monkeypatch.setattr(library, "toolchain", library.toolchain)
    record, device = Record(tmp_path / "record.json", 60), Gpu(prepared, fake=True)
    form = attention_form(models(True)["tiny"], CHIP)
    attention_speed._check(device, record, "right", form)
    expected = attention_work.PagedKeys.expected
    monkeypatch.setattr(
        attention_work.PagedKeys, "expected", lambda self, row, q, start: expected(self, row, q, start - 1)
    )
    attention_speed._check(device, record, "wrong", form)
    assert [(check["name"], check["passed"]) for check in record.data["checks"]] == [
        (f"attention of {name}, {what}: PyTorch's, nearly", name == "right")
        for name in ("right", "wrong") for what in ("decoding", "a chunk")
    ]  # fmt: skip


def test_answers_that_are_wrong_fail_and_are_named(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "toolchain", library.toolchain)
    record, device = Record(tmp_path / "record.json", 60), Gpu(prepared, fake=True)
    engine = engine_of(device, models(True)["tiny"])
    native = engine.executor._native

    class Off:
        """By one, each token that the device has chosen."""

        def __getattr__(self, name: str) -> Any:
            found = getattr(native, name)
            return (lambda number: (found(number) + 1) % 300) if name == "finish" else found

    monkeypatch.setattr(engine.executor, "_native", Off())
    check_answers(device, record, "off", engine)
    assert [check["name"] for check in record.data["checks"] if not check["passed"]] == [
        "off: the tokens that the device chooses are the host's",
        "off: greedy tokens are those of the largest logits",
    ]
