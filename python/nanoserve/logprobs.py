"""Log-probabilities: how likely the model itself found a token.

They are the log-softmax of the model's logits as they leave the model: before bias, masks, penalties and temperature, so
they say what the model thought, not what the sampler was told to do. A row's own logits decide, nothing else in the batch
can change a bit. Sums over the vocabulary come from the kernel that serves draws, in float32 by blocks; the likeliest token's
block is summed in float64, so even of a nearly certain token the error stays below 1e-6 of what it tells, or 1e-30.

Tokens are ranked by (logit descending, id ascending): a total order, so `rank` and `top` are the same on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoserve.logits import Logits

MAX_PROMPT_LOGPROB_ROWS = 256  # per step: each is a row of logits, 256 of a vocabulary of 150,000 are 154 MB


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token at one position.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability.
        rank: 1 for the likeliest token of the vocabulary.
        top: (token id, logprob) of the likeliest tokens, likeliest first; as many as were asked for. `token` is among
            them only if its rank says so.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def token_logprobs(
    logits: Logits, rows: Sequence[int], tokens: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprob]:
    """Of the tokens that followed these rows, which are finite, each with its own `num_top` likeliest ones beside it."""
    scores = logits.reader.score(logits.values, logits.block_max, rows, tokens, num_top)
    return [
        TokenLogprob(token, logprob, rank, tuple(top))
        for token, (logprob, rank, top) in zip(tokens, scores, strict=True)
    ]


def token_logprob(row: NDArray[np.float32], token: int, num_top: int) -> TokenLogprob:
    """The same for one float32[V], without kernels."""
    return token_logprobs(Logits.of(row[None]), [0], [token], [num_top])[0]
