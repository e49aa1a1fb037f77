"""Authoring layer, part three: exp, tanh, erf, the soft cap and the activations, on float32 vectors or scalars; dot products
of narrow types.

MLIR's math.exp would become 16 calls into libm, and the pass that expands it is not in the wheels. These are short
polynomials: branch free, the same on every machine, and NaN in gives NaN out (a request with bad numbers must be seen).

    exp   at most 1 ulp from -87.3 to 88.3; below, it stays at 1.2e-38 (never 0, never subnormal); above, at 2.4e38
    tanh  at most 2 ulp
    erf   at most 2 ulp

The dot products work on 32-bit lanes that hold two bfloat16 or four bytes, the first in the lowest bits. That of bytes is exact,
the same on every target. That of bfloat16 is deterministic on each: vdpbf16ps takes the second product first and subnormals
as zero, the fused multiply-adds elsewhere do not.
"""

from __future__ import annotations

from nanoserve.compiler.builder import (
    Value,
    absolute,
    bitcast,
    const,
    copysign,
    fma,
    fmax,
    fmin,
    intrinsic,
    select,
    signed_shift_right,
)
from nanoserve.compiler.target import Target

# exp(r) = 1 + r + r^2 * P(r) on |r| <= ln(2)/2; ln(2) in two parts so that n * high is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# tanh(x) = x + x^3 * P(x^2) below 0.625, and erf(x) = x + x * P(x^2) below 0.9, where the closed forms would cancel;
# erfc(x) = exp(-x * P(x)) on [0.9, 4]. Minimax fits of the relative error (Lawson's iteration, 40 digits).
_TANH = (
    -5.704986326878293e-3,
    2.06390865676771e-2,
    -5.3739714845669015e-2,
    0.13331442194747967,
    -0.3333328194185379,
)
_ERF = (
    -6.090347559856235e-4, 5.0119622674864445e-3, -2.6778908458411327e-2, 0.1128214079523307, -0.3761252327371466,
    0.12837915379623072,
)  # fmt: skip
_ERFC = (
    -2.1459500884324356e-4, 3.219975394628316e-3, -2.290603084381232e-2, 0.10528685419713465, 0.6356993684666044,
    1.128519952775754,
)  # fmt: skip
# Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits; 127 more is the exponent's bias.
_ROUND = 12582912.0 + 127.0


def _polynomial(x: Value, coefficients: tuple[float, ...]) -> Value:
    """Horner's scheme, highest power first."""
    total = const(coefficients[0], x.type)
    for c in coefficients[1:]:
        total = fma(total, x, c)
    return total


def exp(x: Value, *, at_most_zero: bool = False) -> Value:
    """e ** x. `at_most_zero` promises x <= 0 (softmax) and saves the upper clamp."""
    if not at_most_zero:
        x = fmin(88.3762626647949, x)
    x = fmax(-87.33654022216797, x)  # the lowest whose result is not subnormal: those take 100 cycles
    shifted = fma(x, 1.44269504088896341, _ROUND)
    n = shifted - _ROUND
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, x))
    y = fma(_polynomial(r, _EXP), r * r, r) + 1.0
    return y * bitcast(bitcast(shifted, "i32") << 23, "f32")


def tanh(x: Value) -> Value:
    a, s = absolute(x), x * x
    small = fma(_polynomial(s, _TANH), s * x, x)
    large = copysign(1.0 - 2.0 / (exp(a * 2.0) + 1.0), x)
    return select(a < 0.625, small, large)


def erf(x: Value) -> Value:
    a, s = absolute(x), x * x
    small = fma(_polynomial(s, _ERF), x, x)
    t = fmin(4.0, a)  # erf rounds to 1 from 3.92 on; the polynomial turns around later
    large = copysign(1.0 - exp(_polynomial(t, _ERFC) * (0.0 - t), at_most_zero=True), x)
    return select(a < 0.9, small, large)


def bf16_pairs(lanes: Value, target: Target) -> Value:
    """16 32-bit lanes as dot_bf16 takes them."""
    return bitcast(lanes, "bf16", lanes=2) if target.bf16_dot else lanes


def dot_bf16(acc: Value, a: Value, b: Value, target: Target) -> Value:
    """acc + a0 * b0 + a1 * b1 in float32, of bf16_pairs."""
    if target.bf16_dot:
        return intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", acc, a, b)
    acc = fma(bitcast(a << 16, "f32"), bitcast(b << 16, "f32"), acc)
    return fma(bitcast(a & -65536, "f32"), bitcast(b & -65536, "f32"), acc)


def int8_fours(lanes: Value, target: Target) -> Value:
    """16 32-bit lanes as dot_int8 takes them."""
    return bitcast(lanes, "i8", lanes=4) if target.int8_dot else lanes


def dot_int8(acc: Value, a: Value, b: Value, target: Target) -> Value:
    """acc + the sum of a_i * b_i over four unsigned bytes a and four signed bytes b in each int32 lane, of int8_fours."""
    if target.int8_dot:
        return intrinsic("llvm.x86.avx512.vpdpbusd.512", acc, a, b)
    for at in (0, 8, 16, 24):
        acc = acc + ((a >> at) & 255) * signed_shift_right(b << (24 - at), 24)
    return acc


def soft_cap(x: Value, cap: float) -> Value:
    """cap * tanh(x / cap): x while it is small, never beyond cap."""
    return tanh(x * (1.0 / cap)) * cap


def activate(name: str | None, x: Value) -> Value:
    """An activation by the name models use."""
    match name:
        case None:
            return x
        case "silu":
            return x / (exp(0.0 - x) + 1.0)
        case "gelu_tanh":
            # 0.5 * x * (1 + tanh(u)) = x / (1 + exp(-2u)): no cancellation where tanh(u) is near -1.
            u = (x * x * x * 0.044715 + x) * 0.7978845608028654
            return x / (exp(u * -2.0) + 1.0)
        case "gelu_erf":
            return x * 0.5 * (erf(x * 0.7071067811865476) + 1.0)
    raise ValueError(f"activation {name!r} is not known")
