"""A constraint on what a request may output, as the engine knows it: which tokens may come, and whether it may end.

What a constraint obeys (a grammar, in text/grammar.py) is its own business. It hears of every token of its request's
output once and in order, but for the token that ends the request, which is not part of the output's text. It is asked
any number of times in between, and being asked changes nothing: a discarded step or a preemption is invisible to it.

The engine's part is the end. A token that ends a request (EOS, a stop id) is allowed exactly where the constraint may
end and min_tokens are there, and whatever text it stands for does not count; with ignore_eos, EOS is never allowed.
Where the constraint must end, the request does, min_tokens or not: there is nothing more it could say.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nanoserve.request import Request

MASK_BITS = 32
TokenMask = NDArray[np.uint32]


class Constraint(Protocol):
    """Of one request. What it raises fails that request."""

    def allowed(self) -> TokenMask | None:
        """uint32[ceil(V / 32)], bit i % 32 of word i // 32 for token i; None: all. Valid until `accept`."""
        ...

    def accept(self, token: int) -> None:
        """The output goes on with this token."""
        ...

    def may_end(self) -> bool:
        """The output is complete as it is."""
        ...

    def must_end(self) -> bool:
        """It is complete, and no token may come."""
        ...


def next_tokens(request: Request, eos_token_ids: Collection[int], vocab: int) -> TokenMask | None:
    """Which tokens a constrained request may get next, ends included; None for all.

    Raises:
        ValueError: the constraint's mask is for another vocabulary.
    """
    constraint, params = request.constraint, request.params
    assert constraint is not None
    words = -(-vocab // MASK_BITS)
    allowed = constraint.allowed()
    if allowed is not None and (allowed.dtype != np.uint32 or allowed.shape != (words,)):
        raise ValueError(
            f"constraint: a mask {allowed.dtype}{list(allowed.shape)}, must be uint32[{words}] for {vocab} tokens"
        )
    may_end = len(request.output_tokens) >= params.min_tokens and constraint.may_end()
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)} if may_end else set()
    others = {*params.stop_token_ids, *eos_token_ids} - ends
    if allowed is None and not others:
        return None
    mask = np.full(words, 2**MASK_BITS - 1, np.uint32) if allowed is None else allowed.copy()
    for tokens, is_allowed in ((ends, True), (others, False)):
        for token in tokens:
            bit = np.uint32(1 << token % MASK_BITS)
            if token < vocab:
                mask[token // MASK_BITS] = mask[token // MASK_BITS] & ~bit | (
                    bit if is_allowed else np.uint32(0)
                )
    return mask
