"""How the tokens of a step are chosen, as arrays that a device reads: sampler.py's parameters of each row, and its uniform number.

What a device cannot do is the host's: rows whose request changes its logits, has a constraint, or wants to know log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from nanoserve.random_stream import uniform

if TYPE_CHECKING:
    from nanoserve.batch import Batch
    from nanoserve.logits import Logits
    from nanoserve.request import Request

_FIELDS = 4  # per row, of each array
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """For R rows.

    Attributes:
        floats: float32[R, 4]: 1 / temperature (0: the largest logit), top_p, min_p, and nothing.
        ints: int32[R, 4]: top_k, the uniform number in 32 bits, and nothing twice.
        on_host: rows whose token the host must choose; their numbers say nothing.
    """

    floats: NDArray[np.float32]
    ints: NDArray[np.int32]
    on_host: list[int]

    @classmethod
    def of(cls, requests: Sequence[Request], ahead: int = 0) -> Draws:
        """Of each request's next token, or of the one after `ahead` tokens that are not known yet."""
        floats = np.zeros((len(requests), _FIELDS), np.float32)
        ints = np.zeros((len(requests), _FIELDS), np.int32)
        on_host, drawn = [], []
        for row, request in enumerate(requests):
            params = request.params
            if not can_choose(request):
                on_host.append(row)
            elif params.temperature:
                floats[row, :3] = min(1.0 / params.temperature, _LARGEST), params.top_p, params.min_p
                ints[row, 0] = params.top_k
                drawn.append(row)
        if drawn:
            seeds = np.array([requests[row].seed for row in drawn], np.uint64)
            positions = np.array([requests[row].total_len + ahead for row in drawn], np.uint64)
            ints[drawn, 1] = (uniform(seeds, positions) * 2.0**32).astype(np.uint32).view(np.int32)
        return cls(floats, ints, on_host)


def can_choose(request: Request) -> bool:
    """Whether a device can choose the request's next token, and then every later one."""
    processor = request.logits_processor
    return (
        request.constraint is None
        and request.params.logprobs is None
        and (processor is None or not processor.has_work(request))
        and (request.seed is not None or not request.params.temperature)
    )


class StartedStep(Protocol):
    """A step that a device is computing."""

    def tokens(self) -> list[int]:
        """Waits. A token for each sampled row, -1 where a logit is not finite."""
        ...

    def logits(self, rows: Sequence[int]) -> Logits:
        """Of some of the sampled rows; before another step is started."""
        ...


class AheadExecutor(Protocol):
    """An executor that chooses tokens itself, if `chooses_tokens`, and takes a step before the one it computes is done."""

    chooses_tokens: bool

    def start(self, batch: Batch, draws: Draws) -> StartedStep:
        """Of `batch.sources`, if it has them: the rows of the step before whose tokens are its ids."""
        ...
