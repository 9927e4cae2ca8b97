"""Feature sets that are not compiled in: their table and formulas, the reference by them, and files that carry them."""

import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lopt import PRESETS, Column, FeatureSet, Theta, ThetaSpec
from lopt.rule import features as tables
from lopt.rule import formulas, reference
from lopt.rule.features import FEATURE_SETS, STATS

F64 = torch.float64

#: Every operator and function; one momentum, two second moments, none of which has a mean that is a moment.
OWN = FeatureSet(
    "own_of_tests",
    columns=(
        Column("adam", "mom0 * rsqrt(rms1 + 1e-24)", debias=(("mom0", 1.0), ("rms1", -0.5))),
        Column("share", "grad / (abs(grad) + abs(mom0) + 1e-12)"),
        Column("bell", "exp(-(adam * adam))"),
        Column("param", "param", moment="param_squared"),
        Column("bounded", "max(min(4 * mom0, 0.5), -share)"),
        Column("adam_power", "rsqrt(rms0 * rms0 + 1e-6)", moment="adam_power_squared", debias=(("rms0", 1.5),)),
        Column("log_quick", "ln(rms0 + 1e-24) / 2", moment="param_squared", log=True),
        Column("log_ratio", "log_quick - ln(rms1 + 1e-24) / 2", debias=(("rms0", 0.5), ("rms1", -0.25)), log=True),
    ),
    mom_decays=(0.9,),
    rms_decays=(0.95, 0.999),
)
#: ``compact`` under another name: the same optimizer, by its formulas.
TWIN = dataclasses.replace(FEATURE_SETS["compact"], name="twin_of_compact")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """No set stays registered."""
    monkeypatch.setattr(tables, "_REGISTERED", {})


def spec_of(width: int = 8) -> ThetaSpec:
    return ThetaSpec(OWN.register(), mlp_width=width, tensor_inputs="paper", horizon_input=False)


def test_columns_by_hand() -> None:
    """On one parameter, in plain Python."""
    grad, param, mom, quick, slow = -0.25, 0.5, 0.1, 0.04, 0.09
    share, adam = grad / (0.25 + 0.1 + 1e-12), mom / math.sqrt(slow)
    log_quick = math.log(quick) / 2
    expected = [adam, share, math.exp(-(adam**2)), param, max(min(0.4, 0.5), -share)]
    expected += [1 / math.sqrt(quick**2 + 1e-6), log_quick, log_quick - math.log(slow) / 2]
    operands = [torch.tensor([x], dtype=F64) for x in (grad, param)]
    operands += [torch.tensor([[mom]], dtype=F64), torch.tensor([[quick], [slow]], dtype=F64)]
    found = reference.raw_columns(spec_of(), *operands)
    torch.testing.assert_close(found[:, 0], torch.tensor(expected, dtype=F64), rtol=1e-12, atol=0)
    assert OWN.moments == ("param_squared", "adam_power_squared")
    moments = reference.moments(spec_of(), *operands)
    torch.testing.assert_close(moments, torch.tensor([0.25, expected[5] ** 2], dtype=F64), rtol=1e-12, atol=0)
    stats = torch.cat([torch.full((len(STATS),), math.nan, dtype=F64), torch.tensor([4.0, 9.0], dtype=F64)])[None]
    decays = torch.tensor([0.9, 0.95, 0.999], dtype=F64)
    scale, shift = OWN.column_map(stats, torch.tensor([3.0], dtype=F64), decays)
    first, second, third = (1 / (1 - decay**3) for decay in (0.9, 0.95, 0.999))
    assert scale[0].tolist() == pytest.approx([first / third**0.5, 1, 1, 1 / 2, 1, second**1.5 / 3, 1, 1], rel=1e-9)
    logs = [-math.log(4.0) / 2, math.log(second) / 2 - math.log(third) / 4]
    assert shift[0].tolist() == pytest.approx([0.0] * 6 + logs, rel=1e-9)


def test_formulas_of_compact_are_compact() -> None:
    """Three steps of the reference in float64, by formulas and as it is written for the set that is compiled in."""
    theta = Theta.init_adam("compact").to(dtype=F64)
    twin = Theta(dataclasses.replace(theta.spec, feature_set=TWIN.register()), theta.tensors)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=F64) for shape in ((5, 4), (7,))]
    params = [start, start]
    states = [reference.init_state(one.spec, one.tensors, start) for one in (theta, twin)]
    for _ in range(3):
        grads = [torch.randn(param.shape, generator=generator, dtype=F64) for param in start]
        for i, one in enumerate((theta, twin)):
            params[i], states[i], _ = reference.update(one.spec, one.tensors, states[i], params[i], grads)
    for ours, theirs, first in zip(*params, start, strict=True):
        assert not torch.equal(ours, first)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "Own"}, "name: expected a lower-case identifier, got 'Own'"),
    ({"mom_decays": ()}, r"mom_decays: expected 1 to 8 decays in \(0, 1\), got \(\)"),
    ({"rms_decays": (0.9,) * 9}, "rms_decays: expected 1 to 8 decays"),
    ({"rms_decays": (1.0,)}, r"rms_decays: expected 1 to 8 decays in \(0, 1\), got \(1.0,\)"),
    ({"epsilon": 0.0}, "epsilon: expected a positive float32 number, got 0.0"),
    ({"columns": ()}, "columns: expected at least one"),
    (
        {"moments": ("mom0",)},
        r"moment 'mom0': expected X_squared, where X is an input or a column \(grad, param",
    ),
    ({"moments": ("rms5",)}, "moment 'rms5': expected X_squared"),
    (
        {"mom_decays": (0.5, 0.9), "moments": ("mom1_squared", "mom0_squared")},
        "moments: expected .'mom0_squared', 'mom1_squared'. side by side in this order",
    ),
]
WRONG_COLUMNS = [
    (
        Column("x", "mom7"),
        "column 'x': formula: 'mom7' is not known; a formula has .*, grad, param, mom0, rms0, ln",
    ),
    (Column("x", "grad +"), "column 'x': formula: expected an expression, got 'grad .'"),
    (Column("x", "grad ** 2"), "'grad \\*\\* 2' is not known"),
    (Column("x", "__import__('os')"), "is not known"),
    (Column("x", "max(grad)"), r"'max\(grad\)' is not known"),
    (
        Column("x", "ln(rms0)"),
        r"ln\(rms0\): expected an argument that is never below 1.2e-38, such as ln\(abs",
    ),
    (Column("x", "rsqrt(param + 1e-8)"), "expected an argument that is never below"),
    (Column("x", "ln((rms0 + 1e-24) / (rms0 + 1e-8))"), "expected an argument that is never below"),
    (Column("x", "grad / 0"), "a division by zero"),
    (Column("x", "grad * 1e-50"), "1e-50: expected a normal float32 number"),
    (Column("x", "2 + 3"), "expected something about the parameter, got '2 . 3'"),
    (Column("X", "grad"), "column 'X': expected another lower-case identifier for each column"),
    (Column("param", "2 * param"), "column 'param': is the name of an input, and the formula is another"),
    (Column("x", "grad", moment="y_squared"), "moment 'y_squared': expected X_squared"),
    (Column("x", "grad", debias=(("mom3", 1.0),)), "column 'x': debias: expected an accumulator of .*'mom0', 'rms0'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_table_names_what_is_wrong(change: dict[str, Any], message: str) -> None:
    good = {"name": "own", "columns": (Column("x", "grad"),), "mom_decays": (0.9,), "rms_decays": (0.9,)}
    FeatureSet(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        FeatureSet(**{**good, **change})


@pytest.mark.parametrize(("column", "message"), WRONG_COLUMNS)
def test_a_column_names_what_is_wrong(column: Column, message: str) -> None:
    with pytest.raises(ValueError, match=f"feature set 'own': .*{message}"):
        FeatureSet("own", (column,), (0.9,), (0.9,))


def test_names_are_of_one_table() -> None:
    assert OWN.register() == OWN.register() == OWN.name
    with pytest.raises(ValueError, match="feature set 'own_of_tests': another one has this name"):
        dataclasses.replace(OWN, epsilon=1e-8).register()
    with pytest.raises(ValueError, match="feature set 'compact': another one has this name"):
        dataclasses.replace(OWN, name="compact").register()
    with pytest.raises(ValueError, match="feature set 'own_of_tests': no column is called 'mom0_over_slow', but "):
        OWN.column_index("mom0_over_slow")


def test_inputs_that_need_other_accumulators() -> None:
    with pytest.raises(ValueError, match=r"tensor_inputs: 'relative' is not available .* 'own_of_tests'.* use tens"):
        ThetaSpec(OWN.register())
    assert ThetaSpec(TWIN.register()).preset == "twin_of_compact"


def test_a_theta_carries_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a process that has not seen the set: by a file, and by pickle."""
    theta = Theta.init(spec_of(), seed=3)
    assert theta.provenance["preset"] == OWN.name
    theta.save(tmp_path / "own.safetensors")
    pickled = pickle.dumps(theta.spec)
    for read in (lambda: Theta.load(tmp_path / "own.safetensors").spec, lambda: pickle.loads(pickled)):
        monkeypatch.setattr(tables, "_REGISTERED", {})
        with pytest.raises(ValueError, match=r"feature_set: expected one of .*'compact', 'paper'.*, got 'own_of_te"):
            ThetaSpec(OWN.name)
        spec = read()
        assert spec == theta.spec
        assert spec.features == OWN
    assert torch.equal(Theta.load(tmp_path / "own.safetensors").flatten(), theta.flatten())
    monkeypatch.setattr(tables, "_REGISTERED", {OWN.name: dataclasses.replace(OWN, epsilon=1e-8)})
    with pytest.raises(ValueError, match="another one has this name"):
        Theta.load(tmp_path / "own.safetensors")
    usual = {"mlp_layers"}  # two, which files do not say
    assert set(PRESETS["paper"].to_json()) == {field.name for field in dataclasses.fields(ThetaSpec)} - usual


def test_least_values() -> None:
    """What ``ln`` and ``rsqrt`` accept: bounds that hold for all inputs."""
    names: dict[str, formulas.Node] = {name: ("input", name) for name in ("grad", "mom0", "rms0")}
    for formula in (
        "abs(grad) + 1",
        "grad * grad + 1",
        "max(mom0, 1)",
        "(rms0 + 1) * (abs(grad) + 1)",
        "(rms0 + 2) / 2",
    ):
        assert formulas._least(formulas.parse(formula, names)) == 1.0, formula
    for formula in ("grad + 1", "1 - rms0", "min(mom0, 1)", "grad * mom0 + 1", "-rms0", "rms0 / grad + 1"):
        assert formulas._least(formulas.parse(formula, names)) == -math.inf, formula
