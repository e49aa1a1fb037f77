"""Authoring layer for GPU kernels, part seven: a kernel that begins before the one in front of it ends (sm_90).

NVIDIA calls it programmatic dependent launch. A kernel that is launched so may begin as soon as every block of the kernel
in front runs and has said start_next(), or has ended; await_previous() waits until all of that kernel is done and what it wrote
can be seen. Every kernel says both at its very beginning, in every thread, so a kernel that is past its wait knows that all
kernels before it are done, not only the last one. What may stand between the two touches no memory that a kernel writes: here,
hints about weights. On a chip that does not have it, or launched the old way, both do nothing.

CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, "griddepcontrol".
"""

from __future__ import annotations

from typing import Any

from nanoserve.compiler.bindings import mlir
from nanoserve.compiler.builder import Value
from nanoserve.compiler.gpu.memory import LINE, Array
from nanoserve.compiler.gpu.warpgroup import address_of, integer

llvm = mlir().llvm

START_NEXT, AWAIT_PREVIOUS = "griddepcontrol.launch_dependents;", "griddepcontrol.wait;"
# No access to memory may move across either; LLVM's intrinsics of the same names do not say so.
_MEMORY = "~{memory}"


def _assembly(text: str, operands: list[Any], constraints: str) -> None:
    llvm.inline_asm(None, operands, text, constraints, has_side_effects=True)


def start_next() -> None:
    """The kernel behind may begin, once every block has said so."""
    _assembly(START_NEXT, [], _MEMORY)


def await_previous() -> None:
    """Until the kernel in front is done, and all before it."""
    _assembly(AWAIT_PREVIOUS, [], _MEMORY)


def prefetch(source: Array, row: Value, row_bytes: int, num_bytes: int, begin: Value) -> None:
    """Asks for a piece of a row to be brought to the L2 cache: a hint, nothing waits for it.

    Args:
        row_bytes: from one row to the next. num_bytes, begin: of the piece, multiples of 16, within the row.
    """
    if num_bytes % LINE or not 0 < num_bytes <= row_bytes:
        raise ValueError(f"prefetch: {num_bytes} bytes must be a multiple of {LINE}, at most {row_bytes}")
    address = address_of(source) + integer(row) * row_bytes + integer(begin)
    _assembly(f"cp.async.bulk.prefetch.L2.global [$0], {num_bytes};", [address.ir], "l")


def begin_early(ptx: str, llvm_ir: str, target: str) -> tuple[str, str]:
    """A kernel that another compiler made, in both forms, with the two at its beginning.

    Args:
        target: the chip it is for, in PTX's words: what it was made for may not know them.

    Raises:
        ValueError: it is not one kernel of the form that is expected.
    """
    return (
        _with_first(_for_target(ptx, target), "{\n", f"\t{START_NEXT}\n\t{AWAIT_PREVIOUS}\n", ".entry "),
        _with_first(
            llvm_ir, "{\n", "".join(f'  call void asm sideeffect "{text}", "{_MEMORY}"()\n' for text in (START_NEXT, AWAIT_PREVIOUS)),
            "define ptx_kernel ",
        ),
    )  # fmt: skip


def _for_target(ptx: str, target: str) -> str:
    head, mark, rest = ptx.partition(".target ")
    if not mark:
        raise ValueError("PTX without a target")
    _, end, rest = rest.partition("\n")
    return f"{head}{mark}{target}{end}{rest}"


def _with_first(text: str, opening: str, added: str, kernel: str) -> str:
    if text.count(kernel) != 1:
        raise ValueError(f"{text.count(kernel)} kernels, one was expected")
    start = text.index(opening, text.index(kernel)) + len(opening)
    first_line = text[start:].partition("\n")[0]
    if first_line.rstrip().endswith(":"):  # the first block has a name
        start += len(first_line) + 1
    return text[:start] + added + text[start:]
