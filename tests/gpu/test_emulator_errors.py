"""What a kernel does wrong is an exception that says what, where and who."""

from __future__ import annotations

import numpy as np
import pytest

from gpu.llvm_kernel import Kernel, Value
from nanoserve.emulator import (
    AsyncAtExit,
    AsyncRace,
    Deadlock,
    DeviceArray,
    Divergence,
    Emulator,
    EmulatorError,
    IllegalAddress,
    InvalidOperand,
    MisalignedAddress,
    UnsupportedInstruction,
)

GLOBAL = "ptr addrspace(1)"


def access(type_: str, store: bool = False, space: str = GLOBAL) -> Emulator:
    """A kernel `access` of one thread per block that reads or writes x[at] as `type_`."""
    k = Kernel("access", {"x": space, "at": "i32"})
    place = k.at(k.p["x"], k.p["at"], "i8")
    if store:
        k.emit(f"store volatile {type_} zeroinitializer, {place.typed}, align {_align(type_)}")
    else:
        k.value(f"load volatile {type_}, {place.typed}, align {_align(type_)}", type_)
    return Emulator(k.text())


def _align(type_: str) -> int:
    return {"i8": 1, "float": 4, "<2 x float>": 8, "<4 x float>": 16, "<8 x i16>": 16}[type_]


@pytest.mark.parametrize("space", [GLOBAL, "ptr"])
@pytest.mark.parametrize("store", [False, True])
def test_out_of_bounds(space: str, store: bool) -> None:
    """At the first byte beyond the end, before the start, and far away."""
    emulator = access("i8", store, space)
    x = np.zeros(64, np.uint8)
    emulator.launch("access", 1, 1, 0, [x, 63])
    for at in (64, 5000, -65, -(1 << 31)):
        if at == -65:
            at = -4096
        with pytest.raises(IllegalAddress) as caught:
            emulator.launch("access", (1, 2), (1, 1), 0, [x, at])
        assert (caught.value.kernel, caught.value.block, caught.value.thread) == (
            "access",
            (0, 0, 0),
            (0, 0, 0),
        )
        assert caught.value.address is not None
    assert "byte -4096 of argument 0, which has 64" in str(_caught(emulator, [x, -4096]))


def _caught(emulator: Emulator, args: list[object]) -> EmulatorError:
    with pytest.raises(EmulatorError) as caught:
        emulator.launch("access", 1, 1, 0, args)  # type: ignore[arg-type]
    return caught.value


def test_writing_just_behind_an_array() -> None:
    """The array ends before its last 16 bytes do: nothing faults there, but it is noticed."""
    x = np.zeros(13, np.uint8)
    assert isinstance(_caught(access("i8", store=True), [x, 13]), IllegalAddress)
    with pytest.raises(IllegalAddress, match="behind the end of an allocation of 13 bytes"):
        access("i8", store=True).launch("access", 1, 1, 0, [x, 15])
    access("i8", store=True).launch("access", 1, 1, 0, [x, 12])


def test_memory_of_the_host_and_freed_memory() -> None:
    host = np.zeros(64, np.uint8)
    error = _caught(access("float"), [host.ctypes.data, 0])
    assert isinstance(error, IllegalAddress)
    assert error.address == host.ctypes.data
    array = DeviceArray(np.zeros(64, np.uint8))
    access("float").launch("access", 1, 1, 0, [array, 0])
    address = array.address
    array.free()
    error = _caught(access("float"), [address, 0])
    assert isinstance(error, IllegalAddress)
    assert error.address == address
    assert "not allocated" in str(error)
    assert isinstance(_caught(access("float"), [0, 0]), IllegalAddress)


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize(
    ("type_", "at"), [("float", 2), ("<2 x float>", 4), ("<4 x float>", 8), ("<8 x i16>", 2)]
)
def test_misaligned(type_: str, at: int, store: bool) -> None:
    emulator = access(type_, store)
    x = np.zeros(64, np.uint8)
    emulator.launch("access", 1, 1, 0, [x, 16])
    error = _caught(emulator, [x, at])
    assert isinstance(error, MisalignedAddress)
    assert error.address is not None
    assert error.address % 16 == at
    assert f"{_align(type_)}" in str(error)


@pytest.mark.parametrize("at", [8, -1, 4, 100000, 1 << 20])
@pytest.mark.parametrize("store", [False, True])
def test_shared_memory_out_of_bounds(store: bool, at: int) -> None:
    """Past the end of a variable, between it and the next, and beyond everything."""
    k = Kernel("shared", {"at": "i32", "y": GLOBAL}, {"a": (32, 16), "b": (32, 16)})
    if store:
        k.store(k.const(1, "float"), k.shared("a"), k.p["at"])
    k.store(k.load(k.shared("a"), k.p["at"], "float"), k.p["y"], 0)
    k.store(k.load(k.shared("b"), 0, "float"), k.p["y"], 1)
    emulator = Emulator(k.text())
    y = np.zeros(2, np.float32)
    emulator.launch("shared", 1, 1, 0, [7, y])
    if at == 4:  # inside
        emulator.launch("shared", 1, 1, 0, [at, y])
        return
    with pytest.raises(IllegalAddress, match=r"shared memory|outside"):
        emulator.launch("shared", 1, 1, 0, [at, y])


def test_dynamic_shared_memory_ends_where_the_launch_says() -> None:
    k = Kernel("dynamic", {"at": "i32"}, {"tile": (0, 16)})
    k.store(k.const(1, "float"), k.shared("tile"), k.p["at"])
    emulator = Emulator(k.text())
    emulator.launch("dynamic", 1, 1, 64, [15])
    for shared_bytes, at in ((64, 16), (0, 0)):
        with pytest.raises(IllegalAddress):
            emulator.launch("dynamic", 1, 1, shared_bytes, [at])


def test_deadlock_names_who_waits() -> None:
    k = Kernel("stuck", {})
    k.when(k.sreg("tid.x") < 32, lambda: k.barrier("half"))
    with pytest.raises(Deadlock, match=r"32 at bar.sync .* 32 ended, of 64") as caught:
        Emulator(k.text()).launch("stuck", 1, 64, 0, [])
    assert caught.value.line == 1 + next(
        i for i, s in enumerate(k.text().splitlines()) if s.endswith("; half")
    )


def test_a_warp_at_two_barriers() -> None:
    """Both halves arrive at barrier 0, but not at the same one."""
    k = Kernel("split", {})
    low = k.sreg("tid.x") < 16
    k.when(low, lambda: k.barrier("low"))
    k.when(low.compare("eq", 0), lambda: k.barrier("high"))
    for order in (0, 1, 2):
        with pytest.raises(Divergence, match=r"bar.sync"):
            Emulator(k.text()).launch("split", 1, 32, 0, [], order)


def shuffle(k: Kernel, mask: int) -> Value:
    operands = [k.const(mask), k.sreg("tid.x"), k.const(1), k.const(31)]
    result: Value = k.call("i32", "llvm.nvvm.shfl.sync.bfly.i32", *operands)
    return result


@pytest.mark.parametrize(
    ("mask_low", "mask_high", "fails"),
    [(-1, None, True), (-1, -1, True), (0xFFFF, 0xFFFF0000 - 2**32, False)],
)
def test_divergent_shuffles(mask_low: int, mask_high: int | None, fails: bool) -> None:
    """Half a warp alone in a shuffle of all; both halves in two of them; both in shuffles of their own."""
    k = Kernel("halves", {})
    low = k.sreg("tid.x") < 16
    k.when(low, lambda: shuffle(k, mask_low))
    if mask_high is not None:
        k.when(low.compare("eq", 0), lambda: shuffle(k, mask_high))
    emulator = Emulator(k.text())
    for order in (0, 1, 2):
        if fails:
            with pytest.raises(Divergence):
                emulator.launch("halves", 1, 32, 0, [], order)
        else:
            emulator.launch("halves", 1, 32, 0, [], order)


def test_a_lane_that_is_not_in_its_mask() -> None:
    k = Kernel("outside", {})
    shuffle(k, 1)
    with pytest.raises(Divergence, match="lane 1, which is not in its mask 00000001"):
        Emulator(k.text()).launch("outside", 1, 32, 0, [])


def copying(*after: str, read: bool = False, overwrite: bool = False) -> Emulator:
    """Copies 16 bytes to shared memory, does what `after` says, then perhaps reads or writes them."""
    k = Kernel("copying", {"x": GLOBAL, "y": GLOBAL, "at": "i32"}, {"tile": (32, 16)})
    to, of = k.at(k.shared("tile"), k.p["at"], "i8"), k.at(k.p["x"], 0, "i8")
    k.call("void", "llvm.nvvm.cp.async.cg.shared.global.16", to, of)
    for operation in after:
        args = [k.const(int(operation[-1]))] if operation[-1].isdigit() else []
        k.call("void", f"llvm.nvvm.cp.async.{operation.rstrip('0123456789')}", *args)
    if overwrite:
        k.store(k.const(1, "float"), k.shared("tile"), 0)
    if read:
        k.store(k.load(k.shared("tile"), 0, "float"), k.p["y"], 0)
    return Emulator(k.text())


def test_asynchronous_copies() -> None:
    x, y = np.arange(8, dtype=np.float32) + 5, np.zeros(1, np.float32)
    copying("commit.group", "wait.group0", read=True).launch("copying", 1, 1, 0, [x, y, 0])
    assert y[0] == 5
    copying("wait.all", read=True).launch("copying", 1, 1, 0, [x, y, 0])
    for unfinished in (
        ("commit.group", "wait.group1"),
        ("commit.group", "wait.group3"),
        ("wait.group0",),
        (),
    ):
        with pytest.raises(AsyncRace, match="asynchronous copy nobody waited for"):
            copying(*unfinished, read=True).launch("copying", 1, 1, 0, [x, y, 0])
        with pytest.raises(AsyncRace, match="asynchronous copy nobody waited for"):
            copying(*unfinished, overwrite=True).launch("copying", 1, 1, 0, [x, y, 0])
        with pytest.raises(AsyncAtExit, match=r"1 cp.async"):
            copying(*unfinished).launch("copying", 1, 1, 0, [x, y, 0])
    with pytest.raises(MisalignedAddress):
        copying("wait.all").launch("copying", 1, 1, 0, [x, y, 8])
    with pytest.raises(IllegalAddress):
        copying("wait.all").launch("copying", 1, 1, 0, [x, y, 32])
    array = DeviceArray(x)
    with pytest.raises(IllegalAddress):  # at once, and not when it lands
        copying("commit.group").launch("copying", 1, 1, 0, [array.address + x.nbytes, y, 0])


def test_matrix_instructions_need_whole_warps() -> None:
    k = Kernel("matrix", {}, {"tile": (512, 16)})
    k.call(
        "i32",
        "llvm.nvvm.ldmatrix.sync.aligned.m8n8.x1.b16.p3",
        k.at(k.shared("tile"), k.sreg("tid.x") * 16, "i8"),
    )
    Emulator(k.text()).launch("matrix", 1, 32, 0, [])
    with pytest.raises(InvalidOperand, match="fewer than 32"):
        Emulator(k.text()).launch("matrix", 1, 48, 0, [], 1)


def test_a_trap_and_a_stack_overflow() -> None:
    k = Kernel("trap", {})
    k.call("void", "llvm.trap")
    with pytest.raises(InvalidOperand, match="trapped"):
        Emulator(k.text()).launch("trap", 1, 1, 0, [])
    recursion = """
define i32 @deep(i32 %n) noinline {
  %x = alloca [4096 x i8]
  store volatile i8 0, ptr %x
  %m = call i32 @deep(i32 %n)
  %y = load volatile i8, ptr %x
  %z = zext i8 %y to i32
  %s = add i32 %m, %z
  ret i32 %s
}
define ptx_kernel void @overflow(ptr addrspace(1) %out) {
  %d = call i32 @deep(i32 1)
  store i32 %d, ptr addrspace(1) %out, align 4
  ret void
}
"""
    with pytest.raises(IllegalAddress):
        Emulator(recursion).launch("overflow", 1, 1, 0, [np.zeros(1, np.int32)])


def test_the_emulator_goes_on_after_an_error() -> None:
    emulator = access("float")
    x = np.zeros(4, np.float32)
    for _ in range(3):
        _caught(emulator, [x, 4096])
        emulator.launch("access", 4, 4, 0, [x, 12])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("call void @llvm.nvvm.setmaxnreg.inc.sync.aligned.u32(i32 40)", "intrinsic llvm.nvvm.setmaxnreg"),
        (
            'call void asm sideeffect "tcgen05.wait::ld.sync.aligned;", ""()',
            "PTX instruction tcgen05.wait::ld",
        ),
        ('call void asm sideeffect "mov.u32 %undeclared, 1;", ""()', "%undeclared"),
        ("call void @__nv_nonsense()", "library function __nv_nonsense"),
        ("call void @somewhere_else()", "somewhere_else"),
        ("%x = add i32 1, nonsense", "LLVM does not take"),
    ],
)
def test_what_is_unknown_is_refused(line: str, words: str) -> None:
    """When the module is read, not when it runs."""
    found = line.split("@")
    declare = (
        f"declare void @{found[1].split('(')[0]}({'i32' if 'i32 40' in line else ''})" if "@" in line else ""
    )
    with pytest.raises(UnsupportedInstruction) as caught:
        Emulator(f"{declare}\ndefine ptx_kernel void @k() {{\n  {line}\n  ret void\n}}\n")
    assert words in str(caught.value)


def test_a_module_without_kernels_is_refused() -> None:
    with pytest.raises(UnsupportedInstruction, match="no kernel"):
        Emulator("define void @f() {\n  ret void\n}\n")
