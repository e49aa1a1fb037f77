"""From logits to tokens.

Invariant: a row's token depends on its own logits, parameters, tokens, seed and position only: the same bits alone or in
any batch.

Order: the request's own changes to its logits (logits_processors.py), then its constraint (constraint.py) forbids tokens,
then for a greedy request the largest logit, for
the others temperature, top_k, top_p, min_p (the order of transformers) and one draw. Among equal logits greedy takes the
lowest token id; top_k keeps every token equal to the k-th; top_p prefers the lower ids among equals.

The draw is the inverse CDF at one uniform number per (seed, position): a token weighs exp((logit - largest) / temperature),
the kept tokens stand in vocabulary order, and the first at which the running weight exceeds uniform * total is taken. Where
nothing is cut, running weights are summed in blocks of 256 tokens: a compiled kernel computes the blocks' weights in float32
(kernels/logits.py), everything after that is float64 (src/token_choice.cpp). So a token's chance is exact to some 1e-7 of
itself, and so is the mass that top_p cuts at.

Nothing is carried from token to token, so a preempted or replayed request draws the same. One native call serves a step:
Python sees parameters and tokens, never a logit; only a row whose request changes its logits is copied.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nanoserve.constraint import TokenMask, next_tokens
from nanoserve.logits import Logits
from nanoserve.random_stream import uniform

if TYPE_CHECKING:
    from nanoserve.request import Request


_WORKING_SET = 2**19  # logits copied together, 2 MiB: as much as stays in a core's own cache


class Sampler:
    """One token per row of logits. Keeps no state: everything that varies is in the arguments."""

    def sample(
        self, logits: Logits, requests: Sequence[Request], eos_token_ids: Collection[int]
    ) -> list[int]:
        """R rows of logits and their R requests -> R token ids.

        A row with a non-finite logit gets some token that means nothing (telling is the caller's part) and disturbs no
        other row. The logits are not modified.

        Raises:
            ValueError: a request whose every token is forbidden, or without the seed it needs.
            Exception: whatever a constraint raises.
        """
        if len(logits) != len(requests):
            raise ValueError(f"sample: {len(logits)} rows of logits for {len(requests)} requests")
        vocab = logits.values.shape[1]
        changing: dict[int, TokenMask | None] = {}
        for row, request in enumerate(requests):
            mask = None if request.constraint is None else next_tokens(request, eos_token_ids, vocab)
            if mask is not None or _has_work(request):
                changing[row] = mask
        if not changing:
            return _choose(logits, range(len(requests)), requests)
        tokens: dict[int, int] = {}
        together = max(1, _WORKING_SET // vocab)
        rows = list(changing)
        for begin in range(0, len(rows), together):
            part = {row: changing[row] for row in rows[begin : begin + together]}
            tokens.update(zip(part, self._sample_changed(logits, part, requests, eos_token_ids), strict=True))
        others = [row for row in range(len(requests)) if row not in tokens]
        tokens.update(zip(others, _choose(logits, others, [requests[row] for row in others]), strict=True))
        return [tokens[row] for row in range(len(requests))]

    @staticmethod
    def _sample_changed(
        logits: Logits,
        masks: Mapping[int, TokenMask | None],
        requests: Sequence[Request],
        eos_token_ids: Collection[int],
    ) -> list[int]:
        """Tokens of the rows that `masks` names, each from a copy that its request, and its mask if any, has changed."""
        copy = logits.take(list(masks))
        block_max = copy.block_max
        owners = [requests[row] for row in masks]
        processed = [_has_work(request) for request in owners]
        if any(processed):
            with np.errstate(all="ignore"):  # rows that are, or become, infinite
                for values, request, has_work in zip(copy.values, owners, processed, strict=True):
                    if has_work and request.logits_processor is not None:
                        request.logits_processor.apply(values, request, eos_token_ids)
            block_max = logits.reader.block_max(copy.values, may_forbid=True)
        masked = {index: mask for index, mask in enumerate(masks.values()) if mask is not None}
        finite = copy.finite.tolist()
        if masked:
            logits.reader.forbid(copy.values, block_max, list(masked), np.stack(list(masked.values())))
        for best, was_finite in zip(block_max.max(axis=1).tolist(), finite, strict=True):
            if was_finite and not math.isfinite(best):
                raise ValueError(
                    "sample: bias and penalties made a logit infinite"
                    if not best < 0
                    else "sample: structured_outputs, bad_words, min_tokens and logit_bias leave no token of the vocabulary to choose"
                )
        return _choose(Logits(copy.values, block_max, logits.reader), range(len(owners)), owners)


def _has_work(request: Request) -> bool:
    processor = request.logits_processor
    return processor is not None and processor.has_work(request)


def _choose(logits: Logits, rows: Sequence[int], requests: Sequence[Request]) -> list[int]:
    params = [request.params for request in requests]
    temperatures = [each.temperature for each in params]
    uniforms = [0.0] * len(requests)
    drawn = [index for index, temperature in enumerate(temperatures) if temperature]
    if drawn:
        seeds = np.array([_seed(requests[index]) for index in drawn], dtype=np.uint64)
        positions = np.array([requests[index].total_len for index in drawn], dtype=np.uint64)
        for index, number in zip(drawn, uniform(seeds, positions).tolist(), strict=True):
            uniforms[index] = number
    return logits.reader.sample(
        logits.values, logits.block_max, rows, temperatures, [each.top_k for each in params],
        [each.top_p for each in params], [each.min_p for each in params], uniforms,
    )  # fmt: skip


def _seed(request: Request) -> int:
    if request.seed is None:
        raise ValueError(f"sample: request {request.req_id!r} has no seed and is not greedy")
    return request.seed
