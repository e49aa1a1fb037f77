"""Tensor copies and mbarriers in the emulator: what they bring, and what it says of their misuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gpu.llvm_kernel import Kernel, Value
from nanoserve.compiler.gpu.spec import TensorForm
from nanoserve.emulator import (
    AsyncAtExit,
    AsyncRace,
    Deadlock,
    Emulator,
    IllegalAddress,
    InvalidLaunch,
    InvalidOperand,
    MisalignedAddress,
    UnsupportedInstruction,
)
from nanoserve.emulator.tensor_map import TensorArgument

GLOBAL = "ptr addrspace(1)"
MAP = 'ptr byval([128 x i8]) align 64 "nvvm.grid_constant"'
TILE_BYTES = 16384
ORDERS = (0, 1, 2, 3)
Step = Callable[["Copying"], None]


class Copying(Kernel):
    """One thread, an mbarrier, room for a tile, and steps that a test strings together."""

    def __init__(self, rank: int = 2) -> None:
        params = {"map": MAP, "y": GLOBAL, **{f"c{d}": "i32" for d in range(rank)}}
        super().__init__("copying", params, {"tile": (TILE_BYTES, 1024), "bar": (8, 8)})
        self.rank = rank

    def make(self, count: int = 1) -> None:
        self.call("void", "llvm.nvvm.mbarrier.init.shared", self.shared("bar"), self.const(count))

    def fence(self) -> None:
        self.call("void", "llvm.nvvm.fence.mbarrier_init.release.cluster")

    def expect(self, num_bytes: int) -> None:
        name = "llvm.nvvm.mbarrier.arrive.expect.tx.scope.cta.space.cta"
        self.call("i64", name, self.shared("bar"), self.const(num_bytes))

    def arrive(self) -> None:
        self.call("i64", "llvm.nvvm.mbarrier.arrive.shared", self.shared("bar"))

    def copy(self, offset: int = 0, rank: int | None = None, multicast: bool = False) -> None:
        rank = self.rank if rank is None else rank
        to = self.cast("addrspacecast", self.at(self.shared("tile"), offset, "i8"), "ptr addrspace(7)")
        at = [self.p[f"c{d}"] for d in range(rank)]
        flags = [
            self.const(0, "i16"),
            self.const(0, "i64"),
            self.const(int(multicast), "i1"),
            self.const(0, "i1"),
        ]
        name = f"llvm.nvvm.cp.async.bulk.tensor.g2s.tile.{rank}d"
        self.call(
            "void", name, to, self.shared("bar"), Value(self, "%map", "ptr"), *at, *flags, self.const(0)
        )

    def wait(self, parity: int = 0) -> None:
        """Asks until it is over."""
        self._count += 1
        again, after = f"again{self._count}", f"over{self._count}"
        self.emit(f"br label %{again}")
        self._begin(again)
        name = "llvm.nvvm.mbarrier.try.wait.parity.scope.cta.space.cta"
        over = self.call("i1", name, self.shared("bar"), self.const(parity))
        self.emit(f"br {over.typed}, label %{after}, label %{again}")
        self._begin(after)

    def show(self) -> None:
        """The tile, to y."""
        for place in range(self.shown):
            self.store(self.load(self.shared("tile"), place, "i16", align=2), self.p["y"], place, align=2)

    shown = 0


def kernel(*steps: Step, rank: int = 2, shown: int = 0) -> Emulator:
    made = Copying(rank)
    made.shown = shown
    for step in steps:
        step(made)
    return Emulator(made.text())


def boxed(array: np.ndarray, at: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """What a copy brings, of an array whose dimensions are the tensor's backwards."""
    out = np.zeros(box[::-1], array.dtype)
    for place in np.ndindex(out.shape):
        source = tuple(i + c for i, c in zip(place, at[::-1], strict=True))
        if all(0 <= i < n for i, n in zip(source, array.shape, strict=True)):
            out[place] = array[source]
    return out


def form_of(array: np.ndarray, inner: int, box: tuple[int, ...], swizzle: int = 0) -> TensorForm:
    """Of a contiguous array, of whose rows the first `inner` elements are the tensor's."""
    strides = tuple(stride // 2 for stride in array.strides[-2::-1])
    return TensorForm("bf16", (inner, *array.shape[-2:0:-1]), strides, box, swizzle)


def numbered(*shape: int) -> np.ndarray:
    return np.arange(1, np.prod(shape) + 1, dtype=np.uint16).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "inner", "box", "at"),
    [
        ((9, 32), 32, (16, 4), (0, 0)),
        ((9, 32), 29, (16, 4), (16, 7)),  # beyond both ends
        ((9, 32), 32, (16, 4), (-5, -2)),  # before both beginnings
        ((9, 32), 32, (16, 4), (64, 3)),  # all of it outside
        ((2, 5, 40), 33, (8, 4, 2), (32, 3, 0)),  # a dimension's end is not the next one's beginning
        ((3, 2, 4, 16), 16, (8, 2, 2, 2), (8, 3, 1, 1)),
        ((2, 3, 2, 4, 16), 16, (8, 2, 1, 2, 2), (0, 1, 1, 2, 0)),
    ],
)  # fmt: skip
def test_what_a_copy_brings(
    shape: tuple[int, ...], inner: int, box: tuple[int, ...], at: tuple[int, ...]
) -> None:
    x = numbered(*shape)
    size = int(np.prod(box))
    emulator = kernel(
        Copying.make, Copying.fence, lambda k: k.expect(2 * size), Copying.copy, Copying.wait, Copying.show,
        rank=len(box), shown=size,
    )  # fmt: skip
    expected = boxed(x[..., :inner], at, box)
    for order in ORDERS:
        y = np.zeros(size, np.uint16)
        emulator.launch("copying", 1, 1, 0, [TensorArgument(x, form_of(x, inner, box)), y, *at], order)
        np.testing.assert_array_equal(y.reshape(expected.shape), expected)


def test_the_swizzle_permutes_the_lines_of_a_row() -> None:
    x = numbered(20, 64)
    emulator = kernel(
        Copying.make, Copying.fence, lambda k: k.expect(2048), Copying.copy, Copying.wait, Copying.show, shown=1024
    )  # fmt: skip
    y = np.zeros((16, 8, 8), np.uint16)
    emulator.launch("copying", 1, 1, 0, [TensorArgument(x, form_of(x, 64, (64, 16), 128)), y, 0, 2])
    for row in range(16):
        for line in range(8):
            np.testing.assert_array_equal(y[row, line ^ row % 8], x[row + 2, 8 * line : 8 * line + 8])


X = numbered(16, 64)
FORM = form_of(X, 64, (64, 8), 128)
MADE: tuple[Step, ...] = (Copying.make, Copying.fence, lambda k: k.expect(1024))


def run(
    *steps: Step, form: TensorForm = FORM, shown: int = 0, at: tuple[int, ...] = (0, 0), rank: int = 2
) -> None:
    for order in ORDERS:
        args: list[Any] = [TensorArgument(X, form), np.zeros(max(shown, 1), np.uint16), *at]
        kernel(*steps, rank=rank, shown=shown).launch("copying", 1, 1, 0, args, order)


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        ((*MADE, Copying.copy, Copying.show), AsyncRace, "the destination of an asynchronous copy"),
        ((*MADE, Copying.copy, lambda k: k.store(k.const(1), k.shared("tile"), 3)), AsyncRace, "is going to write"),
        ((*MADE, Copying.copy, Copying.copy), AsyncRace, "is going to write"),
        ((*MADE, Copying.copy), AsyncAtExit, "1 cp.async.bulk.tensor under way"),
        ((Copying.make, lambda k: k.expect(1024), Copying.copy), AsyncRace, "not issued fence.mbarrier_init"),
        ((Copying.copy,), InvalidOperand, "cp.async.bulk.tensor: there is no mbarrier"),
        ((Copying.wait,), InvalidOperand, "mbarrier.try_wait: there is no mbarrier"),
        ((Copying.arrive,), InvalidOperand, "mbarrier.arrive: there is no mbarrier"),
        ((Copying.make, Copying.make), InvalidOperand, "init where there is one"),
        ((lambda k: k.make(0),), InvalidOperand, "for 0 arrivals: 1 to 1048575"),
        ((Copying.make, lambda k: k.wait(2)), InvalidOperand, "parity 2"),
        ((Copying.make, Copying.wait), Deadlock, "lacks 1 arrivals and 0 bytes"),
        ((*MADE, Copying.wait), Deadlock, "lacks 0 arrivals and 1024 bytes"),
        ((*MADE, Copying.arrive), InvalidOperand, "all 1 of this phase have arrived, 1024 bytes are still to come"),
        ((Copying.make, lambda k: k.expect(1 << 20)), InvalidOperand, "can expect 1048575 bytes, not 1048576"),
        ((Copying.make, Copying.fence, lambda k: k.expect(512), Copying.copy, Copying.wait), InvalidOperand, "512 bytes more"),
        ((Copying.make, Copying.fence, Copying.copy, Copying.arrive, Copying.wait, Copying.show), AsyncRace, "destination of"),
        ((Copying.make, lambda k: k.load(k.shared("bar"), 0, "i32")), InvalidOperand, "load of 4 .* an mbarrier is"),
        ((Copying.make, lambda k: k.store(k.const(0), k.shared("bar"), 1)), InvalidOperand, "store of 4 .* an mbarrier is"),
        ((*MADE, lambda k: k.copy(512)), MisalignedAddress, "aligned to 1024"),
        ((*MADE, lambda k: k.copy(TILE_BYTES)), InvalidOperand, "where an mbarrier is"),
        ((*MADE, lambda k: k.copy(rank=1)), InvalidOperand, "of 1 dimensions, its tensor map has 2"),
        ((*MADE, lambda k: k.copy(multicast=True)), InvalidOperand, "to other blocks of a cluster"),
    ],
)  # fmt: skip
def test_misuse(steps: tuple[Step, ...], error: type[Exception], message: str) -> None:
    emulator = kernel(*steps, shown=8)
    args: list[Any] = [TensorArgument(X, FORM), np.zeros(8, np.uint16), 0, 0]
    for order in (0, 1):  # in others, a copy may land before it is wanted
        with pytest.raises(error, match=message):
            emulator.launch("copying", 1, 1, 0, args, order)


def test_a_barrier_is_used_phase_after_phase() -> None:
    def again(k: Copying) -> None:
        for turn in range(3):
            k.expect(1024)
            k.copy()
            k.wait(turn % 2)

    run(Copying.make, Copying.fence, again, Copying.show, shown=8)
    run(Copying.make, lambda k: k.wait(1))  # of what has not begun, the phase before is over


def test_a_fence_for_the_proxy_shows_an_mbarrier_as_well() -> None:
    def fence(k: Copying) -> None:
        k.call("void", "llvm.nvvm.fence.proxy.async.shared_cta")

    run(Copying.make, fence, lambda k: k.expect(1024), Copying.copy, Copying.wait)


def test_a_tensor_that_is_larger_than_its_memory() -> None:
    form = FORM._replace(strides=(32,))  # rows that overlap: twice as many as there are
    assert TensorArgument(X, form).array.nbytes // 64 == 32
    with pytest.raises(IllegalAddress):
        run(*MADE, Copying.copy, Copying.wait, form=form, at=(0, 25))


def test_arguments() -> None:
    emulator = kernel(*MADE, Copying.copy, Copying.wait)
    y = np.zeros(1, np.uint16)
    tensor = TensorArgument(X, FORM)
    emulator.launch("copying", 1, 1, 0, [tensor, y, 0, 0])
    with pytest.raises(InvalidLaunch, match="argument 0 is DeviceArray, the kernel takes"):
        emulator.launch("copying", 1, 1, 0, [X, y, 0, 0])
    with pytest.raises(InvalidLaunch, match="argument 1 is a tensor map, the kernel takes ptr"):
        emulator.launch("copying", 1, 1, 0, [tensor, tensor, 0, 0])
    wide = replace(tensor, form=FORM._replace(box=(64, 257)))
    with pytest.raises(InvalidLaunch, match=r"no tensor map of .*: boxDim = 257: must be 1 to 256"):
        emulator.launch("copying", 1, 1, 0, [wide, y, 0, 0])
    narrow = replace(tensor, form=FORM._replace(box=(32, 8), swizzle=64))
    with pytest.raises(InvalidOperand, match="only that of rows of 128 bytes is emulated"):
        emulator.launch("copying", 1, 1, 0, [narrow, y, 0, 0])


def test_a_pointer_is_no_tensor_map() -> None:
    """One that lies in memory, and bytes that the driver has not made."""
    text = Copying()
    for step in (*MADE, Copying.copy, Copying.wait):
        step(text)
    in_memory = text.text().replace(f"{MAP} %map", "ptr %map")
    with pytest.raises(InvalidOperand, match="its tensor map is no parameter of the kernel"):
        Emulator(in_memory).launch(
            "copying", 1, 1, 0, [np.zeros(128, np.uint8), np.zeros(1, np.uint16), 0, 0]
        )
    with pytest.raises(UnsupportedInstruction, match="parameters"):
        Emulator(text.text().replace(' align 64 "nvvm.grid_constant"', ""))
