"""Rows of logits with the kernels that an engine gives them, without an engine."""

from __future__ import annotations

import numpy as np

from nanoserve.kernels import logits as kernels
from nanoserve.kernels.library import load_kernels
from nanoserve.logits import Logits
from nanoserve.native import LogitsReader, StepExecutor, ThreadPool


def compiled_reader(vocab: int, num_threads: int = 2) -> LogitsReader:
    """For rows that lie as a step leaves them."""
    row_stride = StepExecutor.logits_stride(vocab)
    specs = [
        kernels.block_sums_spec(vocab, row_stride),
        kernels.block_max_spec(vocab, row_stride, may_forbid=True),
    ]
    addresses = load_kernels(specs)
    return LogitsReader(
        ThreadPool(num_threads),
        *(addresses[spec] for spec in specs),
        vocab,
        row_stride,
        kernels.BLOCKS_PER_UNIT,
    )


def compiled(values: np.ndarray, num_threads: int = 2) -> Logits:
    """Logits of float32[R, V] as a step would return them, NaN in the padding."""
    count, vocab = values.shape
    rows = np.full((count, StepExecutor.logits_stride(vocab)), np.nan, np.float32)
    rows[:, :vocab] = values
    return Logits(rows[:, :vocab], Logits.of(values).block_max, compiled_reader(vocab, num_threads))
