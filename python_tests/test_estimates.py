"""Logarithms, exponentials and roots that kernels make of estimates (csrc/rule/maths.h), under ``sim``: within the
stated errors, and near them, so that the simulator's estimates are seen to be as wrong as they may be.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest

from lopt import kernels

ULP = 2.0**-23


def places(start: float, end: float, count: int = 4000) -> list[float]:
    """Positive float32 numbers, evenly spaced by their logarithms, but for some noise."""
    noise = np.random.default_rng(0).uniform(0.0, 1.0, count)
    exponents = math.log2(start) + (math.log2(end) - math.log2(start)) * (np.arange(count) + noise) / count
    return [float(x) for x in np.float32(2.0**exponents)]


def last_place(y: float) -> float:
    return 2.0 ** (math.floor(math.log2(abs(y))) - 23)


FUNCTIONS: dict[str, tuple[Callable[[float], float], Callable[[float, float], float], list[float]]] = {
    # what it is, the error that is stated of y(x), and where
    "log": (math.log, lambda x, y: 1.6 * ULP + last_place(y), places(2.0**-126, 2.0**127)),
    "log near 1": (math.log, lambda x, y: 1.6 * ULP + last_place(y), places(0.7, 1.4)),
    "rough_log": (math.log, lambda x, y: 2.5 * ULP * (1.0 if 0.5 < x < 2.0 else abs(y)), places(2.0**-126, 2.0**127)),
    "exp": (
        math.exp,
        lambda x, y: (2.0 + 0.62 * abs(x)) * ULP * y,
        [s * x for s in (-1, 1) for x in places(1e-6, 80.0)],
    ),
    "rsqrt": (lambda x: x**-0.5, lambda x, y: 1.1 * ULP * y, places(2.0**-126, 2.0**127)),
    "reciprocal": (lambda x: 1.0 / x, lambda x, y: last_place(y), places(2.0**-125, 2.0**125)),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_errors(case: str) -> None:
    function, stated, arguments = FUNCTIONS[case]
    sim, shares = kernels.module_of("sim"), []
    for x in arguments:
        y = function(x)
        shares.append((sim.estimate(case.split()[0], x) - y) / stated(x, y))
    assert -1.0 <= min(shares) < -0.6
    assert 0.6 < max(shares) <= 1.0


def test_what_is_not_estimated() -> None:
    sim = kernels.module_of("sim")
    assert sim.estimate("exp", 0.0) == 1.0
    assert sim.estimate("exp", -1000.0) == 0.0
    assert sim.estimate("exp", 1000.0) == sim.estimate("exp", math.inf) == math.inf
    assert sim.estimate("log", 1.0) == pytest.approx(0.0, abs=1.6 * ULP)
    assert math.isnan(sim.estimate("exp", math.nan))
    with pytest.raises(ValueError, match="of: expected log, rough_log, exp, rsqrt or reciprocal, got sin"):
        sim.estimate("sin", 1.0)
