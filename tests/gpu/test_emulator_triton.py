"""Kernels that Triton compiled ahead of time run in the emulator: its own LLVM IR, inline PTX and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanoserve.emulator import AsyncRace, Emulator
from support.bfloat16 import from_bf16, to_bf16


@triton.jit
def matmul(A, B, C, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """C[m, n] = A[m, k] B[k, n], a tile per program."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        at = start + depth
        a = tl.load(
            A + rows[:, None] * k + at[None, :], mask=(rows < m)[:, None] & (at < k)[None, :], other=0.0
        )
        b = tl.load(
            B + at[:, None] * n + columns[None, :], mask=(at < k)[:, None] & (columns < n)[None, :], other=0.0
        )
        total = tl.dot(a, b, total)
    tl.store(
        C + rows[:, None] * n + columns[None, :], total, mask=(rows < m)[:, None] & (columns < n)[None, :]
    )


def compiled(chip: int, element: str, rows: int) -> Any:
    types = {"A": f"*{element}", "B": f"*{element}", "C": "*fp32", "m": "i32", "n": "i32", "k": "i32"}
    tiles = {"BM": rows, "BN": 64, "BK": 32}
    signature = types | dict.fromkeys(tiles, "constexpr")
    divisible = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 4, 5)}
    source = ASTSource(fn=matmul, signature=signature, constexprs=tiles, attrs=divisible)
    options = {"num_warps": 4, "num_stages": 3}
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


@pytest.fixture(autouse=True)
def cache_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("chip", "element", "rows", "instruction"),
    [
        (80, "bf16", 32, "mma.sync.aligned.m16n8k16"),
        (90, "bf16", 64, "wgmma.mma_async"),
        (80, "fp32", 32, "tf32"),
    ],
)
def test_matmul(chip: int, element: str, rows: int, instruction: str) -> None:
    kernel = compiled(chip, element, rows)
    text = kernel.asm["llir"]
    assert instruction in text
    m, n, k = 75, 80, 112
    rng = np.random.default_rng(chip)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
    args = [a, b] if element == "fp32" else [to_bf16(a), to_bf16(b)]
    if element == "bf16":
        a, b = from_bf16(args[0]), from_bf16(args[1])
    emulator = Emulator(text)
    grid = (-(-m // rows), -(-n // 64))
    for order in range(4):
        c = np.full((m, n), np.nan, np.float32)
        # Triton appends two pointers to scratch memory, which such a kernel does not use.
        emulator.launch("matmul", grid, 128, kernel.metadata.shared, [*args, c, m, n, k, 0, 0], order)
        tolerance = 3e-3 if element == "fp32" else 1e-6  # tf32 keeps ten bits of each factor
        np.testing.assert_allclose(c, a.astype(np.float64) @ b, atol=tolerance * k**0.5 * 4)


def test_a_broken_wait_is_noticed() -> None:
    kernel = compiled(80, "bf16", 32)
    text = kernel.asm["llir"]
    assert "cp.async.wait.group(i32 2)" in text
    args: list[Any] = [
        np.zeros((64, 64), np.uint16),
        np.zeros((64, 64), np.uint16),
        np.zeros((64, 64), np.float32),
    ]
    broken = Emulator(text.replace("cp.async.wait.group(i32 2)", "cp.async.wait.group(i32 3)"))
    with pytest.raises(AsyncRace):
        broken.launch("matmul", (2, 1), 128, kernel.metadata.shared, [*args, 64, 64, 64, 0, 0])
