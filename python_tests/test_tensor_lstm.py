"""Tensor level: losses, clipper, time, statistics, LSTM and scales, against torch, recorded values and plain Python.

golden/tensor_level.npz was recorded from the author's JAX port (float32): ``loss|losses`` a sequence of losses and, for
the decays .9 and .95, ``loss0.9|mean``, ``var``, ``corrected`` (mean) and ``weight`` (standardised loss) after each;
``sinusoids`` [steps, 11] at ``sinusoid_steps``.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lopt import Theta
from lopt.rule import PRESETS, ThetaSpec, inputs, losses, tensor_lstm
from lopt.rule.constants import WARMUP
from lopt.rule.features import STATS
from lopt.rule.inputs import Shapes
from lopt.rule.losses import LossState
from lopt.rule.matrices import Kind
from lopt.rule.tensor_lstm import Globals, Rows

Arrays = dict[str, np.ndarray]

F64 = torch.float64
PAPER, COMPACT = PRESETS["paper"], PRESETS["compact"]
SHAPES = ((), (4,), (3, 5), (2, 3, 2, 2), (1, 2, 2, 1, 3))


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def scalar(value: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def random_theta(preset: str) -> Theta:
    """Random in every tensor."""
    theta = Theta.init(preset, seed=1).to(dtype=F64)
    generator = torch.Generator().manual_seed(2)
    return theta.unflatten(theta.flatten() + 0.2 * torch.randn(theta.num_floats, generator=generator, dtype=F64))


def random_stats(spec: ThetaSpec, count: int, generator: torch.Generator) -> Tensor:
    """``[T, S]``: positive, except for the means."""
    stats = torch.rand(count, spec.features.num_stats, generator=generator, dtype=F64)
    for name in ("param_mean", "mom_mean"):
        stats[:, STATS.index(name)] -= 0.5
    return stats


def fresh(preset: str) -> tuple[ThetaSpec, Globals]:
    theta = Theta.init(preset).to(dtype=F64)
    return theta.spec, tensor_lstm.init_globals(theta.spec, theta.tensors)


def values_of(
    spec: ThetaSpec,
    globals_: Globals,
    rows: Rows | None = None,
    stats: Tensor | None = None,
    shapes: Shapes | None = None,
    total_steps: Tensor | float = 0.0,
) -> dict[str, Tensor]:
    """Inputs at tensor level by name; of one tensor of ones where nothing else is given."""
    like = globals_.from_lstm
    if stats is None:
        stats = like.new_ones(1, spec.features.num_stats)
    if shapes is None:
        shapes = Shapes.of(spec, [(1,)] * len(stats), like)
    if rows is None:
        empty = like.new_empty(len(stats), 0)
        ones = like.new_ones(len(stats))
        rows = Rows(empty, empty, empty, scale=ones, updates=ones, rank=ones)
    total = torch.as_tensor(total_steps, dtype=like.dtype)
    mean, _ = tensor_lstm.mean_grad_square(spec, stats[:, STATS.index("grad_square")], tensor_lstm.rests(stats))
    return spec.inputs.values(spec, tensor_lstm.seen(spec, globals_, rows, stats, shapes, total, mean))


def named(values: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """``[T, len(names)]``."""
    return inputs.stack(values, names, max(value.numel() for value in values.values()))


def loss_inputs(spec: ThetaSpec, globals_: Globals) -> list[Tensor]:
    """Those the set has, training and validation loss first."""
    names = [name for name in spec.inputs.scalars if name.endswith(("_loss", "_rise"))]
    values = values_of(spec, globals_)
    return [values[name] for name in names]


def time_inputs(spec: ThetaSpec, step: Tensor, total_steps: Tensor, like: Tensor) -> Tensor:
    """``[num_time]``."""
    globals_ = tensor_lstm.init_globals(spec, Theta(spec, zeros(spec)).to(dtype=like.dtype).tensors)
    values = values_of(spec, globals_._replace(step=step), total_steps=total_steps)
    return torch.stack([values[name] for name in spec.inputs.time_names(spec.horizon_input)])


def zeros(spec: ThetaSpec) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in spec.shapes().items()}


# ---- LSTM -----------------------------------------------------------------------------------------------------------


def test_lstm_cell_is_torchs() -> None:
    """Gates i g f o here, i f g o in torch; 1 is added to the forget gate here."""
    inputs, hidden, rows = 7, 5, 4
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    w, b, x, h, c = (
        normal(inputs + hidden, 4 * hidden),
        normal(4 * hidden),
        normal(rows, inputs),
        *normal(2, rows, hidden),
    )
    i, g, f, o = w.chunk(4, dim=1)
    bias_i, bias_g, bias_f, bias_o = b.chunk(4)
    cell = torch.nn.LSTMCell(inputs, hidden, dtype=F64)
    ordered = torch.cat([i, f, g, o], dim=1).T
    with torch.no_grad():
        cell.weight_ih.copy_(ordered[:, :inputs])
        cell.weight_hh.copy_(ordered[:, inputs:])
        cell.bias_ih.copy_(torch.cat([bias_i, bias_f + 1.0, bias_g, bias_o]))
        cell.bias_hh.zero_()
        expected = cell(x, (h, c))
    found = tensor_lstm.lstm_cell(x, h, c, w, b)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("preset", PRESETS)
def test_advance_treats_all_tensors_alike(preset: str) -> None:
    """Tensors in another order give rows in that order, and the same global state."""
    theta, generator = random_theta(preset), torch.Generator().manual_seed(3)
    order, count = [3, 0, 4, 2, 1], len(SHAPES)
    kinds = [Kind(), Kind(), Kind("input"), Kind("hidden"), Kind("output")]  # where unknown, told by the order
    results = []
    stats = [random_stats(theta.spec, count, generator) for _ in range(3)]
    for index in (list(range(count)), order):
        globals_ = tensor_lstm.init_globals(theta.spec, theta.tensors)
        rows = tensor_lstm.init_rows(theta.spec, theta.tensors, count)
        shapes = Shapes.of(theta.spec, [SHAPES[i] for i in index], stats[0], [kinds[i] for i in index])
        for step in range(3):
            row = stats[step][index]
            globals_, rows, conditioning, x = tensor_lstm.advance(
                theta.spec, theta.tensors, globals_, rows, row, shapes, scalar(2.0 - step), scalar(10.0)
            )
            rows = rows._replace(feedback=row[:, : theta.spec.from_mlp])
        results.append((globals_, rows, conditioning, x))
    (globals_, rows, conditioning, x), other = results
    torch.testing.assert_close(other[0], globals_, rtol=0, atol=1e-12)
    for found, expected in zip((*other[1], *other[2], other[3]), (*rows, *conditioning, x), strict=True):
        torch.testing.assert_close(found, expected[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("preset", ["compact", "spectral"])
def test_advance_by_hand(preset: str) -> None:
    """What ``advance`` sends on is the documented function of its parts."""
    theta, generator = random_theta(preset), torch.Generator().manual_seed(4)
    spec, weights, count = theta.spec, theta.tensors, len(SHAPES)
    globals_, rows = tensor_lstm.init_globals(spec, weights), tensor_lstm.init_rows(spec, weights, count)
    stats = random_stats(spec, count, generator)
    shapes = Shapes.of(spec, SHAPES, stats)
    after, new, conditioning, x = tensor_lstm.advance(spec, weights, globals_, rows, stats, shapes, None, scalar(0.0))
    h, c = tensor_lstm.lstm_cell(x, rows.h, rows.c, weights["lstm.w"], weights["lstm.b"])
    assert torch.equal(new.h, h)
    assert torch.equal(new.c, c)
    assert new.updates.tolist() == [1.0] * count
    assert int(after.step) == 1
    mean = (h @ weights["lstm_to_lstm.w"]).mean(dim=0) + weights["lstm_to_lstm.b"]
    torch.testing.assert_close(after.from_lstm, mean, rtol=0, atol=1e-14)
    constant = named(values_of(spec, globals_, new, stats, shapes), spec.constant_names)
    square = stats[:, STATS.index("param_square")]
    to_mlp = h @ weights["lstm_to_mlp.w"] + weights["lstm_to_mlp.b"]
    torch.testing.assert_close(conditioning.constant, torch.cat([constant, to_mlp], dim=1), rtol=0, atol=1e-14)
    typical = tensor_lstm.typical_scale(square.sqrt(), torch.ones(count, dtype=torch.bool), shapes)
    _, scale = tensor_lstm.tensor_scale(square.sqrt(), typical, shapes, rows.scale)
    controlled = torch.cat([h, x], dim=1)
    log_step, gate = controlled @ weights["step.w"] + weights["step.b"], torch.zeros(count, dtype=F64)
    if preset == "spectral":
        mean = (1 / math.sqrt(5) / math.sqrt(12) / math.sqrt(12)) ** (1 / 3)
        scale = f64(mean, mean, 1 / math.sqrt(5), 1 / math.sqrt(12), 1 / math.sqrt(12))
        gate = torch.clamp(0.5 + controlled @ weights["gate.w"] + weights["gate.b"], 0, 1) * f64(0, 0, 1, 1, 0)
        log_step = log_step + weights["gate.step"] * gate
        assert torch.equal(new.scale, square.sqrt())
    torch.testing.assert_close(conditioning.gate, gate, rtol=0, atol=1e-14)
    first = 1 / WARMUP
    torch.testing.assert_close(conditioning.multiplier, first * scale * torch.exp(log_step), rtol=1e-13, atol=0)


def test_steps_become_whole_within_ten_updates_of_a_tensor() -> None:
    """A tenth more with every update of the tensor, whatever the number of the step; the paper's steps are whole."""
    for preset, expected in (("compact", [0.1, 0.2, 0.9, 1.0, 1.0]), ("paper", [1.0] * 5)):
        theta = Theta.init(preset).to(dtype=F64)
        stats = torch.ones(5, theta.spec.features.num_stats, dtype=F64)
        rows = tensor_lstm.init_rows(theta.spec, theta.tensors, 5)
        rows = rows._replace(updates=torch.tensor([0.0, 1.0, 8.0, 9.0, 1e6], dtype=F64))
        globals_ = tensor_lstm.init_globals(theta.spec, theta.tensors)
        shapes = Shapes.of(theta.spec, [(3, 3)] * 5, stats)
        after = tensor_lstm.advance(theta.spec, theta.tensors, globals_, rows, stats, shapes, None, scalar(0.0))[2]
        assert after.multiplier.tolist() == pytest.approx(expected, rel=1e-12)  # the scale is 1


@pytest.mark.parametrize(("bias", "bounded"), [(1.0, 1.0), (50.0, 6.0), (-50.0, -6.0)])
def test_log_step_multiplier_is_bounded(bias: float, bounded: float) -> None:
    theta = Theta.init("compact").to(dtype=F64)
    theta.tensors["step.b"].fill_(bias)
    stats = torch.ones(1, theta.spec.features.num_stats, dtype=F64)
    rows, globals_ = (
        tensor_lstm.init_rows(theta.spec, theta.tensors, 1)._replace(updates=scalar(WARMUP).view(1)),
        tensor_lstm.init_globals(theta.spec, theta.tensors),
    )
    shapes = Shapes.of(theta.spec, [(3, 3)], stats)
    conditioning = tensor_lstm.advance(theta.spec, theta.tensors, globals_, rows, stats, shapes, None, scalar(0.0))[2]
    assert conditioning.multiplier.item() == pytest.approx(math.exp(bounded), rel=1e-12)  # the scale is 1


@pytest.mark.parametrize("stop_early", [0.0, 0.7])
def test_a_rising_validation_loss_lowers_the_step_of_init_adam(stop_early: float) -> None:
    theta = Theta.init_adam("compact", stop_early=stop_early).to(dtype=F64)
    spec, weights = theta.spec, theta.tensors
    stats = random_stats(spec, len(SHAPES), torch.Generator().manual_seed(5))
    shapes, rows = Shapes.of(spec, SHAPES, stats), tensor_lstm.init_rows(spec, weights, len(SHAPES))
    globals_ = tensor_lstm.observe_train(spec, tensor_lstm.init_globals(spec, weights), scalar(1.0))
    falling = globals_
    for loss in (2.0, 1.0):
        falling = tensor_lstm.observe_valid(spec, falling, scalar(loss))
    rising = tensor_lstm.observe_valid(spec, falling, scalar(1.6))
    steps = [
        tensor_lstm.advance(spec, weights, state, rows, stats, shapes, None, scalar(0.0))[2].multiplier
        for state in (globals_, falling, rising)
    ]
    assert torch.equal(steps[0], steps[1])
    train = tensor_lstm.observe_train(spec, rising, None).train_loss  # as the step sees it
    spread = losses.loss_spread(train, spec.train_loss_decay)
    rise = losses.loss_rise(rising.valid_loss, spec.valid_loss_decay, spread)
    assert rise > 1.0
    torch.testing.assert_close(steps[2], steps[0] * torch.exp(-stop_early * rise), rtol=1e-6, atol=0)


# ---- Losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.9, 0.95])
def test_loss_statistics_of_the_port(golden: Callable[[str], Arrays], decay: float) -> None:
    """In float32; relative to the largest value, except for the standardised loss, which is of order 1."""
    recorded = golden("tensor_level")
    expected = {name: recorded[f"loss{decay}|{name}"] for name in ("mean", "var", "corrected", "weight")}
    state = torch.zeros(len(LossState._fields))
    for i, loss in enumerate(torch.from_numpy(recorded["loss|losses"])):
        state = losses.next_loss(state, loss, decay)
        found = {
            "mean": state[0],
            "var": state[1],
            "corrected": losses.corrected_mean(state, decay),
            "weight": losses.standardise_loss(state, loss, decay),
        }
        for name, value in found.items():
            assert float(value) == pytest.approx(expected[name][i], rel=1e-6, abs=1e-6), (name, i)
        assert int(state[2]) == i + 1


def test_loss_statistics_by_hand() -> None:
    state = torch.zeros(len(LossState._fields), dtype=F64)
    mean = var = 0.0
    for count, loss in enumerate((3.0, 1.0, 2.0), start=1):
        state = losses.next_loss(state, scalar(loss), 0.9)
        mean = 0.9 * mean + 0.1 * loss
        var = 0.9 * var + 0.1 * (mean - loss) ** 2
        correction = 1 / (1 - 0.9**count + 1e-8)
        assert state[:3].tolist() == pytest.approx([mean, var, count], rel=1e-14)
        assert losses.corrected_mean(state, 0.9).item() == pytest.approx(mean * correction, rel=1e-12)
        standard = (7.0 - mean * correction) / math.sqrt(var * correction + 1e-8)
        found = losses.standardise_loss(state, scalar(7.0), 0.9).item()
        assert found == pytest.approx(min(5.0, standard), rel=1e-12)
    assert losses.standardise_loss(state, scalar(1e6), 0.9).item() == 5.0
    assert losses.standardise_loss(state, scalar(-1e6), 0.9).item() == -5.0


def test_loss_inputs_are_zero_before_any_loss() -> None:
    """Also the validation input while there is no training loss to compare with, and no loss at all for many steps."""
    spec, globals_ = fresh("paper")
    for _ in range(3):
        globals_ = tensor_lstm.observe_train(spec, globals_, None)
    assert globals_.train_loss.tolist() == [0.0] * len(LossState._fields)
    assert [float(x) for x in loss_inputs(spec, globals_)] == [0.0, 0.0]
    globals_ = tensor_lstm.observe_valid(spec, globals_, scalar(3.0))
    assert [float(x) for x in loss_inputs(spec, globals_)] == [0.0, 0.0]


def test_validation_input_before_any_validation_loss() -> None:
    """The mean of no validation losses is 0, standardised by the training loss like any other."""
    spec, globals_ = fresh("paper")
    assert float(losses.corrected_mean(globals_.valid_loss, 0.95)) == 0.0
    for loss in (3.0, 2.0, 2.5):
        globals_ = tensor_lstm.observe_train(spec, globals_, scalar(loss))
    train, valid = loss_inputs(spec, globals_)
    assert float(train) == float(losses.standardise_loss(globals_.train_loss, scalar(2.5), 0.9))
    assert float(valid) == float(losses.standardise_loss(globals_.train_loss, scalar(0.0), 0.9))
    assert float(valid) < -1.0


@pytest.mark.parametrize(("loss", "sign"), [(3.5, 1.0), (1.5, -1.0)])
def test_validation_input_shows_overfitting(loss: float, sign: float) -> None:
    """In units of the training loss' spread; positive when the validation loss is above the training loss."""
    spec, globals_ = fresh("paper")
    for train_loss in (3.0, 2.0, 2.5):
        globals_ = tensor_lstm.observe_train(spec, globals_, scalar(train_loss))
    _, valid = loss_inputs(spec, tensor_lstm.observe_valid(spec, globals_, scalar(loss)))
    expected = losses.standardise_loss(globals_.train_loss, scalar(loss), 0.9)
    assert float(valid) == pytest.approx(float(expected), rel=1e-6)
    assert float(valid) * sign > 0.3


def test_rise_of_a_loss_by_hand() -> None:
    """The share of the way from the first to the lowest mean that is lost, as ln(1 + 100 share), at most 5."""
    state, decay, mean, means = torch.zeros(len(LossState._fields), dtype=F64), 0.9, 0.0, []
    for i, loss in enumerate((8.0, 5.0, 1.0, 0.5, 3.0, 0.1, 7.0)):
        state = losses.next_loss(state, scalar(loss), decay)
        mean = decay * mean + (1 - decay) * loss
        means.append(mean / (1 - decay ** (i + 1) + 1e-8))
        share = (means[-1] - min(means)) / max(means[0] - min(means), 1e-30)
        assert state[3:6].tolist() == pytest.approx([loss, means[0], min(means)], rel=1e-12)
        assert losses.loss_rise(state, decay).item() == pytest.approx(math.log1p(100 * share), abs=1e-9)
    for _ in range(9):
        state = losses.next_loss(state, scalar(100.0), decay)
    assert losses.loss_rise(state, decay).item() == 5.0


def test_fall_of_a_loss_by_hand() -> None:
    """Means over some hundred and some thousand losses, each without bias, in standard deviations of the losses."""
    state, decay, mean, var, middle, slow = losses.init_loss(scalar(0.0).double()), 0.9, 0.0, 0.0, 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=generator, dtype=F64).tolist()
    for i, x in enumerate(noise):
        loss = 3.0 * math.exp(-i / 150) + 0.1 * x
        state = losses.next_loss(state, scalar(loss).double(), decay)
        mean = decay * mean + (1 - decay) * loss
        var = decay * var + (1 - decay) * (mean - loss) ** 2
        middle, slow = middle + 0.01 * (loss - middle), slow + 0.001 * (loss - slow)
    steps = len(noise)
    spread = math.sqrt(var / (1 - decay**steps + 1e-8))
    fall = (slow / (1 - 0.999**steps + 1e-8) - middle / (1 - 0.99**steps + 1e-8)) / (spread + 1e-8)
    assert fall > 1.0
    assert losses.loss_fall(state, decay).item() == pytest.approx(math.log1p(10 * fall), rel=1e-9)
    for _ in range(3000):
        state = losses.next_loss(state, scalar(1.0).double(), decay)
    assert losses.loss_fall(state, decay).item() == -5.0  # it stands still above what it had been


def test_rise_of_a_loss_beside_its_spread_by_hand() -> None:
    """Of 2 that were gained half is lost; a spread of 3 says that this may be noise."""
    state = torch.tensor([3.0, 0.0, 1e9, 3.0, 4.0, 2.0, 3.0, 3.0], dtype=F64)  # mean 3, first 4, lowest 2
    for spread, share in ((0.0, 0.5), (3.0, 0.2), (1e12, 0.0)):
        found = losses.loss_rise(state, 0.9, scalar(spread)).item()
        assert found == pytest.approx(math.log1p(100 * share), abs=1e-6)
    variance = torch.tensor([0.0, 0.19 * 4.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=F64)  # after two losses, 1 - .9^2
    assert losses.loss_spread(variance, 0.9).item() == pytest.approx(2.0, rel=1e-7)


def test_validation_losses_above_the_first_count_as_the_first() -> None:
    """So an overshoot at the beginning is no overfitting, and leaves no trace; the paper's mean has it."""
    for preset, overshoot in (("compact", 2.0), ("paper", 50.0)):
        spec, globals_ = fresh(preset)
        expected = globals_.valid_loss
        for loss, counted in ((2.0, 2.0), (50.0, overshoot), (40.0, min(overshoot, 40.0)), (1.0, 1.0)):
            globals_ = tensor_lstm.observe_valid(spec, globals_, scalar(loss))
            expected = losses.next_loss(expected, scalar(counted), spec.valid_loss_decay)
        torch.testing.assert_close(globals_.valid_loss, expected, rtol=1e-6, atol=0)  # the first mean is off by 1e-7
    spec, globals_ = fresh("compact")
    for loss in (3.0, 2.0):
        globals_ = tensor_lstm.observe_train(spec, globals_, scalar(loss))
    for loss in (2.0, 50.0, 40.0, 50.0):
        globals_ = tensor_lstm.observe_valid(spec, globals_, scalar(loss))
    assert abs(float(loss_inputs(spec, globals_)[3])) < 1e-5


def test_losses_of_compact_are_zero_until_known() -> None:
    spec, globals_ = fresh("compact")
    assert [float(x) for x in loss_inputs(spec, globals_)] == [0.0] * 4
    for loss in (3.0, 2.0, 2.9):
        globals_ = tensor_lstm.observe_train(spec, globals_, scalar(loss))
    train, valid, train_rise, valid_rise = (float(x) for x in loss_inputs(spec, globals_))
    assert (valid, valid_rise) == (0.0, 0.0)
    assert min(abs(train), train_rise) > 0.1
    for loss in (3.0, 1.0, 2.5):
        globals_ = tensor_lstm.observe_valid(spec, globals_, scalar(loss))
    assert all(abs(float(x)) > 0.1 for x in loss_inputs(spec, globals_))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_losses_count_as_none(bad: float) -> None:
    spec, start = fresh("paper")
    assert same(tensor_lstm.observe_train(spec, start, scalar(bad)), start)  # none before: nothing changes
    assert same(tensor_lstm.observe_valid(spec, start, scalar(bad)), start)
    seen = tensor_lstm.observe_train(spec, start, scalar(2.0))
    repeated = tensor_lstm.observe_train(spec, seen, scalar(2.0))
    assert same(tensor_lstm.observe_train(spec, seen, scalar(bad)), repeated)  # later: the last one again
    assert same(tensor_lstm.observe_train(spec, seen, None), repeated)
    valid = tensor_lstm.observe_valid(spec, seen, scalar(1.0))
    assert same(tensor_lstm.observe_valid(spec, valid, scalar(bad)), valid)


def same(first: Globals, second: Globals) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_validation_advances_the_step_as_the_spec_says() -> None:
    for preset, step in (("paper", 1), ("compact", 0)):
        spec, globals_ = fresh(preset)
        assert spec.valid_advances_step == (step == 1)
        after = tensor_lstm.observe_valid(spec, globals_, scalar(1.0))
        assert int(after.step) == step
        assert after.valid_loss[2] == 1.0
        assert torch.equal(after.train_loss, globals_.train_loss)


# ---- Clipper --------------------------------------------------------------------------------------------------------


def test_clip_limit_by_hand() -> None:
    """The first limit is 10; then ten times the bias-corrected average of root mean squares, one of 1 at the start."""
    spec, globals_ = fresh("paper")
    value, count = 1 - 0.99, 1
    assert tensor_lstm.clip_limit(spec, globals_).item() == pytest.approx(10.0, rel=1e-12)
    for squares in ([4.0, 0.0], [1e-6, 3e-6], [0.0, 0.0], [100.0, 50.0]):
        mean = tensor_lstm.mean_grad_square(spec, f64(*squares), torch.zeros(2, dtype=torch.bool))
        globals_ = tensor_lstm.next_clip(spec, globals_, *mean)
        value = 0.99 * value + (1 - 0.99) * math.sqrt(
            1e-8 + sum(squares) / 2
        )  # tensors count alike, whatever their size
        count += 1
        assert globals_.clip.tolist() == pytest.approx([count, value], rel=1e-12)
        expected = 10 * value / (1 - 0.99**count)
        assert tensor_lstm.clip_limit(spec, globals_).item() == pytest.approx(expected, rel=1e-12)


# ---- Time -----------------------------------------------------------------------------------------------------------


def test_sinusoids_of_the_port(golden: Callable[[str], Arrays]) -> None:
    """In float32, where the argument's rounding counts: at step 199,689 it is 6e4, with a resolution of 4e-3."""
    recorded = golden("tensor_level")
    like = torch.zeros(())
    for step, expected in zip(recorded["sinusoid_steps"], recorded["sinusoids"], strict=True):
        found = time_inputs(PAPER, torch.tensor(int(step)), like, like)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-7)


def test_sinusoids_by_hand() -> None:
    found = time_inputs(PAPER, torch.tensor(7), scalar(0.0), scalar(0.0))
    scales = (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)
    assert found.tolist() == pytest.approx([math.sin(7 / (s * math.pi)) for s in scales], abs=1e-6)


LOG_TIME = [
    # step, total_steps -> ln(1 + step) / 8, known, done, ln(1 - .99 done), ln(1 + total) / 8 [known times the first]
    (0, 0, [0.0, 0.0, 0.0, 0.0, 0.0]),
    (99, 0, [math.log(100) / 8, 0.0, 0.0, 0.0, 0.0]),
    (0, 200, [0.0, 1.0, 0.0, 0.0, math.log(201) / 8]),
    (50, 200, [math.log(51) / 8, 1.0, 0.25, math.log(1 - 0.99 * 0.25), math.log(201) / 8]),
    (200, 200, [math.log(201) / 8, 1.0, 1.0, math.log(0.01), math.log(201) / 8]),
    (900, 200, [math.log(901) / 8, 1.0, 1.0, math.log(0.01), math.log(201) / 8]),  # beyond the plan
    (10**6, 10**7, [math.log(10_001) / 8, 1.0, 0.1, math.log(1 - 0.099), math.log(10_001) / 8]),  # time_limit
]


@pytest.mark.parametrize(("step", "total", "expected"), LOG_TIME)
def test_log_time_by_hand(step: int, total: int, expected: list[float]) -> None:
    like = scalar(0.0)
    found = time_inputs(COMPACT, torch.tensor(step), scalar(float(total)), like)
    assert found.tolist() == pytest.approx([*expected, expected[1] * expected[0]], rel=1e-12, abs=1e-12)
    without = dataclasses.replace(COMPACT, horizon_input=False)
    found = time_inputs(without, torch.tensor(step), scalar(float(total)), like)
    assert found.tolist() == pytest.approx(expected[:1], rel=1e-12)


# ---- Facts and statistics as inputs ---------------------------------------------------------------------------------


def test_the_lstm_sees_what_all_share_then_feedback_then_the_named_inputs() -> None:
    for preset in PRESETS:
        theta, globals_, rows, stats = one_row(preset)
        spec, shapes = theta.spec, Shapes.of(theta.spec, [(3, 5)], stats)
        after, new, _, x = tensor_lstm.advance(
            spec, theta.tensors, globals_, rows, stats + 1.0, shapes, scalar(2.0), scalar(9.0)
        )
        seen_by_lstm = after._replace(step=globals_.step, from_lstm=globals_.from_lstm)
        values = values_of(spec, seen_by_lstm, new, stats + 1.0, shapes, 9.0)
        names = spec.inputs.scalars
        names += spec.inputs.facts + spec.inputs.time if spec.inputs.lstm_sees_constants else ()
        expected = [globals_.from_lstm, rows.feedback[0], named(values, names)[0]]
        assert torch.equal(x[0], torch.cat(expected))
        assert [x[0, spec.lstm_index(name)] for name in names] == named(values, names)[0].tolist()


def test_shapes_by_hand() -> None:
    """Dimensions are padded with ones to four; of more, the first four count."""
    found = Shapes.of(COMPACT, SHAPES, scalar(0.0))
    assert found.numel.tolist() == [1.0, 4.0, 15.0, 24.0, 12.0]
    assert found.is_scalar.tolist() == [1.0, -1.0, -1.0, -1.0, -1.0]
    assert found.is_matrix.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    dims = [(1, 1, 1, 1), (4, 1, 1, 1), (3, 5, 1, 1), (2, 3, 2, 2), (1, 2, 2, 1)]
    expected = [[math.log(dim) - 1 for dim in row] for row in dims]
    for row, expected_row in zip(found.log_dims.tolist(), expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-14)
    assert found.decays.tolist() == [float(np.float32(d)) for d in (0.9, 0.99, 0.999, 0.95, 0.999)]
    assert found.whole.tolist() == [False, False, True, True, False]  # (1, 2, 2): one row
    assert found.aspect.tolist() == pytest.approx([1.0, 1.0, 5 / 3, 6.0, 12.0], rel=1e-14)


def test_tensor_facts_by_hand() -> None:
    square = f64(4.0, 0.25, 0.0, 1.0, 1.0)
    found = {}
    for preset in PRESETS:
        spec, globals_ = fresh(preset)
        stats = torch.ones(5, spec.features.num_stats, dtype=F64)
        stats[:, STATS.index("param_square")] = square
        values = values_of(spec, globals_, None, stats, Shapes.of(spec, SHAPES, square))
        found[preset] = named(values, spec.inputs.facts)
    paper, compact = found["paper"], found["compact"]
    for t, numel in enumerate((1, 4, 15, 24, 12)):
        norm = math.sqrt(float(square[t]) * numel)
        assert paper[t].tolist() == pytest.approx([math.log(5) - 1, math.log(norm + 1e-8), math.log(numel)], rel=1e-12)
    assert compact[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert compact[:, 1].tolist() == pytest.approx([math.log(n) / 8 for n in (1, 4, 15, 24, 12)], abs=1e-14)


STAT = {
    "grad_square": 0.09,
    "param_square": 4.0,
    "nonfinite": 2.0,
    "param_mean": -0.5,
    "param_var": 3.75,
    "mom_mean": 0.02,
    "mom_var": 0.0021,
    "rms_mean": 0.04,
    "rms_var": 0.0001,
}


def magnitude(x: float) -> float:
    """``clip(ln(1e-8 + |x|), -5, 5)``."""
    return max(-5.0, min(5.0, math.log(1e-8 + abs(x))))


def one_row(preset: str) -> tuple[Theta, Globals, Rows, Tensor]:
    """A theta, its first state, and statistics of one tensor."""
    theta = Theta.init(preset).to(dtype=F64)
    stats = torch.zeros(1, theta.spec.features.num_stats, dtype=F64)
    stats[0, : len(STATS)] = f64(*(STAT[name] for name in STATS))
    weights = theta.tensors
    return theta, tensor_lstm.init_globals(theta.spec, weights), tensor_lstm.init_rows(theta.spec, weights, 1), stats


def test_paper_lstm_inputs_by_hand() -> None:
    theta, globals_, rows, stats = one_row("paper")
    globals_ = tensor_lstm.observe_train(theta.spec, globals_, scalar(2.0))
    globals_ = tensor_lstm.observe_train(theta.spec, globals_, scalar(1.0))
    train, valid = (float(x) for x in loss_inputs(theta.spec, globals_))
    shapes = Shapes.of(theta.spec, [(3, 5)], stats)
    rows = rows._replace(updates=rows.updates + 1.0)
    found = named(values_of(theta.spec, globals_, rows, stats, shapes), theta.spec.lstm_names)
    assert found.shape == (1, 18)
    expected = [
        *(magnitude(math.sqrt(0.09 * 15)), -1.0),  # gradient norm, is_scalar
        *(magnitude(0.02), 1.0, magnitude(0.04), 1.0, magnitude(-0.5), -1.0),  # mean mom, mean rms, mean param
        *(magnitude(math.sqrt(4.0 * 15)), math.log(3) - 1, math.log(5) - 1, -1.0, -1.0),  # parameter norm, shape
        *(train, valid, magnitude(0.0021), magnitude(0.0001), magnitude(3.75)),  # losses, variances
    ]
    assert found[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert expected[16] == -5.0  # ln .0001 is below the bound


def test_compact_lstm_inputs_by_hand() -> None:
    theta, globals_, rows, stats = one_row("compact")
    rows = rows._replace(scale=f64(0.8), updates=f64(20.0))
    rows = type(rows)(*(value.repeat(2, *[1] * (value.dim() - 1)) for value in rows))
    moments = {"mom0_squared": 0.02, "mom1_squared": 0.003, "mom2_squared": 4e-6, "rms1": 0.001}
    for name, value in moments.items():
        stats[0, len(STATS) + theta.spec.features.moments.index(name)] = value
    stats = stats.repeat(2, 1)
    stats[1, 0] = 0.63  # so that the mean square gradient of the two tensors is .36
    globals_ = globals_._replace(step=torch.tensor(3))
    shapes = Shapes.of(theta.spec, [(3, 5), (7,)], stats)
    found = named(values_of(theta.spec, globals_, rows, stats, shapes, 100.0), theta.spec.lstm_names)
    quick, middle, late = (float(np.float32(decay)) for decay in (0.9, 0.99, 0.999))
    slow = 0.001 / (1 - late**20)
    expected = [
        0.5 * math.log(0.09 / slow),  # this gradient among those before
        0.5 * math.log(0.02 / (1 - quick**20) ** 2 / slow),  # share of signal in the gradients
        0.5 * math.log(0.003 / (1 - middle**20) ** 2 / slow),
        0.5 * math.log(4e-6 / (1 - late**20) ** 2 / slow),
        math.log(0.01 / 0.04),  # coefficient of variation of the second moments
        math.log(2.0 / 0.8),  # growth of the parameters
        math.log(0.3 / 0.6),  # this tensor's gradient among the tensors
        *(0.0, 0.0, 0.0, 0.0),  # no loss yet
        *(1.0, math.log(15) / 8),
        *(math.log(4) / 8, 1.0, 0.03, math.log(1 - 0.99 * 0.03), math.log(101) / 8, math.log(4) / 8),
    ]
    assert found.shape == (2, 19)
    assert found[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert found[1, 6].item() == pytest.approx(0.5 * math.log(0.63 / 0.36), rel=1e-12)


def test_spectral_lstm_inputs_by_hand() -> None:
    """Those of ``relative`` but for growth, which begins at .3 of the natural size; and what it adds."""
    theta, globals_, rows, stats = one_row("spectral")
    rows = type(rows)(*(value.repeat(4, *[1] * (value.dim() - 1)) for value in rows))
    rows = rows._replace(scale=f64(0.8, 0.001, 0.5, 1e-15), updates=f64(20, 20, 20, 20), rank=f64(0.25, 1.0, 1.0, 0.0))
    stats = stats.repeat(4, 1)
    stats[:, STATS.index("param_square")] = f64(4.0, 1e-4, 0.01, 0.0)
    shapes = Shapes.of(theta.spec, [(4, 16), (3, 5, 5), (7,), (2, 1)], stats)
    found = values_of(theta.spec, globals_, rows, stats, shapes, 100.0)
    relative = values_of(PRESETS["compact"], globals_, rows, stats, shapes, 100.0)
    for name in PRESETS["compact"].lstm_names:
        if name != "param_growth":
            assert torch.equal(found[name], relative[name]), name
    vector = (1 / 4 * 1 / 5 * 1) ** (1 / 3)  # natural sizes: 1/4, 1/5, their geometric mean with 1, and 1
    growth = [2.0 / 0.8, 1.0, 0.3 * vector / 0.5, 1.0]
    assert found["param_growth"].tolist() == pytest.approx([math.log(x) for x in growth], abs=1e-12)
    starts = [math.log(0.8 * 4), math.log(0.001 * 5), math.log(0.5 / vector), -5.0]
    assert starts[1] < -5.0
    starts[1] = -5.0
    matrix = [1.0, 1.0, 0.0, 1.0]
    assert found["matrix_start"].tolist() == pytest.approx([x * m for x, m in zip(starts, matrix, strict=True)])
    assert found["vector_start"].tolist() == pytest.approx([x * (1 - m) for x, m in zip(starts, matrix, strict=True)])
    assert found["rank"].tolist() == pytest.approx([0.5 * math.log(0.25), 0.0, 0.0, -5.0], abs=1e-12)
    aspects = [math.log(4.0), math.log(25 / 3), 0.0, math.log(2.0)]
    assert found["aspect"].tolist() == pytest.approx([0.5 * x for x in aspects], abs=1e-12)
    assert found["is_input"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert found["is_output"].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert theta.spec.lstm_names[13 - 2 : 15] == ("train_fall", "matrix_start", "vector_start", "rank")


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-10, 1e15])
def test_lstm_inputs_are_bounded(preset: str, value: float, dtype: torch.dtype) -> None:
    """Whatever the scale of gradients and parameters, zeros included."""
    theta, globals_, rows, stats = one_row(preset)
    spec = theta.spec
    mean, square = value, value * value
    common = {"param_mean": mean, "mom_mean": mean, "rms_mean": square, "rms_var": min(square * square, 1e38)}
    stats[0] = square  # moments, too
    stats[0, : len(STATS)] = f64(*(common.get(name, square) for name in STATS))
    rows = rows._replace(updates=rows.updates + 1.0)
    globals_, rows = (type(x)(*(v.to(dtype) if v.is_floating_point() else v for v in x)) for x in (globals_, rows))
    shapes = Shapes.of(spec, [(3, 5)], stats.to(dtype))
    found = named(values_of(spec, globals_, rows, stats.to(dtype), shapes), spec.lstm_names)
    assert bool((found.abs() <= 5.0).all())


# ---- Scales of tensors ----------------------------------------------------------------------------------------------

SCALES = [
    # shapes, root mean squares -> initial scales
    ([(3, 3), (4, 4)], [1.0, 3.0], [1.0, 3.0]),  # matrices: their own
    ([(3, 3), (4, 4)], [0.2, 3.8], [0.33, 3.8]),  # at least .3 of the mean, where 3.8 counts as ten times the median
    ([(3, 3), (4, 4), (2, 2)], [0.1, 1e6, 0.1], [0.12, 1e6, 0.12]),  # of .1, 1 and .1
    ([(3, 3), (5,)], [2.0, 0.0], [2.0, 0.6]),  # a bias of zeros: .3 of the mean
    ([(3, 3), (5,)], [2.0, 1.0], [2.0, 1.0]),  # in between: its own
    ([(3, 3), (5,), ()], [0.1, 1.0, 7.0], [0.1, 0.1, 0.1]),  # gains of ones: the mean
    ([(3, 3), (2, 2, 3), (5,)], [1.0, 3.0, 9.0], [1.0, 3.0, 2.0]),
    ([(5,), ()], [1.0, 3.0], [1.0, 2.0]),  # no matrix: the mean of all is 2
    ([(5,), ()], [0.0, 0.0], [0.03, 0.03]),  # only zeros: .3 of .1
    ([(3, 3), (5,)], [0.0, 0.0], [0.03, 0.03]),
]


@pytest.mark.parametrize(("shapes", "rms", "expected"), SCALES)
def test_initial_scales_by_hand(shapes: list[tuple[int, ...]], rms: list[float], expected: list[float]) -> None:
    facts = Shapes.of(COMPACT, shapes, scalar(0.0))
    mean = tensor_lstm.typical_scale(f64(*rms), torch.ones(len(rms), dtype=torch.bool), facts)
    initial, scale = tensor_lstm.tensor_scale(f64(*rms), mean, facts, torch.zeros(len(rms), dtype=F64))
    assert initial.tolist() == pytest.approx(expected, rel=1e-12)
    now = [max(min(r, 2 * e), 0.5 * e) for r, e in zip(rms, expected, strict=True)]
    assert scale.tolist() == pytest.approx(now, rel=1e-12)


@pytest.mark.parametrize(("rms", "expected"), [(0.0, 0.5), (0.4, 0.5), (0.7, 0.7), (1.7, 1.7), (9.0, 2.0)])
def test_later_scales_follow_within_a_factor_of_two(rms: float, expected: float) -> None:
    facts = Shapes.of(COMPACT, [(3, 3), (3, 3)], scalar(0.0))
    initial, scale = tensor_lstm.tensor_scale(f64(rms, 100.0), scalar(50.0), facts, f64(1.0, 100.0))
    assert initial.tolist() == [1.0, 100.0]
    assert scale[0].item() == pytest.approx(expected, rel=1e-14)


def test_scales_without_a_gradient_count_only_where_there_are_no_others() -> None:
    """Matrices with a gradient, matrices, others with a gradient, others; zeros never."""
    shapes, rms = [(2, 2), (2, 2), (3,), (4,), (2, 2)], f64(1.0, 3.0, 5.0, 7.0, 0.0)
    facts = Shapes.of(COMPACT, shapes, scalar(0.0))
    for moves, expected in (("10101", 1.0), ("01111", 3.0), ("00110", 2.0), ("00001", 2.0)):
        moving = torch.tensor([digit == "1" for digit in moves])
        assert tensor_lstm.typical_scale(rms, moving, facts).item() == pytest.approx(expected, rel=1e-12)
    no_matrix = Shapes.of(COMPACT, shapes[2:4], scalar(0.0))
    for moves, expected in (("10", 5.0), ("01", 7.0), ("00", 6.0)):
        moving = torch.tensor([digit == "1" for digit in moves])
        assert tensor_lstm.typical_scale(rms[2:4], moving, no_matrix).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "counts", "expected"),
    [
        ([1.0, 2.0, 6.0], "111", 3.0),  # within ten times the median: the mean
        ([1.0, 2.0, 6e9], "111", 23 / 3),  # 6e9 counts as 20
        ([1.0, 3.0, 50.0, 4e9], "1111", 64 / 4),  # of an even number the lower: 3, so 30 twice
        ([5.0, 1e30], "10", 5.0),
        ([1e30, 2.0], "11", 11.0),
        ([0.0, 7.0, 1.0], "000", 0.0),
        ([1e-45, 1e-45, 1.0], "111", 4e-45),
    ],
)
def test_bounded_mean_by_hand(values: list[float], counts: str, expected: float) -> None:
    counted = torch.tensor([digit == "1" for digit in counts])
    assert tensor_lstm.bounded_mean(f64(*values), counted, 10.0).item() == pytest.approx(expected, rel=1e-12)


def test_paper_means_are_arithmetic_and_robust_ones_of_what_has_a_gradient() -> None:
    squares, rest = f64(0.0, 1.0, 3.0, 1e12, 5.0), torch.tensor([False, False, False, False, True])
    mean, number = tensor_lstm.mean_grad_square(PAPER, squares, rest)
    assert (mean.item(), int(number)) == (pytest.approx((4.0 + 1e12) / 4, rel=1e-14), 4)
    mean, number = tensor_lstm.mean_grad_square(COMPACT, squares, rest)
    assert (mean.item(), int(number)) == (pytest.approx((4.0 + 3e4) / 3, rel=1e-14), 3)
    spec, globals_ = fresh("compact")
    kept = tensor_lstm.next_clip(spec, globals_, *tensor_lstm.mean_grad_square(spec, f64(0.0, 0.0), rest[:2]))
    assert same(kept, globals_)
