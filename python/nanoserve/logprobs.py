"""Log-probabilities: how likely the model itself found a token.

They are the log-softmax of the model's logits as they leave the model: before bias, masks, penalties and temperature, so
they say what the model thought, not what the sampler was told to do. Computed in float64 from the float32 logits, one row
at a time, so that nothing else in the batch can change a bit.

Tokens are ranked by (logit descending, id ascending): a total order, so `rank` and `top` are the same on every run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoserve.top_k import likeliest

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


def token_logprob(logits: NDArray[np.float32], token: int, num_top: int) -> TokenLogprob:
    """Of the token that followed these float32[V] finite logits, with the `num_top` likeliest ones beside it."""
    largest = float(logits.max())
    shifted = np.subtract(logits, largest, dtype=np.float64)
    log_total = math.log(float(np.exp(shifted, out=shifted).sum()))
    own = logits[token]
    rank = 1 + int(np.count_nonzero(logits > own) + np.count_nonzero(logits[:token] == own))
    top = likeliest(logits, num_top)
    return TokenLogprob(
        token=token,
        logprob=float(own) - largest - log_total,
        rank=rank,
        top=tuple((token_id, float(logits[token_id]) - largest - log_total) for token_id in top.tolist()),
    )
