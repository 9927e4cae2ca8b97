"""theta: sizes, statistics of the initialisation, files, and the import of the author's weights."""

import dataclasses
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from lopt import Column, LearnedOptimizer, Theta, ThetaSpec
from lopt.rule import PRESETS, reference, tensor_lstm
from lopt.rule import theta as theta_module
from lopt.rule.imports import JAX_NAMES

Arrays = dict[str, np.ndarray]

PAPER_SHAPES = {
    "initial_from_lstm": (18,),
    "initial_from_mlp": (16,),
    "initial_h": (64,),
    "initial_c": (64,),
    "lstm.w": (116, 256),
    "lstm.b": (256,),
    "lstm_to_mlp.w": (64, 17),
    "lstm_to_mlp.b": (17,),
    "lstm_to_lstm.w": (64, 18),
    "lstm_to_lstm.b": (18,),
    "mlp.w1": (54, 32),
    "mlp.b1": (32,),
    "mlp.w2": (32, 32),
    "mlp.b2": (32,),
    "mlp.w3": (32, 18),
    "mlp.b3": (18,),
}

# ---- Sizes ----------------------------------------------------------------------------------------------------------


def test_paper_has_35799_floats() -> None:
    spec = PRESETS["paper"]
    assert spec.shapes() == PAPER_SHAPES
    assert spec.num_floats == 35_799
    assert Theta.init("paper").flatten().shape == (35_799,)
    assert sum(math.prod(PAPER_SHAPES[name]) for name in PAPER_SHAPES if name.startswith("mlp")) == 3_410
    assert (len(spec.constant_names), spec.num_constant, spec.num_lstm_input) == (14, 31, 52)


def test_paper_has_the_constants_of_the_specification() -> None:
    spec = PRESETS["paper"]
    assert (spec.step_multiplier, spec.magnitude_rate) == (1e-3, 1e-3)
    assert (spec.train_loss_decay, spec.valid_loss_decay) == (0.9, 0.95)
    assert (spec.clip_decay, spec.clip_multiplier) == (0.99, 10.0)
    assert (spec.linear_skip, spec.step_control, spec.horizon_input, spec.feature_clip) == (False, False, False, None)
    assert spec.valid_advances_step


@pytest.mark.parametrize("horizon", [True, False])
def test_compact_sizes_by_hand(horizon: bool) -> None:
    """12 columns, 2 facts, 4 LSTM values, and 6 or 1 time inputs reach the MLP; 4 + 4 + 13 and the time the LSTM."""
    time = 6 if horizon else 1
    spec = dataclasses.replace(PRESETS["compact"], horizon_input=horizon)
    expected = {
        "initial": 4 + 4 + 8 + 8,
        "lstm": (4 + 4 + 13 + time + 8) * 32 + 32,
        "lstm_to": (8 + 1) * 4 * 2,
        "mlp": (12 + time + 2 + 4 + 1) * 8 + (8 + 1) * 8 + (8 + 1) * 6,
        "skip": 12,
        "step": 8 + (4 + 4 + 13 + time) + 1,
    }
    assert spec.num_floats == sum(expected.values())
    assert Theta.init("compact").flatten().shape == (PRESETS["compact"].num_floats,)


def test_spectral_sizes_by_hand() -> None:
    """Four scalars and four facts more than compact for the LSTM, those facts for the MLP, and the gate."""
    spec = PRESETS["spectral"]
    expected = {
        "initial": 4 + 4 + 8 + 8,
        "lstm": (4 + 4 + 13 + 6 + 8 + 8) * 32 + 32,
        "lstm_to": (8 + 1) * 4 * 2,
        "mlp": (12 + 6 + 2 + 4 + 4 + 1) * 8 + (8 + 1) * 8 + (8 + 1) * 6,
        "skip": 12,
        "step": 8 + (4 + 4 + 13 + 6 + 8) + 1,
        "gate": 8 + (4 + 4 + 13 + 6 + 8) + 2,
    }
    assert spec.num_floats == sum(expected.values())
    assert (spec.newton_schulz, spec.tensor_inputs) == (3, "natural")
    assert dataclasses.replace(spec, newton_schulz=0, tensor_inputs="relative") == PRESETS["compact"]


def test_spectral_starts_with_gates_open_for_hidden_matrices() -> None:
    """And for those alone, whatever else the LSTM sees."""
    theta = Theta.init_adam("spectral")
    spec, weights = theta.spec, theta.tensors
    for name, gate in ((None, 1.0), ("is_input", 0.0), ("is_output", 0.0)):
        x = torch.randn(spec.lstm_width + spec.num_lstm_input, generator=torch.Generator().manual_seed(0))
        for place in ("is_input", "is_output"):
            x[spec.lstm_width + spec.lstm_index(place)] = float(place == name)
        assert float(torch.clamp(0.5 + x @ weights["gate.w"] + weights["gate.b"], 0, 1)) == gate
    assert int((weights["gate.w"] != 0).sum()) == 2


# ---- Initialisation -------------------------------------------------------------------------------------------------


def truncated_normal_moments(bound: float) -> tuple[float, float]:
    """Variance and kurtosis of a unit normal truncated at +-bound, in closed form."""
    density = math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
    mass = math.erf(bound / math.sqrt(2))
    second = 1 - 2 * bound * density / mass
    fourth = 3 * second - 2 * bound**3 * density / mass
    return second, fourth / second**2


@pytest.mark.parametrize("preset", PRESETS)
def test_init_statistics(preset: str) -> None:
    """Mean and standard deviation of every weight matrix within four standard errors of the closed form."""
    variance, kurtosis = truncated_normal_moments(2.0)
    assert math.sqrt(variance) == pytest.approx(0.87962566, abs=1e-8)
    for name, tensor in Theta.init(preset, seed=7).tensors.items():
        if name.startswith("initial_from"):
            sigma = math.sqrt(1 / len(tensor)) / math.sqrt(variance)
        elif tensor.dim() == 2:
            sigma = 1 / math.sqrt(tensor.shape[0])
        else:
            assert not tensor.any(), f"{name} starts at zero"
            continue
        count, std = tensor.numel(), sigma * math.sqrt(variance)
        values = tensor.double()
        assert abs(float(values.mean())) < 4 * std / math.sqrt(count), name
        spread = std * math.sqrt((kurtosis - 1) / (4 * count))
        assert abs(float(values.std(correction=0)) - std) < 4 * spread, name
        assert float(values.abs().max()) <= 2 * sigma * (1 + 1e-6), name


@pytest.mark.parametrize("create", [Theta.init, Theta.init_adam])
@pytest.mark.parametrize("preset", PRESETS)
def test_init_is_determined_by_the_seed(preset: str, create: Callable[..., Theta]) -> None:
    torch.manual_seed(0)
    first = create(preset, seed=1)
    torch.manual_seed(1)
    assert torch.equal(first.flatten(), create(preset, seed=1).flatten())
    assert not torch.equal(first.flatten(), create(preset, seed=2).flatten())
    assert first.provenance.items() >= {"method": create.__name__, "preset": preset, "seed": 1}.items()


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"preset: expected one of \['compact', .*, or of the rules .*, got 'large'"):
        Theta.init("large")


# ---- One vector -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_flatten_and_unflatten(preset: str) -> None:
    theta = Theta.init(preset, seed=3)
    flat = theta.flatten()
    again = theta.unflatten(flat)
    assert (again.spec, again.provenance) == (theta.spec, theta.provenance)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in theta.tensors.items())
    offset = 0
    for name, shape in theta.spec.shapes().items():  # the order of flatten() is the order of shapes()
        size = math.prod(shape)
        assert torch.equal(flat[offset : offset + size].reshape(shape), theta.tensors[name])
        offset += size
    assert offset == theta.num_floats == flat.numel()


@pytest.mark.parametrize("preset", PRESETS)
def test_unflatten_a_population(preset: str) -> None:
    """Leading dimensions are kept, and entries are views: a perturbation in place reaches the tensors."""
    spec = PRESETS[preset]
    flat = torch.randn(2, 3, spec.num_floats, generator=torch.Generator().manual_seed(0))
    tensors = theta_module.unflatten(spec, flat)
    for name, shape in spec.shapes().items():
        assert tensors[name].shape == (2, 3, *shape)
    for i in range(2):
        for j in range(3):
            alone = theta_module.unflatten(spec, flat[i, j])
            assert all(torch.equal(tensors[name][i, j], alone[name]) for name in alone)


def test_unflatten_of_another_length() -> None:
    theta = Theta.init("compact")
    with pytest.raises(ValueError, match=rf"flat: expected shape \({theta.num_floats},\), got \(7,\)"):
        theta.unflatten(torch.zeros(7))


def test_toward_is_linear() -> None:
    theta, other = Theta.init("compact", seed=1), Theta.init("compact", seed=2)
    between = theta.toward(other, 0.25)
    torch.testing.assert_close(between.flatten(), 0.75 * theta.flatten() + 0.25 * other.flatten())
    assert torch.equal(theta.toward(other, 0.0).flatten(), theta.flatten())
    assert torch.equal(theta.toward(other, 1.0).flatten(), other.flatten())
    assert between.spec == theta.spec
    with pytest.raises(ValueError, match="other: expected a theta of the same spec, got ThetaSpec"):
        theta.toward(Theta.init("paper"), 0.5)


def test_to_changes_the_dtype() -> None:
    theta = Theta.init("compact").to(dtype=torch.float64)
    assert {tensor.dtype for tensor in theta.tensors.values()} == {torch.float64}
    assert torch.equal(theta.flatten().float(), Theta.init("compact").flatten())


# ---- The spec -------------------------------------------------------------------------------------------------------


def test_with_spec_changes_constants() -> None:
    theta = Theta.init("paper", seed=1)
    changed = theta.with_spec(step_multiplier=0.01, clip_multiplier=3.0, feature_clip=5.0, mom_decays=(0.1,) * 5)
    assert (changed.spec.step_multiplier, changed.spec.clip_multiplier) == (0.01, 3.0)
    assert changed.spec.mom_decays == (0.1,) * 5
    assert dataclasses.replace(changed.spec, **dataclasses.asdict(theta.spec)) == theta.spec
    assert torch.equal(changed.flatten(), theta.flatten())


SHAPE_CHANGES = [
    ({"mlp_width": 16}, r"theta\['mlp.w1'\]: expected shape \(54, 16\), got \(54, 32\)"),
    ({"lstm_width": 8}, r"theta\['initial_h'\]: expected shape \(8,\), got \(64,\)"),
    ({"from_mlp": 4}, r"theta\['initial_from_mlp'\]: expected shape \(4,\), got \(16,\)"),
    ({"linear_skip": True}, r"missing tensors \['skip'\], unknown tensors \[\]"),
    ({"step_control": True}, r"missing tensors \['step.b', 'step.w'\]"),
]


@pytest.mark.parametrize(("change", "message"), SHAPE_CHANGES)
def test_with_spec_cannot_change_shapes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Theta.init("paper").with_spec(**change)


BAD_SPECS = [
    ({"feature_set": "large"}, r"feature_set: expected one of \['compact', 'paper'\], got 'large'"),
    ({"mom_decays": (0.9,)}, r"mom_decays: feature set 'compact' needs 3 decays in \(0, 1\), got \(0.9,\)"),
    ({"rms_decays": (0.9, 1.0)}, r"rms_decays: feature set 'compact' needs 2 decays in \(0, 1\), got \(0.9, 1.0\)"),
    ({"mlp_width": 0}, "mlp_width: expected a positive size, got 0"),
    ({"clip_decay": 1.0}, r"clip_decay: expected a value in \(0, 1\), got 1.0"),
    ({"step_multiplier": 0.0}, "step_multiplier: expected a positive number, got 0.0"),
    ({"clip_multiplier": math.inf}, "clip_multiplier: expected a positive number, got inf"),
    ({"magnitude_rate": math.nan}, "magnitude_rate: expected a finite number, got nan"),
    ({"feature_clip": -1.0}, "feature_clip: expected None or a positive bound, got -1.0"),
    ({"tensor_inputs": "all"}, r"tensor_inputs: expected one of \['natural', 'paper', 'relative'\], got 'all'"),
    ({"feature_set": "paper", "mom_decays": (0.9,) * 5, "rms_decays": (0.9,) * 5}, "'relative' is not available"),
    ({"newton_schulz": 3}, "newton_schulz: 3 iterations need tensor_inputs='natural' and step_control=True, got 'rel"),
    ({"newton_schulz": 1, "tensor_inputs": "natural", "step_control": False}, "step_control=True, got 'natural' and F"),
    ({"newton_schulz": -1}, "newton_schulz: expected 0 to 10 iterations, got -1"),
    ({"newton_schulz": 11, "tensor_inputs": "natural"}, "newton_schulz: expected 0 to 10 iterations, got 11"),
    ({"tensor_inputs": "paper"}, "horizon_input: only available with tensor_inputs='relative' or 'natural'"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SPECS)
def test_spec_names_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThetaSpec(**change)


def test_theta_checks_its_tensors() -> None:
    theta = Theta.init("compact")
    without = {name: tensor for name, tensor in theta.tensors.items() if name != "lstm.b"}
    with pytest.raises(ValueError, match=r"missing tensors \['lstm.b'\], unknown tensors \[\]"):
        Theta(theta.spec, without)
    with pytest.raises(ValueError, match=r"missing tensors \[\], unknown tensors \['bias'\]"):
        Theta(theta.spec, {**theta.tensors, "bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"theta\['lstm.b'\]: expected a floating dtype, got torch.int64"):
        Theta(theta.spec, {**theta.tensors, "lstm.b": torch.zeros(32, dtype=torch.int64)})


# ---- Carried to another spec -----------------------------------------------------------------------------------------

F64 = torch.float64


def random_theta(spec: ThetaSpec) -> Theta:
    generator = torch.Generator().manual_seed(9)
    tensors = {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[0] if shape else 1)
        for name, shape in spec.shapes().items()
    }
    return Theta(spec, tensors, {"run": "old"})


def with_stage(**changes: Any) -> ThetaSpec:
    return dataclasses.replace(PRESETS["spectral"], **changes)


def test_carried_is_the_same_map_of_the_old_inputs() -> None:
    """LSTM, step and MLP give the same whatever the new inputs are, as these are read by zeros."""
    old = random_theta(PRESETS["compact"])
    new = old.carried(PRESETS["spectral"])
    assert (new.spec, new.provenance) == (PRESETS["spectral"], {"run": "old"})
    generator = torch.Generator().manual_seed(0)
    h, c, to_mlp = (torch.randn(4, size, generator=generator, dtype=F64) for size in (8, 8, 4))
    shared = torch.randn(4, old.spec.from_lstm + old.spec.from_mlp, generator=generator, dtype=F64)
    columns = torch.randn(4, len(old.spec.features.columns), generator=generator, dtype=F64)
    values = {name: torch.randn(4, generator=generator, dtype=F64) for name in new.spec.lstm_names}
    assert set(old.spec.lstm_names) < set(new.spec.lstm_names)
    assert set(old.spec.constant_names) < set(new.spec.constant_names)
    results = []
    for theta in (old, new):
        spec, weights = theta.spec, theta.to(dtype=F64).tensors
        x = torch.cat([shared, torch.stack([values[name] for name in spec.lstm_names], dim=1)], dim=1)
        state = tensor_lstm.lstm_cell(x, h, c, weights["lstm.w"], weights["lstm.b"])
        step = torch.cat([state[0], x], dim=1) @ weights["step.w"] + weights["step.b"]
        constant = torch.stack([values[name] for name in spec.constant_names], dim=1)
        first = torch.cat([columns, constant, to_mlp], dim=1) @ weights["mlp.w1"] + weights["mlp.b1"]
        results.append((*state, step, first))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    for name in set(old.tensors) - {"lstm.w", "step.w", "mlp.w1"}:
        assert torch.equal(new.tensors[name], old.tensors[name]), name
    for name in ("gate.w", "gate.b", "gate.step"):
        assert not new.tensors[name].any(), name


def test_carried_takes_the_same_steps() -> None:
    """A first step of tensors whose root mean squares are their natural sizes; other sizes are another optimizer."""
    old = random_theta(PRESETS["compact"]).with_spec(step_multiplier=0.05)
    spec = with_stage(step_multiplier=0.05)
    shut = old.carried(spec)
    shut.tensors["gate.b"].fill_(-0.5)
    generator = torch.Generator().manual_seed(3)
    params, grads = [], []
    for shape in ((6, 9), (6,), (7, 9)):
        values = torch.randn(shape, generator=generator, dtype=F64)
        params.append(values / values.square().mean().sqrt() / 3)
        grads.append(torch.randn(shape, generator=generator, dtype=F64))
    results = []
    for theta in (old, shut, old.carried(dataclasses.replace(spec, newton_schulz=0)), old.carried(spec)):
        weights = theta.to(dtype=F64).tensors
        state = reference.init_state(theta.spec, weights, params)
        loss = torch.tensor(1.5, dtype=F64)
        results.append(reference.update(theta.spec, weights, state, params, grads, loss, total_steps=50.0).params)
    assert float((results[0][0] - params[0]).abs().max()) > 1e-3
    for found in results[1:3]:
        for ours, expected in zip(found, results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)
    assert torch.equal(results[3][1], results[2][1])
    assert float((results[3][0] - results[0][0]).abs().max()) > 1e-4  # a gate of zeros is half open


def test_carried_to_a_table_with_another_column() -> None:
    """Weights of the MLP and skip are those of the same columns, wherever these stand; steps are the same."""
    old = random_theta(PRESETS["compact"])
    table = old.spec.features
    columns = (table.columns[0], Column("sign", "grad / (abs(grad) + 1e-12)"), *table.columns[1:])
    name = dataclasses.replace(table, name="compact_and_sign", columns=columns).register()
    new = old.carried(dataclasses.replace(old.spec, feature_set=name))
    for tensor in ("skip", "mlp.w1"):
        assert not new.tensors[tensor][1].any()
        assert torch.equal(torch.cat([new.tensors[tensor][:1], new.tensors[tensor][2:]]), old.tensors[tensor])
    assert torch.equal(new.carried(old.spec).flatten(), old.flatten())
    ends = []
    for theta in (old, new):
        param = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 12, dtype=F64).reshape(3, 4))
        optimizer = LearnedOptimizer([param], theta, impl="reference")
        for _ in range(3):
            param.grad = param.detach() ** 3
            optimizer.step()
        ends.append(param.detach())
    assert (ends[0] - torch.linspace(-1.0, 1.0, 12, dtype=F64).reshape(3, 4)).abs().max() > 1e-3
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-12)


def test_carried_to_the_own_spec_and_back() -> None:
    old = random_theta(PRESETS["compact"])
    assert torch.equal(old.carried(old.spec).flatten(), old.flatten())
    assert torch.equal(old.carried(PRESETS["spectral"]).carried(old.spec).flatten(), old.flatten())


CARRIED_SIZES: list[tuple[dict[str, Any], str]] = [
    ({"mlp_width": 16}, r"spec: mlp.w1 has shape \(28, 16\), in this theta \(24, 8\)"),
    ({"lstm_width": 9}, r"spec: initial_h has shape \(9,\), in this theta \(8,\)"),
    ({"from_mlp": 3}, r"spec: initial_from_mlp has shape \(3,\)"),
    ({"from_lstm": 5}, r"spec: initial_from_lstm has shape \(5,\)"),
    ({"lstm_to_mlp": 2}, r"spec: lstm_to_mlp.w has shape \(8, 2\)"),
]


@pytest.mark.parametrize(("change", "message"), CARRIED_SIZES)
def test_carried_needs_the_same_sizes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_theta(PRESETS["compact"]).carried(with_stage(**change))


# ---- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_save_and_load(preset: str, tmp_path: Path) -> None:
    """Bits, spec and provenance; one file, nothing left beside it."""
    theta = Theta.init_adam(preset, seed=5).with_spec(step_multiplier=0.0123456789)
    theta = Theta(theta.spec, theta.tensors, {"run": "a", "iterations": 7, "tasks": ["x", "y"], "loss": 0.1})
    path = tmp_path / "theta.safetensors"
    theta.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["theta.safetensors"]
    again = Theta.load(path)
    assert again.spec == theta.spec
    assert again.provenance == theta.provenance
    assert list(again.tensors) == list(theta.spec.shapes())
    assert torch.equal(again.flatten(), theta.flatten())
    assert Theta.load(str(path)).spec == theta.spec


def test_save_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "theta.safetensors"
    Theta.init("compact", seed=1).save(path)
    second = Theta.init("paper", seed=2)
    second.save(path)
    assert torch.equal(Theta.load(path).flatten(), second.flatten())


def test_saved_as_float32(tmp_path: Path) -> None:
    theta = Theta.init("compact", seed=1)
    theta.to(dtype=torch.float64).save(tmp_path / "theta.safetensors")
    again = Theta.load(tmp_path / "theta.safetensors")
    assert {tensor.dtype for tensor in again.tensors.values()} == {torch.float32}
    assert torch.equal(again.flatten(), theta.flatten())


def test_shipped_weights_load_by_name() -> None:
    for name in theta_module.shipped():
        theta = Theta.load(name)
        assert theta.provenance
        assert bool(theta.flatten().isfinite().all())


def write(path: Path, header: Any, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A safetensors file with the tensors of ``compact`` and this as its lopt metadata."""
    tensors = Theta.init("compact").tensors if tensors is None else tensors
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, path, {"lopt": header if isinstance(header, str) else json.dumps(header)})
    return path


def header_of(**changes: Any) -> dict[str, Any]:
    spec = {**PRESETS["compact"].to_json(), **changes}
    return {"format": theta_module.FORMAT, "spec": spec, "provenance": {}}


def test_load_of_a_missing_file_names_the_shipped_weights(tmp_path: Path) -> None:
    shipped = re.escape(str(theta_module.shipped()))  # ['default']
    for source in (tmp_path / "absent.safetensors", "no-such-name", tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"theta: no file .*shipped name: {shipped}"):
            Theta.load(source)


@pytest.mark.parametrize("kept", [0, 4, 100, 2000, -1])
def test_load_of_a_truncated_file(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "theta.safetensors"
    Theta.init("compact").save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"is not a readable safetensors file .*; it may be truncated"):
        Theta.load(path)


def test_load_of_random_bytes(tmp_path: Path) -> None:
    path = tmp_path / "theta.safetensors"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        Theta.load(path)


class Bomb:
    """Unpickling it is an error."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_load_never_unpickles(tmp_path: Path, protocol: str) -> None:
    path = tmp_path / "theta.safetensors"
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"weights": torch.zeros(3), "bomb": Bomb()}, path)
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        Theta.load(path)


WRONG_HEADERS = [
    ("not json", "has no lopt metadata; it was not written by Theta.save"),
    ([1, 2], "has no lopt metadata"),
    ({"format": theta_module.FORMAT}, "has no lopt metadata"),
    ({**header_of(), "format": 99}, r"has format 99, this version of lopt reads \(2, 3\); install the version of lopt"),
    ({**header_of(), "spec": [1]}, r"spec: unknown fields \[1\], missing fields"),
    (header_of(colour="red"), r"spec: unknown fields \['colour'\], missing fields \[\]"),
    (header_of(mlp_width=16), r"theta\['mlp.w1'\]: expected shape \(24, 16\), got \(24, 8\)"),
    (header_of(linear_skip=False), r"unknown tensors \['skip'\] for this spec"),
]


def test_saved_files_say_format_3(tmp_path: Path) -> None:
    """An older version reads 2 and says so of this one; whatever the spec has, so that there is one format."""
    for preset in PRESETS:
        path = tmp_path / f"{preset}.safetensors"
        Theta.init(preset).save(path)
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["lopt"])
        assert header["format"] == 3
        assert header["spec"]["newton_schulz"] == (3 if preset == "spectral" else 0)


@pytest.mark.parametrize("preset", ["compact", "paper"])
def test_files_of_format_2_load(preset: str, tmp_path: Path) -> None:
    """They know no ``newton_schulz``, and may know no ``stats``: there was no direction stage."""
    theta = Theta.init_adam(preset, seed=4)
    for later in (["newton_schulz"], ["newton_schulz", "stats"]):
        spec = {name: value for name, value in theta.spec.to_json().items() if name not in later}
        header = {"format": 2, "spec": spec, "provenance": {"run": "old"}}
        again = Theta.load(write(tmp_path / "old.safetensors", header, theta.tensors))
        assert again.spec == theta.spec
        assert again.spec.newton_schulz == 0
        assert again.provenance == {"run": "old"}
        assert torch.equal(again.flatten(), theta.flatten())


@pytest.mark.parametrize("version", [1, 4, "3", None, [3]])
def test_other_formats_are_refused(version: Any, tmp_path: Path) -> None:
    header = {**header_of(), "format": version}
    message = rf"has format {re.escape(str(version))}, this version of lopt reads \(2, 3\); install the version of lopt"
    with pytest.raises(ValueError, match=message):
        Theta.load(write(tmp_path / "theta.safetensors", header))


@pytest.mark.parametrize(("header", "message"), WRONG_HEADERS)
def test_load_of_a_wrong_header(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Theta.load(write(tmp_path / "theta.safetensors", header))


def test_load_of_a_header_without_a_field(tmp_path: Path) -> None:
    header = header_of()
    del header["spec"]["lstm_width"]
    with pytest.raises(ValueError, match=r"spec: unknown fields \[\], missing fields \['lstm_width'\]"):
        Theta.load(write(tmp_path / "theta.safetensors", header))


def test_load_of_a_foreign_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "theta.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="has no lopt metadata; it was not written by"):
        Theta.load(path)


def test_load_of_other_tensors(tmp_path: Path) -> None:
    tensors = Theta.init("compact").tensors
    wrong = {**tensors, "mlp.b1": torch.zeros(9)}
    with pytest.raises(ValueError, match=r"theta\['mlp.b1'\]: expected shape \(8,\), got \(9,\)"):
        Theta.load(write(tmp_path / "shape.safetensors", header_of(), wrong))
    renamed = {("mlp.b9" if name == "mlp.b1" else name): tensor for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"missing tensors \['mlp.b1'\], unknown tensors \['mlp.b9'\]"):
        Theta.load(write(tmp_path / "name.safetensors", header_of(), renamed))


# ---- Weights of the author's port -----------------------------------------------------------------------------------


@pytest.fixture
def port(golden: Callable[[str], Arrays]) -> Arrays:
    """Weights of the port by their key names, prefix ``theta|`` included."""
    return {key: value for key, value in golden("rnn_mlp_lopt_default").items() if key.startswith("theta|")}


def nested(flat: Arrays) -> dict[str, Any]:
    """``a|b|c`` keys as mappings of mappings, without the prefix."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.removeprefix("theta|").split("|")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def flax_bytes(tree: Any, code: int = 1) -> bytes:
    """What flax.serialization.to_bytes writes: arrays as extension 1, (shape, dtype name, bytes) in msgpack."""

    def pack(value: Any) -> msgpack.ExtType:
        return msgpack.ExtType(code, msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True))

    packed: bytes = msgpack.packb(tree, default=pack, use_bin_type=True)
    return packed


def check_imported(theta: Theta, port: Arrays) -> None:
    assert theta.spec == PRESETS["paper"]
    assert theta.spec.valid_advances_step
    assert theta.provenance == {"method": "import_jax"}
    w, b = "rnn_params|rnn/linear|w", "ffmod_params|mlp/~/linear_2|b"
    np.testing.assert_array_equal(theta.tensors["lstm.w"].numpy(), port[f"theta|{w}"])
    np.testing.assert_array_equal(theta.tensors["mlp.b3"].numpy(), port[f"theta|{b}"])
    np.testing.assert_array_equal(theta.tensors["initial_c"].numpy(), port["theta|lstm_init_state|cell"][0])
    expected = {key: port[f"theta|{key}"].reshape(-1) for key in JAX_NAMES.values()}
    np.testing.assert_array_equal(theta.flatten().numpy(), np.concatenate(list(expected.values())))


def test_import_jax(port: Arrays, tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", **port)
    (tmp_path / "theta.state").write_bytes(flax_bytes(nested(port)))
    without_prefix = {key.removeprefix("theta|"): value for key, value in port.items()}
    for source in (port, without_prefix, nested(port), {"theta": nested(port)}):
        check_imported(Theta.import_jax(source), port)
    for path in (tmp_path / "weights.npz", tmp_path / "theta.state", str(tmp_path / "theta.state")):
        check_imported(Theta.import_jax(path), port)


def test_import_jax_of_a_whole_golden_file(port: Arrays, golden: Callable[[str], Arrays]) -> None:
    """Other keys beside the weights do not matter."""
    check_imported(Theta.import_jax(golden("rnn_mlp_lopt_default")), port)


def test_import_jax_copies(port: Arrays) -> None:
    theta = Theta.import_jax(port)
    theta.tensors["mlp.b3"].add_(1.0)
    check_imported(Theta.import_jax(port), port)


def test_import_jax_of_other_arrays(port: Arrays) -> None:
    key = "theta|ffmod_params|mlp/~/linear_0|w"
    without = {name: value for name, value in port.items() if name != key}
    with pytest.raises(ValueError, match=r"import_jax: no array 'ffmod_params\|mlp/~/linear_0\|w'; found 15 arrays"):
        Theta.import_jax(without)
    for shape in ((54, 16), (32, 54), (54 * 32,)):
        wrong = {**port, key: np.zeros(shape, np.float32)}
        with pytest.raises(ValueError, match=rf"linear_0\|w' has shape {re.escape(str(shape))}, expected \(54, 32\)"):
            Theta.import_jax(wrong)


BAD_STATES = [
    (lambda port: b"", "is not a readable flax theta.state file"),
    (lambda port: flax_bytes(nested(port))[:-100], "is not a readable flax theta.state file"),
    (lambda port: np.random.default_rng(0).bytes(3000), "import_jax: .*theta.state"),
    (lambda port: pickle.dumps(Bomb()), "import_jax: .*theta.state"),
    (lambda port: flax_bytes([1, 2]), "holds a list, expected a mapping of arrays"),
    (lambda port: flax_bytes(nested(port), code=3), "holds a flax value of type 3, only arrays are expected"),
    (lambda port: flax_bytes({"a": 1}), "import_jax: no array 'initial_from_lstm'"),
]


@pytest.mark.parametrize(("content", "message"), BAD_STATES)
def test_import_jax_of_a_bad_file(
    port: Arrays, tmp_path: Path, content: Callable[[Arrays], bytes], message: str
) -> None:
    path = tmp_path / "theta.state"
    path.write_bytes(content(port))
    with pytest.raises(ValueError, match=message):
        Theta.import_jax(path)


def test_import_jax_of_a_missing_or_pickled_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Theta.import_jax(tmp_path / "absent.npz")
    np.savez(tmp_path / "objects.npz", initial_from_lstm=np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        Theta.import_jax(tmp_path / "objects.npz")


def test_a_spec_value_of_the_wrong_type_is_a_value_error(tmp_path):
    path = tmp_path / "theta.safetensors"
    theta = Theta.init("compact")
    header = {"format": theta_module.FORMAT, "spec": {**theta.spec.to_json(), "mlp_width": "8"}, "provenance": {}}
    safetensors.torch.save_file(theta.tensors, path, {"lopt": json.dumps(header)})
    with pytest.raises(ValueError, match="wrong type"):
        Theta.load(path)


def test_a_corrupt_npz_is_named(tmp_path):
    path = tmp_path / "theta.npz"
    path.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match=r"theta\.npz: not a readable \.npz file"):
        Theta.import_jax(path)
