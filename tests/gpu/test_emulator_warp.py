"""What the lanes of a warp, and the warps of a block, do together: each against its definition, in every thread order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from gpu.llvm_kernel import Kernel, Value
from nanoserve.emulator import Deadlock, Emulator, InvalidOperand

ORDERS = (0, 1, 2, 3)
GLOBAL = "ptr addrspace(1)"
rng = np.random.default_rng(0)


def run_warp(body: Callable[[Kernel, Value, Value], list[Value]], x: np.ndarray, num_out: int) -> np.ndarray:
    """out[i][lane] of 32 threads that each compute body(kernel, x[lane], lane): the same in every order."""
    k = Kernel("warp", {"x": GLOBAL, "out": GLOBAL})
    lane = k.sreg("tid.x")
    for i, value in enumerate(body(k, k.load(k.p["x"], lane, "i32"), lane)):
        k.store(k.cast("zext", value, "i32") if value.type == "i1" else value, k.p["out"], lane + 32 * i)
    emulator = Emulator(k.text())
    results = []
    for order in ORDERS:
        out = np.zeros((num_out, 32), np.int32)
        emulator.launch("warp", 1, 32, 0, [x.astype(np.int32), out], order)
        results.append(out)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
    return results[0]


def shuffled(mode: str, x: np.ndarray, b: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """As __shfl_*_sync is documented: lanes in segments of `width`, a source outside of it is the lane itself."""
    lane = np.arange(32)
    segment, inner = lane // width * width, lane % width
    wanted = {"up": inner - b, "down": inner + b, "bfly": inner ^ b, "idx": np.full(32, b % width)}[mode]
    valid = (wanted >= 0) & (wanted < width)
    return x[np.where(valid, segment + wanted, lane)], valid


SHUFFLES = [(m, b, w) for m in ("up", "down", "bfly", "idx") for b in (0, 1, 3, 16, 31) for w in (32, 16, 4)]


@pytest.mark.parametrize(("mode", "b", "width"), [s for s in SHUFFLES if s[0] != "bfly" or s[1] < s[2]])
def test_shuffles(mode: str, b: int, width: int) -> None:
    c = ((32 - width) << 8) | (0 if mode == "up" else 31)
    x = rng.integers(-1000, 1000, 32)

    def body(k: Kernel, value: Value, lane: Value) -> list[Value]:
        operands = [k.const(-1), value, k.const(b), k.const(c)]
        both = k.call("{ i32, i1 }", f"llvm.nvvm.shfl.sync.{mode}.i32p", *operands)
        return [*(k.value(f"extractvalue {both.typed}, {i}", type_) for i, type_ in enumerate(("i32", "i1")))]

    out = run_warp(body, x, 2)
    expected, valid = shuffled(mode, x, b, width)
    np.testing.assert_array_equal(out[0], expected)
    np.testing.assert_array_equal(out[1], valid)


def test_a_butterfly_across_segments() -> None:
    """PTX: lane ^ b, if that is not above the last lane of the segment."""
    x = np.arange(32)

    def body(k: Kernel, value: Value, lane: Value) -> list[Value]:
        operands = [k.const(-1), value, k.const(16), k.const((32 - 16) << 8 | 31)]
        return [k.call("i32", "llvm.nvvm.shfl.sync.bfly.i32", *operands)]

    np.testing.assert_array_equal(run_warp(body, x, 1)[0], [*range(16), *range(16)])


def test_a_lane_that_takes_no_part_has_no_value() -> None:
    """Half a warp reads from the other half, which is elsewhere: undefined on a GPU, a NaN here."""

    def body(k: Kernel, value: Value, lane: Value) -> list[Value]:
        slot = k.value("alloca i32", "ptr")
        k.emit(f"store i32 1, {slot.typed}")

        def low() -> None:
            operands = [k.const(0xFFFF), value, k.const(16), k.const(31)]
            moved = k.call("i32", "llvm.nvvm.shfl.sync.bfly.i32", *operands)
            k.emit(f"store {moved.typed}, {slot.typed}")

        k.when(lane < 16, low)
        return [k.value(f"load i32, {slot.typed}", "i32")]

    out = run_warp(body, np.zeros(32), 1)[0]
    assert np.isnan(out[:16].copy().view(np.float32)).all()
    assert (out[16:] == 1).all()


def test_a_warp_of_fewer_threads() -> None:
    """A mask may name lanes that do not exist."""
    k = Kernel("few", {"out": GLOBAL})
    operands = [k.const(-1), k.sreg("tid.x"), k.const(1), k.const(31)]
    k.store(k.call("i32", "llvm.nvvm.shfl.sync.bfly.i32", *operands), k.p["out"], k.sreg("tid.x"))
    out = np.zeros(44, np.int32)
    Emulator(k.text()).launch("few", 1, 44, 0, [out], 2)
    np.testing.assert_array_equal(out, (np.arange(44) % 32 ^ 1) + np.arange(44) // 32 * 32)


def test_votes() -> None:
    for x in (np.zeros(32), np.ones(32), rng.integers(0, 2, 32)):
        ballot = int(sum(int(bit) << lane for lane, bit in enumerate(x)))

        def body(k: Kernel, value: Value, lane: Value) -> list[Value]:
            bit = value.compare("ne", 0)
            names = [(f"llvm.nvvm.vote.{mode}.sync", "i1") for mode in ("all", "any", "uni")]
            names.append(("llvm.nvvm.vote.ballot.sync", "i32"))
            return [k.call(result, name, k.const(-1), bit) for name, result in names]

        out = run_warp(body, x, 4)
        expected = [x.all(), x.any(), x.all() or not x.any(), np.uint32(ballot).view(np.int32)]
        np.testing.assert_array_equal(out, np.repeat(np.array(expected, np.int32)[:, None], 32, 1))


def test_reductions_matches_and_elections() -> None:
    x = rng.integers(-5, 5, 32)
    ops: dict[str, Callable[[np.ndarray], int]] = {
        "add": lambda v: int(v.sum()),
        "min": lambda v: int(v.min()),
        "max": lambda v: int(v.max()),
        "umin": lambda v: int(v.astype(np.int32).view(np.uint32).min().view(np.int32)),
        "umax": lambda v: int(v.astype(np.int32).view(np.uint32).max().view(np.int32)),
        "and": lambda v: int(np.bitwise_and.reduce(v)),
        "or": lambda v: int(np.bitwise_or.reduce(v)),
        "xor": lambda v: int(np.bitwise_xor.reduce(v)),
    }

    def low_lanes_apart(k: Kernel, value: Value, lane: Value) -> list[Value]:
        """Lanes 4 to 31 elect; the others must not be there."""
        slot = k.value("alloca i32", "ptr")
        k.emit(f"store i32 -1, {slot.typed}")

        def elect() -> None:
            whole = k.call("{ i32, i1 }", "llvm.nvvm.elect.sync", k.const(-16))
            leader = k.members(whole, 1, "i32")[0]
            mine = k.cast("zext", k.value(f"extractvalue {whole.typed}, 1", "i1"), "i32")
            k.emit(f"store {(leader * 2 + mine).typed}, {slot.typed}")

        k.when(lane.compare("sge", 4), elect)
        return [k.value(f"load i32, {slot.typed}", "i32")]

    def reduced(k: Kernel, value: Value, lane: Value) -> list[Value]:
        results = [k.call("i32", f"llvm.nvvm.redux.sync.{op}", value, k.const(-1)) for op in ops]
        k.call("void", "llvm.nvvm.bar.warp.sync", k.const(-1))
        return [*results, k.call("i32", "llvm.nvvm.match.any.sync.i32", k.const(-1), value)]

    out = run_warp(reduced, x, len(ops) + 1)
    for row, (op, expected) in zip(out, ops.items(), strict=False):
        assert (row == expected(x)).all(), op
    same = [int(sum(1 << other for other in range(32) if x[other] == x[lane])) for lane in range(32)]
    np.testing.assert_array_equal(out[-1].view(np.uint32), np.array(same, np.uint32))
    elected = run_warp(low_lanes_apart, x, 1)[0]
    assert elected.tolist() == [-1] * 4 + [4 * 2 + 1] + [4 * 2] * 27


@pytest.mark.parametrize("order", ORDERS)
def test_named_barriers(order: int) -> None:
    """Warp 0 hands over to warp 1 through barrier 3; warps 2 and 3 use barrier 5 for themselves, twice."""
    k = Kernel("hand_over", {"out": GLOBAL}, {"box": (128, 16), "pair": (256, 16)})
    thread = k.sreg("tid.x")
    warp, lane = thread // 32, thread % 32

    def count(name: str, id_: int) -> None:
        k.call("void", f"llvm.nvvm.barrier.cta.{name}.aligned.count", k.const(id_), k.const(64))

    def give() -> None:
        k.store(lane * 7, k.shared("box"), lane)
        count("arrive", 3)

    def take() -> None:
        count("sync", 3)
        k.store(k.load(k.shared("box"), lane, "i32"), k.p["out"], thread)

    def exchange() -> None:
        for turn in range(2):
            k.store(thread + turn, k.shared("pair"), thread % 64)
            count("sync", 5)
            k.store(k.load(k.shared("pair"), (thread + 32) % 64, "i32"), k.p["out"], thread)
            count("sync", 5)

    for number, body in ((0, give), (1, take)):
        k.when(warp.compare("eq", number), body)
    k.when(warp.compare("sge", 2), exchange)
    out = np.zeros(128, np.int32)
    Emulator(k.text()).launch("hand_over", 1, 128, 0, [out], order)
    assert out[32:64].tolist() == [7 * i for i in range(32)]
    assert out[64:].tolist() == [*range(97, 129), *range(65, 97)]


def test_barriers_that_reduce() -> None:
    k = Kernel("agree", {"x": GLOBAL, "out": GLOBAL})
    thread = k.sreg("tid.x")
    bit = k.load(k.p["x"], thread, "i32").compare("ne", 0)
    for i, (name, result) in enumerate((("popc", "i32"), ("and", "i1"), ("or", "i1"))):
        value = k.call(result, f"llvm.nvvm.barrier.cta.red.{name}.aligned.all", k.const(0), bit)
        k.store(k.cast("zext", value, "i32") if result == "i1" else value, k.p["out"], thread * 3 + i)
    emulator = Emulator(k.text())
    for x in (np.zeros(64), np.ones(64), np.arange(64) % 3):
        for order in ORDERS:
            out = np.zeros((64, 3), np.int32)
            emulator.launch("agree", 1, 64, 0, [x.astype(np.int32), out], order)
            assert (out == [np.count_nonzero(x), x.all(), x.any()]).all()


@pytest.mark.parametrize(
    ("id_", "count", "error", "words"),
    [
        (16, 64, InvalidOperand, "there are 16"),
        (1, 48, InvalidOperand, "multiple of 32"),
        (1, 96, InvalidOperand, "at most the block's 64"),
        (1, 32, None, ""),
    ],
)
def test_numbers_of_barriers(id_: int, count: int, error: type[Exception] | None, words: str) -> None:
    k = Kernel("numbered", {})
    k.call("void", "llvm.nvvm.barrier.cta.sync.aligned.count", k.const(id_), k.const(count))
    emulator = Emulator(k.text())
    if error is None:
        emulator.launch("numbered", 1, 64, 0, [])
        return
    with pytest.raises(error, match=words):
        emulator.launch("numbered", 1, 64, 0, [])


def test_different_counts_at_one_barrier_and_too_few_threads() -> None:
    k = Kernel("counts", {"low": "i32", "high": "i32"})
    first = k.sreg("tid.x") < 64
    sync = "llvm.nvvm.barrier.cta.sync.aligned.count"
    for part, name in ((first, "low"), (first.compare("eq", 0), "high")):
        k.when(part, lambda name=name: k.call("void", sync, k.const(1), k.p[name]))
    emulator = Emulator(k.text())
    emulator.launch("counts", 1, 128, 0, [64, 64])
    emulator.launch("counts", 1, 128, 0, [128, 128])
    with pytest.raises(InvalidOperand, match=r"others came for 96"):
        emulator.launch("counts", 1, 128, 0, [96, 128])  # in this order the first two warps come first
    with pytest.raises(Deadlock, match="64 at bar"):
        emulator.launch("counts", 1, 128, 0, [64, 96])
