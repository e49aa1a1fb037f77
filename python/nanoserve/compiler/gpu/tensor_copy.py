"""Authoring layer for GPU kernels, part six: boxes of tensors, brought by the chip's copy engine (TMA of sm_90).

One thread asks for a whole tile: no register and no other thread takes part. That it has come, an mbarrier tells: a
barrier in shared memory whose phase ends when so many threads have arrived and so many bytes have come. Who waits names
the phase by its parity, 0 for the first, then 1, and 0 again; of a phase that has not begun, the one before counts as
over, so that the first wait for parity 1 does not wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanoserve.compiler.bindings import mlir, mlir_gpu
from nanoserve.compiler.builder import Operand, Value, const, i32, index, ir, type_of
from nanoserve.compiler.gpu.memory import SharedMemory
from nanoserve.compiler.gpu.spec import TensorForm
from nanoserve.compiler.gpu.warpgroup import address_of, integer

nvvm, arith, scf, llvm = mlir_gpu().nvvm, mlir().arith, mlir().scf, mlir().llvm

MAP_TYPE = "!llvm.ptr"
# By these a kernel's tensor maps are known again after lowering: no other argument has an alignment of its own.
MAP_ATTRIBUTES = "{llvm.align = 64 : i64}"
_BY_VALUE = "{llvm.byval = !llvm.array<128 x i8>, llvm.align = 64 : i64, nvvm.grid_constant}"
_BARRIER_BYTES = 8


def _shared_pointer(address: Value, space: int = 3) -> Any:
    pointer = llvm.inttoptr(type_of("!llvm.ptr<3>"), address.ir)
    return pointer if space == 3 else llvm.addrspacecast(type_of(f"!llvm.ptr<{space}>"), pointer)


class Mbarriers:
    """So many mbarriers in shared memory."""

    def __init__(self, shared: SharedMemory, count: int) -> None:
        self._count = count
        self._address = address_of(shared.array(count, element="i64", alignment=_BARRIER_BYTES))

    def pointer(self, number: Operand) -> Any:
        """Where one lies."""
        return _shared_pointer(self._address + integer(index(number)) * _BARRIER_BYTES)

    def make(self, arrivals: int) -> None:
        """For so many arrivals a phase; by one thread, before publish_barriers() and a barrier of the block."""
        for number in range(self._count):
            nvvm.mbarrier_init(self.pointer(number), const(arrivals, "i32").ir)

    def arrive(self, number: Operand) -> None:
        """What this thread did before is visible to who waits for the phase."""
        nvvm.mbarrier_arrive(self.pointer(number), results=[type_of("i64")])

    def arrive_expecting(self, number: Operand, num_bytes: int) -> None:
        """The same, and so many bytes of copies belong to the phase."""
        nvvm.mbarrier_arrive_expect_tx(self.pointer(number), const(num_bytes, "i32").ir, results=[])

    def wait(self, number: Operand, parity: Value) -> None:
        """Until the phase of this parity (i32) is over. The hardware may give up early: then it is asked again."""
        loop = scf.WhileOp([], [])
        with ir.InsertionPoint(loop.before.blocks.append()):
            over = nvvm.mbarrier_try_wait(self.pointer(number), parity.ir)
            scf.condition(arith.xori(over, const(1, "i1").ir), [])
        with ir.InsertionPoint(loop.after.blocks.append()):
            scf.yield_([])


def publish_barriers() -> None:
    """The mbarriers this thread has made are visible to the copy engine; to other threads, after a barrier."""
    nvvm.fence_mbarrier_init()


class TensorMap:
    """An argument of a kernel, whose form the spec states."""

    def __init__(self, value: Any, form: TensorForm) -> None:
        self._value, self._form = value, form

    def copy(self, at: Sequence[Operand], target: Value, barriers: Mbarriers, number: Operand) -> None:
        """Begins to bring the box whose first element is `at`, the innermost first, to an address of shared memory.

        An mbarrier counts the bytes of all of it, also of what lies beyond the tensor and is zeros.
        """
        if len(at) != len(self._form.box):
            raise ValueError(f"a box of {len(self._form.box)} dimensions, not of {len(at)}")
        nvvm.cp_async_bulk_tensor_shared_cluster_global(
            _shared_pointer(target, 7),
            self._value,
            [i32(index(i)).ir for i in at],
            barriers.pointer(number),
            [],
        )


def pass_maps_by_value(kernels: Any) -> None:
    """Makes the tensor maps of lowered kernels what they are to the driver: 128 bytes among the parameters.

    A gpu.func cannot say so; instructions read them in the constant bank of parameters, where no fence is needed.
    """
    marked = ir.DictAttr.parse(MAP_ATTRIBUTES, kernels.context)
    by_value = ir.DictAttr.parse(_BY_VALUE, kernels.context)
    for operation in kernels.regions[0].blocks[0].operations:
        attributes = operation.attributes
        if operation.name == "llvm.func" and "arg_attrs" in attributes:
            attributes["arg_attrs"] = ir.ArrayAttr.get(
                [by_value if each == marked else each for each in attributes["arg_attrs"]], kernels.context
            )
