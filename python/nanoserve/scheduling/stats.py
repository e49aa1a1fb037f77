"""Counters of a scheduler since the start or the latest reset."""

from __future__ import annotations

from dataclasses import dataclass

from nanoserve.batch import Batch


@dataclass(slots=True)
class SchedulerStats:
    """Everything get_stats reports that has to be counted as it happens."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    request_steps: int = 0  # requests in a step, summed over steps
    output_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    errors: int = 0
    refused: int = 0
    preemptions: int = 0

    def count(self, batch: Batch) -> None:
        """A step was computed."""
        decode = sum(start >= request.num_prompt_tokens for request, start in zip(batch.requests, batch.starts, strict=True))
        self.steps += 1
        self.request_steps += batch.size
        self.decode_tokens += decode
        self.prefill_tokens += batch.num_tokens - decode

    def ended(self, reason: str) -> None:
        if reason == "abort":
            self.aborted += 1
        elif reason == "error":
            self.errors += 1
        else:
            self.finished += 1
