"""Cases of what is done to logits: the largest of each block, and a token of each row."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tools.gpu_check.case import MOST_ROWS, WIDE_ROWS, Array, Case, Launch, poison, random

from nanoserve.compiler.gpu.chip import Chip
from nanoserve.kernels.cuda.choose import choose_spec
from nanoserve.kernels.cuda.layout import row_stride
from nanoserve.kernels.cuda.logits import block_max_spec
from nanoserve.kernels.logits import num_blocks
from nanoserve.native import LOGITS_BLOCK

_VOCAB = 3 * LOGITS_BLOCK + 70
_WIDE_VOCAB = 128256  # as Llama 3 has it: more than 65,536 take the largest block of threads


def logits(chip: Chip) -> Iterable[Case]:
    yield _block_max_case("block_max", _VOCAB)
    yield _block_max_case("block_max, wide", _WIDE_VOCAB, is_wide=True)


def choose(chip: Chip) -> Iterable[Case]:
    yield _choose_case("choose", _VOCAB)
    yield _choose_case("choose, wide", _WIDE_VOCAB, is_wide=True)


def _logits(vocab: int, is_wide: bool) -> Array:
    """Large ones in the padding."""
    x = random(1, WIDE_ROWS if is_wide else MOST_ROWS, row_stride(vocab))
    x[:, vocab:] = 1e9
    return x


def _block_max(x: Array) -> Array:
    m, vocab = x.shape
    padded = np.full((m, num_blocks(vocab) * LOGITS_BLOCK), -np.inf, np.float32)
    padded[:, :vocab] = x
    return padded.reshape(m, -1, LOGITS_BLOCK).max(-1)


def _block_max_case(name: str, vocab: int, *, is_wide: bool = False) -> Case:
    x, spec = _logits(vocab, is_wide), block_max_spec(vocab, row_stride(vocab))

    def run(launch: Launch, m: int) -> list[Array]:
        largest = poison(m, num_blocks(vocab))
        launch(spec, x, largest, m)
        return [largest]

    return Case(name, (spec,), run, lambda m: [_block_max(x[:m, :vocab])], 0, wide=is_wide)


def _choose_case(name: str, vocab: int, *, is_wide: bool = False) -> Case:
    """Greedy rows, and others whose uniform numbers lie in the middle of a token's share: no rounding decides."""
    x = _logits(vocab, is_wide)
    x[2, [5, 300]] = 50  # a tie: the first of them
    rows = np.arange(len(x))
    weights = np.exp(x[:, :vocab].astype(np.float64))
    drawn = np.random.default_rng(2).integers(0, vocab, len(x))
    if (
        is_wide
    ):  # the middle of a small share would be nearer to its border than roundings of so many weights are
        weights[rows, drawn] = np.exp(5.0)
        x[rows, drawn] = 5.0
    ends = np.cumsum(weights, axis=1)
    middle = (ends[rows, drawn] - weights[rows, drawn] / 2) / ends[:, -1]
    draws, draw_ints = np.zeros((len(x), 4), np.float32), np.zeros((len(x), 4), np.int32)
    draws[3:, :3] = 1, 1, 0
    draw_ints[:, 1] = np.minimum(middle * 2.0**32, 2.0**32 - 1).astype(np.uint32).view(np.int32)
    largest = _block_max(x[:, :vocab])
    spec = choose_spec(vocab, row_stride(vocab))

    def run(launch: Launch, m: int) -> list[Array]:
        tokens = np.full(m, -7, np.int32)
        launch(spec, x, largest, draws, draw_ints, tokens, m)
        return [tokens]

    def expected(m: int) -> list[Array]:
        return [np.where(rows < 3, x[:, :vocab].argmax(1), drawn)[:m].astype(np.int32)]

    return Case(name, (spec,), run, expected, 0, wide=is_wide)
