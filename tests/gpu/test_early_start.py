"""Kernels that begin before the one in front has ended: what each must keep to, who checks it, and that no bit depends on it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
from tests.gpu.test_engine_of_chips import on

from gpu.attention_problem import FORMS
from gpu.fake_driver import CudaError, FakeDriver, own_driver
from gpu.kernel_examples import examples
from gpu.llvm_kernel import Kernel
from gpu.run_kernel import artifact
from nanoserve.compiler import jit
from nanoserve.compiler.gpu import early_start
from nanoserve.compiler.gpu.chip import CHIPS, parse_chip
from nanoserve.compiler.gpu.kernel import device_kernel
from nanoserve.compiler.gpu.lowering import lower
from nanoserve.compiler.gpu.ptx import ptx_from_llvm
from nanoserve.compiler.gpu.ptx_order import TooEarly, check_early_start, faults
from nanoserve.compiler.gpu.spec import ONE, UNBOUNDED, GpuKernelSpec, pointer
from nanoserve.emulator import (
    DeviceArray,
    Emulator,
    IllegalAddress,
    InvalidOperand,
    UnsupportedInstruction,
    image,
)
from nanoserve.kernels.cuda.gemm import gemm_plan

HOPPER = CHIPS["sm_90a"]
GLOBAL = "ptr addrspace(1)"
START, WAIT = early_start.START_NEXT, early_start.AWAIT_PREVIOUS


def attention() -> dict[str, GpuKernelSpec]:
    form = FORMS["bf16"]
    return {"attend": form.attend_spec(), "split": form.split_spec(), "merge": form.merge_spec()}


# ---- the code


@pytest.mark.parametrize("name", [*examples(HOPPER), *attention()])
def test_every_kernel_of_hoppers_touches_nothing_before_its_wait(name: str) -> None:
    spec = attention()[name] if name in attention() else examples(HOPPER)[name].spec
    made = artifact(spec, "sm_90a")
    assert made.launch.starts_early
    assert faults(made.ptx) == []
    assert made.ptx.index(START) < made.ptx.index(WAIT)
    assert ".target sm_90a" in made.ptx


@pytest.mark.parametrize("name", ["rmsnorm", "bf16, 16 rows", "attend"])
def test_older_chips_have_none_of_it(name: str) -> None:
    chip = parse_chip("sm_80")
    made = artifact(attention()[name] if name in attention() else examples(chip)[name].spec, "sm_80")
    assert not made.launch.starts_early
    assert "griddepcontrol" not in made.ptx + made.llvm_ir
    assert "prefetch" not in made.ptx


BROKEN = {
    "no wait": (f"\t{WAIT}\n", "", "0 waits"),
    "a load before": (f"\t{START}\n", f"\t{START}\n\tld.global.b32 %r1, [%rd1];\n", "ld.global.b32 before the wait"),
    "a copy before": (f"\t{START}\n", f"\t{START}\n\tcp.async.cg.shared.global [%rd1], [%rd2], 16;\n", "cp.async.cg"),
    "an early end": (f"\t{START}\n", f"\t{START}\n\t@%p1 ret;\n", "ret before the wait"),
    "a way around": (f"\t{START}\n", f"\t{START}\n\t@%p1 bra $L__BB0_9;\n", "a branch past the wait"),
    "a wait of some": (f"\t{WAIT}", f"\t@!%p1 {WAIT}", "a wait of some threads"),
    "a way back": (f"\t{WAIT}\n", f"$L_again:\n\t{WAIT}\n\t@%p1 bra $L_again;\n", "a loop around the wait"),
    "a load of what never changes": (
        f"\t{WAIT}\n", f"\t{WAIT}\n\tld.global.nc.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd1];\n", "nobody writes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_the_judge_finds(what: str) -> None:
    whole, broken, why = BROKEN[what]
    ptx = artifact(examples(HOPPER)["rmsnorm"].spec, "sm_90a").ptx
    assert ptx.count(whole) == 1
    assert any(why in fault for fault in faults(ptx.replace(whole, broken)))
    with pytest.raises(TooEarly, match=why):
        check_early_start(ptx.replace(whole, broken), "rmsnorm")


def _copy_kernel(noalias: bool) -> str:
    """PTX of out[thread] = x[thread], its pointers as given."""
    from nanoserve.compiler.gpu.threads import thread_id

    rows = pointer(UNBOUNDED, 4)
    spec = GpuKernelSpec.make("copy", {"x": rows, "out": rows}, (ONE,), 32)

    def build() -> None:
        @device_kernel(spec, HOPPER)
        def _(x, out) -> None:  # type: ignore[no-untyped-def]
            out.store(x.load(thread_id(), 0, width=4), thread_id(), 0)

    with jit.context():
        text = lower(jit.build_module(build))
    if noalias:
        text = text.replace("ptr %0, ptr %1", "ptr noalias %0, ptr noalias %1")
        assert "noalias" in text
    return ptx_from_llvm(text, HOPPER)


def test_pointers_that_nothing_else_reaches_would_be_read_too_early() -> None:
    """Why no pointer of such a kernel is `noalias`: LLVM then takes the path for what never changes."""
    assert faults(_copy_kernel(noalias=False)) == []
    assert any("nobody writes" in fault for fault in faults(_copy_kernel(noalias=True)))


def test_products_ask_for_their_weight_before_the_wait() -> None:
    plan = gemm_plan(2048, 2048, 2048, 2048, HOPPER, x="bf16", dtype="bf16", y="bf16")
    before = artifact(plan.specs[0], "sm_90a").ptx.partition(WAIT)[0]
    assert "cp.async.bulk.prefetch.L2.global" in before
    # 16 rows of 2,048 in bfloat16 are 64 KiB: all of it, a quarter of a row for each part of k.
    assert "], 1024;" in before


def test_a_hint_is_within_its_row() -> None:
    spec = GpuKernelSpec.make("hint", {"w": pointer(UNBOUNDED, 64)}, (ONE,), 32)

    def emit(num_bytes: int) -> str:
        from nanoserve.compiler.gpu.threads import thread_id

        def early(w) -> None:  # type: ignore[no-untyped-def]
            early_start.prefetch(w, thread_id(), 256, num_bytes, thread_id() * 0)

        return str(jit.build_module(lambda: device_kernel(spec, HOPPER, early=early)(lambda w: None)))

    assert "prefetch.L2.global [$0], 256;" in emit(256)
    for wrong in (0, 8, 272):
        with pytest.raises(
            ValueError, match=f"prefetch: {wrong} bytes must be a multiple of 16, at most 256"
        ):
            emit(wrong)


def test_another_compilers_kernel_gets_both_forms_of_it() -> None:
    ptx = ".version 8.0\n.target sm_80\n.visible .entry k(\n)\n{\n\t.reg .b32 %r<2>;\n\tret;\n}\n"
    for first in ("", "entry:\n"):
        ir = f"define ptx_kernel void @k() {{\n{first}  ret void\n}}\n"
        made, text = early_start.begin_early(ptx, ir, "sm_90a")
        assert made.index(START) < made.index(WAIT) < made.index(".reg")
        assert ".target sm_90a\n" in made
        assert text.index(first or "{") < text.index(START) < text.index(WAIT) < text.index("ret void")
    for bad in (ptx.replace(".target", ".aim"), ptx.replace(".entry", ".func"), ptx + ptx):
        with pytest.raises(ValueError, match=r"PTX without a target|kernels, one was expected"):
            early_start.begin_early(bad, ir, "sm_90a")


# ---- the emulator


def _waiting_kernel(all_threads: bool) -> str:
    k = Kernel("k", {"x": GLOBAL})
    wait = f'call void asm sideeffect "{WAIT}", "~{{memory}}"()'
    if all_threads:
        k.emit(wait)
    else:
        k.when(k.sreg("tid.x") < 31, lambda: k.emit(wait))
    k.store(k.const(1), k.p["x"], k.sreg("tid.x"))
    return k.text()


def test_a_thread_that_ends_without_waiting_is_found() -> None:
    x = DeviceArray(np.zeros(32, np.int32))
    Emulator(_waiting_kernel(all_threads=True)).launch("k", 1, 32, 0, [x])
    assert (x.host == 1).all()
    with pytest.raises(InvalidOperand, match=r"ends without griddepcontrol\.wait"):
        Emulator(_waiting_kernel(all_threads=False)).launch("k", 1, 32, 0, [x])


def _prefetch_kernel(num_bytes: int) -> str:
    k = Kernel("k", {"x": GLOBAL})
    address = k.cast("ptrtoint", k.p["x"], "i64")
    k.emit(
        f'call void asm sideeffect "cp.async.bulk.prefetch.L2.global [$0], {num_bytes};", "l"({address.typed})'
    )
    return k.text()


def test_a_hint_about_memory_that_is_not_there_is_found() -> None:
    x = DeviceArray(np.zeros(1024, np.int32))  # one page
    Emulator(_prefetch_kernel(4096)).launch("k", 1, 1, 0, [x])
    with pytest.raises(IllegalAddress):
        Emulator(_prefetch_kernel(4096 + 16)).launch("k", 1, 1, 0, [x])
    with pytest.raises(UnsupportedInstruction, match="a multiple of 16"):
        Emulator(_prefetch_kernel(24))


# ---- the driver


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    with own_driver() as made:
        yield made


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint64 * 8)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("num_attributes", ctypes.c_uint),
    ]  # fmt: skip


def _put_early(
    driver: FakeDriver, function: int, x: int, stream: int = 0, number: int = 6, value: int = 1
) -> None:
    attribute = _Attribute(number, 0, (ctypes.c_uint64 * 8)(value))
    config = _Config((1, 1, 1), (32, 1, 1), 0, stream, ctypes.pointer(attribute), 1)
    argument = ctypes.c_uint64(x)
    params = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    driver.call("cuLaunchKernelEx", ctypes.byref(config), function, params, 0)


def _launch_early(driver: FakeDriver, text: str, number: int = 6, value: int = 1) -> None:
    x = driver.upload(np.zeros(32, np.int32))
    _put_early(driver, driver.load(image(text), "k"), x, number=number, value=value)
    assert (driver.download(x, 32, np.int32) == 1).all()


def test_only_a_kernel_that_waits_is_launched_early(driver: FakeDriver) -> None:
    without = _waiting_kernel(all_threads=True).replace(
        f'  call void asm sideeffect "{WAIT}", "~{{memory}}"()\n', ""
    )
    assert WAIT not in without
    _launch_early(driver, _waiting_kernel(all_threads=True))
    _launch_early(driver, without, value=0)
    _launch_early(driver, without, number=8)  # another attribute
    with pytest.raises(CudaError, match=r"has no griddepcontrol\.wait"):
        _launch_early(driver, without)


def test_an_older_driver_captures_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (12020, 12030):
        monkeypatch.setenv("NANOSERVE_FAKE_CUDA_VERSION", str(version))
        with own_driver() as driver:
            x, stream = driver.upload(np.zeros(32, np.int32)), driver.stream()
            function = driver.load(image(_waiting_kernel(all_threads=True)), "k")
            driver.capture(stream)
            if version == 12020:
                with pytest.raises(CudaError, match=r"captured from CUDA 12\.3 on"):
                    _put_early(driver, function, x, stream)
            else:
                _put_early(driver, function, x, stream)
                driver.call("cuGraphLaunch", driver.end_capture(stream), stream)
                driver.call("cuStreamSynchronize", stream)
                assert (driver.download(x, 32, np.int32) == 1).all()


# ---- the engine


def test_all_kernels_of_a_step_but_the_first_begin_early() -> None:
    told = on("9.0", "bfloat16")
    counts = told["counts"]
    # Launched are the steps that are no graph's, and what a graph is made of, once.
    walks = counts["steps"] - counts["graph_launches"] + counts["graphs"]
    assert counts["early_launches"] == counts["kernel_launches"] - walks > 0
    assert on("9.0", "bfloat16", "mma", "48", "in-turn")["counts"]["early_launches"] == 0


def test_what_is_behind_a_librarys_product_does_not() -> None:
    counts = on("9.0", "bfloat16", "cublas")["counts"]
    walks = counts["steps"] - counts["graph_launches"] + counts["graphs"]
    products = counts["products"] // (
        walks + counts["graphs"]
    )  # of a step; before a capture they run once more
    assert products > 0
    assert counts["early_launches"] == counts["kernel_launches"] - walks * (1 + products) > 0


@pytest.mark.parametrize(("capability", "version"), [("8.0", "12080"), ("9.0", "12020")])
def test_a_device_or_driver_that_cannot_is_not_asked(capability: str, version: str) -> None:
    """And answers the same."""
    told = on(capability, "bfloat16", version=version)
    assert told["counts"]["early_launches"] == 0
    assert told["answers"] == on("9.0", "bfloat16")["answers"]
