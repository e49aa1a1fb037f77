"""Tokens as OpenAI's log-probabilities show them: text, bytes, likeliest alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanoserve.logprobs import TokenLogprob
from nanoserve.text_request import AnyTokenizer

LOWEST = -9999.0  # JSON has no -Infinity; what others send


def chat_logprobs(tokenizer: AnyTokenizer | None, entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Of output tokens, as /v1/chat/completions has them."""
    return [
        {
            **_spelled(tokenizer, entry.token, entry.logprob),
            "top_logprobs": [_spelled(tokenizer, token, logprob) for token, logprob in entry.top],
        }
        for entry in entries
    ]


def prompt_logprobs(
    tokenizer: AnyTokenizer | None, entries: Sequence[TokenLogprob | None]
) -> list[dict[str, Any] | None]:
    """Of a prompt's tokens, as vLLM has them: token id to log-probability, rank and text."""
    made: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            made.append(None)
            continue
        ranked = {token: (value, rank) for rank, (token, value) in enumerate(entry.top, start=1)}
        ranked[entry.token] = (entry.logprob, entry.rank)
        made.append(
            {
                str(token): {
                    "logprob": max(value, LOWEST),
                    "rank": rank,
                    "decoded_token": _text(tokenizer, token),
                }
                for token, (value, rank) in ranked.items()
            }
        )
    return made


class CompletionLogprobs:
    """The four lists of /v1/completions, as they grow."""

    def __init__(self, tokenizer: AnyTokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def more(self, entries: Sequence[TokenLogprob | None], tokens: Sequence[int]) -> dict[str, list[Any]]:
        """Of the next tokens; None is a prompt's first, which nothing predicts."""
        texts, logprobs, tops, offsets = [], [], [], []
        for entry, token in zip(entries, tokens, strict=True):
            text = _text(self._tokenizer, token)
            texts.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            logprobs.append(None if entry is None else max(entry.logprob, LOWEST))
            top = None
            if entry is not None:
                top = {
                    _text(self._tokenizer, other): max(value, LOWEST) for other, value in reversed(entry.top)
                }
                top = dict(reversed(top.items()))  # of two that look alike the likelier stays
                top.setdefault(text, max(entry.logprob, LOWEST))
            tops.append(top)
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _spelled(tokenizer: AnyTokenizer | None, token: int, logprob: float) -> dict[str, Any]:
    spelled = {"token": _text(tokenizer, token), "logprob": max(logprob, LOWEST)}
    return {**spelled, "bytes": None if tokenizer is None else list(tokenizer.token_bytes(token))}


def _text(tokenizer: AnyTokenizer | None, token: int) -> str:
    return f"token_id:{token}" if tokenizer is None else tokenizer.token_text(token)
