"""explain shows the kernel as written, after every stage, and as machine code; and the stages do what they say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from nanoserve.compiler import jit
from nanoserve.compiler.explain import explain
from nanoserve.compiler.lowering import STAGES, lower
from nanoserve.compiler.target import AVX2, host
from nanoserve.kernels import attention, convert, embedding, gemm, kv_write, norm

SPECS = [
    gemm.gemm_spec(20, 70, 20, 128, bias=True, activation="gelu_erf", residual=True),
    attention.attention_spec(4, 2, 20, 16, 80, 80, attention.Tiling(2)),
    norm.norm_spec("layernorm", 70, 70, 70, 1e-5, bias=True, gather=True),
    kv_write.kv_write_spec(4, 2, 20, 16, 160, 20),
    embedding.embedding_spec(70, 70, positions=True),
    convert.convert_spec(70, 80, 128, "u8"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_every_stage_is_shown(spec) -> None:  # type: ignore[no-untyped-def]
    steps = explain(spec)
    names = [name for name, _, _ in steps]
    assert names[: len(STAGES) + 1] == ["written", *(stage.name for stage in STAGES)]
    if jit.shutil.which("objdump") and jit.linker():
        assert names[-1] == "assembly"
        assert "vfmadd" in steps[-1][2] or spec.kind in ("embedding", "kv_write", "convert")
    for _, purpose, text in steps:
        assert purpose.endswith(".")
        assert text.strip()


def test_stages_remove_the_dialects_they_lower() -> None:
    after = {name: text for name, _, text in explain(SPECS[1])}

    def dialects(text: str) -> set[str]:
        return set(re.findall(r"\b(scf|vector|memref|arith|math|cf|func)\.\w+", text))

    assert dialects(after["written"]) >= {"scf", "vector", "memref", "arith", "math", "func"}
    gone: set[str] = set()
    for stage, removed in (
        ("control-flow", "scf"), ("vectors", "vector"), ("memory", "memref"), ("arithmetic", "arith"), ("functions", "func"),
    ):  # fmt: skip
        gone.add(removed)
        assert not dialects(after[stage]) & gone, stage
    assert dialects(after["clean-up"]) == set()
    assert "unrealized_conversion_cast" not in after["clean-up"]


def test_stepping_through_gives_the_module_that_runs() -> None:
    stepped, at_once = (jit.build_module(lambda: SPECS[0].build(host())) for _ in range(2))
    with jit.context():
        lower(stepped, host(), lambda stage, text: None)
        lower(at_once, host())
    assert str(stepped) == str(at_once)


def test_stages_are_data() -> None:
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    for stage in STAGES:
        assert re.fullmatch(r"[a-z-]+", stage.name)
        assert stage.purpose.count(".") == 1


def inner_loops(code: str) -> list[list[str]]:
    """Bodies of the loops that hold no other loop, from a disassembly with addresses."""
    lines = re.findall(r"^\s*([0-9a-f]+):\t(.*)$", code, re.MULTILINE)
    at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    spans = []
    for i, (_, text) in enumerate(lines):
        jump = re.match(r"j\w+\s+([0-9a-f]+)", text)
        begin = at.get(int(jump[1], 16)) if jump else None
        if begin is not None and begin <= i and not any(begin <= other < i for other, _ in spans):
            spans.append((begin, i))
    return [[text for _, text in lines[begin : end + 1]] for begin, end in spans]


@pytest.mark.parametrize("rows", [1, 2, 4, 6, 8])
def test_hot_loops_keep_their_accumulators_in_registers(rows: int, tmp_path: Path) -> None:
    """No vector goes to the stack inside a loop of multiply-adds: such a spill costs up to half the speed."""
    objdump = jit.shutil.which("objdump")
    if objdump is None or jit.linker() is None or host().name != "avx512":
        pytest.skip("needs objdump, a linker and AVX-512")
    for spec in (
        attention.attention_spec(8, 4, 128, 16, 1040, 1040, attention.Tiling(rows, 4)),
        attention.attention_spec(8, 4, 128, 16, 1040, 1040, attention.Tiling(rows), dtype="bf16"),
        gemm.gemm_spec(256, 384, 272, 400),
    ):
        engine = jit.compile_kernel(lambda spec=spec: spec.build(host()), host())
        path = tmp_path / "kernel.so"
        path.write_bytes(jit.shared_object(engine, spec.symbol))
        command = [objdump, "--disassemble", "--no-show-raw-insn", path]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        hot = [
            body
            for body in inner_loops(code)
            if sum("vfmadd" in line or "vdpbf16ps" in line for line in body) >= 2 * rows
        ]
        assert len(hot) >= 2, "the loops were not recognised"
        for body in hot:
            assert not [line for line in body if re.search(r"zmm\d+,.*\(%r[sb]p", line)]


def test_the_smaller_target_uses_smaller_registers() -> None:
    if not (jit.shutil.which("objdump") and jit.linker() and host().name in ("avx2", "avx512")):
        pytest.skip("needs objdump, a linker and an x86 CPU with AVX2")
    text = explain(SPECS[0], AVX2)[-1][2]
    assert "%ymm" in text
    assert "%zmm" not in text
