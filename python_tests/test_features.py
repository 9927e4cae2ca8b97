"""The feature tables: equal to the compiled ones, and every column and column map by hand on a few numbers."""

import math
import re
from typing import Any

import pytest
import torch

from lopt import Theta, kernels
from lopt.kernels import tables
from lopt.rule import PRESETS, reference
from lopt.rule.features import FEATURE_SETS, STATS, FeatureSet

F64 = torch.float64

#: One parameter: gradient, parameter, and as many accumulators as the set has.
GRAD, PARAM = -0.25, 0.5
MOM = (0.1, -0.2, 0.3, -0.04, 0.05)
RMS = (0.04, 0.09, 0.16, 0.0025, 0.01)


def by_hand(name: str) -> dict[str, float]:
    """Raw columns of that parameter, in plain Python."""
    if name == "paper":
        columns = {"grad": GRAD, "param": PARAM, "log_param": math.log(PARAM + 1e-8)}
        columns |= {f"mom{k}": MOM[k] for k in range(5)}
        columns |= {f"rms{k}": RMS[k] for k in range(5)}
        columns |= {f"mom{k}_over_rms{k}": MOM[k] / math.sqrt(RMS[k] + 1e-6) for k in range(5)}
        columns |= {f"rsqrt_rms{k}": 1 / math.sqrt(RMS[k] + 1e-6) for k in range(5)}
        return columns
    return {
        "mom0_over_slow": 0.1 / 0.3,
        "mom1_over_slow": -0.2 / 0.3,
        "mom2_over_slow": 0.3 / 0.3,
        "grad_over_slow": -0.25 / 0.3,
        "mom0_over_quick": 0.1 / 0.2,
        "param": 0.5,
        "grad": -0.25,
        "mom0": 0.1,
        "mom1": -0.2,
        "mom2": 0.3,
        "log_slow": math.log(0.3),
        "log_ratio": math.log(0.2 / 0.3),
    }


@pytest.fixture(params=FEATURE_SETS)
def features(request: pytest.FixtureRequest) -> FeatureSet:
    return FEATURE_SETS[request.param]


def one_parameter(features: FeatureSet) -> tuple[torch.Tensor, ...]:
    """grad, param [1], mom, rms [K, 1] in float64."""
    mom, rms = MOM[: len(features.mom_decays)], RMS[: len(features.rms_decays)]
    return (
        torch.tensor([GRAD], dtype=F64),
        torch.tensor([PARAM], dtype=F64),
        torch.tensor(mom, dtype=F64)[:, None],
        torch.tensor(rms, dtype=F64)[:, None],
    )


@pytest.mark.parametrize("name", tables.rule_tables())
def test_another_table_than_the_compiled_one_fails_at_import(name: str) -> None:
    """Two names swapped, one missing, or another number; the message says which table."""
    compiled = kernels._C.rule_tables()
    tables.check_tables(compiled)
    value = compiled[name]
    others: list[Any] = [value + 1] if not isinstance(value, list) else [[*value[1:], value[0]], value[1:]]
    for other in others:
        if other != value:
            with pytest.raises(ImportError, match=rf"lopt\._C has {re.escape(name)} = "):
                tables.check_tables({**compiled, name: other})
    with pytest.raises(ImportError, match="rebuild the extension"):
        tables.check_tables({**compiled, "more": 1})


def test_decays() -> None:
    assert FEATURE_SETS["paper"].mom_decays == FEATURE_SETS["paper"].rms_decays == (0.5, 0.9, 0.99, 0.999, 0.9999)
    assert FEATURE_SETS["compact"].mom_decays == (0.9, 0.99, 0.999)
    assert FEATURE_SETS["compact"].rms_decays == (0.95, 0.999)


def test_raw_columns_by_hand(features: FeatureSet) -> None:
    expected = by_hand(features.name)
    assert [column.name for column in features.columns] == list(expected)
    columns = reference.raw_columns(PRESETS[features.name], *one_parameter(features))
    torch.testing.assert_close(columns[:, 0], torch.tensor(list(expected.values()), dtype=F64), rtol=1e-12, atol=0)


def test_formulas_say_what_is_computed(features: FeatureSet) -> None:
    """The column ``formula`` of the table, evaluated as it is written."""
    names = {"grad": GRAD, "param": PARAM, "ln": math.log, "rsqrt": lambda x: 1 / math.sqrt(x)}
    names |= {f"mom{k}": value for k, value in enumerate(MOM)} | {f"rms{k}": value for k, value in enumerate(RMS)}
    for column in features.columns:
        value = eval(column.formula, by_hand(features.name) | names)
        assert value == pytest.approx(by_hand(features.name)[column.name], rel=1e-12), column.name


def test_moments_by_hand(features: FeatureSet) -> None:
    """Over two parameters, the second with every value twice as large: a square has mean 2.5, a second moment 1.5."""
    operands = [torch.cat([x, 2 * x], dim=-1) for x in one_parameter(features)]
    found = reference.moments(PRESETS[features.name], *operands)
    first, second = (
        reference.raw_columns(PRESETS[features.name], *(x[..., i : i + 1] for x in operands))[:, 0] for i in (0, 1)
    )
    if features.name == "paper":
        expected = [(float(a) ** 2 + float(b) ** 2) / 2 for a, b in zip(first, second, strict=True)]
    else:
        expected = [2.5 * x**2 for x in (PARAM, GRAD, *MOM[:3])] + [1.5 * RMS[1]]
    assert len(features.moments) == len(expected)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-12, atol=0)


def test_paper_column_map_divides_by_the_root_mean_square() -> None:
    features = FEATURE_SETS["paper"]
    moments = torch.arange(1.0, 24.0, dtype=F64)
    stats = torch.cat([torch.full((len(STATS),), math.nan, dtype=F64), moments])[None]
    decays = torch.tensor(features.mom_decays + features.rms_decays, dtype=F64)
    for updates in (1.0, 1000.0):  # no bias correction
        scale, shift = features.column_map(stats, torch.tensor([updates], dtype=F64), decays)
        assert scale[0].tolist() == pytest.approx([1 / math.sqrt(n + 1e-5) for n in range(1, 24)], rel=1e-12)
        assert shift[0].tolist() == [0.0] * 23


@pytest.mark.parametrize("updates", [1, 2, 10, 5000])
def test_compact_column_map_by_hand(updates: int) -> None:
    """Ratios get both bias corrections, values their tensor's root mean square, logarithms a shift."""
    features = FEATURE_SETS["compact"]
    squares = {
        "param_squared": 4.0,
        "grad_squared": 0.25,
        "mom0_squared": 0.01,
        "mom1_squared": 1e-6,
        "mom2_squared": 100.0,
        "rms1": 0.09,
    }
    moments = torch.tensor([squares[name] for name in features.moments], dtype=F64)
    stats = torch.cat([torch.full((len(STATS),), math.nan, dtype=F64), moments])[None]
    decays = torch.tensor(features.mom_decays + features.rms_decays, dtype=F64)
    scale, shift = features.column_map(stats, torch.tensor([float(updates)], dtype=F64), decays)
    mom = [1 / (1 - decay**updates) for decay in (0.9, 0.99, 0.999)]  # Adam's corrections
    quick, slow = (1 / (1 - decay**updates) for decay in (0.95, 0.999))
    expected = {
        "mom0_over_slow": (mom[0] / math.sqrt(slow), 0.0),
        "mom1_over_slow": (mom[1] / math.sqrt(slow), 0.0),
        "mom2_over_slow": (mom[2] / math.sqrt(slow), 0.0),
        "grad_over_slow": (1 / math.sqrt(slow), 0.0),
        "mom0_over_quick": (mom[0] / math.sqrt(quick), 0.0),
        "param": (1 / 2.0, 0.0),
        "grad": (1 / 0.5, 0.0),
        "mom0": (1 / 0.1, 0.0),
        "mom1": (1 / 1e-3, 0.0),
        "mom2": (1 / 10.0, 0.0),
        "log_slow": (1.0, -math.log(0.3)),
        "log_ratio": (1.0, 0.5 * math.log(quick) - 0.5 * math.log(slow)),
    }
    for i, column in enumerate(features.columns):
        found = float(scale[0, i]), float(shift[0, i])
        assert found == pytest.approx(expected[column.name], rel=1e-9, abs=1e-12), column.name


def test_column_map_has_a_row_per_tensor(features: FeatureSet) -> None:
    """Rows do not mix: tensors in another order give maps in that order, and each has its own number of updates."""
    generator = torch.Generator().manual_seed(0)
    stats = torch.rand(4, features.num_stats, generator=generator, dtype=F64)
    updates = torch.tensor([1.0, 3.0, 3.0, 70.0], dtype=F64)
    decays = torch.tensor(features.mom_decays + features.rms_decays, dtype=F64)
    together = features.column_map(stats, updates, decays)
    for t in range(4):
        alone = features.column_map(stats[t : t + 1], updates[t : t + 1], decays)
        for row, value in zip(together, alone, strict=True):
            torch.testing.assert_close(row[t], value[0], rtol=1e-14, atol=0)


def test_columns_of_a_tensor_of_zeros(features: FeatureSet) -> None:
    """Zero parameters with zero gradients, in float32: constants that are not zero are +-1 after the normaliser."""
    spec = PRESETS[features.name]
    zero = torch.zeros(3)
    mom, rms = torch.zeros(len(spec.mom_decays), 3), torch.zeros(len(spec.rms_decays), 3)
    _, _, _, stats = reference.accumulate(spec, zero, zero, mom, rms, torch.tensor(10.0))
    decays = torch.tensor(spec.mom_decays + spec.rms_decays)
    scale, shift = features.column_map(stats[None], torch.ones(1), decays)
    columns = reference.raw_columns(spec, zero, zero, mom, rms) * scale[0][:, None] + shift[0][:, None]
    expected = {"log_param": -1.0, "log_ratio": 0.5 * math.log(0.001 / 0.05)}
    expected |= {f"rsqrt_rms{k}": 1.0 for k in range(5)}
    for i, column in enumerate(features.columns):
        assert columns[i].tolist() == pytest.approx([expected.get(column.name, 0.0)] * 3, abs=1e-5), column.name


# ---- Adam -----------------------------------------------------------------------------------------------------------


def adam_directions(
    preset: str, decades: float, largest: float, clipped: bool, steps: int = 30
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised updates ``[steps, numel]`` of ``Theta.init_adam(preset)`` and of torch's Adam with the same gradients.

    Gradients are normal, with a scale per parameter over ``decades`` orders of magnitude below ``largest``. Parameters
    are put back after each step, so that only the direction counts. Adam's epsilon is as good as zero.

    Args:
        clipped: whether Adam is given the gradients as the optimizer's clipper leaves them.
    """
    generator = torch.Generator().manual_seed(1)
    numel = 2000
    scales = largest * 10 ** (decades * (torch.rand(numel, generator=generator, dtype=F64) - 1))
    start = torch.randn(numel, generator=generator, dtype=F64)
    theta = Theta.init_adam(preset).to(dtype=F64)
    state = reference.init_state(theta.spec, theta.tensors, [start])
    param = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([param], lr=1e-3, betas=(0.9, 0.999), eps=1e-30)
    updates = []
    for _ in range(steps):
        grad = scales * torch.randn(numel, generator=generator, dtype=F64)
        (new,), state, trace = reference.update(theta.spec, theta.tensors, state, [start], [grad])
        param.grad = trace["grad"][0] if clipped else grad
        adam.step()
        updates.append(torch.stack([new - start, param.detach() - start]))
        with torch.no_grad():
            param.copy_(start)
    ours, theirs = torch.nn.functional.normalize(torch.stack(updates), dim=2).unbind(1)
    return ours, theirs


@pytest.mark.parametrize(
    ("clipped", "bound"),
    [
        (True, 1e-6),  # measured 1.2e-7: decays are rounded to float32
        (False, 0.01),  # measured .0063: gradients above ten times their running root mean square are clipped
    ],
)
def test_init_adam_compact_has_adams_direction(clipped: bool, bound: float) -> None:
    """Relative L2 distance of the directions within the tensor, in each of 30 steps."""
    ours, theirs = adam_directions("compact", decades=4, largest=1.0, clipped=clipped)
    assert float((ours - theirs).norm(dim=1).max()) < bound


def test_init_adam_paper_is_near_adams_direction() -> None:
    """No column has the decays .9 and .999: with scales from .01 to 10 the cosine is .993 or more, in 30 steps."""
    ours, theirs = adam_directions("paper", decades=3, largest=10.0, clipped=False)
    assert float((ours * theirs).sum(dim=1).min()) > 0.99
