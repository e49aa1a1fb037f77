"""Log-probabilities of one step: of the tokens that were sampled, and of the prompt tokens whose rows were computed.

Rows that are not finite have none: their requests fail, and so does a request with such a row inside its prompt. Rows of
prompts are bounded per step, because each is a row of logits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from nanoserve.batch import Batch
from nanoserve.logprobs import MAX_PROMPT_LOGPROB_ROWS, TokenLogprob, token_logprob
from nanoserve.observe.events import ReqId
from nanoserve.request import Request

Logits = NDArray[np.float32]


def within_row_limit(chosen: Sequence[tuple[Request, int]], request: Request, count: int) -> int:
    """How many of a piece's tokens a step can give the prompt log-probabilities they are to have.

    Args:
        chosen: the pieces, (request, tokens), that are in the step already.
        request, count: one more, from the request's `cached_len` on.
    """
    if not request.lacks_prompt_logprobs:
        return count
    taken = sum(len(other.prompt_logprob_rows(other.cached_len, n)) for other, n in chosen)
    rows = request.prompt_logprob_rows(request.cached_len, count)
    left = MAX_PROMPT_LOGPROB_ROWS - taken
    return count if len(rows) <= left else rows[left] - request.cached_len


def score_tokens(
    requests: Sequence[Request],
    logits: Logits,
    tokens: Sequence[int],
    finite: Sequence[bool],
    errors: Collection[ReqId],
) -> dict[ReqId, TokenLogprob]:
    """Of each row's token, for the requests that ask and have one."""
    scored: dict[ReqId, TokenLogprob] = {}
    for row, request in enumerate(requests):
        num_top = request.params.logprobs
        if num_top is not None and finite[row] and request.req_id not in errors:
            scored[request.req_id] = token_logprob(logits[row], tokens[row], num_top)
    return scored


def score_prompts(
    batch: Batch, logits: Logits, finite: Sequence[bool], errors: dict[ReqId, str]
) -> dict[ReqId, list[TokenLogprob]]:
    """Of the prompt tokens that follow the positions of `batch.prompt_rows`.

    Args:
        logits: of all of `batch.sample_rows`.
        errors: is told of requests with a row that is not finite; requests in it already are passed over.
    """
    scored: dict[ReqId, list[TokenLogprob]] = {}
    row = 0
    for index, (request, sampled) in enumerate(zip(batch.requests, batch.sampled, strict=True)):
        positions = batch.prompt_rows.get(index, range(0))
        if positions and request.req_id not in errors:
            if all(finite[row : row + len(positions)]):
                num_top = request.params.prompt_logprobs or 0
                scored[request.req_id] = [
                    token_logprob(logits[row + i], request.prompt_tokens[position + 1], num_top)
                    for i, position in enumerate(positions)
                ]
            else:
                # Not the first bad one: NaN keys of a chunk reach the masked lanes of earlier rows.
                errors[request.req_id] = (
                    f"the logits of positions {positions[0]} to {positions[-1]} are not all finite"
                )
        row += len(positions) + sampled
    return scored
