"""Timeline: when each token of each request came, and what follows from that.

Times are seconds since the run began. A token's time is when the step that brought it returned to whoever asked for it,
sampling and scheduling included.

    prefill_tokens_per_s   prompt tokens until every request has its first token
    decode_tokens_per_s    tokens after that moment
    output_tokens_per_s    all output tokens over the whole run; input_tokens_per_s likewise
    ttft                   a request's first token since it was sent
    itl                    a token since the one before it, of the same request
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

METRICS = ("prefill_tokens_per_s", "decode_tokens_per_s", "output_tokens_per_s")
PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class RequestTimes:
    """One request: when it was sent, what came and when."""

    num_prompt_tokens: int
    sent_s: float
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Timeline:
    """A run, request by request in the order in which they were sent."""

    requests: list[RequestTimes]
    wall_s: float

    def metrics(self) -> dict[str, float | None]:
        """Rates in tokens per second, latencies in milliseconds; None for what this run has not got."""
        everyone_began = max(one.times_s[0] for one in self.requests)
        after = sum(time > everyone_began for one in self.requests for time in one.times_s)
        prompts = sum(one.num_prompt_tokens for one in self.requests)
        outputs = sum(len(one.tokens) for one in self.requests)
        first = [one.times_s[0] - one.sent_s for one in self.requests]
        gaps = [
            later - earlier
            for one in self.requests
            for earlier, later in zip(one.times_s, one.times_s[1:], strict=False)
        ]
        last = [one.times_s[-1] - one.sent_s for one in self.requests]
        made: dict[str, float | None] = {
            "wall_s": self.wall_s,
            "input_tokens_per_s": prompts / self.wall_s,
            "output_tokens_per_s": outputs / self.wall_s,
            "prefill_tokens_per_s": prompts / everyone_began,
            "decode_tokens_per_s": after / (self.wall_s - everyone_began) if after else None,
        }
        for name, values in (("ttft", first), ("itl", gaps), ("latency", last)):
            made |= {
                f"{name}_p{rank}_ms": 1e3 * percentile(values, rank) if values else None
                for rank in PERCENTILES
            }
        return made

    def as_json(self) -> dict[str, Any]:
        """For another process: `from_json` there."""
        return {
            "wall_s": self.wall_s,
            "requests": [
                {"prompt_tokens": one.num_prompt_tokens, "sent_s": one.sent_s, "tokens": one.tokens,
                 "times_s": one.times_s} for one in self.requests
            ],
        }  # fmt: skip

    @classmethod
    def from_json(cls, held: Any, asked: Sequence[tuple[int, int]]) -> Timeline:
        """What another process measured.

        Args:
            asked: prompt and output tokens of each request: what does not answer exactly that is refused.

        Raises:
            ValueError: not a timeline, not of these requests, or times that cannot be.
        """
        try:
            wall = _seconds(held["wall_s"])
            requests = [
                RequestTimes(one["prompt_tokens"], _seconds(one["sent_s"]), list(one["tokens"]),
                             [_seconds(time) for time in one["times_s"]]) for one in held["requests"]
            ]  # fmt: skip
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a timeline: {type(error).__name__} {error}") from error
        if len(requests) != len(asked):
            raise ValueError(f"requests: {len(requests)} were answered, {len(asked)} were asked")
        for index, (one, (prompt, output)) in enumerate(zip(requests, asked, strict=True)):
            if (one.num_prompt_tokens, len(one.tokens), len(one.times_s)) != (prompt, output, output):
                raise ValueError(
                    f"requests[{index}]: {one.num_prompt_tokens} prompt tokens, {len(one.tokens)} tokens at "
                    f"{len(one.times_s)} times; asked were {prompt} and {output}"
                )
            if (
                sorted(one.times_s) != one.times_s
                or not one.sent_s <= one.times_s[0] <= one.times_s[-1] <= wall
            ):
                raise ValueError(f"requests[{index}]: times_s are not in order between sent_s and wall_s")
        return cls(requests, wall)


def percentile(values: Sequence[float], rank: float) -> float:
    """The least value that `rank` percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(rank / 100 * len(ordered)) - 1)]


def median_and_range(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"not a time: {value!r:.80}")
    return float(value)
