"""Broken synchronisation is noticed: every mutant here is accepted by LLVM, and would be by ptxas, without a word."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpu import emulated_kernels
from gpu.llvm_kernel import replaced, without
from gpu.run_emulated import ORDERS, run_gemm, run_rms_norm
from nanoserve.emulator import AsyncAtExit, AsyncRace, Emulator, EmulatorError, InvalidOperand

Mutation = Callable[[str], str]


def drop(tag: str) -> Mutation:
    return lambda text: without(text, tag)


def one_group_more(groups: int) -> Mutation:
    """Waits leave one more group under way than they may."""
    line = "call void @llvm.nvvm.cp.async.wait.group(i32 {}) ; tile arrived"
    return lambda text: replaced(text, line.format(groups), line.format(groups + 1))


def swap(old: str, new: str) -> Mutation:
    return lambda text: replaced(text, old, new)


# kernel, what is broken, the mutation, and what must be raised where it does not only compute wrong numbers.
MUTANTS: list[tuple[str, str, Mutation, type[Exception] | None]] = [
    ("rms_norm", "no barrier between writing and reading sums", drop("partial sums written"), None),
    ("gemm_f32", "no barrier after writing tiles", drop("tiles written"), None),
    ("gemm_f32", "no barrier before overwriting tiles", drop("tiles read"), None),
    ("gemm_mma", "no wait for the copies", drop("tile arrived"), AsyncRace),
    ("gemm_mma", "waits for one group too few", one_group_more(1), AsyncRace),
    ("gemm_mma", "no barrier after the wait", drop("tile visible"), None),
    ("gemm_mma", "no barrier before overwriting a stage", drop("tile read"), None),
    ("gemm_mma", "copies under way at the end", drop("nothing under way"), AsyncAtExit),
    ("gemm_wgmma", "no wait for the copies", drop("tile arrived"), AsyncRace),
    ("gemm_wgmma", "waits for one group too few", one_group_more(1), AsyncRace),
    ("gemm_wgmma", "no barrier after the wait", drop("tile visible"), None),
    ("gemm_wgmma", "no wait for the products", drop("product done"), AsyncRace),
    ("gemm_wgmma", "no fence before the first product", drop("registers ready"), InvalidOperand),
    ("gemm_wgmma", "copies under way at the end", drop("nothing under way"), AsyncAtExit),
    ("gemm_wgmma", "tiles written without the swizzle", swap(" xor i32 ", " or i32 "), None),
]


def run(emulator: Emulator, kernel: str, order: int) -> None:
    if kernel == "rms_norm":
        run_rms_norm(emulator, 2, 200, order)
    else:
        run_gemm(emulator, kernel, 65, 70, 264, order)


@pytest.mark.parametrize("kernel", ["rms_norm", "gemm_f32", "gemm_mma", "gemm_wgmma"])
def test_as_written_they_pass(kernel: str) -> None:
    emulator = Emulator(getattr(emulated_kernels, kernel)())
    for order in ORDERS:
        run(emulator, kernel, order)


@pytest.mark.parametrize(
    ("kernel", "mutation", "error"),
    [(kernel, mutation, error) for kernel, _, mutation, error in MUTANTS],
    ids=[f"{kernel}: {what}" for kernel, what, _, _ in MUTANTS],
)
def test_mutants_are_caught(kernel: str, mutation: Mutation, error: type[Exception] | None) -> None:
    """By an exception in every order, where one is named, and else by wrong numbers or an exception in at least one."""
    emulator = Emulator(mutation(getattr(emulated_kernels, kernel)()))
    caught = []
    for order in ORDERS:
        try:
            run(emulator, kernel, order)
        except (AssertionError, EmulatorError) as problem:
            caught.append(type(problem))
    assert caught
    if error is not None:
        assert caught == [error] * len(ORDERS)
