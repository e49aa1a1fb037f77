"""Where the randomness comes from: one number for each (seed, position), and seeds made from seeds.

The generator is the output function of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014), keyed by the mixed seed so that neighbouring seeds do not give shifted streams. It counts instead of keeping
state: a preempted, replayed or restarted request draws what it would have drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Uint64Array = NDArray[np.uint64]

_CHILD_STREAM = (
    0xD6E8FEB86659FD93  # any constant: keeps the seeds of children apart from the draws of their parent
)


def mix64(x: Uint64Array) -> Uint64Array:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(seeds: Uint64Array, positions: Uint64Array) -> Uint64Array:
    """64 random bits for each (seed, position)."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    return mix64(mix64(seeds + gamma) + (positions + np.uint64(1)) * gamma)


def uniform(seeds: Uint64Array, positions: Uint64Array) -> NDArray[np.float64]:
    """float64 in [0, 1) for each (seed, position): 53 random bits."""
    bits = random_bits(seeds, positions) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def derive_seed(engine_seed: int, arrival: int) -> int:
    """The seed of the `arrival`-th request that brings none of its own."""
    return int(random_bits(np.array([engine_seed], np.uint64), np.array([arrival], np.uint64))[0])


def child_seed(seed: int, index: int) -> int:
    """The seed of the `index`-th of the n sequences one prompt asks for; the first keeps the prompt's own seed."""
    return seed if index == 0 else derive_seed(seed ^ _CHILD_STREAM, index)
