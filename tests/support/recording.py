"""Executor wrapper that keeps every row of logits, so that tests can compare them bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from nanoserve.batch import Batch
from nanoserve.logits import Logits
from nanoserve.nano_engine import NanoServingEngine
from nanoserve.sampling import SamplingParams


class RecordingExecutor:
    """Forwards to a real executor; `rows[req_id][position]` is the logits row that predicts the token after position."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.rows: dict[Any, dict[int, np.ndarray]] = {}

    def forward(self, batch: Batch) -> Logits:
        logits = self.inner.forward(batch)
        row = 0
        pieces = zip(batch.requests, batch.starts, batch.counts, batch.sampled, strict=True)
        for index, (request, start, count, sampled) in enumerate(pieces):
            end = start + count - 1
            for position in (*batch.prompt_rows.get(index, ()), *((end,) if sampled else ())):
                self.rows.setdefault(request.req_id, {})[position] = logits.values[row].copy()
                row += 1
        assert row == len(logits)
        return logits


def record(engine: NanoServingEngine) -> RecordingExecutor:
    """Put a recorder between an engine's batcher and its executor."""
    recorder = RecordingExecutor(engine.batcher.executor)
    engine.batcher.executor = recorder
    return recorder


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)
