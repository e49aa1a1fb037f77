"""Inline PTX: each instruction does what the manual says, under its predicate, with its operands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu.llvm_kernel import Kernel
from nanoserve.emulator import AsyncRace, Emulator, IllegalAddress, MisalignedAddress
from nanoserve.emulator.inline_ptx import Address, Statement, parse
from support.bfloat16 import from_bf16, to_bf16

GLOBAL = "ptr addrspace(1)"
Array = np.ndarray[Any, Any]


def test_reading_statements() -> None:
    text = """{ // a block
        .reg .pred p, q;  /* two
        of them */ setp.ne.b32 p, $2, 0;
        @p ld.global.v2.b32 { $0, $1 }, [ $3 + 16 ];
        @!p mov.u32 $0, 0x10; bar.sync 0;
    }"""
    assert parse(text) == [
        Statement(".reg", (".pred", "p", "q")),
        Statement("setp.ne.b32", ("p", "$2", "0")),
        Statement("ld.global.v2.b32", (("$0", "$1"), Address("$3", 16)), "p"),
        Statement("mov.u32", ("$0", "0x10"), "p", True),
        Statement("bar.sync", ("0",)),
    ]
    assert parse("shfl.sync.idx.b32 $0|p, $1, 0, 31, -1; st.b32 [$1-4], $0;") == [
        Statement("shfl.sync.idx.b32", ("$0", "p", "$1", "0", "31", "-1")),
        Statement("st.b32", (Address("$1", -4), "$0")),
    ]


def compute(ptx: str, *inputs: Array, out: str = "i32") -> Array:
    """The output `$0` of a thread per element of the inputs, which are `$1`, `$2`, ..."""
    codes = {"i32": "r", "float": "f", "i64": "l", "i16": "h"}
    types = {
        "int32": "i32",
        "uint32": "i32",
        "float32": "float",
        "int64": "i64",
        "uint64": "i64",
        "uint16": "i16",
    }
    params = {"out": GLOBAL, **{f"x{i}": GLOBAL for i in range(len(inputs))}}
    k = Kernel("compute", params)
    thread = k.sreg("tid.x")
    values = [k.load(k.p[f"x{i}"], thread, types[str(x.dtype)], align=2) for i, x in enumerate(inputs)]
    constraints = ",".join([f"={codes[out]}", *(codes[value.type] for value in values)])
    args = ", ".join(value.typed for value in values)
    k.store(k.value(f'call {out} asm "{ptx}", "{constraints}"({args})', out), k.p["out"], thread, align=2)
    dtype = {"i32": np.int32, "float": np.float32, "i64": np.int64, "i16": np.uint16}[out]
    result = np.zeros(len(inputs[0]), dtype)
    Emulator(k.text()).launch("compute", 1, len(result), 0, [result, *inputs])
    return result


rng = np.random.default_rng(2)
A, B = (rng.integers(-(2**31), 2**31, 64).astype(np.int32) for _ in range(2))
SMALL = rng.integers(0, 31, 64).astype(np.int32)
X, Y, Z = (rng.standard_normal(64, np.float32) for _ in range(3))
U = A.view(np.uint32)
SIGNS = np.repeat(A.view(np.int8) >> 7, 1).view(np.int32)  # of each byte, all over it


@pytest.mark.parametrize(
    ("ptx", "inputs", "expected"),
    [
        ("add.s32 $0, $1, $2;", (A, B), A + B),
        ("sub.u32 $0, $1, $2;", (A, B), A - B),
        ("mul.lo.s32 $0, $1, $2;", (A, B), A * B),
        ("mad.lo.s32 $0, $1, $2, 7;", (A, B), A * B + 7),
        ("and.b32 $0, $1, $2;", (A, B), A & B),
        ("or.b32 $0, $1, 0xF0;", (A,), A | 0xF0),
        ("xor.b32 $0, $1, $2;", (A, B), A ^ B),
        ("not.b32 $0, $1;", (A,), ~A),
        ("shl.b32 $0, $1, $2;", (A, SMALL), A << SMALL),
        ("shr.s32 $0, $1, $2;", (A, SMALL), A >> SMALL),
        ("shr.u32 $0, $1, $2;", (A, SMALL), (U >> SMALL.view(np.uint32)).view(np.int32)),
        ("min.s32 $0, $1, $2;", (A, B), np.minimum(A, B)),
        ("max.u32 $0, $1, $2;", (A, B), np.maximum(U, B.view(np.uint32)).view(np.int32)),
        ("{ .reg .pred p; setp.lt.s32 p, $1, $2; selp.b32 $0, 5, 6, p; }", (A, B), np.where(A < B, 5, 6)),
        ("{ .reg .pred p; setp.hs.u32 p, $1, $2; selp.b32 $0, 5, 6, p; }", (A, B), np.where(B.view(np.uint32) <= U, 5, 6)),
        ("{ .reg .pred %p; setp.gt.f32 %p, $1, $2; @!%p mov.b32 $0, 9; }", (X, Y), np.where(X > Y, 0, 9)),
        ("{ .reg .b16 a, b; mov.b32 {a, b}, $1; mov.b32 $0, {b, a}; }", (A,), (U >> 16 | U << 16).view(np.int32)),
        ("mov.u32 $0, %tid.x;", (A,), np.arange(64)),
        ("prmt.b32 $0, $1, $2, 0x5410;", (A, B), ((U & 0xFFFF) | B.view(np.uint32) << 16).view(np.int32)),
        ("prmt.b32 $0, $1, $2, 0xBA98;", (A, B), SIGNS),
        ("cvt.rn.bf16x2.f32 $0, $1, $2;", (X, Y), (to_bf16(X).astype(np.uint32) << 16 | to_bf16(Y)).view(np.int32)),
        ("cvt.rna.tf32.f32 $0, $1;", (X,), ((X.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.int32)),
        ("cvt.u32.u16 $0, $1;", (to_bf16(X),), to_bf16(X).astype(np.int32)),
    ],
)  # fmt: skip
def test_integers_and_bits(ptx: str, inputs: tuple[Array, ...], expected: Array) -> None:
    np.testing.assert_array_equal(compute(ptx, *inputs), expected)


@pytest.mark.parametrize(
    ("ptx", "inputs", "expected"),
    [
        ("add.f32 $0, $1, $2;", (X, Y), X + Y),
        ("sub.rn.f32 $0, $1, $2;", (X, Y), X - Y),
        ("mul.ftz.f32 $0, $1, 0f40000000;", (X,), X * 2),
        ("div.full.f32 $0, $1, $2;", (X, Y), X / Y),
        ("fma.rn.f32 $0, $1, $2, $3;", (X, Y, Z), (X.astype(np.float64) * Y + Z).astype(np.float32)),
        ("max.f32 $0, $1, $2;", (X, Y), np.maximum(X, Y)),
        ("neg.f32 $0, $1;", (X,), -X),
        ("ex2.approx.ftz.f32 $0, $1;", (X,), np.exp2(X)),
        ("lg2.approx.f32 $0, $1;", (abs(X),), np.log2(abs(X))),
        ("tanh.approx.f32 $0, $1;", (X,), np.tanh(X)),
        ("rcp.approx.ftz.f32 $0, $1;", (X,), 1 / X),
        ("rsqrt.approx.f32 $0, $1;", (abs(X),), 1 / np.sqrt(abs(X))),
        ("cvt.f32.bf16 $0, $1;", (to_bf16(X),), from_bf16(to_bf16(X))),
    ],
)
def test_floats(ptx: str, inputs: tuple[Array, ...], expected: Array) -> None:
    np.testing.assert_allclose(compute(ptx, *inputs, out="float"), expected, rtol=3e-7)


def test_memory_under_predicates() -> None:
    """A thread that must not touch memory does not: its address may be anything."""
    k = Kernel("guarded", {"x": GLOBAL, "y": GLOBAL, "n": "i32"})
    thread = k.sreg("tid.x")
    inside = thread < k.p["n"]
    source, target = (k.at(k.p[name], thread * 4, "float") for name in "xy")
    zeros = ", ".join(["i32 -1"] * 4)
    load = "@$9 ld.global.v4.b32 { $0, $1, $2, $3 }, [ $8 + 0 ];"
    result = "{ i32, i32, i32, i32 }"
    call = f'call {result} asm sideeffect "{load}", "=r,=r,=r,=r,0,1,2,3,l,b"({zeros}, {source.typed}, {inside.typed})'
    words = k.members(k.value(call, result), 4, "i32")
    store = "@$5 st.global.v4.b32 [ $4 + 0 ], { $0, $1, $2, $3 };"
    args = ", ".join(value.typed for value in [*words, target, inside])
    k.emit(f'call void asm sideeffect "{store}", "r,r,r,r,l,b"({args})')
    emulator = Emulator(k.text())
    x, y = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    emulator.launch("guarded", 1, 4096 // 32, 0, [x, y, 8])
    np.testing.assert_array_equal(x, y)
    with pytest.raises(IllegalAddress) as caught:
        emulator.launch("guarded", 1, 32, 0, [x, y, 9])
    assert caught.value.thread == (8, 0, 0)
    with pytest.raises(MisalignedAddress, match="16 bytes must be aligned to 16"):
        Emulator(k.text().replace("[ $8 + 0 ]", "[ $8 + 4 ]")).launch("guarded", 1, 1, 0, [x, y, 1])


@pytest.mark.parametrize("waits", [True, False])
def test_asynchronous_copies(waits: bool) -> None:
    """Sixteen bytes, of which the last are zero where the source has fewer."""
    k = Kernel("copies", {"x": GLOBAL, "y": GLOBAL, "some": "i32"}, {"tile": (64, 16)})
    tile, source = k.at(k.shared("tile"), 16, "i8"), k.at(k.p["x"], 0, "i8")
    copy = "cp.async.cg.shared.global [ $0 + 16 ], [ $1 + 0 ], 0x10, $2;"
    k.emit(f'call void asm sideeffect "{copy}", "r,l,r"({tile.typed}, {source.typed}, {k.p["some"].typed})')
    k.emit('call void asm sideeffect "cp.async.commit_group;", ""()')
    wait = f"cp.async.wait_group {0 if waits else 1};"
    k.emit(f'call void asm sideeffect "{wait} bar.sync 0; fence.proxy.async; membar.gl;", ""()')
    for i in range(4):
        k.store(k.load(k.shared("tile"), 8 + i, "float"), k.p["y"], i)
    emulator = Emulator(k.text())
    x, y = np.arange(1, 5, dtype=np.float32), np.zeros(4, np.float32)
    if not waits:
        with pytest.raises(AsyncRace):
            emulator.launch("copies", 1, 1, 0, [x, y, 16])
        return
    for some in (16, 12, 0):
        emulator.launch("copies", 1, 1, 0, [x, y, some])
        assert y.tolist() == [i + 1 if 4 * i < some else 0 for i in range(4)]


def test_warp_instructions() -> None:
    k = Kernel("warp", {"out": GLOBAL})
    lane = k.sreg("tid.x")
    text = (
        "{ .reg .pred p; .reg .b32 l; bar.warp.sync 0xffffffff; elect.sync l|p, 0xffffffff; selp.b32 $0, 1, 0, p;"
        " shfl.sync.bfly.b32 $1|p, $3, 1, 31, 0xffffffff; shfl.sync.up.b32 l|p, $3, 1, 0, 0xffffffff;"
        " selp.b32 $2, l, 99, p; }"
    )
    result = "{ i32, i32, i32 }"
    whole = k.value(f'call {result} asm sideeffect "{text}", "=r,=r,=r,r"({lane.typed})', result)
    for i, value in enumerate(k.members(whole, 3, "i32")):
        k.store(value, k.p["out"], lane + 32 * i)
    for order in range(3):
        out = np.zeros((3, 32), np.int32)
        Emulator(k.text()).launch("warp", 1, 32, 0, [out], order)
        assert out[0].tolist() == [1] + [0] * 31
        assert out[1].tolist() == [i ^ 1 for i in range(32)]
        assert out[2].tolist() == [99, *range(31)]
