"""What the threads of a block find together among numbers that are spread over them. Sums are of integers, which have no order.

FirstBeyond: each thread holds a weight; the first of them, in the order of threads, at which the running sum exceeds a target.
BarSearch: the largest number, of those looked through, that leaves so much at or above itself. An interval that holds it is
cut in `WAYS` parts each turn: first evenly, which is quick where the numbers lie close to each other, then evenly among the
float32 numbers that there are, which ends for any. Those count as integers of the same order, "keys".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from nanoserve.compiler.gpu.chip import WARP

if TYPE_CHECKING:
    from nanoserve.compiler.builder import Operand, Value
    from nanoserve.compiler.gpu.memory import SharedMemory

WAYS = 8
_EVEN_TURNS = 3
_TURNS = _EVEN_TURNS + 11  # 8^11 is more than 2^32 keys

Scan = Callable[["list[Value]", "Value"], "list[Value]"]


def shared_bytes(warps: int) -> int:
    """Of both."""
    return 8 * (warps + 2) + 8 * (WAYS * warps + WAYS)


class FirstBeyond:
    """All threads of the block must call it, and get the same."""

    def __init__(self, warps: int, shared: SharedMemory) -> None:
        self._warps = warps
        self._sums = shared.array(warps, element="i64", alignment=8)
        self._found = shared.array(2, element="i64", alignment=8)

    def __call__(self, own: Value, target_of: Callable[[Value], Value]) -> tuple[Value, Value]:
        """The thread at which the running sum of `own` exceeds target_of(the sum of all), and how much of the target was
        left before it. Weights are i64, zero or more; the target is less than their sum.
        """
        from nanoserve.compiler.builder import add, const, i64, imin, index, select
        from nanoserve.compiler.control import when
        from nanoserve.compiler.gpu.threads import barrier, over_warp, running_sum, thread_id

        thread = thread_id()
        warp, lane = thread // WARP, thread % WARP
        running = running_sum(own)

        @when(lane > WARP - 2)
        def _() -> None:
            self._sums[warp] = running

        barrier()
        zero = const(0, "i64")
        of_lane = select(lane < self._warps, self._sums[imin(lane, self._warps - 1)], zero)
        target = target_of(over_warp(of_lane, add))
        running = running + over_warp(select(lane < warp, of_lane, zero), add)
        before = running - own

        @when((running > target) & (before <= target))
        def _() -> None:
            self._found[0] = i64(thread)
            self._found[1] = target - before

        barrier()
        return index(self._found[0]), self._found[1]


class Bar(NamedTuple):
    """What a search found: the number (f32), and as i64 how much lies above it, how much is equal to it, and the target."""

    value: Value
    above: Value
    equal: Value
    target: Value


class BarSearch:
    """All threads of the block must call it, and get the same."""

    def __init__(self, warps: int, shared: SharedMemory) -> None:
        self._warps = warps
        self._parts = shared.array(WAYS, warps, element="i64", alignment=8)
        self._totals = shared.array(WAYS, element="i64", alignment=8)

    def __call__(self, scan: Scan, lowest: Value, highest: Value, target_of: Callable[[Value], Value]) -> Bar:
        """The largest number in [lowest, highest] such that what is at least as large amounts to the target; `lowest`,
        where not even that does.

        Args:
            scan: (cuts, end) -> for each cut, what of this thread's numbers in [cut, end) amounts to, as i64.
            highest: the largest number there is.
            target_of: of the amount in [lowest, highest].
        """
        from nanoserve.compiler.builder import const, select
        from nanoserve.compiler.control import loop, when

        zero = const(0, "i64")

        @loop(0, _TURNS, carry=[_key(lowest), _key(highest) + 1, zero, zero, zero])
        def found(turn: Value, state: list[Value]) -> list[Value]:
            low, high, above, _, target = state

            @when((high - low > 1) | (turn < 1), otherwise=state)
            def narrowed() -> list[Value]:
                def cut(part: Operand) -> Value:
                    return _cut(low, high, part, turn < _EVEN_TURNS)

                totals = self._over_block(scan([_number(cut(j)) for j in range(WAYS)], _number(high)))
                wanted = select(turn < 1, target_of(totals[0]), target)
                part = zero
                for total in totals[1:]:
                    part = part + select(above + total >= wanted, const(1, "i64"), 0)
                is_last = part > WAYS - 2
                here = _pick(totals, part)
                beyond = select(is_last, zero, _pick(totals, part + 1))
                end = select(is_last, high, cut(part + 1))
                nowhere = above + totals[0] < wanted
                return [
                    cut(part), select(nowhere, low + 1, end), above + beyond, here - beyond, wanted,
                ]  # fmt: skip

            return list(narrowed)

        return Bar(_number(found[0]), found[2], found[3], found[4])

    def _over_block(self, own: list[Value]) -> list[Value]:
        """The sums over all threads."""
        from nanoserve.compiler.builder import add, const, imin, select
        from nanoserve.compiler.control import when
        from nanoserve.compiler.gpu.threads import barrier, over_warp, shuffle_xor, thread_id

        thread = thread_id()
        warp, lane = thread // WARP, thread % WARP
        distance = WARP // 2
        while len(own) > 1:  # a lane keeps one half, and its partner the other
            half = len(own) // 2
            is_upper = lane // distance % 2 > 0
            own = [
                select(is_upper, b, a) + shuffle_xor(select(is_upper, a, b), distance)
                for a, b in zip(own[:half], own[half:], strict=True)
            ]
            distance //= 2
        while distance:
            own = [own[0] + shuffle_xor(own[0], distance)]
            distance //= 2
        each = WARP // WAYS

        @when(lane % each < 1)
        def _() -> None:
            self._parts[lane // each, warp] = own[0]

        barrier()

        @when(warp < WAYS)
        def _() -> None:
            of_lane = self._parts[warp, imin(lane, self._warps - 1)]
            total = over_warp(select(lane < self._warps, of_lane, const(0, "i64")), add)

            @when(lane < 1)
            def _() -> None:
                self._totals[warp] = total

        barrier()
        return [self._totals[j] for j in range(WAYS)]


def _pick(values: list[Value], number: Value) -> Value:
    from nanoserve.compiler.builder import select

    picked = values[0]
    for j, value in enumerate(values[1:], 1):
        picked = select(number > j - 1, value, picked)
    return picked


def _key(number: Value) -> Value:
    """float32 as i64 in the same order; the two zeros are neighbours."""
    from nanoserve.compiler.builder import bitcast, i64, signed_shift_right

    bits = bitcast(number, "i32")
    return i64(bits ^ (signed_shift_right(bits, 31) & 0x7FFFFFFF))


def _number(key: Value) -> Value:
    from nanoserve.compiler.builder import bitcast, i32, signed_shift_right

    bits = i32(key)
    return bitcast(bits ^ (signed_shift_right(bits, 31) & 0x7FFFFFFF), "f32")


def _cut(low: Value, high: Value, part: Operand, evenly: Value) -> Value:
    """Where a part, of WAYS, of the keys from `low` to `high` begins: the first at `low` itself. Both are of finite numbers."""
    from nanoserve.compiler.builder import Value, const, i32, select, to_float

    if not isinstance(part, Value) and part == 0:
        return low
    fraction = to_float(i32(part)) * (1 / WAYS) if isinstance(part, Value) else const(part / WAYS, "f32")
    start = _number(low)
    even = _key(start + (_number(high) - start) * fraction)
    even = select(even > high, high, even)  # where the difference is infinite, or rounding led past it
    among_keys = low + (high - low) * part // WAYS
    cut = select(evenly, even, among_keys)
    return select(part < 1, low, cut) if isinstance(part, Value) else cut
