"""Kernels run in the emulator: right in every thread order, to the same bits, for shapes that fit no tile."""

from __future__ import annotations

import doctest
import subprocess
import sys

import numpy as np
import pytest

import nanoserve.emulator
from gpu import emulated_kernels
from gpu.llvm_kernel import Kernel
from gpu.run_emulated import ORDERS, run_gemm, run_rms_norm
from nanoserve.emulator import DeviceArray, Emulator, InvalidLaunch
from support.bfloat16 import to_bf16

GEMMS = ("gemm_f32", "gemm_mma", "gemm_wgmma")
SHAPES = ((1, 8, 8), (33, 40, 24), (64, 64, 64), (65, 130, 72), (130, 70, 200))


@pytest.fixture(scope="module")
def emulators() -> dict[str, Emulator]:
    return {name: Emulator(getattr(emulated_kernels, name)()) for name in ("rms_norm", *GEMMS)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 127), (2, 128), (5, 300)])
def test_rms_norm(emulators: dict[str, Emulator], rows: int, n: int, order: int) -> None:
    run_rms_norm(emulators["rms_norm"], rows, n, order)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("kernel", GEMMS)
def test_gemm_in_every_order_to_the_same_bits(
    emulators: dict[str, Emulator], kernel: str, m: int, n: int, k: int
) -> None:
    results = [run_gemm(emulators[kernel], kernel, m, n, k, order) for order in ORDERS]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_the_same_image_gives_the_same_arithmetic_for_mma_and_wgmma(emulators: dict[str, Emulator]) -> None:
    """Both sum k in ascending order, one rounding each: what the emulator promises."""
    for shape in SHAPES:
        mma, wgmma = (run_gemm(emulators[kernel], kernel, *shape, 0) for kernel in ("gemm_mma", "gemm_wgmma"))
        np.testing.assert_array_equal(mma, wgmma)


def test_example_of_the_package() -> None:
    results = doctest.testmod(nanoserve.emulator)
    assert results.attempted >= 5
    assert results.failed == 0


def record_order() -> Emulator:
    """Thread t of block b writes 100 b + t at the next free place of `out`."""
    k = Kernel("record", {"count": "ptr addrspace(1)", "out": "ptr addrspace(1)"})
    place = k.value(f"atomicrmw add {k.p['count'].typed}, i32 1 monotonic, align 4", "i32")
    k.store(k.sreg("ctaid.x") * 100 + k.sreg("tid.x"), k.p["out"], place)
    return Emulator(k.text())


def test_orders_are_what_they_say() -> None:
    emulator = record_order()

    def order(number: int) -> list[int]:
        out = np.zeros(128, np.int32)
        emulator.launch("record", 2, 64, 0, [np.zeros(1, np.int32), out], number)
        return [int(value) for value in out]

    forwards = [100 * b + t for b in range(2) for t in range(64)]
    assert order(0) == forwards
    assert order(1) == forwards[::-1]
    assert sorted(order(2)) == forwards
    assert order(2) not in (forwards, forwards[::-1])
    assert order(2) != order(3)
    # Warps take turns, and so do the lanes of one.
    block = [value for value in order(2) if value < 100]
    warps, lanes = [t // 32 for t in block], [t for t in block if t < 32]
    assert warps not in (sorted(warps), sorted(warps)[::-1])
    assert lanes != sorted(lanes)
    assert order(2) == order(2)


def test_three_dimensions() -> None:
    """Index and size of thread and block, in x, y and z."""
    k = Kernel("where", {"out": "ptr addrspace(1)"})
    names = [f"{what}.{dim}" for what in ("tid", "ctaid", "ntid", "nctaid") for dim in "xyz"]
    v = {name: k.sreg(name) for name in names}
    thread = (v["tid.z"] * v["ntid.y"] + v["tid.y"]) * v["ntid.x"] + v["tid.x"]
    block = (v["ctaid.z"] * v["nctaid.y"] + v["ctaid.y"]) * v["nctaid.x"] + v["ctaid.x"]
    threads = v["ntid.x"] * v["ntid.y"] * v["ntid.z"]
    at = (block * threads + thread) * 14
    for i, value in enumerate([*v.values(), k.sreg("laneid"), k.sreg("warpid")]):
        k.store(value, k.p["out"], at + i)
    out = np.zeros((2, 3, 2, 4, 5, 3, 14), np.int32)
    Emulator(k.text()).launch("where", (2, 3, 2), (3, 5, 4), 0, [out], 2)
    bz, by, bx, z, y, x, value = np.indices(out.shape)
    linear = (z * 5 + y) * 3 + x
    expected = [
        x,
        y,
        z,
        bx,
        by,
        bz,
        *(np.full_like(x, n) for n in (3, 5, 4, 2, 3, 2)),
        linear % 32,
        linear // 32,
    ]
    np.testing.assert_array_equal(out, np.choose(value, [e[..., :1] for e in expected]))


def test_shared_memory_starts_as_nan() -> None:
    k = Kernel("peek", {"out": "ptr addrspace(1)"}, {"static": (8, 8), "dynamic": (0, 16)})
    for i, name in enumerate(("static", "dynamic")):
        k.store(k.load(k.shared(name), 1, "float"), k.p["out"], i)
        k.store(k.const(1, "float"), k.shared(name), 1)  # the next block must not see this
    out = np.zeros(2, np.float32)
    Emulator(k.text()).launch("peek", 3, 1, 8, [out])
    assert np.isnan(out).all()


def test_shared_memory_is_aligned_as_declared_and_no_better() -> None:
    """Dynamic shared memory that comes first begins at a multiple of 1024, as on a GPU; behind others it does not."""

    def places(shared: dict[str, tuple[int, int]]) -> list[int]:
        k = Kernel("places", {"out": "ptr addrspace(1)"}, shared)
        for i, name in enumerate(shared):
            k.store(k.cast("ptrtoint", k.shared(name), "i64"), k.p["out"], i)
        out = np.zeros(len(shared), np.int64)
        Emulator(k.text()).launch("places", 1, 1, 64, [out])
        return [int(address) for address in out]

    for address in places({"a": (40, 32), "b": (4, 32), "c": (100, 32), "dynamic": (0, 32)}):
        assert address % 64 == 32
    (alone,) = places({"dynamic": (0, 16)})
    assert alone % 1024 == 0
    assert alone < 2**32


def test_atomics_on_global_and_shared_memory() -> None:
    k = Kernel("count", {"out": "ptr addrspace(1)"}, {"sum": (8, 8)})
    thread, total = k.sreg("tid.x"), k.shared("sum")
    k.when(thread.compare("eq", 0), lambda: k.store(k.const(0, "i64"), total, 0))
    k.barrier("cleared")
    k.emit(f'%one = atomicrmw fadd {total.typed}, float 1.0 syncscope("block") monotonic, align 4')
    second = k.at(total, 1, "i32")
    k.emit(f"%two = atomicrmw max {second.typed}, i32 {thread.name} seq_cst, align 4")
    k.emit(f'%three = atomicrmw add {k.p["out"].typed}, i32 1 syncscope("device") acq_rel, align 4')
    k.barrier("counted")
    bits = k.cast("bitcast", k.load(total, 0, "float"), "i32")
    k.store(bits, k.p["out"], 1)
    k.store(k.load(second, 0, "i32"), k.p["out"], 2)
    for order in ORDERS:
        out = np.zeros(3, np.int32)
        Emulator(k.text()).launch("count", 1, 96, 0, [out], order)
        assert (out[0], out[1:2].view(np.float32)[0], out[2]) == (96, 96.0, 95)


def test_constants_and_local_memory_are_memory_too() -> None:
    """Generic pointers: to a table of the module, to the thread's own stack, to shared memory, to an argument."""
    text = """
@table = internal constant [4 x float] [float 1.0, float 2.0, float 4.0, float 8.0], align 16
@tile = internal addrspace(3) global [4 x float] undef, align 16
declare i32 @llvm.nvvm.read.ptx.sreg.tid.x()
define ptx_kernel void @sum(ptr %out, i32 %which) {
  %t = call i32 @llvm.nvvm.read.ptx.sreg.tid.x()
  %local = alloca [4 x float], align 16
  %a = getelementptr float, ptr @table, i32 %t
  %x = load float, ptr %a, align 4
  %b = getelementptr float, ptr %local, i32 %t
  store volatile float %x, ptr %b, align 4
  %y = load volatile float, ptr %b, align 4
  %generic = addrspacecast ptr addrspace(3) @tile to ptr
  %c = getelementptr float, ptr %generic, i32 %t
  store volatile float %y, ptr %c, align 4
  %z = load volatile float, ptr %c, align 4
  %d = getelementptr float, ptr %out, i32 %t
  store float %z, ptr %d, align 4
  ret void
}
"""
    out = np.zeros(4, np.float32)
    Emulator(text).launch("sum", 1, 4, 0, [out, 0])
    assert out.tolist() == [1, 2, 4, 8]


def test_a_device_array_is_used_in_place() -> None:
    k = Kernel("increment", {"x": "ptr addrspace(1)"})
    k.store(k.load(k.p["x"], k.sreg("tid.x"), "i32") + 1, k.p["x"], k.sreg("tid.x"))
    emulator = Emulator(k.text())
    array = DeviceArray(np.arange(4, dtype=np.int32))
    for _ in range(2):
        emulator.launch("increment", 1, 4, 0, [array])
    assert array.host.tolist() == [2, 3, 4, 5]
    emulator.launch("increment", 1, 2, 0, [array.address + 8])
    assert array.host.tolist() == [2, 3, 5, 6]
    read_only = np.zeros(4, np.int32)
    read_only.flags.writeable = False
    emulator.launch("increment", 1, 4, 0, [read_only])
    assert not read_only.any()


def test_bfloat16_conversions_round_to_nearest_even() -> None:
    k = Kernel("convert", {"x": "ptr addrspace(1)", "y": "ptr addrspace(1)"})
    thread = k.sreg("tid.x")
    half = k.cast("fptrunc", k.load(k.p["x"], thread, "float"), "bfloat")
    k.store(half, k.p["y"], thread, align=2)
    rng = np.random.default_rng(1)
    x = rng.standard_normal(256).astype(np.float32)
    x[:4] = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x00018000], np.uint32).view(np.float32)
    y = np.zeros(256, np.uint16)
    Emulator(k.text()).launch("convert", 1, 256, 0, [x, y])
    np.testing.assert_array_equal(y, to_bf16(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": "other"}, "no kernel 'other'"),
        ({"grid": 0}, "may be 0"),
        ({"grid": (1, 65536)}, "may be 0 or too large"),
        ({"block": 1025}, "too large"),
        ({"block": (32, 33)}, "at most 1024"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory"),
        ({"args": []}, "0 arguments for 1"),
        ({"args": [1.5]}, "takes a pointer"),
        ({"grid": (1, 1, 1, 1)}, "one to three"),
    ],
)
def test_invalid_launches(change: dict[str, object], words: str) -> None:
    k = Kernel("nothing", {"x": "ptr addrspace(1)"})
    launch: dict[str, object] = {"kernel": "nothing", "grid": 1, "block": 1, "shared_bytes": 0, "args": [0]}
    emulator = Emulator(k.text())
    emulator.launch(**launch)  # type: ignore[arg-type]
    with pytest.raises(InvalidLaunch, match=words):
        emulator.launch(**(launch | change))  # type: ignore[arg-type]


def test_limits_that_a_kernel_declares() -> None:
    text = """
define ptx_kernel void @most() #0 {
  ret void
}
define ptx_kernel void @exactly() #1 {
  ret void
}
attributes #0 = { "nvvm.maxntid"="64,2" }
attributes #1 = { nounwind "nvvm.reqntid"="96" }
"""
    emulator = Emulator(text)
    emulator.launch("most", 1, 128, 0, [])
    emulator.launch("exactly", 1, (48, 2), 0, [])
    with pytest.raises(InvalidLaunch, match="at most 128"):
        emulator.launch("most", 1, 129, 0, [])
    with pytest.raises(InvalidLaunch, match="exactly 96"):
        emulator.launch("exactly", 1, 64, 0, [])


def test_shared_memory_has_its_place_from_the_beginning() -> None:
    """Not when a kernel first runs: by then, the heap of a long process may lie there."""
    code = (
        "from nanoserve.emulator.library import library\n"
        "from nanoserve.emulator.access_checks import SHARED_BASE\n"
        "library()\n"
        "assert any(line.startswith(f'{SHARED_BASE:x}-') for line in open('/proc/self/maps'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
