"""The rounding of real tensor cores, under ``sim``: the models by hand and by rational numbers, and that kernels keep
their error bounds with it.
"""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from kernel_cases import ALIGNED, F32, WINDOWS, Backend, Run, applied_of, outputs, problem_of, same, solve_apply
from test_lagged import sweep
from test_ops import ULP, check_apply, error

from lopt import kernels
from lopt.rule.features import FEATURE_SETS

BITS = {"ampere": 24, "hopper": 25}  # kept below the largest exponent
INPUTS = {"ampere": 8, "hopper": 16}  # added up at a time

SETS = pytest.mark.parametrize("feature_set", FEATURE_SETS)
HARDWARE = pytest.mark.parametrize("backend", ["sim-ampere", "sim-hopper"], indirect=True)


def sum_of(of: str, a: list[float], b: list[float], d: float) -> float:
    sim = kernels.module_of("sim")
    sim.use_tensor_cores(of)
    try:
        return float(sim.tensor_core_sum([*a, *[0.0] * (16 - len(a))], [*b, *[0.0] * (16 - len(b))], d))
    finally:
        sim.use_tensor_cores("ideal")


# 2^-12 is half of the least bit of a half in [1, 2); products are of such numbers.
CASES = {
    "nothing": ([], [], 0.0, (0.0, 0.0, 0.0)),
    "a product is exact": ([1.0 + 2.0**-10], [1.0 + 2.0**-10], 0.0, (1.0 + 2.0**-9 + 2.0**-20,) * 3),
    "below the least bit": ([2.0**-13] * 16, [2.0**-12] * 16, 1.0, (1.0 + 2.0**-21, 1.0, 1.0 + 2.0**-21)),
    "below either": ([2.0**-13] * 16, [2.0**-13] * 16, 1.0, (1.0 + 2.0**-22, 1.0, 1.0)),
    "of both signs": ([2.0**-13, -(2.0**-13)], [2.0**-12] * 2, 1.0, (1.0, 1.0, 1.0)),
    "just below one": ([-(2.0**-13)], [2.0**-12], 1.0, (1.0 - 2.0**-24, 1.0, 1.0 - 2.0**-24)),
    "the first eight come first": ([2.0**-13] * 8 + [1.0], [2.0**-12] * 8 + [1.0], 0.0, (1 + 2.0**-22,) * 3),
    "a large one hides": ([128.0, *[2.0**-6] * 3], [128.0, *[2.0**-6] * 3], -16384.0, (3 * 2.0**-12, 0.0, 0.0)),
    "all but the last bit": ([128.0, -128.0, 2.0**-5], [128.0, 128.0, 2.0**-6], 0.0, (2.0**-11, 0.0, 2.0**-11)),
    "subnormal halves": ([2.0**-24], [2.0**-24], 0.0, (2.0**-48,) * 3),
    "infinity": ([math.inf], [1.0], 3.0, (math.inf,) * 3),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case: str) -> None:
    a, b, d, expected = CASES[case]
    for of, value in zip(("ideal", "ampere", "hopper"), expected, strict=True):
        assert sum_of(of, a, b, d) == value, of


def test_what_is_no_number() -> None:
    for of in ("ideal", *BITS):
        assert math.isnan(sum_of(of, [math.inf, -math.inf], [1.0, 1.0], 0.0))
        assert math.isnan(sum_of(of, [math.nan], [1.0], 0.0))
    with pytest.raises(ValueError, match="of: expected ideal, ampere or hopper, got volta"):
        kernels.module_of("sim").use_tensor_cores("volta")


def exponent(x: float, least: int) -> int:
    return max(math.frexp(x)[1] - 1, least) if x else least


def cut(x: Fraction, unit: Fraction) -> Fraction:
    """To a multiple of ``unit``, toward zero."""
    return int(x / unit) * unit


def to_float(x: Fraction) -> float:
    """Toward zero, as a float32."""
    if not x:
        return 0.0
    top = x.numerator.bit_length() - x.denominator.bit_length()
    top -= abs(x) < Fraction(2) ** top
    return float(cut(x, Fraction(2) ** (max(top, -126) - 23)))


def by_fractions(of: str, a: list[float], b: list[float], d: float) -> float:
    """The same model once more, without floating point."""
    for first in range(0, 16, INPUTS[of]):
        pairs = [(x, y) for x, y in zip(a, b, strict=True)][first : first + INPUTS[of]]
        terms = [(Fraction(x) * Fraction(y), exponent(x, -14) + exponent(y, -14)) for x, y in pairs]
        terms = [(Fraction(d), exponent(d, -126)), *(term for term in terms if term[0])]
        unit = Fraction(2) ** (max(e for _, e in terms) - BITS[of])
        d = to_float(sum((cut(value, unit) for value, _ in terms), Fraction(0)))
    return d


@pytest.mark.parametrize("of", BITS)
@pytest.mark.parametrize("spread", [0.5, 6.0, 14.0])
def test_by_fractions(of: str, spread: float) -> None:
    """Bit for bit, over powers of two up to ``spread``; beyond 12 there are subnormal halves among the inputs."""
    generator = torch.Generator().manual_seed(int(spread))

    def normal(*shape: int) -> torch.Tensor:
        exponents = spread * (2.0 * torch.rand(shape, generator=generator) - 1.0)
        return torch.randn(shape, generator=generator) * 2.0**exponents

    a, b, d = normal(60, 16).half(), normal(60, 16).half(), normal(60)
    found, expected, ideal = [], [], []
    for row in range(60):
        operands = a[row].tolist(), b[row].tolist(), float(d[row])
        found.append(sum_of(of, *operands))
        expected.append(by_fractions(of, *operands))
        ideal.append(sum_of("ideal", *operands))
    assert found == expected
    assert found != ideal


@HARDWARE
@pytest.mark.parametrize("width", kernels.WIDTHS)
@SETS
def test_high_keeps_the_rule(backend: Backend, feature_set: str, width: int) -> None:
    """`high` is held to twice the error of float32, plus an ulp, on real tensor cores too."""
    check_apply(backend, feature_set, width, WINDOWS, guard=ALIGNED, precision="high")


@HARDWARE
@SETS
def test_extreme_values(backend: Backend, feature_set: str) -> None:
    key = (feature_set, 8, WINDOWS, F32, F32, True)
    check_apply(backend, *key, guard=ALIGNED, precision="high")
    for precision in ("high", "fast"):
        found = outputs(Run(problem_of(*key), backend, guard=ALIGNED, precision=precision))
        assert all(bool(x.isfinite().all()) for x in found)


@HARDWARE
@pytest.mark.parametrize("width", kernels.WIDTHS)
@SETS
def test_fast_keeps_eleven_bits(backend: Backend, feature_set: str, width: int) -> None:
    problem, exact = problem_of(feature_set, width, WINDOWS), applied_of(torch.float64, feature_set, width, WINDOWS)
    run = Run(problem, backend, guard=ALIGNED, precision="fast")
    assert 2.0**-16 < error([*run.apply()], [*exact.hidden]) < 2.0**-9
    assert error(run.params, exact.params) < 2.0**-6


@HARDWARE
@SETS
def test_a_sweep_keeps_the_rule(backend: Backend, feature_set: str) -> None:
    """From accumulators of the same sweep; and not the bits of ideal sums, so that the rounding is seen to be used."""
    problem = problem_of(feature_set, 16, WINDOWS)
    found, count = sweep(problem, backend, "high"), len(problem.params)
    after = dataclasses.replace(problem, mom=found["state"][:count], rms=found["state"][count:])
    exact, single = solve_apply(after, torch.float64), solve_apply(after, F32)
    for values, x, y in (
        (found["params"], exact.params, single.params),
        ([*found["hidden"][0]], [*exact.hidden], [*single.hidden]),
    ):
        assert error(values, x) <= 2 * max(error(y, x), ULP / 2) + ULP
    kernels.module_of("sim").use_tensor_cores("ideal")
    assert not same(found["hidden"], sweep(problem, backend, "high")["hidden"])
