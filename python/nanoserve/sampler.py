"""From logits to tokens.

Invariant: a row's token depends on its own logits, parameters, tokens, seed and position only: the same bits alone or in
any batch.

Order: the request's own changes to its logits (logits_processors.py), then for a greedy request the largest logit, for
the others temperature, top_k, top_p, min_p (the order of transformers) and one draw. Among equal logits greedy takes the
lowest token id; top_k keeps every token equal to the k-th; top_p prefers the lower ids among equals.

The draw is the inverse CDF at one uniform number per (seed, position): a token weighs exp((logit - largest) / temperature),
the kept tokens stand in vocabulary order, and the first at which the running weight exceeds uniform * total is taken. All
of it is float64. Sums are taken in blocks of 256 kept tokens, first over blocks, then inside the one that is hit: a running
sum over a whole vocabulary is a chain of dependent additions and would cost more than everything else together.

Nothing is carried from token to token, so a preempted or replayed request draws the same. A greedy row costs one argmax, a
drawn one a few passes over the vocabulary; only a row whose request changes its logits is copied.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nanoserve.random_stream import uniform
from nanoserve.top_k import at_least_kth

if TYPE_CHECKING:
    from nanoserve.request import Request
    from nanoserve.sampling import SamplingParams

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

_BLOCK = 256  # tokens summed together
_WORKING_SET = 2**18  # weights computed together, 2 MiB: as much as stays in a core's own cache


class Sampler:
    """One token per row of logits. Keeps no state: everything that varies is in the arguments."""

    def sample(
        self, logits: Float32Array, requests: Sequence[Request], eos_token_ids: Collection[int]
    ) -> list[int]:
        """float32[R, V] logits and their R requests -> R token ids.

        A row with a non-finite logit gets some token that means nothing (telling is the caller's part) and disturbs no
        other row. `logits` is not modified.

        Raises:
            ValueError: a request whose every token is forbidden, or without the seed it needs.
        """
        if len(logits) != len(requests):
            raise ValueError(f"sample: {len(logits)} rows of logits for {len(requests)} requests")
        changed = {  # rows by number
            row: processor
            for row, request in enumerate(requests)
            if (processor := request.logits_processor) is not None and processor.has_work(request)
        }
        drawn = [row for row, request in enumerate(requests) if not request.params.is_greedy]
        if not drawn and not changed:
            best: list[int] = logits.argmax(axis=1).tolist()
            return best

        def row_of(row: int) -> Float32Array:
            if row in changed:
                return changed[row].apply(logits[row], requests[row], eos_token_ids)
            one: Float32Array = logits[row]
            return one

        tokens = [0] * len(requests)
        for row, request in enumerate(requests):
            if request.params.is_greedy:
                tokens[row] = int(row_of(row).argmax())
        if not drawn:
            return tokens
        uniforms = uniform(
            np.array([_seed(requests[row]) for row in drawn], dtype=np.uint64),
            np.array([requests[row].total_len for row in drawn], dtype=np.uint64),
        )
        plain = [i for i, row in enumerate(drawn) if not requests[row].params.has_filters]
        together = max(1, _WORKING_SET // logits.shape[1])
        with np.errstate(all="ignore"):  # non-finite rows
            for begin in range(0, len(plain), together):
                part = plain[begin : begin + together]
                rows = [drawn[i] for i in part]
                temperatures = [requests[row].params.temperature for row in rows]
                weights = _weights([row_of(row) for row in rows], temperatures)
                for row, token in zip(rows, _draw(weights, uniforms[part]), strict=True):
                    tokens[row] = token
            for row, u in zip(drawn, uniforms.tolist(), strict=True):
                if requests[row].params.has_filters:
                    tokens[row] = _draw_filtered(row_of(row), requests[row].params, u)
        return tokens


def _seed(request: Request) -> int:
    if request.seed is None:
        raise ValueError(f"sample: request {request.req_id!r} has no seed and is not greedy")
    return request.seed


def _weights(rows: Sequence[Float32Array], temperatures: Sequence[float]) -> Float64Array:
    """float64[R, whole blocks] of rows of equal length: probabilities but for their sum, zeros behind them.

    The likeliest token's weight is 1.
    """
    width = len(rows[0])
    padded = np.empty((len(rows), -(-width // _BLOCK) * _BLOCK))
    weights = padded[:, :width]
    for weight, row in zip(weights, rows, strict=True):
        weight[:] = row
    weights -= weights.max(axis=1, keepdims=True)
    if any(temperature != 1.0 for temperature in temperatures):
        weights /= np.array(temperatures)[:, None]
    np.exp(weights, out=weights)
    padded[:, width:] = 0.0
    return padded


def _draw(weights: Float64Array, uniforms: Float64Array) -> list[int]:
    """float64[R, whole blocks] and a number in [0, 1) for each row -> the column that each number falls on."""
    if weights.shape[1] == _BLOCK:
        cumulative = np.cumsum(weights, axis=1)
        first: list[int] = (cumulative > uniforms[:, None] * cumulative[:, -1:]).argmax(axis=1).tolist()
        return first
    rows = np.arange(len(weights))
    blocks = weights.reshape(len(weights), -1, _BLOCK)
    running = np.cumsum(blocks.sum(axis=2), axis=1)
    targets = uniforms * running[:, -1]
    hit = (running > targets[:, None]).argmax(axis=1)
    before = np.where(hit > 0, running[rows, hit - 1], 0.0)
    inside = blocks[rows, hit]
    inside[:, 0] += before
    np.cumsum(inside, axis=1, out=inside)
    # Summed in another order the block may end a rounding error short of the target: then its last token it is.
    targets = np.minimum(targets, np.nextafter(inside[:, -1], 0.0))
    columns: list[int] = (hit * _BLOCK + (inside > targets[:, None]).argmax(axis=1)).tolist()
    return columns


def _draw_filtered(row: Float32Array, params: SamplingParams, u: float) -> int:
    largest = float(row.max())
    if not np.isfinite(largest):
        return 0
    if params.top_k:
        kept = at_least_kth(row, params.top_k)
    elif params.min_p > 0.0 and params.top_p == 1.0:
        # Most tokens are far below min_p, told without computing their weights. The margin covers what is rounded.
        lowest = largest + params.temperature * math.log(params.min_p)
        kept = np.flatnonzero(row >= lowest - 1e-5 * (1.0 + abs(largest) + abs(lowest)))
    else:
        kept = np.arange(len(row))
    weights = _weights([row[kept]], [params.temperature])[0, : len(kept)]
    if params.top_p < 1.0:
        columns = _nucleus(weights, params.top_p)
        weights, kept = weights[columns], kept[columns]
    if params.min_p > 0.0:
        columns = np.flatnonzero(weights >= params.min_p)
        weights, kept = weights[columns], kept[columns]
    if len(weights) > _BLOCK:
        padded = np.zeros((1, -(-len(weights) // _BLOCK) * _BLOCK))
        padded[0, : len(weights)] = weights
        return int(kept[_draw(padded, np.array([u]))[0]])
    cumulative = np.cumsum(weights)
    return int(kept[np.searchsorted(cumulative, u * cumulative[-1], side="right")])


def _nucleus(weights: Float64Array, top_p: float) -> NDArray[np.intp]:
    """Columns, ascending, of the fewest weights, largest first, whose sum reaches top_p of the total."""
    total = weights.sum()
    target = top_p * total
    # Only likely tokens need sorting: those above a bar, if together they are more than enough. Tokens below the last bar
    # weigh less together than the tail that is cut; half of that keeps the likeliest in it whatever is rounded.
    for bar in (2.0**-8, 2.0**-16, 0.5 * (1.0 - top_p) / len(weights) * total):
        columns = np.flatnonzero(weights > bar)
        candidates = weights[columns]
        if candidates.sum() > target * (1.0 + 1e-9):
            break
    ranked = np.sort(candidates)[::-1]
    count = min(int(np.searchsorted(np.cumsum(ranked), target, side="left")) + 1, len(ranked))
    last = ranked[count - 1]
    equal = np.flatnonzero(candidates == last)
    keep = candidates > last
    keep[equal[: count - np.count_nonzero(keep)]] = True
    nucleus: NDArray[np.intp] = columns[keep]
    return nucleus
