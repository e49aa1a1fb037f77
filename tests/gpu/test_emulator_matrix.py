"""Tensor core instructions: fragments, layouts and the order of summation, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu.llvm_kernel import Kernel, Value
from nanoserve.emulator import (
    AsyncAtExit,
    AsyncRace,
    Emulator,
    IllegalAddress,
    InvalidOperand,
    MisalignedAddress,
    UnsupportedInstruction,
)
from support.bfloat16 import from_bf16, to_bf16

GLOBAL = "ptr addrspace(1)"
Array = np.ndarray[Any, Any]
rng = np.random.default_rng(5)
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4

# element: (bits as stored, what they stand for), both of a random float32 array.
FORMATS = {
    "bf16": lambda x: (to_bf16(x), from_bf16(to_bf16(x))),
    "f16": lambda x: (x.astype(np.float16).view(np.uint16), x.astype(np.float16).astype(np.float32)),
    "tf32": lambda x: (x.view(np.uint32), (x.view(np.uint32) & 0xFFFFE000).view(np.float32)),
}


def stepwise(a: Array, b: Array, c: Array) -> Array:
    """c + a b, k ascending, every product exact and every sum rounded to float32: what the emulator promises."""
    total = c.astype(np.float32)
    for k in range(a.shape[1]):
        total = (
            total.astype(np.float64) + a[:, k, None].astype(np.float64) * b[k].astype(np.float64)
        ).astype(np.float32)
    return total


def fragments(matrix: Array, element: str, k_first: bool) -> list[Array]:
    """Registers of A (m x k) or, with k first, of B (k x n): one uint32 per lane each, from the PTX manual's figures."""
    matrix = matrix.T if k_first else matrix
    rows, depth = matrix.shape
    step = 4 if element == "tf32" else 8
    found = []
    for k in range(0, depth, step):
        for row in range(0, rows, 8):
            if element == "tf32":
                found.append(matrix[row + G, k + T])
            else:
                low, high = (matrix[row + G, k + 2 * T + i].astype(np.uint32) for i in (0, 1))
                found.append(low | high << 16)
    return found


def accumulators(matrix: Array) -> list[Array]:
    return [matrix[G + 8 * (r // 2), 2 * T + r % 2] for r in range(4)]


@pytest.mark.parametrize(
    ("shape", "element", "name", "half"),
    [
        ("m16n8k16", "bf16", "bf16", ""),
        ("m16n8k8", "bf16", "bf16", ""),
        ("m16n8k16", "f16", "f32.f32", "<2 x half>"),
        ("m16n8k8", "f16", "f32.f32", "<2 x half>"),
        ("m16n8k8", "tf32", "tf32", ""),
        ("m16n8k4", "tf32", "tf32", ""),
    ],
)
@pytest.mark.parametrize("through", ["intrinsic", "ptx"])
def test_mma(shape: str, element: str, name: str, half: str, through: str) -> None:
    depth = int(shape.rsplit("k", 1)[1])
    (a_bits, a), (b_bits, b) = (
        FORMATS[element](rng.standard_normal(s, np.float32)) for s in ((16, depth), (depth, 8))
    )
    c = rng.standard_normal((16, 8), np.float32)
    a_registers, b_registers = fragments(a_bits, element, False), fragments(b_bits, element, True)
    registers = np.array(
        [*a_registers, *b_registers, *(r.view(np.uint32) for r in accumulators(c))], np.uint32
    )
    k = Kernel("mma", {"x": GLOBAL, "out": GLOBAL})
    lane = k.sreg("tid.x")
    words = [k.load(k.p["x"], lane + 32 * i, "i32") for i in range(len(registers))]
    sums = [k.cast("bitcast", word, "float") for word in words[-4:]]
    result = "{ float, float, float, float }"
    if through == "intrinsic":
        operands = [k.cast("bitcast", word, half) if half else word for word in words[:-4]]
        whole = k.call(result, f"llvm.nvvm.mma.{shape}.row.col.{name}", *operands, *sums)
    else:
        num_a, num_b = len(a_registers), len(b_registers)
        lists = [range(4), range(4, 4 + num_a), range(4 + num_a, 4 + num_a + num_b)]
        lists.append(range(4 + num_a + num_b, 8 + num_a + num_b))
        text = ", ".join("{" + ", ".join(f"${i}" for i in numbers) + "}" for numbers in lists)
        ptx = f"mma.sync.aligned.{shape}.row.col.f32.{element}.{element}.f32 {text};"
        constraints = ",".join(["=f"] * 4 + ["r"] * (num_a + num_b) + ["f"] * 4)
        args = ", ".join(value.typed for value in [*words[:-4], *sums])
        whole = k.value(f'call {result} asm sideeffect "{ptx}", "{constraints}"({args})', result)
    for i, value in enumerate(k.members(whole, 4, "float")):
        k.store(value, k.p["out"], lane + 32 * i)
    emulator = Emulator(k.text())
    for order in range(3):
        out = np.zeros((4, 32), np.float32)
        emulator.launch("mma", 1, 32, 0, [registers, out], order)
        np.testing.assert_array_equal(out, accumulators(stepwise(a, b, c)))


def test_f16_values_of_every_kind() -> None:
    """Zero, subnormal, infinite and not a number, through a product with the unit matrix."""
    a = np.zeros((16, 8), np.float16)
    a.reshape(-1)[:8] = np.array([0x8000, 1, 0x83FF, 0x0400, 0x7BFF, 0xFC00, 0x7C00, 0x7E00], np.uint16).view(
        np.float16
    )
    k = Kernel("values", {"x": GLOBAL, "out": GLOBAL})
    lane = k.sreg("tid.x")
    words = [k.cast("bitcast", k.load(k.p["x"], lane + 32 * i, "i32"), "<2 x half>") for i in range(3)]
    zero = [k.const(0, "float")] * 4
    whole = k.call("{ float, float, float, float }", "llvm.nvvm.mma.m16n8k8.row.col.f32.f32", *words, *zero)
    for i, value in enumerate(k.members(whole, 4, "float")):
        k.store(value, k.p["out"], lane + 32 * i)
    eye = np.zeros((8, 8), np.float16)
    eye[0, 0] = 1
    for column in range(8):
        alone = np.zeros_like(a)
        alone[0, 0] = a[0, column]
        registers = [
            *fragments(alone.view(np.uint16), "f16", False),
            *fragments(eye.view(np.uint16), "f16", True),
        ]
        out = np.zeros((4, 32), np.float32)
        Emulator(k.text()).launch("values", 1, 32, 0, [np.array(registers, np.uint32), out])
        np.testing.assert_array_equal(out[0][0], np.float32(a[0, column]))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("through", ["intrinsic", "ptx"])
def test_matrices_to_and_from_shared_memory(count: int, transposed: bool, through: str) -> None:
    """ldmatrix brings tiles into fragments, stmatrix puts them back; rows are 48 bytes apart."""
    k = Kernel(
        "moves", {"x": GLOBAL, "loaded": GLOBAL, "stored": GLOBAL}, {"a": (48 * 32, 16), "b": (48 * 32, 16)}
    )
    lane = k.sreg("tid.x")
    for i in range(4):
        k.store(k.load(k.p["x"], lane * 4 + i, "i32"), k.shared("a"), lane * 12 + i)
        k.store(k.const(0), k.shared("b"), lane * 12 + i)
    k.barrier("tiles written")
    row = k.select(lane < 8 * count, lane, k.const(0))
    at = [k.at(k.shared(name), row * 48, "i8") for name in "ab"]
    trans = ".trans" if transposed else ""
    result = "i32" if count == 1 else "{ " + ", ".join(["i32"] * count) + " }"
    if through == "intrinsic":
        whole = k.call(result, f"llvm.nvvm.ldmatrix.sync.aligned.m8n8.x{count}{trans}.b16.p3", at[0])
    else:
        names = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
        ptx = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names}, [${count} + 0];"
        constraints = ",".join(["=r"] * count + ["r"])
        whole = k.value(f'call {result} asm sideeffect "{ptx}", "{constraints}"({at[0].typed})', result)
    words = [whole] if count == 1 else k.members(whole, count, "i32")
    for i, word in enumerate(words):
        k.store(word, k.p["loaded"], lane * count + i)
    if through == "intrinsic":
        k.call("void", f"llvm.nvvm.stmatrix.sync.aligned.m8n8.x{count}{trans}.b16.p3", at[1], *words)
    else:
        names = "{" + ", ".join(f"${i + 1}" for i in range(count)) + "}"
        ptx = f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [$0], {names};"
        args = ", ".join(value.typed for value in [at[1], *words])
        k.emit(f'call void asm sideeffect "{ptx}", "{",".join(["r"] * (count + 1))}"({args})')
    k.barrier("tiles stored")
    for i in range(4):
        k.store(k.load(k.shared("b"), lane * 12 + i, "i32"), k.p["stored"], lane * 4 + i)
    x = rng.integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    tiles = x[:count].transpose(0, 2, 1) if transposed else x[:count]
    expected = np.stack([t[G, 2 * T] | t[G, 2 * T + 1].astype(np.uint32) << 16 for t in tiles], 1)
    emulator = Emulator(k.text())
    for order in range(3):
        loaded, stored = np.zeros((32, count), np.uint32), np.zeros_like(x)
        emulator.launch("moves", 1, 32, 0, [x, loaded, stored], order)
        np.testing.assert_array_equal(loaded, expected)
        np.testing.assert_array_equal(stored[:count], x[:count])
        assert not stored[count:].any()


def test_matrix_rows_are_checked() -> None:
    k = Kernel("rows", {"at": "i32"}, {"a": (512, 16)})
    place = k.at(k.shared("a"), k.sreg("tid.x") * 16 + k.p["at"], "i8")
    k.call("{ i32, i32, i32, i32 }", "llvm.nvvm.ldmatrix.sync.aligned.m8n8.x4.b16.p3", place)
    emulator = Emulator(k.text())
    emulator.launch("rows", 1, 32, 0, [0])
    with pytest.raises(IllegalAddress) as caught:
        emulator.launch("rows", 1, 32, 0, [16])
    assert caught.value.thread == (31, 0, 0)
    with pytest.raises(MisalignedAddress) as misaligned:
        emulator.launch("rows", 1, 32, 0, [8])
    assert misaligned.value.thread == (0, 0, 0)


# --- wgmma --------------------------------------------------------------------------------------------------------------


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    return (
        (start & 0x3FFFF) >> 4
        | leading >> 4 << 16
        | stride >> 4 << 32
        | {16: 0, 128: 1, 64: 2, 32: 3}[swizzle] << 62
    )


def swizzled(offset: Array, swizzle: int) -> Array:
    """The manual's swizzles: 16-byte pieces of a row, exchanged by the number of the row within its core."""
    return offset ^ ((offset >> 7) % (swizzle // 16) << 4)


def laid_out(matrix: Array, swizzle: int, mn_major: bool) -> tuple[Array, int, int]:
    """The bytes of a matrix (rows x 16) as wgmma wants them, and its leading and stride offsets."""
    _rows, _depth = matrix.shape
    row, k = np.indices(matrix.shape)
    per_row = swizzle // 2  # elements
    if swizzle == 16:  # cores of 8 x 8: the next 8 k follow at once, then the next 8 rows
        leading, stride = 128, 256
        inner = row % 8 * 2 + k % 8 * 16 if mn_major else row % 8 * 16 + k % 8 * 2
        offset = inner + row // 8 * stride + k // 8 * leading
    elif mn_major:
        stride = 8 * swizzle  # to the next 8 k
        leading = 2 * stride  # to the next row length of m: there are 16 k
        offset = row % per_row * 2 + k % 8 * swizzle + row // per_row * leading + k // 8 * stride
    else:
        leading, stride = 0, 8 * swizzle
        offset = row % 8 * swizzle + row // 8 * stride + k * 2
    out = np.zeros(16384, np.uint16)
    out[swizzled(offset, swizzle) // 2] = matrix
    return out, leading, stride


def wgmma_kernel(
    n: int, element: str, from_registers: bool, scale: tuple[int, int, int], trans: list[int]
) -> str:
    """d = scale_d * d + (+-a) (+-b): A and B are copied to shared memory as they come."""
    k = Kernel(
        "wgmma", {"a": GLOBAL, "b": GLOBAL, "d": GLOBAL, "da": "i64", "db": "i64"}, {"tiles": (0, 1024)}
    )
    thread, tiles = k.sreg("tid.x"), k.shared("tiles")
    for i, name in enumerate("ab"):
        for part in range(32768 // 4 // 128):
            place = thread + 128 * part
            k.store(k.load(k.p[name], place, "i32"), tiles, place + i * 8192)
    k.call("void", "llvm.nvvm.fence.proxy.async.shared_cta", tag="writers fence")
    k.barrier("tiles written")
    k.call("void", "llvm.nvvm.wgmma.fence.sync.aligned")
    base = (k.cast("ptrtoint", tiles, "i64") & 0x3FFFF) >> 4
    count = n // 2
    sums = [k.load(k.p["d"], thread * count + i, "float") for i in range(count)]
    operands: list[Value] = [base + k.p["da"], base + 2048 + k.p["db"]]
    if from_registers:
        operands[:1] = [k.load(k.p["a"], thread * 4 + i, "i32") for i in range(4)]
    num_a = len(operands) - 1
    numbers = iter(range(2 * count, 2 * count + num_a + 1))
    a_text = ", ".join(f"${next(numbers)}" for _ in range(num_a))
    a_text = "{" + a_text + "}" if from_registers else a_text
    rest = ", ".join(map(str, [*scale[1:], *trans]))
    text = (
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{element}.{element} "
        f"{{{', '.join(f'${i}' for i in range(count))}}}, {a_text}, ${next(numbers)}, {scale[0]}, {rest};"
    )
    constraints = (
        ["=f"] * count + [str(i) for i in range(count)] + (["r"] * 4 if from_registers else ["l"]) + ["l"]
    )
    args = ", ".join(value.typed for value in [*sums, *operands])
    result = "{ " + ", ".join(["float"] * count) + " }"
    whole = k.value(f'call {result} asm sideeffect "{text}", "{",".join(constraints)}"({args})', result)
    k.call("void", "llvm.nvvm.wgmma.commit_group.sync.aligned")
    k.call("void", "llvm.nvvm.wgmma.wait_group.sync.aligned", k.const(0, "i64"), tag="product done")
    for i, value in enumerate(k.members(whole, count, "float")):
        k.store(value, k.p["d"], thread * count + i)
    return k.text()


def run_wgmma(
    n: int = 16,
    element: str = "bf16",
    swizzle: int = 128,
    mn_major: tuple[bool, bool] = (False, False),
    scale: tuple[int, int, int] = (1, 1, 1),
    from_registers: bool = False,
) -> None:
    bits = FORMATS[element]
    (a_bits, a), (b_bits, b) = (bits(rng.standard_normal(s, np.float32)) for s in ((64, 16), (n, 16)))
    c = rng.standard_normal((64, n), np.float32)
    packed_a, leading, stride = laid_out(a_bits, swizzle, mn_major[0])
    a_descriptor = descriptor(0, leading, stride, swizzle)
    packed_b, leading, stride = laid_out(b_bits, swizzle, mn_major[1])
    if from_registers:
        warps = [fragments(a_bits[16 * w : 16 * w + 16], element, False) for w in range(4)]
        packed_a = np.zeros(16384, np.uint16)
        packed_a[: 64 * 16] = (
            np.concatenate([np.stack(w, 1).reshape(-1) for w in warps]).astype(np.uint32).view(np.uint16)
        )
    thread, register = np.indices((128, n // 2))
    row = thread // 32 * 16 + thread % 32 // 4 + 8 * (register % 4 // 2)
    column = 8 * (register // 4) + 2 * (thread % 4) + register % 2
    trans = [int(flag) for flag in (mn_major[1:] if from_registers else mn_major)]
    emulator = Emulator(wgmma_kernel(n, element, from_registers, scale, trans))
    args = [a_descriptor, descriptor(0, leading, stride, swizzle)]
    expected = stepwise(scale[1] * a, scale[2] * b.T, scale[0] * c)
    for order in range(3):
        d = c[row, column].copy()
        emulator.launch("wgmma", 1, 128, 65536, [packed_a, packed_b, d, *args], order)
        np.testing.assert_array_equal(d, expected[row, column])


@pytest.mark.parametrize("swizzle", [128, 64, 32, 16])
@pytest.mark.parametrize("mn_major", [(False, False), (True, False), (False, True), (True, True)])
def test_wgmma_layouts(swizzle: int, mn_major: tuple[bool, bool]) -> None:
    run_wgmma(64, swizzle=swizzle, mn_major=mn_major)


def test_wgmma_sizes_formats_scales_and_registers() -> None:
    for n in (8, 24, 256):
        run_wgmma(n)
    run_wgmma(element="f16")
    for scale in ((0, 1, 1), (1, -1, 1), (1, 1, -1), (0, -1, -1)):
        run_wgmma(scale=scale)
    run_wgmma(32, from_registers=True)
    run_wgmma(64, from_registers=True, mn_major=(False, True), scale=(1, -1, 1))


def test_wgmma_sees_stores_only_after_a_proxy_fence() -> None:
    text = wgmma_kernel(8, "bf16", False, (1, 1, 1), [0, 0])
    fence = next(line for line in text.splitlines() if line.endswith("; writers fence"))
    bits = descriptor(0, 0, 1024, 128)
    args = [np.zeros(16384, np.uint16), np.zeros(16384, np.uint16), np.zeros(512, np.float32), bits, bits]
    Emulator(text).launch("wgmma", 1, 128, 65536, args)
    # Without any; and by the readers, not the writers, which helps only where these happen to come first.
    behind = text.replace(fence, "").replace("; tiles written", "; tiles written\n" + fence, 1)
    for broken, orders in ((text.replace(fence, ""), (0, 1, 2, 3)), (behind, (0, 1))):
        emulator = Emulator(broken)
        for order in orders:
            with pytest.raises(AsyncRace, match=r"no fence\.proxy\.async"):
                emulator.launch("wgmma", 1, 128, 65536, args, order)


def test_wgmma_that_nobody_waits_for() -> None:
    text = wgmma_kernel(8, "bf16", False, (1, 1, 1), [0, 0])
    wait = next(line for line in text.splitlines() if line.endswith("; product done"))
    bits = descriptor(0, 0, 1024, 128)
    args = [np.zeros(16384, np.uint16), np.zeros(16384, np.uint16), np.zeros(512, np.float32), bits, bits]
    with pytest.raises(AsyncAtExit):
        Emulator(text.replace(wait, "")).launch("wgmma", 1, 128, 65536, args)
    overwrite = "  store i32 0, ptr addrspace(3) @tiles, align 4\n"
    with pytest.raises(AsyncRace, match="wgmma nobody waited for may still read"):
        Emulator(text.replace(wait, overwrite + wait)).launch("wgmma", 1, 128, 65536, args, 1)


def test_wgmma_operands() -> None:
    bits = descriptor(0, 0, 1024, 128)
    args: list[Any] = [
        np.zeros(16384, np.uint16),
        np.zeros(16384, np.uint16),
        np.zeros(512, np.float32),
        bits,
        bits,
    ]
    emulator = Emulator(wgmma_kernel(8, "bf16", False, (1, 1, 1), [0, 0]))
    with pytest.raises(InvalidOperand, match="base offset"):
        emulator.launch("wgmma", 1, 128, 65536, [*args[:4], bits | 1 << 49])
    with pytest.raises(InvalidOperand, match="groups of four"):
        emulator.launch("wgmma", 1, 96, 65536, args)
    with pytest.raises(IllegalAddress, match="outside"):
        emulator.launch("wgmma", 1, 128, 65536, [*args[:4], bits + 4096 - 2048 - 1])
    with pytest.raises(UnsupportedInstruction, match="m64n8k32"):
        Emulator(wgmma_kernel(8, "e4m3", False, (1, 1, 1), [0, 0]).replace("k16.f32", "k32.f32"))
