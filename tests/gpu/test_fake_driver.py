"""The fake CUDA driver: the launcher's view of a GPU, with a GPU's rules and none of its luck."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gpu.fake_driver import CudaError, FakeDriver, own_driver
from gpu.llvm_kernel import Kernel
from nanoserve.emulator import FAKE_DRIVER, image, library_path

INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, INVALID_DEVICE = 1, 2, 3, 101
INVALID_IMAGE, INVALID_CONTEXT, INVALID_HANDLE, NOT_FOUND, NOT_READY = 200, 201, 400, 500, 600
ILLEGAL_ADDRESS, LAUNCH_TIMEOUT, MISALIGNED, LAUNCH_FAILED = 700, 702, 716, 719
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURE_UNJOINED, CAPTURE_IMPLICIT = 900, 901, 904, 906

MEMORY = 1 << 20
N = 64


def add_kernel() -> str:
    """y[t] = x[t] + amount for t < n."""
    k = Kernel(
        "add",
        {"y": "ptr addrspace(1)", "x": "ptr addrspace(1)", "amount": "float", "n": "i64"},
        {"s": (0, 16)},
    )
    t = k.cast("zext", k.sreg("ctaid.x") * k.sreg("ntid.x") + k.sreg("tid.x"), "i64")
    k.when(t < k.p["n"], lambda: k.store(k.load(k.p["x"], t, "float") + k.p["amount"], k.p["y"], t))
    return k.text()


def bad_kernel(name: str) -> str:
    k = Kernel(name, {"x": "ptr addrspace(1)"})
    if name == "stuck":
        k.when(k.sreg("tid.x").compare("eq", 0), lambda: k.barrier("alone"))
    elif name == "crooked":
        k.emit(f"store volatile <4 x float> zeroinitializer, {k.at(k.p['x'], 4, 'i8').typed}, align 16")
    else:
        operands = [k.const(1), k.const(1), k.const(1), k.const(31)]
        k.call("i32", "llvm.nvvm.shfl.sync.bfly.i32", *operands)
    return k.text()


@pytest.fixture(scope="module")
def add_image() -> bytes:
    return image(add_kernel())


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    monkeypatch.setenv("NANOSERVE_FAKE_CUDA_MEMORY", str(MEMORY))
    with own_driver() as fake:
        yield fake


@pytest.fixture
def add(driver: FakeDriver, add_image: bytes) -> Callable[..., None]:
    """add(y, x, amount, stream): launches it over N elements."""
    function = driver.load(add_image, "add")

    def launch(y: int, x: int, amount: float, stream: int = 0) -> None:
        driver.launch(function, [y, x, amount, N], stream, (2, 1, 1), (N // 2, 1, 1))

    return launch


def error(code: int, function: Callable[..., object], *args: object, **options: object) -> str:
    with pytest.raises(CudaError) as caught:
        function(*args, **options)
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


def ones() -> np.ndarray:
    return np.ones(N, np.float32)


# --- the device ---------------------------------------------------------------------------------------------------------


def test_the_device(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    name = ctypes.create_string_buffer(64)
    driver.call("cuDeviceGetName", name, 64, 0)
    assert b"emulated" in name.value
    assert driver.number("cuDeviceGetCount") == 1
    assert driver.number("cuDeviceGet", 0) == 0
    assert driver.number("cuDriverGetVersion") >= 12000
    assert driver.handle("cuDeviceTotalMem_v2", 0) == MEMORY
    error(INVALID_DEVICE, driver.number, "cuDeviceGet", 1)
    known = {10: 32, 75: 9, 76: 0, 97: 232448, 81: 233472, 8: 49152, 16: 132, 1: 1024}
    assert {a: driver.number("cuDeviceGetAttribute", a, 0) for a in known} == known
    assert "9999" in error(INVALID_VALUE, driver.number, "cuDeviceGetAttribute", 9999, 0)
    driver.close()
    monkeypatch.setenv("NANOSERVE_FAKE_CUDA_CAPABILITY", "8.6")
    monkeypatch.setenv("NANOSERVE_FAKE_CUDA_SMS", "20")
    driver.open()
    known = {75: 8, 76: 6, 97: 101376, 81: 102400, 16: 20}
    assert {a: driver.number("cuDeviceGetAttribute", a, 0) for a in known} == known


def test_calls_need_a_context(driver: FakeDriver) -> None:
    driver.call("cuCtxSetCurrent", 0)
    assert driver.handle("cuCtxGetCurrent") == 0
    error(INVALID_CONTEXT, driver.alloc, 16)
    error(INVALID_CONTEXT, driver.call, "cuCtxSetCurrent", 12345)
    context = driver.handle("cuDevicePrimaryCtxRetain", 0)
    driver.call("cuCtxSetCurrent", context)
    driver.alloc(16)
    driver.close()
    driver.alloc(16)  # retained twice


def test_before_cu_init() -> None:
    path = library_path(FAKE_DRIVER)
    code = f"import ctypes; print(ctypes.CDLL({str(path)!r}).cuDeviceGetCount(ctypes.byref(ctypes.c_int())))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == NOT_INITIALIZED


def test_names_of_errors_and_functions(driver: FakeDriver) -> None:
    text = ctypes.c_char_p()
    driver.call("cuGetErrorName", ILLEGAL_ADDRESS, ctypes.byref(text))
    assert text.value == b"CUDA_ERROR_ILLEGAL_ADDRESS"
    driver.call("cuGetErrorString", OUT_OF_MEMORY, ctypes.byref(text))
    assert text.value == b"out of memory"
    error(INVALID_VALUE, driver.call, "cuGetErrorName", 424242, ctypes.byref(text))
    for name, exported in (("cuMemAlloc", "cuMemAlloc_v2"), ("cuLaunchKernel", "cuLaunchKernel")):
        out = ctypes.c_void_p()
        driver.call("cuGetProcAddress_v2", name.encode(), ctypes.byref(out), 12000, 0, 0)
        assert out.value == ctypes.cast(getattr(driver.lib, exported), ctypes.c_void_p).value
    error(
        NOT_FOUND,
        driver.call,
        "cuGetProcAddress_v2",
        b"cuNothing",
        ctypes.byref(ctypes.c_void_p()),
        12000,
        0,
        0,
    )


# --- memory -------------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_and_starts_as_nan(driver: FakeDriver) -> None:
    free, total = ctypes.c_uint64(), ctypes.c_uint64()

    def free_bytes() -> int:
        driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        assert total.value == MEMORY
        return free.value

    assert free_bytes() == MEMORY
    half = driver.alloc(MEMORY // 2)
    assert half % 256 == 0
    assert np.isnan(driver.download(half, 1024)).all()
    assert free_bytes() == MEMORY // 2
    assert "524288 of 1048576 are free" in error(OUT_OF_MEMORY, driver.alloc, MEMORY // 2 + 1)
    error(OUT_OF_MEMORY, driver.alloc, 2**63)
    rest = driver.alloc(MEMORY // 2)
    error(OUT_OF_MEMORY, driver.alloc, 1)
    for address in (half, rest):
        driver.call("cuMemFree_v2", address)
    assert free_bytes() == MEMORY
    driver.call("cuMemFree_v2", 0)
    error(INVALID_VALUE, driver.call, "cuMemFree_v2", half)
    error(INVALID_VALUE, driver.alloc, 0)
    driver.alloc(MEMORY)


def test_copies_and_fills(driver: FakeDriver) -> None:
    x = np.arange(N, dtype=np.float32)
    a, b = driver.upload(x), driver.alloc(x.nbytes)
    driver.call("cuMemcpyDtoD_v2", b, a, x.nbytes)
    np.testing.assert_array_equal(driver.download(b, N), x)
    driver.call("cuMemcpyDtoDAsync_v2", b + 4, a, x.nbytes - 4, 0)
    assert driver.download(b, N).tolist() == [0, *x[:-1]]
    driver.call("cuMemsetD32_v2", b, 7, 3)
    driver.call("cuMemsetD8Async", b + 12, 1, 4, 0)
    assert driver.download(b, 5, np.int32)[:4].tolist() == [7, 7, 7, 0x01010101]
    error(INVALID_VALUE, driver.call, "cuMemsetD32_v2", b + 2, 7, 1)


class BoxSide(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("x", "y", "z", "lod")),
        ("memory_type", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("host", "device", "array", "reserved")),
        ("pitch", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    ]


class BoxCopy(ctypes.Structure):
    _fields_ = [
        ("source", BoxSide),
        ("destination", BoxSide),
        *((name, ctypes.c_size_t) for name in ("width", "height", "depth")),
    ]


def test_boxes_are_copied(driver: FakeDriver) -> None:
    """Rows 2 and 3 of three slices of five rows, from the second element on, to where slices are four rows apart."""
    x = np.arange(3 * 5 * 4, dtype=np.float32)
    source, target = driver.upload(x), driver.alloc(4 * 4 * 4 * 4)
    driver.call("cuMemsetD32_v2", target, 0, 4 * 4 * 4)
    stream = driver.stream()

    def copy(**changes: int) -> None:
        box = BoxCopy(
            BoxSide(x=4, y=2, memory_type=2, device=source, pitch=16, height=5),
            BoxSide(y=1, z=1, memory_type=2, device=target, pitch=16, height=4),
            width=8, height=2, depth=3,
        )  # fmt: skip
        for name, value in changes.items():
            place, _, field = name.rpartition("__")
            setattr(getattr(box, place) if place else box, field, value)
        driver.call("cuMemcpy3DAsync_v2", ctypes.byref(box), stream)
        ctypes.memset(ctypes.addressof(box), 0xEE, ctypes.sizeof(box))  # taken during the call

    copy()
    assert not driver.download(target, 64).any()  # nobody waited
    driver.call("cuStreamSynchronize", stream)
    expected = np.zeros((4, 4, 4), np.float32)
    expected[1:4, 1:3, :2] = x.reshape(3, 5, 4)[:, 2:4, 1:3]
    np.testing.assert_array_equal(driver.download(target, 64).reshape(4, 4, 4), expected)
    copy(depth=0)
    for wrong in (
        {"depth": 4}, {"source__z": 1}, {"source__device": source - 48}, {"destination__z": 2},
        {"width": 16}, {"height": 4}, {"destination__height": 2}, {"source__pitch": 2**31}, {"source__memory_type": 1},
    ):  # fmt: skip
        error(INVALID_VALUE, copy, **wrong)


@pytest.mark.parametrize(
    ("function", "order"), [("cuMemcpyHtoD_v2", "dh"), ("cuMemcpyDtoH_v2", "hd"), ("cuMemcpyDtoD_v2", "dd")]
)
def test_pointers_of_copies_are_checked(driver: FakeDriver, function: str, order: str) -> None:
    """Past the end of an allocation, across two, freed, and of the host where the device's is meant."""
    host = np.zeros(N, np.float32)
    device = driver.alloc(host.nbytes)
    gone = driver.alloc(host.nbytes)
    driver.call("cuMemFree_v2", gone)
    for wrong, num_bytes in ((device, host.nbytes + 1), (device - 1, 4), (gone, 4), (host.ctypes.data, 4)):
        for at in [i for i, side in enumerate(order) if side == "d"]:
            args = [device if side == "d" else host.ctypes.data for side in order]
            args[at] = wrong
            error(INVALID_VALUE, driver.call, function, *args, num_bytes)


def test_asynchronous_copies_are_late(driver: FakeDriver) -> None:
    """From pageable memory the bytes are taken at once, from page-locked memory when the stream gets there."""
    stream = driver.stream()
    pageable, pinned = ones(), driver.pinned(N)
    pinned[:] = 1
    a, b = driver.alloc(4 * N), driver.alloc(4 * N)
    driver.call("cuMemcpyHtoDAsync_v2", a, pageable.ctypes.data, 4 * N, stream)
    driver.call("cuMemcpyHtoDAsync_v2", b, pinned.ctypes.data, 4 * N, stream)
    pageable[:], pinned[:] = 2, 2  # too early for one of the two
    driver.call("cuStreamSynchronize", stream)
    assert driver.download(a, N).tolist() == [1] * N
    assert driver.download(b, N).tolist() == [2] * N
    driver.call("cuMemcpyDtoHAsync_v2", pinned.ctypes.data, a, 4 * N, stream)
    assert np.isnan(pinned).all()  # not there yet
    driver.call("cuStreamSynchronize", stream)
    assert (pinned == 1).all()
    driver.call("cuMemcpyDtoHAsync_v2", pageable.ctypes.data, a, 4 * N, stream)
    assert (pageable == 1).all()  # to pageable memory it is done on return
    driver.call("cuMemFreeHost", pinned.ctypes.data)
    error(INVALID_VALUE, driver.call, "cuMemFreeHost", pageable.ctypes.data)


# --- modules and launches -----------------------------------------------------------------------------------------------


def test_a_launch(driver: FakeDriver, add: Callable[..., None]) -> None:
    x, y = driver.upload(ones()), driver.alloc(4 * N)
    before = driver.num_launches
    add(y, x, 2.0)
    assert driver.num_launches == before  # nobody waited for it yet
    assert driver.download(y, N).tolist() == [3] * N
    assert driver.num_launches == before + 1


@pytest.mark.parametrize(
    "data", [b"\x7fELF" + bytes(64), b"NVEMUIMG" + b"\xff" * 64, b"NVEMUIMG" + bytes(64)]
)
def test_bad_images(driver: FakeDriver, data: bytes) -> None:
    error(INVALID_IMAGE, driver.handle, "cuModuleLoadData", data)


def test_modules_and_functions(driver: FakeDriver, add_image: bytes) -> None:
    other = image(add_kernel().replace("@add(", "@other(").replace("fadd", "fsub"))
    modules = [driver.handle("cuModuleLoadData", data) for data in (add_image, other, add_image)]
    error(NOT_FOUND, driver.handle, "cuModuleGetFunction", modules[0], b"other")
    subtract = driver.handle("cuModuleGetFunction", modules[1], b"other")
    assert subtract == driver.handle("cuModuleGetFunction", modules[1], b"other")
    x, y = driver.upload(ones()), driver.alloc(4 * N)
    for module in (modules[0], modules[2]):
        driver.call("cuModuleUnload", module)
        error(INVALID_HANDLE, driver.call, "cuModuleUnload", module)
    driver.launch(subtract, [y, x, 3.0, N], 0, (1, 1, 1), (N, 1, 1))
    assert driver.download(y, N).tolist() == [-2] * N
    driver.call("cuModuleUnload", modules[1])
    error(INVALID_HANDLE, driver.launch, subtract, [y, x, 3.0, N])
    error(INVALID_HANDLE, driver.handle, "cuModuleGetFunction", modules[1], b"other")


def test_limits_of_launches(driver: FakeDriver, add_image: bytes) -> None:
    function = driver.load(add_image, "add")
    args = [driver.alloc(4 * N), driver.alloc(4 * N), 1.0, 0]
    for grid, block in (((0, 1, 1), (1, 1, 1)), ((1, 65536, 1), (1, 1, 1)), ((1, 1, 1), (32, 33, 1))):
        error(INVALID_VALUE, driver.launch, function, args, 0, grid, block)
    error(INVALID_HANDLE, driver.launch, 99, args)
    error(INVALID_HANDLE, driver.launch, function, args, 99)
    assert driver.number("cuFuncGetAttribute", 8, function) == 49152
    assert "49152" in error(INVALID_VALUE, driver.launch, function, args, 0, (1, 1, 1), (1, 1, 1), 49153)
    error(INVALID_VALUE, driver.call, "cuFuncSetAttribute", function, 8, 232449)
    driver.call("cuFuncSetAttribute", function, 8, 232448)
    driver.launch(function, args, 0, (1, 1, 1), (1, 1, 1), 232448)
    assert [driver.number("cuFuncGetAttribute", a, function) for a in (0, 1, 6, 8)] == [1024, 0, 90, 232448]
    driver.call("cuCtxSynchronize")


def test_extended_launch(driver: FakeDriver, add_image: bytes) -> None:
    class Config(ctypes.Structure):
        _fields_ = [
            ("dimensions", ctypes.c_uint * 6),
            ("shared_bytes", ctypes.c_uint),
            ("stream", ctypes.c_void_p),
            ("attributes", ctypes.c_void_p),
            ("num_attributes", ctypes.c_uint),
        ]

    x, y = driver.upload(ones()), driver.alloc(4 * N)
    values = [ctypes.c_uint64(y), ctypes.c_uint64(x), ctypes.c_float(4), ctypes.c_int64(N)]
    params = (ctypes.c_void_p * 4)(*[ctypes.addressof(value) for value in values])
    config = Config(dimensions=(ctypes.c_uint * 6)(2, 1, 1, N // 2, 1, 1), stream=driver.stream(0))
    driver.call("cuLaunchKernelEx", ctypes.byref(config), driver.load(add_image, "add"), params, 0)
    assert driver.download(y, N).tolist() == [5] * N


# --- order --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [False, True])
def test_streams_are_ordered_by_events_only(
    driver: FakeDriver, add: Callable[..., None], waits: bool
) -> None:
    first, second = driver.stream(), driver.stream()
    x, y, z = driver.upload(ones()), driver.alloc(4 * N), driver.alloc(4 * N)
    event = driver.handle("cuEventCreate", 0)
    add(y, x, 1.0, first)
    driver.call("cuEventRecord", event, first)
    add(y, x, 100.0, first)  # after the event: nobody waits for it
    if waits:
        driver.call("cuStreamWaitEvent", second, event, 0)
    add(z, y, 1.0, second)
    driver.call("cuStreamSynchronize", second)
    result = driver.download(z, N)
    assert result.tolist() == [3] * N if waits else np.isnan(result).all()


def test_the_legacy_stream_and_blocking_streams_take_turns(
    driver: FakeDriver, add: Callable[..., None]
) -> None:
    x, y, z = driver.upload(ones()), driver.alloc(4 * N), driver.alloc(4 * N)
    blocking, free = driver.stream(0), driver.stream()
    add(y, x, 1.0, blocking)
    add(z, y, 1.0, 0)  # waits for it
    add(y, z, 1.0, blocking)  # and this for that
    driver.call("cuStreamSynchronize", blocking)
    assert driver.download(y, N).tolist() == [4] * N
    fresh = driver.alloc(4 * N)
    add(fresh, x, 1.0, free)
    add(z, fresh, 1.0, 0)
    driver.call("cuStreamSynchronize", 0)
    assert np.isnan(driver.download(z, N)).all()  # a non-blocking stream is not waited for


def test_a_plain_upload_is_not_ordered_with_other_streams(
    driver: FakeDriver, add: Callable[..., None]
) -> None:
    """As the manual says: the bytes are taken, but may not have arrived."""
    x, y = driver.alloc(4 * N), driver.alloc(4 * N)
    stream = driver.stream()
    source = ones()
    driver.call("cuMemcpyHtoD_v2", x, source.ctypes.data, 4 * N)
    source[:] = 9
    add(y, x, 1.0, stream)
    driver.call("cuStreamSynchronize", stream)
    assert np.isnan(driver.download(y, N)).all()
    add(y, x, 1.0, 0)
    assert driver.download(y, N).tolist() == [2] * N


def test_events(driver: FakeDriver, add: Callable[..., None]) -> None:
    x, y = driver.upload(ones()), driver.alloc(4 * N)
    stream = driver.stream()
    start, end, untimed = (driver.handle("cuEventCreate", flags) for flags in (0, 0, 2))
    elapsed = ctypes.c_float(-1)
    error(INVALID_HANDLE, driver.call, "cuEventElapsedTime", ctypes.byref(elapsed), start, end)
    driver.call("cuEventQuery", start)  # not recorded: nothing to wait for
    driver.call("cuEventRecord", start, stream)
    add(y, x, 1.0, stream)
    driver.call("cuEventRecord", end, stream)
    error(NOT_READY, driver.call, "cuEventElapsedTime", ctypes.byref(elapsed), start, end)
    for _ in range(3):  # asking makes progress: start, kernel, end
        error(NOT_READY, driver.call, "cuEventQuery", end)
    driver.call("cuEventQuery", end)
    driver.call("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
    assert elapsed.value >= 0
    driver.call("cuEventRecord", untimed, stream)
    driver.call("cuEventSynchronize", untimed)
    error(INVALID_HANDLE, driver.call, "cuEventElapsedTime", ctypes.byref(elapsed), start, untimed)
    driver.call("cuEventDestroy_v2", end)
    error(INVALID_HANDLE, driver.call, "cuEventRecord", end, stream)
    add(y, x, 1.0, stream)
    error(NOT_READY, driver.call, "cuStreamQuery", stream)
    driver.call("cuStreamQuery", stream)
    driver.call("cuStreamDestroy_v2", stream)
    error(INVALID_HANDLE, driver.call, "cuStreamSynchronize", stream)


def test_host_functions_run_in_order(driver: FakeDriver, add: Callable[..., None]) -> None:
    stream = driver.stream()
    x, y = driver.upload(ones()), driver.pinned(N)
    seen: list[float] = []
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: seen.append(float(y[0])))
    add(x, x, 1.0, stream)
    driver.call("cuMemcpyDtoHAsync_v2", y.ctypes.data, x, 4 * N, stream)
    driver.call("cuLaunchHostFunc", stream, callback, 0)
    assert seen == []
    driver.call("cuStreamSynchronize", stream)
    assert seen == [2]


def test_freeing_waits_for_work_that_uses_the_memory(driver: FakeDriver, add: Callable[..., None]) -> None:
    x, y = driver.upload(ones()), driver.alloc(4 * N)
    add(y, x, 1.0, driver.stream())
    driver.call("cuMemFree_v2", x)
    assert driver.download(y, N).tolist() == [2] * N


# --- graphs -------------------------------------------------------------------------------------------------------------


def test_capture_and_replay(driver: FakeDriver, add: Callable[..., None]) -> None:
    """What was launched is done at each replay, with the parameters of then and the memory of now."""
    stream = driver.stream()
    pinned = driver.pinned(N)
    x, y, z = (driver.alloc(4 * N) for _ in range(3))
    before = driver.num_launches
    driver.capture(stream)
    driver.call("cuMemcpyHtoDAsync_v2", x, pinned.ctypes.data, 4 * N, stream)
    add(y, x, 1.0, stream)
    add(z, y, 10.0, stream)
    driver.call("cuMemcpyDtoHAsync_v2", pinned.ctypes.data, z, 4 * N, stream)
    executable = driver.end_capture(stream)
    driver.call("cuCtxSynchronize")
    assert driver.num_launches == before  # captured, not done
    pinned[:] = 1
    driver.call("cuGraphLaunch", executable, stream)
    driver.call("cuGraphLaunch", executable, stream)
    driver.call("cuStreamSynchronize", stream)
    assert pinned.tolist() == [23] * N
    assert driver.num_launches == before + 4
    driver.call("cuGraphLaunch", executable, stream)
    driver.call("cuGraphExecDestroy", executable)  # the launch is still to be done
    error(INVALID_HANDLE, driver.call, "cuGraphLaunch", executable, stream)
    driver.call("cuStreamSynchronize", stream)
    assert pinned.tolist() == [34] * N


def test_captured_copies_read_host_memory_at_each_replay(driver: FakeDriver) -> None:
    stream, source, x = driver.stream(), ones(), driver.alloc(4 * N)
    driver.capture(stream)
    driver.call("cuMemcpyHtoDAsync_v2", x, source.ctypes.data, 4 * N, stream)
    executable = driver.end_capture(stream)
    source[:] = 5
    driver.call("cuGraphLaunch", executable, stream)
    driver.call("cuStreamSynchronize", stream)
    assert driver.download(x, N).tolist() == [5] * N


def test_state_of_a_capture(driver: FakeDriver, add: Callable[..., None]) -> None:
    stream = driver.stream()
    status = ctypes.c_int(-1)

    def capturing() -> int:
        driver.call("cuStreamIsCapturing", stream, ctypes.byref(status))
        return status.value

    assert capturing() == 0
    driver.capture(stream)
    assert capturing() == 1
    error(INVALID_VALUE, driver.capture, stream)
    x = driver.handle("cuStreamCreate", 1)
    graph = ctypes.c_uint64()
    error(INVALID_VALUE, driver.call, "cuStreamEndCapture", x, ctypes.byref(graph))
    driver.call("cuStreamEndCapture", stream, ctypes.byref(graph))
    assert capturing() == 0
    count = ctypes.c_uint64(99)
    driver.call("cuGraphGetNodes", graph.value, 0, ctypes.byref(count))
    assert count.value == 0
    error(CAPTURE_UNSUPPORTED, driver.capture, 0)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_what_may_not_be_done_while_a_stream_captures(
    driver: FakeDriver, add_image: bytes, mode: int
) -> None:
    """Allocating, synchronising copies, waiting: the call fails and the capture is void. Relaxed, allocating is fine."""
    memory = driver.alloc(64)
    host = np.zeros(16, np.float32)
    event = driver.handle("cuEventCreate", 0)

    def attempt(function: str, *args: object, relaxed: bool) -> None:
        stream = driver.stream()
        driver.capture(stream, mode)
        args = tuple(stream if arg == "stream" else arg for arg in args)
        if relaxed and mode == 2:
            driver.call(function, *args)
            driver.end_capture(stream)
        else:
            error(CAPTURE_UNSUPPORTED, driver.call, function, *args)
            error(CAPTURE_INVALIDATED, driver.end_capture, stream)
        driver.call("cuStreamDestroy_v2", stream)

    out = ctypes.c_uint64()
    attempt("cuMemAlloc_v2", ctypes.byref(out), 64, relaxed=True)
    attempt("cuMemcpyHtoD_v2", memory, host.ctypes.data, 64, relaxed=True)
    attempt("cuMemcpyDtoH_v2", host.ctypes.data, memory, 64, relaxed=True)
    attempt("cuModuleLoadData", ctypes.byref(out), add_image, relaxed=True)
    attempt("cuCtxSynchronize", relaxed=True)
    attempt("cuStreamSynchronize", "stream", relaxed=False)
    attempt("cuStreamQuery", "stream", relaxed=False)
    stream = driver.stream()
    driver.call("cuEventRecord", event, stream)
    attempt("cuStreamWaitEvent", "stream", event, 0, relaxed=False)
    blocking = driver.stream(0)
    driver.capture(blocking, mode)
    error(CAPTURE_IMPLICIT, driver.call, "cuMemsetD8Async", memory, 0, 64, 0)
    error(CAPTURE_INVALIDATED, driver.end_capture, blocking)


@pytest.mark.parametrize("joins", [True, False])
def test_a_capture_may_fork_and_must_join(driver: FakeDriver, add: Callable[..., None], joins: bool) -> None:
    first, second = driver.stream(), driver.stream()
    fork, join = (driver.handle("cuEventCreate", 2) for _ in range(2))
    x, y, z = driver.upload(ones()), driver.alloc(4 * N), driver.alloc(4 * N)
    driver.capture(first)
    add(y, x, 1.0, first)
    driver.call("cuEventRecord", fork, first)
    driver.call("cuStreamWaitEvent", second, fork, 0)
    add(z, y, 1.0, second)
    driver.call("cuEventRecord", join, second)
    if not joins:
        add(z, z, 1.0, second)  # behind the event
    driver.call("cuStreamWaitEvent", first, join, 0)
    add(y, z, 1.0, first)
    if not joins:
        error(CAPTURE_UNJOINED, driver.end_capture, first)
        return
    driver.call("cuGraphLaunch", driver.end_capture(first), first)
    driver.call("cuStreamSynchronize", first)
    assert driver.download(y, N).tolist() == [4] * N
    add(z, x, 5.0, second)  # the capture is over for this stream, too
    driver.call("cuStreamSynchronize", second)
    assert driver.download(z, N).tolist() == [6] * N


def test_a_graph_whose_module_is_gone(driver: FakeDriver, add_image: bytes) -> None:
    stream = driver.stream()
    module = driver.handle("cuModuleLoadData", add_image)
    function = driver.handle("cuModuleGetFunction", module, b"add")
    x = driver.upload(ones())
    driver.capture(stream)
    driver.launch(function, [x, x, 1.0, N], stream)
    executable = driver.end_capture(stream)
    driver.call("cuModuleUnload", module)
    driver.call("cuGraphLaunch", executable, stream)
    assert "unloaded" in error(LAUNCH_FAILED, driver.call, "cuStreamSynchronize", stream)


# --- errors -------------------------------------------------------------------------------------------------------------


def test_an_error_of_a_kernel_is_sticky(driver: FakeDriver, add: Callable[..., None]) -> None:
    """It shows when somebody waits, and then everywhere, until the context is gone."""
    x, y = driver.upload(ones()), driver.alloc(4 * N)
    stream = driver.stream()
    before = driver.num_launches
    add(y, x + 4096, 1.0, stream)  # the launch itself is fine
    add(x, x, 1.0, stream)
    text = error(ILLEGAL_ADDRESS, driver.call, "cuStreamSynchronize", stream)
    assert "kernel add, block (0, 0, 0), thread (0, 0, 0)" in text
    error(ILLEGAL_ADDRESS, driver.alloc, 16)
    error(ILLEGAL_ADDRESS, driver.download, x, N)
    error(ILLEGAL_ADDRESS, add, y, x, 1.0, stream)
    error(ILLEGAL_ADDRESS, driver.call, "cuCtxSynchronize")
    assert driver.num_launches == before + 1  # nothing ran after it
    driver.close()
    driver.open()
    error(INVALID_HANDLE, driver.call, "cuStreamSynchronize", stream)
    error(INVALID_VALUE, driver.download, x, N)
    assert driver.download(driver.upload(ones()), N).tolist() == [1] * N


@pytest.mark.parametrize(
    ("kernel", "code", "words"),
    [
        ("stuck", LAUNCH_TIMEOUT, "deadlock"),
        ("crooked", MISALIGNED, "aligned to 16"),
        ("apart", LAUNCH_FAILED, "not in its mask"),
    ],
)
def test_kinds_of_errors(driver: FakeDriver, kernel: str, code: int, words: str) -> None:
    memory = driver.alloc(64)
    driver.launch(driver.load(image(bad_kernel(kernel)), kernel), [memory], 0, (1, 1, 1), (64, 1, 1))
    assert words in error(code, driver.call, "cuCtxSynchronize")


def test_use_after_free(driver: FakeDriver, add: Callable[..., None]) -> None:
    x, y = driver.upload(ones()), driver.alloc(4 * N)
    driver.call("cuMemFree_v2", x)
    add(y, x, 1.0)
    assert "not allocated" in error(ILLEGAL_ADDRESS, driver.download, y, N)


def test_thread_orders(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment; a seed gives every launch an order of its own."""
    k = Kernel("last", {"out": "ptr addrspace(1)"})
    k.store(k.sreg("tid.x"), k.p["out"], 0)  # a race: whoever is last
    data = image(k.text())

    def winners(order: int, count: int) -> list[int]:
        driver.close()
        monkeypatch.setenv("NANOSERVE_FAKE_CUDA_ORDER", str(order))
        driver.open()
        function, out = driver.load(data, "last"), driver.alloc(64)
        found = []
        for _ in range(count):
            driver.launch(function, [out], 0, (1, 1, 1), (128, 1, 1))
            found.append(int(driver.download(out, 1, np.int32)[0]))
        return found

    assert winners(0, 2) == [127, 127]
    assert winners(1, 2) == [0, 0]
    assert len(set(winners(2, 6))) > 1


CPP = r"""
#include <dlfcn.h>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <vector>
template <typename... A> void run(void* lib, const char* name, A... args) {
    int code = reinterpret_cast<int (*)(A...)>(dlsym(lib, name))(args...);
    if (code != 0) { std::printf("%s: %d\n", name, code); std::fflush(stdout); _Exit(1); }
}
int main(int, char** argv) {
    void* lib = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    std::ifstream file(argv[2], std::ios::binary);
    std::vector<char> image((std::istreambuf_iterator<char>(file)), {});
    void *context, *module, *function; uint64_t x, y; float amount = 2; int64_t n = 8; float host[8];
    run(lib, "cuInit", 0u);
    run(lib, "cuDevicePrimaryCtxRetain", &context, 0);
    run(lib, "cuCtxSetCurrent", context);
    run(lib, "cuModuleLoadData", &module, static_cast<const void*>(image.data()));
    run(lib, "cuModuleGetFunction", &function, module, "add");
    run(lib, "cuMemAlloc_v2", &x, size_t{32});
    run(lib, "cuMemAlloc_v2", &y, size_t{32});
    run(lib, "cuMemsetD32_v2", x, 0x3F800000u, size_t{8});
    void* params[] = {&y, &x, &amount, &n};
    run(lib, "cuLaunchKernel", function, 1u, 1u, 1u, 8u, 1u, 1u, 0u, static_cast<void*>(nullptr),
        static_cast<void**>(params), static_cast<void**>(nullptr));
    run(lib, "cuMemcpyDtoH_v2", static_cast<void*>(host), y, size_t{32});
    std::printf("%g %g\n", host[0], host[7]);
}
"""


def test_from_cpp_without_python(add_image: bytes, tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(CPP)
    (tmp_path / "add.image").write_bytes(add_image)
    program = tmp_path / "main"
    subprocess.run(["c++", "-std=c++20", str(tmp_path / "main.cpp"), "-o", str(program), "-ldl"], check=True)
    args = [str(program), str(library_path(FAKE_DRIVER)), str(tmp_path / "add.image")]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.stdout == "3 3\n"
