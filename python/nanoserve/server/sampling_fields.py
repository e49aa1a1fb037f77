"""A request's fields to SamplingParams: HTTP's names and defaults are OpenAI's, everything else is the engine's own."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from nanoserve.checks import shown
from nanoserve.sampling import SamplingParams
from nanoserve.server.errors import ApiError, bad_request
from nanoserve.server.parameters import ChatRequest, CompletionRequest, SamplingFields

COMPLETION_MAX_TOKENS = 16
MAX_LOGPROB_VALUES = 2**21
_PLAIN = {field.name for field in fields(SamplingParams)} - {"logprobs", "logit_bias", "max_tokens", "seed"}


def sampling_params(
    request: SamplingFields,
    defaults: dict[str, Any],
    prompt_tokens: int,
    max_model_len: int,
    more: dict[str, Any],
) -> SamplingParams:
    """What is asked, on top of the checkpoint's defaults.

    Args:
        prompt_tokens, max_model_len: leave this much room for output; more is refused.
        more: fields that follow from the rest of the request.

    Raises:
        ApiError: 400 with the numbers.
    """
    room = max_model_len - prompt_tokens
    if room < 1:
        raise ApiError(
            400, f"prompt: {prompt_tokens} tokens leave no room for output, prompt + output is at most {max_model_len} tokens",
            "context_length_exceeded", "prompt",
        )  # fmt: skip
    given = {name: value for name, value in request if name in _PLAIN and value is not None}
    max_tokens, field = _max_tokens(request)
    if max_tokens is None:
        max_tokens = room if isinstance(request, ChatRequest) else min(room, COMPLETION_MAX_TOKENS)
        max_tokens = max(max_tokens, min(room, request.min_tokens or 0))
    elif max_tokens > room:
        raise ApiError(
            400, f"{field}: {max_tokens} after a prompt of {prompt_tokens} tokens, prompt + output is at most {max_model_len} "
            "tokens", "context_length_exceeded", field,
        )  # fmt: skip
    values = {**defaults, **given, "max_tokens": max(1, max_tokens), **more}
    if request.seed is not None:
        values["seed"] = request.seed % 2**64
    if request.logit_bias is not None:
        values["logit_bias"] = {_token_id(token): bias for token, bias in request.logit_bias.items()}
    try:
        return SamplingParams(**values)
    except ValueError as error:
        raise bad_request(error) from error


def check_logprobs(params: SamplingParams, prompt_tokens: int, num_prompts: int) -> None:
    """Log-probabilities wait in memory for their client, and every token has up to 21 of them: a bound on a call's.

    Raises:
        ApiError: 400 with the numbers.
    """
    for field, tokens in (("logprobs", params.n * params.max_tokens), ("prompt_logprobs", prompt_tokens)):
        alternatives = getattr(params, field)
        if (
            alternatives is not None
            and (count := num_prompts * tokens * (alternatives + 1)) > MAX_LOGPROB_VALUES
        ):
            raise ApiError(
                400, f"{field}: {alternatives} and the token's own, of {num_prompts * tokens} tokens, are {count} values, at most "
                f"{MAX_LOGPROB_VALUES} are allowed", "invalid_value", field,
            )  # fmt: skip


def _max_tokens(request: SamplingFields) -> tuple[int | None, str]:
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens, "max_completion_tokens"
    if request.max_tokens == 0 and not (isinstance(request, CompletionRequest) and request.echo):
        raise ApiError(400, "max_tokens: 0 must be at least 1, or with echo", "invalid_value", "max_tokens")
    return request.max_tokens, "max_tokens"


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise ApiError(400, f"logit_bias: {shown(text)} must be a token id", "invalid_value", "logit_bias")
    return int(text)
