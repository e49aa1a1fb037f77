"""IdealMachine: a server that is as fast as memory bandwidth and peak arithmetic allow, and never waits for anything else.

    step   = max(operations / peak, bytes / bandwidth)
    operations: 2 per weight and token of the layers, 4 * heads * head_dim per pair of positions that attend, and the head for
                each token that is sampled
    bytes: each weight once per step, and the KV cache of all running sequences, in the width's bytes

It schedules perfectly: all prompts that may run join the next step whole, and a prefix that prompts share is computed once.
Played through the same loop with its own clock, a workload's rate on it is what an engine's is divided by. A model small
enough for the caches can beat it: caches are faster than the bandwidth that was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.peers.limits import PEAK_OF_WIDTH, Limits
from nanoserve.models.config import ModelConfig
from nanoserve.models.weights import checkpoint_shapes
from nanoserve.workloads import Timeline, WorkloadRequest, play

WIDTH_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 2}
_NOT_OF_LAYERS = ("embed", "wte", "wpe", "lm_head")


@dataclass
class _Sequence:
    output_tokens: int
    context: int
    to_compute: int  # prompt tokens


class IdealMachine:
    """Server and clock."""

    def __init__(self, config: ModelConfig, width: str, peak_per_s: float, bytes_per_s: float) -> None:
        self._peak, self._bandwidth = peak_per_s, bytes_per_s
        matrices = sum(
            math.prod(shape)
            for name, shape in checkpoint_shapes(config).items()
            if len(shape) == 2 and not any(part in name for part in _NOT_OF_LAYERS)
        )
        head = config.vocab_size * config.n_embd
        self._token_ops, self._head_ops = 2 * matrices, 2 * head
        self._pair_ops = 4 * config.n_layer * config.n_head * config.dim_per_head
        self._weight_bytes = WIDTH_BYTES[width] * (matrices + head)
        self._kv_bytes = 2 * config.n_layer * config.kv_heads * config.dim_per_head * _KV_BYTES[width]
        self._running: dict[int, _Sequence] = {}
        self._known: list[list[int]] = []  # prompts whose KV is there
        self.now_s = 0.0

    def add(self, key: int, prompt: list[int], output_tokens: int) -> None:
        shared = max((_shared(prompt, other) for other in self._known), default=0)
        self._known.append(prompt)
        self._running[key] = _Sequence(output_tokens, len(prompt), len(prompt) - min(shared, len(prompt) - 1))

    def step(self) -> list[tuple[int, list[int]]]:
        operations, moved = 0.0, float(self._weight_bytes)
        for one in self._running.values():
            count = one.to_compute
            pairs = count * (one.context - count) + count * (count + 1) / 2
            operations += count * self._token_ops + pairs * self._pair_ops + self._head_ops
            moved += one.context * self._kv_bytes
            one.context, one.to_compute, one.output_tokens = one.context + 1, 1, one.output_tokens - 1
        self.now_s += max(operations / self._peak, moved / self._bandwidth)
        came = [(key, [0]) for key in self._running]
        self._running = {key: one for key, one in self._running.items() if one.output_tokens}
        return came


def ideal_timeline(
    config: ModelConfig, width: str, limits: Limits, requests: list[WorkloadRequest], max_in_flight: int
) -> Timeline | None:
    """The workload on the ideal machine of these limits; None if the CPU lacks the width's instruction."""
    peak, read = limits[PEAK_OF_WIDTH[width]], limits["read_gb_per_s"]
    if peak is None or read is None:
        return None
    machine = IdealMachine(config, width, 1e9 * peak, 1e9 * read)
    return play(machine, requests, max_in_flight, clock=lambda: machine.now_s)


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    shorter = min(len(a), len(b))
    return next((at for at in range(shorter) if a[at] != b[at]), shorter)
