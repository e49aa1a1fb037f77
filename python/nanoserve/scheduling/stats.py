"""Counters of a scheduler since its start or the latest reset."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class SchedulerStats:
    """What get_stats reports and has to be counted as it happens."""

    steps: int = 0  # that computed something
    request_steps: int = 0  # requests in a step, summed over steps
    prefill_tokens: int = 0
    decode_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0  # by themselves: not aborted, no error
    aborted: int = 0
    errors: int = 0
    refused: int = 0
    preemptions: int = 0
    held_back: int = 0  # waits for an elder's prompt, one per elder (twins.py)

    def count(self, num_requests: int, num_tokens: int, num_decode_rows: int) -> None:
        """A step was computed."""
        self.steps += 1
        self.request_steps += num_requests
        self.decode_tokens += num_decode_rows
        self.prefill_tokens += num_tokens - num_decode_rows

    def reset(self) -> None:
        for one in fields(self):
            setattr(self, one.name, 0)
