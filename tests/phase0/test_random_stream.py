"""Phase 0: where the randomness comes from: one number per (seed, position), the same on every machine."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nanoserve.logits import Logits
from nanoserve.request import Request
from nanoserve.sampling import Sampler, SamplingParams, derive_seed, mix64, uniform
from phase0.chi_square import chi_square_z


def request(seed: int, position: int = 1) -> Request:
    """A request whose next token has index `position`."""
    return Request(seed, [0] * position, params=SamplingParams(seed=seed))


def test_the_same_seed_repeats_and_others_differ() -> None:
    """A user's seed must reproduce a run, and neighbouring seeds must not share streams."""
    logits = np.zeros((1, 1000), dtype=np.float32)

    def stream(seed: int) -> list[int]:
        return [
            Sampler().sample(Logits.of(logits), [request(seed, position)], ())[0] for position in range(1, 40)
        ]

    seeds = [*range(8), 0x9E3779B97F4A7C15]  # the last is the generator's own step
    streams = [stream(seed) for seed in seeds]
    assert streams == [stream(seed) for seed in seeds]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 4
            assert one[1:] != other[:-1]
            assert one[:-1] != other[1:]


def test_the_draw_depends_on_the_position_and_not_on_history() -> None:
    """A preempted request resumes with the same token, whatever happened in between: prompt or output, position counts."""
    logits = np.zeros((1, 500), dtype=np.float32)
    resumed = request(3, position=2)
    resumed.append_output(0)
    assert Sampler().sample(Logits.of(logits), [resumed], ()) == Sampler().sample(
        Logits.of(logits), [request(3, position=3)], ()
    )


def test_the_generator_matches_published_splitmix64_values() -> None:
    """The mixing function is the one the statistics in the literature are about: first outputs for seed 1234567."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    states = np.uint64(1234567) + gamma * np.arange(1, 6, dtype=np.uint64)
    assert mix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_uniforms_are_even_and_uncorrelated_along_seeds_and_positions() -> None:
    """Small seeds and consecutive positions are what users really have: the grid of both must look random."""
    seeds, positions = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300, dtype=np.uint64))
    grid = uniform(seeds, positions)
    assert grid.min() >= 0.0
    assert grid.max() < 1.0
    assert chi_square_z(np.histogram(grid, 100, (0, 1))[0], np.full(100, grid.size / 100)) < 4
    centred = grid - 0.5
    for neighbour in (centred[1:, :] * centred[:-1, :], centred[:, 1:] * centred[:, :-1]):
        assert abs(neighbour.mean()) * 12 * math.sqrt(neighbour.size) < 4
    assert len(np.unique(grid)) == grid.size


def test_derived_seeds_are_stable_and_distinct() -> None:
    """Requests without a seed get one from the engine's seed and their arrival: replays agree, requests differ."""
    assert derive_seed(0, 0) == derive_seed(0, 0)
    assert len({derive_seed(engine, arrival) for engine in range(20) for arrival in range(50)}) == 1000
    assert all(0 <= derive_seed(2**64 - 1, arrival) < 2**64 for arrival in range(10))


def test_a_request_without_a_seed_is_refused_by_name() -> None:
    """The engine fills seeds in; a hole there must not become a shared stream."""
    each = request(0)
    each.seed = None
    with pytest.raises(ValueError, match="request 0 has no seed"):
        Sampler().sample(Logits.of(np.zeros((1, 4), dtype=np.float32)), [each], ())
    with pytest.raises(ValueError, match="2 rows of logits for 1 requests"):
        Sampler().sample(Logits.of(np.zeros((2, 4), dtype=np.float32)), [each], ())
