"""Pearson's test, for counts of draws against exact probabilities."""

from __future__ import annotations

import math

import numpy as np


def chi_square_z(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic as standard deviations above its mean (Wilson-Hilferty); cells expected below 5 are merged."""
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    ratio = float(((observed - wanted) ** 2 / wanted).sum()) / freedom
    return (ratio ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
