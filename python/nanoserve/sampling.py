"""SamplingParams: what a user may ask of the sampler. (The sampler itself joins this file.)"""

from __future__ import annotations
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 128
    min_tokens: int = 0
    stop: tuple = ()
    stop_token_ids: tuple = ()
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float = 0
    frequency_penalty: float = 0
    repetition_penalty: float = 1.0
    logit_bias: dict | None = None
    logprobs: int | None = None
    n: int = 1
