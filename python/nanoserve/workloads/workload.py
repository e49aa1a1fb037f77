"""Workload: a JSON file that fixes, down to the token id, what is asked of an engine.

    description            what it stands for, and why as many requests run at once as do
    metric                 the timeline's number it is about: prefill_, decode_ or output_tokens_per_s
    seed                   of its lengths and tokens
    generator              "splitmix64", see SplitMix64
    requests               how many there are
    concurrent             most of them in flight at once: the next is sent when one ends; without it, all at t = 0
    prompt_tokens          a number, or [least, most]: each request's own part of its prompt
    shared_prefix_tokens   further tokens that all prompts begin with (0)
    output_tokens          a number, or [least, most]
    scale                  shrinks the number of requests: 0.25 leaves a quarter, rounded up (1)

Lengths are drawn once, so every round asks for the same work; tokens are drawn anew for each round, so that no prefix cache
knows an earlier round's prompts. Every id is below the model's vocabulary, special tokens included: EOS is to be ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nanoserve.checkpoint_json import parse_object
from nanoserve.checks import number, shown, whole_number
from nanoserve.workloads.timeline import METRICS

FOLDER = Path(__file__).parent
GENERATOR = "splitmix64"
MAX_FILE_BYTES = 2**20
MAX_REQUESTS, MAX_TOKENS = 100_000, 2**20  # of a workload; of one prompt or output
WARM_UP_REQUESTS, WARM_UP_TOKENS = 2, 8
_MASK = 2**64 - 1

Length = tuple[int, int]  # least and most, both included


class SplitMix64:
    """Steele, Lea and Flood's generator: the state grows by a constant, and each state is mixed into a number.

    Its whole definition is here, so ids do not depend on anybody's library. Stream 0 of a seed draws lengths, stream
    1 + round that round's tokens.
    """

    def __init__(self, seed: int, stream: int) -> None:
        self._state = (seed << 32 | stream) & _MASK

    def below(self, count: int) -> int:
        """A number in [0, count); the bias of the remainder is under count / 2**64."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        mixed = self._state
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
        return (mixed ^ mixed >> 31) % count


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """A prompt as token ids, and how many tokens its answer has: exactly."""

    prompt: list[int]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload; the fields are the file's, see the module's head.

    Raises:
        ValueError: naming the field, its value and its limit.
    """

    name: str
    description: str
    metric: str
    seed: int
    generator: str
    requests: int
    prompt_tokens: Length
    output_tokens: Length
    shared_prefix_tokens: int = 0
    concurrent: int | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.description, str) or not self.description:
            raise ValueError(f"description: {shown(self.description)} must be a text that is not empty")
        if self.metric not in METRICS:
            raise ValueError(f"metric: {shown(self.metric)} must be one of {', '.join(METRICS)}")
        if self.generator != GENERATOR:
            raise ValueError(f"generator: {shown(self.generator)} must be {GENERATOR!r}")
        whole_number("seed", self.seed, 0, 2**31 - 1)
        whole_number("requests", self.requests, 1, MAX_REQUESTS)
        if self.concurrent is not None:
            whole_number("concurrent", self.concurrent, 1, MAX_REQUESTS)
        whole_number("shared_prefix_tokens", self.shared_prefix_tokens, 0, MAX_TOKENS)
        object.__setattr__(self, "scale", number("scale", self.scale, 0, 1))
        for name in ("prompt_tokens", "output_tokens"):
            object.__setattr__(self, name, _length(name, getattr(self, name)))

    @classmethod
    def load(cls, name: str | Path) -> Workload:
        """A workload by the name it comes with, or from a file of one's own: whatever ends in .json.

        Raises:
            ValueError: no such workload, or what is wrong with which field of it.
        """
        file = Path(name)
        if file.suffix != ".json":
            file = FOLDER / f"{name}.json"
            if str(name) not in workload_names():
                known = ", ".join(workload_names())
                raise ValueError(f"{shown(str(name))} is no workload: give a .json file, or one of {known}")
        try:
            with file.open("rb") as stream:
                raw = stream.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
        if len(raw) > MAX_FILE_BYTES:
            raise ValueError(f"{file}: larger than the limit of {MAX_FILE_BYTES} bytes")
        return cls.parse(file, parse_object(str(file), raw))

    @classmethod
    def parse(cls, file: Path, held: dict[str, Any]) -> Workload:
        """A workload from what a file held; `file` names it, in messages too."""
        known = {field.name for field in fields(cls)} - {"name"}
        required = known - {"shared_prefix_tokens", "concurrent", "scale"}
        for field in sorted(held.keys() - known):
            raise ValueError(f"{file}: {field}: no such field; there are {', '.join(sorted(known))}")
        for field in sorted(required - held.keys()):
            raise ValueError(f"{file}: {field}: is missing")
        try:
            return cls(file.stem, **held)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def scaled(self, scale: float) -> Workload:
        """The same with another scale."""
        return replace(self, scale=scale)

    @property
    def num_requests(self) -> int:
        return math.ceil(self.requests * self.scale)

    @property
    def max_in_flight(self) -> int:
        """Most requests at once."""
        return self.num_requests if self.concurrent is None else min(self.concurrent, self.num_requests)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence there can be: prompt and output."""
        return self.shared_prefix_tokens + self.prompt_tokens[1] + self.output_tokens[1]

    def lengths(self) -> list[tuple[int, int]]:
        """Own prompt tokens and output tokens of each request."""
        draw = SplitMix64(self.seed, 0)
        return [
            (_between(draw, self.prompt_tokens), _between(draw, self.output_tokens))
            for _ in range(self.num_requests)
        ]

    def draw(self, vocab_size: int, round_number: int) -> list[WorkloadRequest]:
        """The requests of a round, in the order in which they are sent. Round 0 warms up, the others count."""
        whole_number("vocab_size", vocab_size, 1)
        tokens = SplitMix64(self.seed, 1 + whole_number("round_number", round_number, 0, 2**31 - 1))
        shared = [tokens.below(vocab_size) for _ in range(self.shared_prefix_tokens)]
        return [
            WorkloadRequest(shared + [tokens.below(vocab_size) for _ in range(prompt)], output)
            for prompt, output in self.lengths()
        ]

    def warm_up(self, vocab_size: int) -> list[WorkloadRequest]:
        """The beginning of a round that is never measured: enough to make an engine touch what it needs."""
        begin = self.draw(vocab_size, 0)[:WARM_UP_REQUESTS]
        return [WorkloadRequest(one.prompt, min(one.output_tokens, WARM_UP_TOKENS)) for one in begin]


def workload_names() -> list[str]:
    """The workloads that come with nanoserve."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def _between(draw: SplitMix64, length: Length) -> int:
    return length[0] + draw.below(length[1] - length[0] + 1)


def _length(name: str, value: Any) -> Length:
    pair = value if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: {shown(value)} must be a number of tokens, or [least, most]")
    least = whole_number(name, pair[0], 1, MAX_TOKENS)
    return least, whole_number(name, pair[1], least, MAX_TOKENS)
