"""What a user may ask of the sampler, and the sampler.

Invariants:
  - a parameter works or is refused by name with its limit; nothing is parsed and dropped (`UNSUPPORTED` lists what
    this version refuses);
  - a row's token depends on its own logits, parameters, seed and position only: the same bits alone or in any batch.

The draw is the inverse CDF at one uniform number per (seed, position), in float64 and in vocabulary order, from a
counter-based generator: nothing is carried from token to token, so a preempted or replayed request draws the same. The
price is one pass over the vocabulary per sampled row; a batch that is all greedy pays one argmax instead.

Filters apply in the order of transformers: temperature, top_k, top_p, min_p. Among equal logits greedy takes the lowest
token id; top_k keeps every token equal to the k-th; top_p prefers the lower ids among equals.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoserve.checks import shown, whole_number

if TYPE_CHECKING:
    from nanoserve.request import Request

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Uint64Array = NDArray[np.uint64]

MAX_TOKENS = 2**31 - 1  # positions are int32
MAX_STOP_IDS = 256

# Checked but not implemented: only the default is accepted. An issue that implements a field deletes its row.
UNSUPPORTED = (
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "logprobs",
    "n",
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample and when to stop.

    Args:
        temperature: 0 is greedy, at most 100.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens until their mass reaches p.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        max_tokens: most output tokens.
        min_tokens: EOS and stop ids are not sampled before this many output tokens.
        stop_token_ids: sampled, they end the request.
        ignore_eos: EOS neither ends the request nor is held back by min_tokens.
        seed: of this request's own random stream; None lets the engine choose.

    Raises:
        ValueError: naming the field, its value and its limit.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 128
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        self._check_real("temperature", 0.0, 100.0)
        self._check_int("top_k", 0, MAX_TOKENS)
        self._check_real("top_p", 0.0, 1.0, above=True)
        self._check_real("min_p", 0.0, 1.0)
        self._check_int("max_tokens", 1, MAX_TOKENS)
        self._check_int("min_tokens", 0, self.max_tokens, "max_tokens = ")
        self._check_stops()
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos: {shown(self.ignore_eos)} must be True or False")
        if self.seed is not None:
            self._check_int("seed", 0, 2**64 - 1)
        self._check_real("presence_penalty", -2.0, 2.0)
        self._check_real("frequency_penalty", -2.0, 2.0)
        self._check_real("repetition_penalty", 0.0, 100.0, above=True)
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias: {shown(self.logit_bias)} must map token ids to numbers")
        if self.logprobs is not None:
            self._check_int("logprobs", 0, 20)
        self._check_int("n", 1, 128)
        for name in UNSUPPORTED:
            if getattr(self, name) != _DEFAULTS[name]:
                raise ValueError(
                    f"{name}: {shown(getattr(self, name))} is not supported yet, only {_DEFAULTS[name]!r} is"
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_filters(self) -> bool:
        """Some tokens may be cut off before the draw."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    def _check_real(self, name: str, low: float, high: float, above: bool = False) -> None:
        value: Any = getattr(self, name)
        limit = f"{'(' if above else '['}{low:g}, {high:g}]"
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number:
            raise ValueError(f"{name}: {shown(value)} must be a number in {limit}")
        if not low <= value <= high or (above and value == low):  # a NaN fails the first
            raise ValueError(f"{name}: {shown(value)} must be in {limit}")
        object.__setattr__(self, name, float(value))

    def _check_int(self, name: str, low: int, high: int, high_name: str = "") -> None:
        object.__setattr__(self, name, whole_number(name, getattr(self, name), low, high, high_name))

    def _check_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop: {shown(self.stop)} must be a sequence of strings that are not empty")
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids
        if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
            raise ValueError(f"stop_token_ids: {shown(ids)} must be a sequence of token ids")
        if len(ids) > MAX_STOP_IDS:
            raise ValueError(f"stop_token_ids: {len(ids)} ids, at most {MAX_STOP_IDS} are allowed")
        checked = (whole_number(f"stop_token_ids[{i}]", token, 0, MAX_TOKENS) for i, token in enumerate(ids))
        object.__setattr__(self, "stop_token_ids", tuple(checked))


_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}


class Sampler:
    """One token per row of logits. Keeps no state: everything that varies is in the arguments."""

    def sample(
        self, logits: Float32Array, requests: Sequence[Request], eos_token_ids: Collection[int]
    ) -> list[int]:
        """float32[R, V] logits and their R requests -> R token ids.

        A row with a non-finite logit gets some token that means nothing (telling is the caller's part) and disturbs no
        other row. `logits` is not modified.
        """
        if len(logits) != len(requests):
            raise ValueError(f"sample: {len(logits)} rows of logits for {len(requests)} requests")
        greedy: list[int] = []
        plain: list[int] = []
        filtered: list[int] = []
        own_copy = False
        for row, request in enumerate(requests):
            params = request.params
            if len(request.output_tokens) < params.min_tokens:
                logits = logits if own_copy else logits.copy()
                own_copy = True
                _forbid_stops(logits[row], params, eos_token_ids)
            (greedy if params.is_greedy else filtered if params.has_filters else plain).append(row)
        if len(greedy) == len(requests):
            best: list[int] = logits.argmax(axis=1).tolist()
            return best
        tokens = np.zeros(len(requests), dtype=np.int64)
        if greedy:
            tokens[greedy] = logits[greedy].argmax(axis=1)
        drawn = plain + filtered
        uniforms = uniform(
            np.array([_seed(requests[row]) for row in drawn], dtype=np.uint64),
            np.array([requests[row].total_len for row in drawn], dtype=np.uint64),
        )
        with np.errstate(all="ignore"):  # non-finite rows
            if plain:
                temperatures = np.array([requests[row].params.temperature for row in plain])
                weights = _weights(logits[plain], temperatures[:, None])
                cumulative = np.cumsum(weights, axis=1, out=weights)
                targets = uniforms[: len(plain)] * cumulative[:, -1]
                tokens[plain] = np.count_nonzero(cumulative <= targets[:, None], axis=1)
            for row, u in zip(filtered, uniforms[len(plain) :], strict=True):
                tokens[row] = _draw_filtered(logits[row], requests[row].params, u)
        return tokens.tolist()


def _forbid_stops(row: Float32Array, params: SamplingParams, eos_token_ids: Collection[int]) -> None:
    """Rules out, in place, every token that would end the request."""
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    known = [token for token in stops if token < len(row)]
    if len(known) == len(row):
        raise ValueError(
            f"min_tokens: {params.min_tokens}, but every token of the vocabulary ends the request"
        )
    row[known] = -np.inf


def _seed(request: Request) -> int:
    if request.seed is None:
        raise ValueError(f"sample: request {request.req_id!r} has no seed and is not greedy")
    return request.seed


def _weights(logits: Float32Array, temperature: Float64Array | float) -> Float64Array:
    """exp((logits - max) / temperature): probabilities but for their sum. The likeliest token's weight is 1."""
    weights = logits.astype(np.float64)
    weights -= weights.max(axis=-1, keepdims=True)
    weights /= temperature
    return np.exp(weights, out=weights)


def _draw_filtered(row: Float32Array, params: SamplingParams, u: float) -> int:
    if not np.isfinite(row.max()):
        return 0
    weights = _weights(row, params.temperature)
    kept = np.arange(len(row))
    if 0 < params.top_k < len(row):
        kept = np.flatnonzero(row >= np.partition(row, len(row) - params.top_k)[len(row) - params.top_k])
    if params.top_p < 1.0:
        kept = _nucleus(weights, kept, params.top_p)
    if params.min_p > 0.0:
        kept = kept[weights[kept] >= params.min_p]
    cumulative = np.cumsum(weights[kept])
    return int(kept[np.searchsorted(cumulative, u * cumulative[-1], side="right")])


def _nucleus(weights: Float64Array, kept: NDArray[np.int64], top_p: float) -> NDArray[np.int64]:
    """The fewest of the `kept` tokens, likeliest first, whose mass reaches top_p of theirs; in vocabulary order."""
    total = weights[kept].sum()
    # Tokens this unlikely weigh less together than the tail that is cut: leave them out of the sort. Half of the bound
    # keeps the likeliest token in it whatever is rounded.
    kept = kept[weights[kept] > 0.5 * (1.0 - top_p) / len(kept) * total]
    ranked = kept[np.argsort(-weights[kept], kind="stable")]
    count = np.searchsorted(np.cumsum(weights[ranked]), top_p * total, side="left") + 1
    return np.sort(ranked[:count])


# ---- the generator: the output function of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
# Generators", OOPSLA 2014), keyed by the mixed seed so that neighbouring seeds do not give shifted streams.


def mix64(x: Uint64Array) -> Uint64Array:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(seeds: Uint64Array, positions: Uint64Array) -> Uint64Array:
    """64 random bits for each (seed, position)."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    return mix64(mix64(seeds + gamma) + (positions + np.uint64(1)) * gamma)


def uniform(seeds: Uint64Array, positions: Uint64Array) -> Float64Array:
    """float64 in [0, 1) for each (seed, position): 53 random bits."""
    bits = random_bits(seeds, positions) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def derive_seed(engine_seed: int, arrival: int) -> int:
    """The seed of the `arrival`-th request that brings none of its own."""
    return int(random_bits(np.array([engine_seed], np.uint64), np.array([arrival], np.uint64))[0])
