"""What a prompt became: whole (RequestOutput) or piece by piece (TextDelta)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nanoserve.logprobs import TokenLogprob


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a prompt with all its sequences; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One sequence generated for a prompt.

    Attributes:
        index: 0 to n - 1.
        text: None when the checkpoint has no tokenizer.
        token_ids: everything sampled, the token that ended it included.
        logprobs: one entry per token, if they were asked for.
        finish_reason: "stop", "length", "abort" or "error".
        stop_reason: the stop string or stop token id that ended it; None for EOS.
        error: what went wrong, for finish_reason "error".
    """

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Log-probability of the whole sequence, if log-probabilities were asked for."""
        return None if self.logprobs is None else math.fsum(entry.logprob for entry in self.logprobs)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its `n` completions; `text`, `token_ids` and the like are the first one's."""

    prompt: str | list[int]
    prompt_token_ids: list[int]
    outputs: list[Completion]
    usage: Usage
    prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def text(self) -> str | None:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.outputs[0].logprobs

    @property
    def num_cached_tokens(self) -> int:
        return self.usage.cached_tokens

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def error(self) -> str | None:
        return self.outputs[0].error


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What a step added to one sequence of a streamed prompt.

    `text` may be empty while a character is incomplete or a stop string may be under way. The deltas' texts joined are the
    completion's text. `output` is set on the last delta of all and has everything.
    """

    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    output: RequestOutput | None = None
