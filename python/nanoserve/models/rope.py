"""Rotary positions: which angle a position turns each pair of dimensions by.

    angle(position, i) = position * frequency[i],   frequency[i] = theta ** (-2i / dims)

"RoFormer" (Su et al., 2021) gives the plain form; the kinds below stretch it to contexts longer than a model was first
trained for. All of them are tables computed once, so the kernel never knows which kind it serves.

    linear    frequencies divided by a factor (position interpolation, Chen et al., 2023)
    dynamic   theta grows with the length ("NTK-aware"). Here the token at position p gets the frequencies of length p + 1:
              what generating token by token gives, and the only reading under which an answer does not depend on chunking
    llama3    low frequencies divided by a factor, high ones kept, a ramp between (Llama 3.1)
    yarn      a ramp over dimensions, and a factor on cosines and sines (Peng et al., 2023)
    longrope  one factor per dimension, from a short list up to `original_len` and from a long list for sequences beyond
              (Ding et al., 2024): a table of two halves, see `switch_len`

Frequencies and angles are float32 products, as in the reference implementations: at large positions that rounding is part
of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoserve.checks import number, shown, whole_number

Float32Array = NDArray[np.float32]

# The keys each kind reads, beside rope_type and rope_theta; any other is refused.
KINDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        """factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim
        truncate""".split()
    ),
    "longrope": frozenset(
        "factor original_max_position_embeddings attention_factor short_factor long_factor".split()
    ),
}
_MIN_FACTOR, _MAX_FACTOR, _MAX_THETA = 1e-6, 1e6, 1e30


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions of a layer.

    Args:
        dims: leading dimensions of a head that rotate, even; pair i is (x[i], x[i + dims / 2]).
        theta: base wavelength.
        kind: one of KINDS.
        factor, low_freq_factor, high_freq_factor, beta_fast, beta_slow, truncate: of the kinds that have them.
        original_len: positions of the first training; of dynamic, llama3, yarn and longrope.
        amplitude: multiplies cosines and sines ("attention factor").
        short_factor, long_factor: dims / 2 numbers each, of longrope.
    """

    dims: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def switch_len(self) -> int | None:
        """Sequences longer than this use the table's second half, with all their tokens; None: there is one half."""
        return self.original_len if self.kind == "longrope" else None

    def table(self, num_positions: int) -> Float32Array:
        """float32[rows, dims]: cosines of a position's dims / 2 angles, then their sines.

        rows is num_positions, or twice that where sequences of num_positions can be longer than `switch_len`.
        """
        positions = np.arange(num_positions, dtype=np.float32)[:, None]
        if self.kind == "dynamic":
            angles = positions * self._dynamic_frequencies(num_positions)
        else:
            angles = positions * self._frequencies(self.short_factor)
        if self.switch_len is not None and num_positions > self.switch_len:
            angles = np.concatenate([angles, positions * self._frequencies(self.long_factor)])
        result = np.empty((len(angles), self.dims), np.float32)
        half = self.dims // 2
        for part, turn in ((result[:, :half], np.cos), (result[:, half:], np.sin)):
            turn(angles, out=part)
            part *= np.float32(self.amplitude)
        return result

    def _wavelengths(self, theta: float) -> Float32Array:
        """theta ** (2i / dims): the divisor of each position."""
        return _power(np.float64(theta), self.dims)

    def _frequencies(self, extended: tuple[float, ...]) -> Float32Array:
        wavelengths, one = self._wavelengths(self.theta), np.float32(1)
        match self.kind:
            case "linear":
                return (one / wavelengths) / np.float32(self.factor)
            case "llama3":
                return self._llama3(one / wavelengths)
            case "yarn":
                interpolated = one / (np.float32(self.factor) * wavelengths)
                kept = one - self._yarn_ramp()
                return interpolated * (one - kept) + (one / wavelengths) * kept
            case "longrope":
                return one / (np.array(extended, np.float32) * wavelengths)
        return one / wavelengths

    def _dynamic_frequencies(self, num_positions: int) -> Float32Array:
        """float32[num_positions, dims / 2]: a row of frequencies for each length, constant up to `original_len`."""
        lengths = np.maximum(np.arange(1, num_positions + 1), self.original_len)
        growth = self.factor * lengths / self.original_len - (self.factor - 1.0)
        thetas = self.theta * growth ** (self.dims / (self.dims - 2))
        return np.float32(1) / _power(thetas[:, None], self.dims)

    def _llama3(self, frequencies: Float32Array) -> Float32Array:
        wavelen = np.float32(2 * math.pi) / frequencies
        scaled = np.where(
            wavelen > self.original_len / self.low_freq_factor,
            frequencies / np.float32(self.factor),
            frequencies,
        )
        smooth = (self.original_len / wavelen - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - smooth) * scaled / self.factor + smooth * scaled
        between = (wavelen >= self.original_len / self.high_freq_factor) & (
            wavelen <= self.original_len / self.low_freq_factor
        )
        return np.where(between, blended, scaled).astype(np.float32)

    def _yarn_ramp(self) -> Float32Array:
        """0 where a dimension turns often enough to be kept as it is, 1 where it is interpolated."""

        def dimension(rotations: float) -> float:
            return (
                self.dims
                * math.log(self.original_len / (rotations * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dims - 1)
        if low == high:
            high += 0.001
        steps = np.arange(self.dims // 2, dtype=np.float32)
        ramp: Float32Array = np.clip((steps - np.float32(low)) / np.float32(high - low), 0, 1)
        return ramp


def _power(theta: NDArray[np.float64] | np.float64, dims: int) -> Float32Array:
    """theta ** (2i / dims), exponents and result float32: rounded once, from float64.

    The reference computes this in float32, with the last bit up to its library; the nearest float32 is what it gives most
    often, and a bit here is a visible angle some ten thousand positions on.
    """
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def parse_rope(parameters: Mapping[str, Any], *, dims: int, theta: float, max_positions: int) -> Rope:
    """A Rope from config.json's `rope_parameters` (or the older `rope_scaling`).

    Args:
        dims: leading dimensions of a head that rotate.
        theta: where `parameters` has no rope_theta.
        max_positions: the config's max_position_embeddings, from which some kinds derive what is left out.

    Raises:
        ValueError: naming the key, its value and its limit; for unknown kinds and keys, too.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    kind = given.pop("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"rope_type: {shown(kind)} is not supported, only {', '.join(KINDS)}")
    if given.pop("type", kind) != kind:
        raise ValueError(f"rope_type: {shown(kind)} and type: {shown(parameters['type'])} disagree")
    theta = theta_in("rope_theta", given.pop("rope_theta", theta))
    unknown = sorted(set(given) - KINDS[kind])
    if unknown:
        raise ValueError(f"{unknown[0]}: is not understood for rope_type {kind!r}")
    whole_number("rotary dimensions", dims, 2, 2**16)
    if dims % 2:
        raise ValueError(f"rotary dimensions: {dims} must be even")

    def factor(name: str, default: float | None = None, above: float = _MIN_FACTOR) -> float:
        if name not in given and default is None:
            raise ValueError(f"{name}: is missing, rope_type {kind!r} needs it")
        return number(name, given.get(name, default), above, _MAX_FACTOR)

    rope: dict[str, Any] = {"dims": dims, "theta": theta, "kind": kind}
    original = whole_number(
        "original_max_position_embeddings",
        given.get("original_max_position_embeddings", max_positions), 1, 2**31 - 1,
    )  # fmt: skip
    if kind == "default":
        return Rope(**rope)
    if kind in ("linear", "dynamic", "llama3"):
        rope["factor"] = factor("factor")
    if kind == "dynamic":
        if rope["factor"] < 1:
            raise ValueError(f"factor: {rope['factor']:g} must be at least 1 for rope_type 'dynamic'")
        if dims <= 2:
            raise ValueError(f"rotary dimensions: {dims} must be more than 2 for rope_type 'dynamic'")
        rope["original_len"] = max_positions
    if kind == "llama3":
        rope["original_len"] = original
        rope["low_freq_factor"] = factor("low_freq_factor")
        rope["high_freq_factor"] = factor("high_freq_factor", above=rope["low_freq_factor"])
    if kind in ("yarn", "longrope"):
        rope["original_len"] = original
        rope["factor"] = factor("factor", max_positions / original)
        if "attention_factor" in given:
            rope["amplitude"] = factor("attention_factor")
    if kind == "yarn":
        rope["beta_fast"] = factor("beta_fast", 32.0)
        rope["beta_slow"] = factor("beta_slow", 1.0)
        rope["truncate"] = given.get("truncate", True)
        if not isinstance(rope["truncate"], bool):
            raise ValueError(f"truncate: {shown(rope['truncate'])} must be true or false")
        rope.setdefault(
            "amplitude",
            _yarn_amplitude(rope["factor"], factor("mscale", 0.0, above=-1.0),
                            factor("mscale_all_dim", 0.0, above=-1.0)),
        )  # fmt: skip
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            rope[name] = _factors(name, given.get(name), dims // 2)
        if rope["factor"] > 1:
            rope.setdefault("amplitude", math.sqrt(1 + math.log(rope["factor"]) / math.log(max(2, original))))
    return Rope(**rope)


def theta_in(name: str, value: object) -> float:
    """The value as a base wavelength; a ValueError naming the field otherwise."""
    return number(name, value, 1.0, _MAX_THETA)


def _yarn_amplitude(factor: float, mscale: float, mscale_all_dim: float) -> float:
    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def _factors(name: str, values: object, count: int) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{name}: {shown(values)} must be a list of {count} numbers")
    return tuple(number(f"{name}[{i}]", value, _MIN_FACTOR, _MAX_FACTOR) for i, value in enumerate(values))
