"""Log-probabilities of one step: of the tokens that were sampled, and of the prompt tokens whose rows were computed.

Rows that are not finite have none: their requests fail, and so does a request with such a row inside its prompt. Rows of
prompts are bounded per step, because each is a row of logits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from nanoserve.batch import Batch
from nanoserve.logits import Logits
from nanoserve.logprobs import MAX_PROMPT_LOGPROB_ROWS, TokenLogprob, token_logprobs
from nanoserve.observe.events import ReqId
from nanoserve.request import Request


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
    rows = [
        row
        for row, request in enumerate(requests)
        if request.params.logprobs is not None and finite[row] and request.req_id not in errors
    ]
    if not rows:
        return {}
    num_top = [requests[row].params.logprobs or 0 for row in rows]
    scores = token_logprobs(logits, rows, [tokens[row] for row in rows], num_top)
    return {requests[row].req_id: score for row, score in zip(rows, scores, strict=True)}


def score_prompts(
    batch: Batch, logits: Logits, finite: Sequence[bool], errors: dict[ReqId, str]
) -> dict[ReqId, list[TokenLogprob]]:
    """Of the prompt tokens that follow the positions of `batch.prompt_rows`.

    Args:
        logits, finite: of all of `batch.sample_rows`.
        errors: is told of requests with a row that is not finite; requests in it already are passed over.
    """
    scored: dict[ReqId, list[TokenLogprob]] = {}
    row = 0
    for index, (request, sampled) in enumerate(zip(batch.requests, batch.sampled, strict=True)):
        positions = batch.prompt_rows.get(index, range(0))
        if positions and request.req_id not in errors:
            if all(finite[row : row + len(positions)]):
                scored[request.req_id] = token_logprobs(
                    logits,
                    range(row, row + len(positions)),
                    request.prompt_tokens[positions.start + 1 : positions.stop + 1],
                    [request.params.prompt_logprobs or 0] * len(positions),
                )
            else:
                # Not the first bad one: NaN keys of a chunk reach the masked lanes of earlier rows.
                errors[request.req_id] = (
                    f"the logits of positions {positions[0]} to {positions[-1]} are not all finite"
                )
        row += len(positions) + sampled
    return scored
