"""What int8 weights cost: how far they are from the weights of the checkpoint, measured while they are packed.

    relative RMS error of a weight = ||w - w_q|| / ||w||, w_q[n, k] = codes[n, k] * scale[n], over all of its elements

Of codes between -127 and 127 that lie evenly this is about 0.3 / 127 * largest / RMS of an output channel, so a channel with
an outlier shows. It is an error of weights, not of answers: inputs are rounded too, per token, and bench/precision.py measures
what both do to a model's predictions. Channels with a NaN or an infinity are left out, for nothing they give is finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuantizationError:
    """Of one weight.

    Attributes:
        squared_error, squared_norm: sums of (w - w_q)^2 and of w^2.
        worst_output: the largest relative RMS error of one output channel, 1 at most: one that became all zeros.
    """

    squared_error: float
    squared_norm: float
    worst_output: float

    @property
    def relative_rms(self) -> float:
        return _ratio(self.squared_error, self.squared_norm)

    @property
    def is_plausible(self) -> bool:
        """Whether a measurement can have given these numbers: what a file holds may be anything."""
        values = (self.squared_error, self.squared_norm, self.worst_output)
        return all(math.isfinite(value) and value >= 0 for value in values)


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """Of all weights of a model that are int8, at least one.

    Attributes:
        errors: by weight, in the decoder's names and order.
    """

    errors: dict[str, QuantizationError]

    @property
    def relative_rms(self) -> float:
        """Over the elements of all of them."""
        return _ratio(
            math.fsum(error.squared_error for error in self.errors.values()),
            math.fsum(error.squared_norm for error in self.errors.values()),
        )

    @property
    def worst_weight(self) -> str:
        """The one with the largest relative RMS error."""
        return max(self.errors, key=lambda name: self.errors[name].relative_rms)

    @property
    def worst_channel_weight(self) -> str:
        """The one that has the output channel with the largest."""
        return max(self.errors, key=lambda name: self.errors[name].worst_output)

    def lines(self) -> Iterable[str]:
        """Two, for people."""
        worst, channel = self.worst_weight, self.worst_channel_weight
        count = f"{len(self.errors)} weight{'s' if len(self.errors) > 1 else ''}"
        yield f"int8: {count}, relative RMS error {self.relative_rms:.2%}"
        yield (
            f"int8: the most {self.errors[worst].relative_rms:.2%} in {worst}; "
            f"of one output channel {self.errors[channel].worst_output:.2%}, in {channel}"
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _ratio(squared_error: float, squared_norm: float) -> float:
    return math.sqrt(squared_error / squared_norm) if squared_norm > 0 else 0.0
