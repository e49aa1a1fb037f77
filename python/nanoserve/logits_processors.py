"""What a request does to its logits before a token is chosen: bias, bad words, min_tokens, penalties, in this order.

Everything is computed from the request's parameters and tokens, nothing is carried from step to step: a preempted or
replayed request sees the same logits. A step costs what the request's own tokens and lists are long, in NumPy; nothing here
walks the vocabulary. Requests that ask for none of it have no processor.

Meanings, where engines differ (vLLM's): repetition_penalty looks at prompt and output, the other penalties at the output;
a bad word is completed by tokens of the output only, so a prompt that ends inside one forbids nothing. A bias of -100 is
a number like any other. A forbidden token has the logit -inf, and a row in which every token is forbidden is an error.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nanoserve.request import Request
    from nanoserve.sampling import SamplingParams

Float32Array = NDArray[np.float32]


class LogitsProcessor:
    """One request's changes to its logits, with its lists as arrays.

    Args:
        params: of the request.
        bad_word_ids: token sequences the output must not have.
    """

    __slots__ = ("_bad_tokens", "_bad_words", "_bias", "_biased", "_params", "_stops_only")

    def __init__(self, params: SamplingParams, bad_word_ids: Sequence[Sequence[int]] = ()) -> None:
        self._params = params
        bias = params.logit_bias or {}
        self._biased = np.array(list(bias.keys()), dtype=np.intp)
        self._bias = np.array(list(bias.values()), dtype=np.float32)
        self._bad_tokens = np.array([word[0] for word in bad_word_ids if len(word) == 1], dtype=np.intp)
        # By the token before the last, so that a step looks at the few words that could be completed now.
        self._bad_words: dict[int, list[Sequence[int]]] = {}
        for word in bad_word_ids:
            if len(word) > 1:
                self._bad_words.setdefault(word[-2], []).append(word)
        self._stops_only = not (len(bias) or len(bad_word_ids) or params.has_penalties)

    @classmethod
    def of(cls, params: SamplingParams, bad_word_ids: Sequence[Sequence[int]]) -> LogitsProcessor | None:
        """The processor such a request needs, None if it never changes a logit."""
        needed = params.logit_bias or bad_word_ids or params.min_tokens or params.has_penalties
        return cls(params, bad_word_ids) if needed else None

    def has_work(self, request: Request) -> bool:
        """Some logit of the request's next token may change; where none may, none of a later one may."""
        return not self._stops_only or len(request.output_tokens) < self._params.min_tokens

    def apply(self, row: Float32Array, request: Request, eos_token_ids: Collection[int]) -> None:
        """Changes float32[V] in place; a row that is not finite may get any values.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        self._add_bias(row)
        self._forbid("bad_words", row, self._completing(request))
        if len(request.output_tokens) < self._params.min_tokens:
            ends = {*self._params.stop_token_ids, *(() if self._params.ignore_eos else eos_token_ids)}
            row[[token for token in ends if token < len(row)]] = -np.inf
        if self._params.has_penalties:
            self._penalize(row, request)

    def _add_bias(self, row: Float32Array) -> None:
        if len(self._biased):
            _check_ids("logit_bias", self._biased, len(row))
            row[self._biased] += self._bias

    def _completing(self, request: Request) -> NDArray[np.intp]:
        """Tokens that would complete a bad word."""
        output = request.output_tokens
        words = self._bad_words.get(output[-1], ()) if output else ()
        completing = [word[-1] for word in words if output[1 - len(word) :] == list(word[:-1])]
        return np.append(self._bad_tokens, completing).astype(np.intp) if completing else self._bad_tokens

    def _forbid(self, name: str, row: Float32Array, tokens: NDArray[np.intp]) -> None:
        if len(tokens):
            _check_ids(name, tokens, len(row))
            row[tokens] = -np.inf

    def _penalize(self, row: Float32Array, request: Request) -> None:
        params, known = self._params, request.token_ids
        if params.repetition_penalty != 1.0:
            seen = _as_ids(known)
            logits, factor = row[seen], np.float32(params.repetition_penalty)
            row[seen] = np.where(logits > 0, logits / factor, logits * factor)
        if (params.presence_penalty or params.frequency_penalty) and request.output_tokens:
            seen, counts = np.unique(_as_ids(known[request.num_prompt_tokens :]), return_counts=True)
            penalties = params.frequency_penalty * counts + params.presence_penalty
            row[seen] -= penalties.astype(np.float32)


def _as_ids(tokens: array[int]) -> NDArray[np.int32]:
    """A copy: a view would keep the array from growing."""
    return np.array(tokens, dtype=np.int32)


def _check_ids(name: str, tokens: NDArray[np.intp], vocab: int) -> None:
    if tokens.max() >= vocab:
        raise ValueError(f"{name}: token id {tokens.max()} must be in [0, {vocab})")
