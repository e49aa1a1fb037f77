"""exp, tanh, erf, the soft cap and the activations against float64, in units of the last place; special values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compiler.packed_call import act64, elementwise, ulp_error

rng = np.random.default_rng(0)


def samples(low: float, high: float, count: int = 1 << 18) -> np.ndarray:
    """Evenly spread, at random, and down to tiny magnitudes."""
    even = np.linspace(low, high, count)
    tiny = np.exp(rng.uniform(-40, 0, count)) * rng.choice([low, high], count)
    return np.concatenate([even, rng.uniform(low, high, count), tiny]).astype(np.float32)


def exp(x):  # type: ignore[no-untyped-def]
    from nanoserve.compiler.vector_math import exp

    return exp(x)


def exp_of_negative(x):  # type: ignore[no-untyped-def]
    from nanoserve.compiler.vector_math import exp

    return exp(x, at_most_zero=True)


def tanh(x):  # type: ignore[no-untyped-def]
    from nanoserve.compiler.vector_math import tanh

    return tanh(x)


def erf(x):  # type: ignore[no-untyped-def]
    from nanoserve.compiler.vector_math import erf

    return erf(x)


@pytest.mark.parametrize(
    ("function", "exact", "low", "high", "ulp"),
    [
        (exp, np.exp, -87.33, 88.37, 1.0),
        (exp_of_negative, np.exp, -87.33, 0.0, 1.0),
        (tanh, np.tanh, -12.0, 12.0, 2.0),
        (erf, np.vectorize(math.erf), -5.0, 5.0, 2.0),
    ],
    ids=["exp", "exp_of_negative", "tanh", "erf"],
)
def test_ulp(function, exact, low: float, high: float, ulp: float) -> None:  # type: ignore[no-untyped-def]
    x = samples(low, high, 1 << (14 if function is erf else 18))
    got = elementwise(f"check_{function.__name__}", function, x)
    worst = ulp_error(got, exact(x.astype(np.float64))).max()
    assert worst <= ulp, worst
    if function in (tanh, erf):
        assert (got == -elementwise(f"check_{function.__name__}", function, -x)).all(), "not odd"


def test_erf_is_accurate_in_absolute_terms() -> None:
    x = samples(-6, 6, 1 << 14)
    assert (
        np.abs(elementwise("check_erf", erf, x) - np.vectorize(math.erf)(x.astype(np.float64))).max() < 1e-7
    )


def test_special_values() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e30, 1.0] * 2, dtype=np.float32)
    y = elementwise("check_exp", exp, x)
    assert np.isnan(y[0])
    assert y[3] == y[4] == 1  # exactly: a masked block multiplies by this
    assert y[1] == y[5]
    assert 2.3e38 < y[1] < np.inf
    assert np.finfo(np.float32).smallest_normal <= y[2] == y[6] < 1.2e-38  # subnormal results are slow
    assert np.isnan(elementwise("check_exp_of_negative", exp_of_negative, x)[0])
    for name, function in (("check_tanh", tanh), ("check_erf", erf)):
        y = elementwise(name, function, x)
        assert np.isnan(y[0])
        assert y[1:7].tolist() == [1, -1, 0, 0, 1, -1]


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "gelu_erf"])
def test_activations(name: str) -> None:
    def function(x):  # type: ignore[no-untyped-def]
        from nanoserve.compiler.vector_math import activate

        return activate(name, x)

    x = samples(-30, 30, 1 << 14)
    got, exact = elementwise(f"check_{name}", function, x), act64(name, x)
    assert (np.abs(got - exact) <= 3e-7 * np.maximum(1, np.abs(exact))).all()
    special = np.array([np.nan, np.inf, 0.0, 1e30, -1e30] + [0.0] * 11, dtype=np.float32)
    y = elementwise(f"check_{name}", function, special)
    assert np.isnan(y[0])
    assert y[1:4].tolist() == [np.inf, 0, np.float32(1e30)]
    assert abs(y[4]) < 1e-5


@pytest.mark.parametrize("cap", [1.0, 30.0, 50.0])
def test_soft_cap(cap: float) -> None:
    def function(x):  # type: ignore[no-untyped-def]
        from nanoserve.compiler.vector_math import soft_cap

        return soft_cap(x, cap)

    x = samples(-9 * cap, 9 * cap, 1 << 14)
    got = elementwise(f"check_soft_cap_{int(cap)}", function, x)
    assert ulp_error(got, cap * np.tanh(x.astype(np.float64) / cap)).max() <= 4
    special = np.array([np.nan, np.inf, -np.inf, 0.0, 3e38, -3e38] + [0.0] * 10, dtype=np.float32)
    y = elementwise(f"check_soft_cap_{int(cap)}", function, special)
    assert np.isnan(y[0])
    assert y[1:6].tolist() == [cap, -cap, 0, cap, -cap]
