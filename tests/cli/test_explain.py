"""nanoserve explain prints what the compiler does, whole or one stage of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nanoserve.cli import explain as explain_module
from nanoserve.cli.explain import KERNELS
from nanoserve.compiler.explain import explain
from nanoserve.compiler.lowering import STAGES

Run = Callable[..., Any]


def test_all_stages_in_order(run: Run) -> None:
    text = run("explain", "convert").stdout
    headings = [line.split()[2].rstrip(":") for line in text.splitlines() if line.startswith("// ----")]
    named = ["written", *(stage.name for stage in STAGES)]
    assert headings[: len(named)] == named
    assert headings[len(named) :] in ([], ["assembly"])
    assert text.startswith("// convert: rows")


def test_one_stage_is_its_text_alone(run: Run) -> None:
    steps = {name: text for name, _, text in explain(KERNELS["norm"][0]())}
    for stage in ("written", "vectors"):
        assert run("explain", "norm", "--stage", stage).stdout == steps[stage].strip() + "\n"


def test_every_kernel_of_the_library_is_there() -> None:
    from pathlib import Path

    folder = Path(explain_module.__file__).parents[1] / "kernels"
    builders = {path.stem for path in folder.glob("*.py") if "\ndef build(" in path.read_text()}
    assert set(KERNELS) == builders
    for name, (make, _) in KERNELS.items():
        assert make().kind == name


def test_the_list_names_every_kernel(run: Run) -> None:
    listed = run("explain", "--list").stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(KERNELS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "KERNEL: is missing, it must be one of gemm, attention, norm, "),
        (["softmax"], "KERNEL: 'softmax' must be one of gemm, attention, norm, "),
        (["norm", "--stage", "magic"], "--stage: 'magic' must be one of written, simplify, "),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(run: Run, words: list[str], message: str) -> None:
    result = run("explain", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")


def test_assembly_without_the_tools_says_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoserve.compiler.explain.shutil.which", lambda name: None)
    result = run("explain", "norm", "--stage", "assembly")
    assert result.exit_code == 2
    assert result.stderr == "error: --stage: assembly needs objdump and a linker (ld or cc) on the PATH\n"
