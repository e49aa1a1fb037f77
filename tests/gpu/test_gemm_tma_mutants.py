"""A GEMM with one of its barriers, waits or copies broken: every mutant is accepted by LLVM and ptxas, and noticed here.

The mutations are of the kernel's own LLVM IR, as it is compiled for a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from gpu.llvm_kernel import replaced, without_call
from gpu.matrix_problem import MatrixProblem
from gpu.run_kernel import artifact
from nanoserve.compiler.gpu.chip import parse_chip
from nanoserve.compiler.gpu.ptx import ptx_from_llvm
from nanoserve.compiler.gpu.spec import GpuKernelSpec
from nanoserve.emulator import AsyncRace, Deadlock, EmulatorError, InvalidOperand
from nanoserve.emulator.emulated_kernel import EmulatedKernel
from nanoserve.kernels.cuda.epilogue import Epilogue
from nanoserve.kernels.cuda.gemm_tma import gemm_tma_spec
from nanoserve.kernels.cuda.wgmma_tile import Shape

ORDERS = (0, 1, 2, 3, 4)
SHAPE = Shape(2, 8, 3)
CUTS = 3  # of two tiles, and of three
STAGE_BYTES = (2 * 64 + 8) * 128
PROBLEM = MatrixProblem(13, 64 * 8 - 3, 101, x="bf16", dtype="bf16")  # the ring is used more than twice
MULTIPLY, COPY = 0, 1  # whose wait comes first in the text
Mutation = Callable[[str], str]


def spec_of() -> GpuKernelSpec:
    return gemm_tma_spec(PROBLEM.k, PROBLEM.n, PROBLEM.ldx, PROBLEM.ldy, SHAPE, Epilogue(), cuts=CUTS)


def swap(old: str, new: str) -> Mutation:
    return lambda text: replaced(text, old, new)


WAIT = re.compile(
    r"(%\d+) = call i1 @llvm\.nvvm\.mbarrier\.try\.wait[.\w]*\((ptr addrspace\(3\) %\d+), i32 (%\d+)\)"
)


def no_wait(which: int) -> Mutation:
    return lambda text: _at(text, which, lambda m: f"{m[1]} = icmp eq i32 0, 0")


def other_parity(which: int) -> Mutation:
    def mutate(m: re.Match[str]) -> str:
        return f"%other = xor i32 {m[3]}, 1\n  " + m[0].replace(f"i32 {m[3]}", "i32 %other")

    return lambda text: _at(text, which, mutate)


def asks_once(which: int) -> Mutation:
    def mutate(text: str) -> str:
        waits = [m[1] for m in WAIT.finditer(text)]
        return replaced(text, f"xor i1 {waits[which]}, true", f"and i1 {waits[which]}, false")

    return mutate


def _at(text: str, which: int, mutate: Callable[[re.Match[str]], str]) -> str:
    found = list(WAIT.finditer(text))
    assert len(found) == 2
    m = found[which]
    return text[: m.start()] + mutate(m) + text[m.end() :]


def no_arrival(text: str) -> str:
    found = re.search(r"(%\d+) = call i64 @llvm\.nvvm\.mbarrier\.arrive\.shared\(.*\)", text)
    assert found is not None
    return text.replace(found[0], f"{found[1]} = add i64 0, 0")


COPY_CALL = "llvm.nvvm.cp.async.bulk.tensor.g2s.tile.2d"
INIT = "llvm.nvvm.mbarrier.init.shared"
MUTANTS: dict[str, tuple[Mutation, type[Exception] | None]] = {
    "no fence after the mbarriers are made": (without_call("llvm.nvvm.fence.mbarrier_init.release.cluster"), AsyncRace),
    "no barrier after the mbarriers are made": (without_call("llvm.nvvm.barrier.cta.sync.aligned.all"), None),
    "an mbarrier is not made": (without_call(INIT), InvalidOperand),
    "multiplies without a wait": (no_wait(MULTIPLY), AsyncRace),
    "multiplies after a wait for the other parity": (other_parity(MULTIPLY), None),
    "multiplies after asking once": (asks_once(MULTIPLY), AsyncRace),
    "copies without a wait": (no_wait(COPY), None),
    "copies after a wait for the other parity": (other_parity(COPY), Deadlock),
    "copies after asking once": (asks_once(COPY), None),
    "nobody says that a place is empty": (no_arrival, Deadlock),
    "a place is empty one warp too early": (swap(" i32 8)\n", " i32 7)\n"), None),
    "a place is empty one warp too late": (swap(" i32 8)\n", " i32 9)\n"), Deadlock),
    "two must fill a place": (swap(" i32 1)\n", " i32 2)\n"), Deadlock),
    "fewer bytes are expected": (swap(f"i32 {STAGE_BYTES})", f"i32 {STAGE_BYTES - 128})"), InvalidOperand),
    "more bytes are expected": (swap(f"i32 {STAGE_BYTES})", f"i32 {STAGE_BYTES + 128})"), Deadlock),
    "the weight is not copied": (without_call(COPY_CALL), Deadlock),
    "x is not copied": (without_call(COPY_CALL, 1), Deadlock),
    "no wait for the products": (without_call("llvm.nvvm.wgmma.wait_group.sync.aligned"), AsyncRace),
    "no fence before the products": (without_call("llvm.nvvm.wgmma.fence.sync.aligned"), InvalidOperand),
}  # fmt: skip


def run(kernel: EmulatedKernel, order: int) -> None:
    def launch(spec: GpuKernelSpec, *args: np.ndarray | int, order: int, chip: str) -> None:
        kernel(*args, order=order)

    found = PROBLEM.run(spec_of(), order=order, launch=launch)
    np.testing.assert_allclose(found, PROBLEM.expected(), atol=1e-5, rtol=1e-5)


def test_as_written_it_passes() -> None:
    spec = spec_of()
    kernel = EmulatedKernel(spec, artifact(spec, "sm_90a"))
    for order in ORDERS:
        run(kernel, order)


@pytest.mark.parametrize("what", MUTANTS)
def test_mutants_are_caught(what: str) -> None:
    """By an exception in every order, where one is named, and else by wrong numbers or an exception in at least one."""
    mutate, error = MUTANTS[what]
    spec = spec_of()
    made = artifact(spec, "sm_90a")
    text = mutate(made.llvm_ir)
    ptx_from_llvm(text, parse_chip("sm_90a"))
    kernel = EmulatedKernel(spec, made, text)
    caught = []
    for order in ORDERS:
        try:
            run(kernel, order)
        except (AssertionError, EmulatorError) as problem:
            caught.append(type(problem))
    assert caught
    if error is not None:
        assert caught == [error] * len(ORDERS)


def test_tiles_without_the_swizzle_are_noticed() -> None:
    """The map says it, not the kernel."""
    spec = spec_of()
    plain = tuple(
        (name, kind if isinstance(kind, str) else kind._replace(swizzle=0)) for name, kind in spec.arguments
    )
    kernel = EmulatedKernel(replace(spec, arguments=plain), artifact(spec, "sm_90a"))
    with pytest.raises(AssertionError):
        run(kernel, 0)


def test_a_deadlock_names_what_is_waited_for() -> None:
    spec = spec_of()
    made = artifact(spec, "sm_90a")
    kernel = EmulatedKernel(spec, made, without_call(COPY_CALL, 1)(made.llvm_ir))
    with pytest.raises(
        Deadlock,
        match=r"256 at mbarrier\.try_wait \(line \d+\), the mbarrier at offset 53248 of shared memory, which lacks 0 "
        r"arrivals and 1024 bytes, 1 at mbarrier\.try_wait .* which lacks 8 arrivals and 0 bytes, 31 ended",
    ):
        run(kernel, 0)
