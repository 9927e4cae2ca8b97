"""Tensor-level state: per-tensor statistics and losses -> LSTM -> what the per-parameter MLP is conditioned on.

Pure functions over T rows, one per parameter tensor: the definition, used by the reference, of what
csrc/rule/tensor_lstm.h does for the compiled back ends. They stay on the device of their inputs, never read a value
back, and can be vmapped.

Source: arXiv:2009.11243, appendix C.2 to C.4, with the constants of the author's port.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.rule.features import STATS, bias_corrections
from lopt.rule.spec import ThetaSpec

Weights = Mapping[str, Tensor]

WAVES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
LOG_TIME_SCALE = 8.0  # brings ln(steps) into the range of the other inputs
SMALLEST_SCALE = 0.3  # of a tensor, relative to the mean of all matrices
EMPTY_SCALE = 0.1  # when every parameter is zero
MAX_LOG_STEP = 6.0  # bound of the learned log step multiplier
WARMUP = 10.0  # updates of a tensor until its learned step is whole
TINY = 1e-30  # keeps ratios of zeros finite


class Globals(NamedTuple):
    """State that all tensors share."""

    step: Tensor  # [] number of updates so far
    train_loss: Tensor  # [6] mean, var, updates, last loss, first and lowest mean without bias
    valid_loss: Tensor  # [6] the same
    clip: Tensor  # [2] count (starts at 1), running root mean square of gradients
    from_lstm: Tensor  # [from_lstm]


class Rows(NamedTuple):
    """State of each tensor."""

    h: Tensor  # [T, lstm_width]
    c: Tensor  # [T, lstm_width]
    feedback: Tensor  # [T, from_mlp]
    scale: Tensor  # [T] initial scale of the parameters, 0 until the first step
    updates: Tensor  # [T] how often the accumulators were updated


class Conditioning(NamedTuple):
    """What the per-parameter computation of one step needs to know about each tensor."""

    scale: Tensor  # [T, columns]
    shift: Tensor  # [T, columns]
    constant: Tensor  # [T, num_constant] MLP inputs that are the same for all parameters of a tensor
    multiplier: Tensor  # [T] step multiplier beside step_multiplier


@dataclass(frozen=True)
class Shapes:
    """Facts about the tensors that never change, as tensors on the device."""

    numel: Tensor  # [T]
    log_dims: Tensor  # [T, 4] ln(dim) - 1 of the first four dimensions, padded with ones
    is_scalar: Tensor  # [T] +1 for rank 0, else -1
    is_matrix: Tensor  # [T] 1 for rank >= 2, else 0
    any_matrix: bool
    decays: Tensor  # [num_mom + num_rms]

    @classmethod
    def of(cls, spec: ThetaSpec, shapes: Sequence[Sequence[int]], like: Tensor) -> "Shapes":
        """Facts about tensors of these shapes, in dtype and on device of ``like``."""
        dims = [([*shape[:4]] + [1] * 4)[:4] for shape in shapes]
        return cls(
            numel=like.new_tensor([float(math.prod(shape)) for shape in shapes]),
            log_dims=torch.log(like.new_tensor(dims)) - 1.0,
            is_scalar=like.new_tensor([1.0 if len(shape) == 0 else -1.0 for shape in shapes]),
            is_matrix=like.new_tensor([float(len(shape) >= 2) for shape in shapes]),
            any_matrix=any(len(shape) >= 2 for shape in shapes),
            decays=round_decays(spec.mom_decays + spec.rms_decays, like),
        )


def round_decays(decays: Sequence[float], like: Tensor) -> Tensor:
    """Decays rounded to float32 in any dtype: ``1 - .9999`` differs by 2e-4 between float32 and float64 decays."""
    return torch.tensor(decays, dtype=torch.float32, device=like.device).to(like.dtype)


def init_globals(spec: ThetaSpec, weights: Weights) -> Globals:
    """Global state before the first step."""
    like = weights["initial_from_lstm"]
    return Globals(
        step=torch.zeros((), dtype=torch.int64, device=like.device),
        train_loss=like.new_zeros(6),
        valid_loss=like.new_zeros(6),
        clip=like.new_tensor([1.0, 1.0 - spec.clip_decay]),
        from_lstm=like.clone(),
    )


def init_rows(spec: ThetaSpec, weights: Weights, num_tensors: int) -> Rows:
    """Row state of ``num_tensors`` new tensors."""
    like = weights["initial_h"]
    return Rows(
        h=weights["initial_h"].expand(num_tensors, -1).clone(),
        c=weights["initial_c"].expand(num_tensors, -1).clone(),
        feedback=weights["initial_from_mlp"].expand(num_tensors, -1).clone(),
        scale=like.new_zeros(num_tensors),
        updates=like.new_zeros(num_tensors),
    )


def next_loss(state: Tensor, loss: Tensor, decay: float) -> Tensor:
    """State of a loss after one more; ``var`` uses the new, uncorrected mean."""
    mean = decay * state[0] + (1.0 - decay) * loss
    var = decay * state[1] + (1.0 - decay) * torch.square(mean - loss)
    state = torch.stack([mean, var, state[2] + 1.0, loss, state[4], state[5]])
    now, only = corrected_mean(state, decay), state[2] == 1.0
    first, lowest = torch.where(only, now, state[4]), torch.where(only, now, torch.minimum(state[5], now))
    return torch.stack([*state[:4], first, lowest])


def _correction(state: Tensor, decay: float) -> Tensor:
    return 1.0 / (1.0 - torch.pow(state.new_full((), decay), state[2]) + 1e-8)


def corrected_mean(state: Tensor, decay: float) -> Tensor:
    """Bias-corrected mean of the losses, 0 before the first."""
    return torch.where(state[2] > 0, state[0] * _correction(state, decay), torch.zeros_like(state[0]))


def standardise_loss(state: Tensor, loss: Tensor, decay: float) -> Tensor:
    """``clip((loss - mean) / std, -5, 5)`` with bias-corrected mean and variance."""
    correction = _correction(state, decay)
    return torch.clamp((loss - state[0] * correction) * torch.rsqrt(state[1] * correction + 1e-8), -5.0, 5.0)


def loss_spread(state: Tensor, decay: float) -> Tensor:
    """Standard deviation of the losses around their mean."""
    return torch.sqrt(state[1] * _correction(state, decay))


def loss_rise(state: Tensor, decay: float, spread: Tensor | float = 0.0) -> Tensor:
    """``ln(1 + 100 (mean - lowest) / (first - lowest + spread))``, at most 5: how much of what was gained is lost.

    0 while the mean of the losses falls, .7 when a hundredth of the way down is lost, 4.6 at the first loss. A rising
    validation loss is overfitting, a rising training loss too large a step. Does not depend on the loss' scale or zero.

    Args:
        spread: of the losses, in their units: as long as less than that is gained, a rise may be noise.
    """
    above, gained = corrected_mean(state, decay) - state[5], state[4] - state[5]
    return torch.clamp(torch.log1p(100.0 * above / (gained + spread + TINY)), max=5.0)


def observe_train(spec: ThetaSpec, globals_: Globals, loss: Tensor | None) -> Globals:
    """Global state after a training loss. None or a non-finite one repeats the last; before any, nothing changes."""
    state = globals_.train_loss
    last, seen = state[3], state[2] > 0
    if loss is None:
        current, usable = last, seen
    else:
        loss = loss.to(state)
        given = torch.isfinite(loss)
        current, usable = torch.where(given, loss, last), given | seen
    updated = next_loss(state, current, spec.train_loss_decay)
    return globals_._replace(train_loss=torch.where(usable, updated, state))


def observe_valid(spec: ThetaSpec, globals_: Globals, loss: Tensor) -> Globals:
    """Global state after a validation update; a non-finite loss counts as none.

    For ``relative``, a loss above the first one counts as the first one. Otherwise, a few steps that overshoot at the
    beginning would stay in the mean for hundreds of steps, and look like overfitting while the loss falls again.
    """
    state = globals_.valid_loss
    given = torch.isfinite(loss.to(state))
    safe = torch.where(given, loss.to(state), torch.zeros_like(state[0]))
    if spec.tensor_inputs == "relative":
        safe = torch.where(state[2] > 0, torch.minimum(safe, state[4]), safe)
    updated = torch.where(given, next_loss(state, safe, spec.valid_loss_decay), state)
    step = globals_.step + given.to(torch.int64) if spec.valid_advances_step else globals_.step
    return globals_._replace(valid_loss=updated, step=step)


def loss_inputs(spec: ThetaSpec, globals_: Globals) -> list[Tensor]:
    """Training and validation loss as LSTM inputs, both standardised by the training loss; for ``relative`` also their
    rises, the second beside the spread of the training losses. 0 before any loss; in the paper, no validation loss is a
    validation loss of 0."""
    train, seen = globals_.train_loss, globals_.train_loss[2] > 0
    valid = corrected_mean(globals_.valid_loss, spec.valid_loss_decay)
    inputs = [standardise_loss(train, loss, spec.train_loss_decay) for loss in (train[3], valid)]
    if spec.tensor_inputs == "paper":
        return [torch.where(seen, x, torch.zeros_like(x)) for x in inputs]
    known = seen & (globals_.valid_loss[2] > 0)
    spread = loss_spread(train, spec.train_loss_decay)
    inputs += [loss_rise(train, spec.train_loss_decay), loss_rise(globals_.valid_loss, spec.valid_loss_decay, spread)]
    return [torch.where(known if i % 2 else seen, x, torch.zeros_like(x)) for i, x in enumerate(inputs)]


def clip_limit(spec: ThetaSpec, globals_: Globals) -> Tensor:
    """Bound of every gradient element in this step, from the gradients of the steps before."""
    count, value = globals_.clip.unbind()
    return value / (1.0 - torch.pow(value.new_full((), spec.clip_decay), count)) * spec.clip_multiplier


def next_clip(spec: ThetaSpec, globals_: Globals, grad_square: Tensor) -> Globals:
    """Clipper state after this step; ``grad_square`` ``[T]`` are the mean squares of the clipped gradients."""
    count, value = globals_.clip.unbind()
    rms = torch.sqrt(1e-8 + grad_square.mean())
    value = spec.clip_decay * value + (1.0 - spec.clip_decay) * rms
    return globals_._replace(clip=torch.stack([count + 1.0, value]))


def time_inputs(spec: ThetaSpec, step: Tensor, total_steps: Tensor, like: Tensor) -> Tensor:
    """``[num_time]`` inputs from the step before its increment and the number of steps planned (0: unknown)."""
    steps = step.to(like.dtype)
    if spec.tensor_inputs == "paper":
        waves = torch.tensor(WAVES, dtype=torch.float32, device=like.device)
        period = (waves * torch.tensor(math.pi, dtype=torch.float32)).to(like.dtype)
        return torch.sin(steps / period)
    inputs = [torch.log1p(torch.clamp(steps, max=spec.time_limit)) / LOG_TIME_SCALE]
    if spec.horizon_input:
        total = total_steps.to(like)
        known = (total > 0).to(like.dtype)
        done = known * torch.clamp(steps / torch.clamp(total, min=1.0), max=1.0)
        log_total = torch.log1p(torch.clamp(total, max=spec.time_limit)) / LOG_TIME_SCALE
        inputs += [known, done, torch.log(1.0 - 0.99 * done), log_total, known * inputs[0]]
    return torch.stack(inputs)


def tensor_facts(spec: ThetaSpec, shapes: Shapes, param_square: Tensor) -> Tensor:
    """``[T, num_facts]``: the paper's ln(T) - 1, ln ||param||, ln numel; otherwise is_matrix and ln numel, scaled."""
    num_tensors = shapes.numel.shape[0]
    if spec.tensor_inputs == "paper":
        log_count = torch.full_like(param_square, math.log(num_tensors) - 1.0)
        param_norm = torch.sqrt(param_square * shapes.numel)
        return torch.stack([log_count, torch.log(param_norm + 1e-8), torch.log(shapes.numel)], dim=1)
    return torch.stack([shapes.is_matrix, torch.log(shapes.numel) / LOG_TIME_SCALE], dim=1)


def log_magnitude(x: Tensor) -> Tensor:
    """``clip(ln(1e-8 + |x|), -5, 5)``."""
    return torch.clamp(torch.log(1e-8 + torch.abs(x)), -5.0, 5.0)


def lstm_inputs(spec: ThetaSpec, globals_: Globals, rows: Rows, stats: Tensor, shapes: Shapes, time: Tensor) -> Tensor:
    """``[T, num_lstm_input]``: shared LSTM output, MLP feedback, scalars of the tensor; for ``relative`` also time."""
    num_tensors = stats.shape[0]
    stat = dict(zip(STATS, stats.unbind(1)[: len(STATS)], strict=True))
    losses = [loss.expand(num_tensors) for loss in loss_inputs(spec, globals_)]
    parts = [globals_.from_lstm.expand(num_tensors, -1), rows.feedback]
    if spec.tensor_inputs == "paper":
        parts.append(torch.stack(_magnitudes_and_signs(stat, shapes, *losses), dim=1))
    else:
        scalars = [*_ratios(spec, stats, rows, shapes), *losses]
        parts += [torch.stack(scalars, dim=1), tensor_facts(spec, shapes, stat["param_square"])]
        parts.append(time.expand(num_tensors, -1))
    return torch.cat(parts, dim=1)


def _magnitudes_and_signs(stat: dict[str, Tensor], shapes: Shapes, train: Tensor, valid: Tensor) -> list[Tensor]:
    """The 18 scalars of the paper."""
    norms = torch.sqrt(torch.stack([stat["grad_square"], stat["param_square"]]) * shapes.numel)
    means = torch.stack([stat["mom_mean"], stat["rms_mean"], stat["param_mean"]])
    variances = torch.stack([stat["mom_var"], stat["rms_var"], stat["param_var"]])
    magnitude = log_magnitude(torch.cat([norms, means, variances])).unbind()
    sign = torch.sign(means).unbind()
    return [
        magnitude[0],  # gradient norm
        shapes.is_scalar,
        magnitude[2],  # mean of mom, rms, param, each as magnitude and sign
        sign[0],
        magnitude[3],
        sign[1],
        magnitude[4],
        sign[2],
        magnitude[1],  # parameter norm
        *shapes.log_dims.unbind(1),
        train,
        valid,
        *magnitude[5:],  # variance of mom, rms, param
    ]


def _ratios(spec: ThetaSpec, stats: Tensor, rows: Rows, shapes: Shapes) -> Iterable[Tensor]:
    """Logarithms of ratios of root mean squares, within +-5, unchanged when gradients or parameters are rescaled.

    Momenta and the slow second moment are without bias. For gradients that are all noise, momentum ``k`` over slow is
    ``sqrt((1 - decay_k) / (1 + decay_k))``; for gradients that never change it is 1.
    """
    features, num_mom = spec.features, len(spec.mom_decays)
    assert features.slow is not None  # by ThetaSpec
    corrections = bias_corrections(rows.updates, shapes.decays)
    stat = dict(zip((*STATS, *features.moments), stats.unbind(1), strict=True))
    slow = stat[f"rms{features.slow}"] / corrections[:, num_mom + features.slow]
    grad = stat["grad_square"]
    pairs = [
        (grad, slow),  # this gradient among those before
        *((stat[f"mom{k}_squared"] / torch.square(corrections[:, k]), slow) for k in range(num_mom)),  # share of signal
        (stat["rms_var"], torch.square(stat["rms_mean"])),  # how unequal the parameters are
        (stat["param_square"], torch.square(rows.scale)),  # how far the parameters have grown
        (grad, grad.mean().expand_as(grad)),  # among the tensors
    ]
    above, below = (torch.stack(side) + TINY for side in zip(*pairs, strict=True))
    return torch.clamp(0.5 * torch.log(above / below), -5.0, 5.0).unbind()


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM step; gates in the order i, g, f, o, and 1 added to the forget gate."""
    i, g, f, o = (torch.cat([x, h], dim=1) @ w + b).chunk(4, dim=1)
    c = torch.sigmoid(f + 1.0) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def tensor_scale(rms: Tensor, shapes: Shapes, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Initial and current scale ``[T]`` of every tensor, from the root mean square ``[T]`` of its parameters.

    A matrix starts with its root mean square, at least .3 of the mean of all matrices; other tensors, often zeros or
    ones at first, start between .3 and 1 of it. Later the scale follows the parameters within a factor of two.
    """
    mean = (rms * shapes.is_matrix).sum() / shapes.is_matrix.sum() if shapes.any_matrix else rms.mean()
    mean = torch.where(mean > 0, mean, torch.full_like(mean, EMPTY_SCALE))
    matrix = torch.maximum(rms, SMALLEST_SCALE * mean)
    other = torch.minimum(matrix, mean)
    start = torch.where(shapes.is_matrix > 0, matrix, other)
    initial = torch.where(initial > 0, initial, start)
    return initial, torch.minimum(torch.maximum(rms, 0.5 * initial), 2.0 * initial)


def advance(
    spec: ThetaSpec,
    weights: Weights,
    globals_: Globals,
    rows: Rows,
    stats: Tensor,
    shapes: Shapes,
    loss: Tensor | None,
    total_steps: Tensor,
) -> tuple[Globals, Rows, Conditioning, Tensor]:
    """One step of everything at tensor level, between the two device operations.

    Args:
        stats: ``[T, S]`` from ``accumulate``.
        loss: training loss ``[]``, or None.
        total_steps: ``[]`` number of steps planned, 0 when unknown.

    Returns:
        New global state and rows (feedback not yet updated), the conditioning of ``apply``, and the LSTM's input.
    """
    rows = rows._replace(updates=rows.updates + 1.0)
    globals_ = observe_train(spec, globals_, loss)
    globals_ = next_clip(spec, globals_, stats[:, STATS.index("grad_square")])
    rms = torch.sqrt(stats[:, STATS.index("param_square")])
    initial, scale = tensor_scale(rms, shapes, rows.scale)
    rows = rows._replace(scale=initial)
    time = time_inputs(spec, globals_.step, total_steps, stats)
    x = lstm_inputs(spec, globals_, rows, stats, shapes, time)
    h, c = lstm_cell(x, rows.h, rows.c, weights["lstm.w"], weights["lstm.b"])
    rows = rows._replace(h=h, c=c)
    from_lstm = (h @ weights["lstm_to_lstm.w"] + weights["lstm_to_lstm.b"]).mean(dim=0)
    globals_ = globals_._replace(step=globals_.step + 1, from_lstm=from_lstm)

    facts = torch.cat(
        [time.expand(stats.shape[0], -1), tensor_facts(spec, shapes, stats[:, STATS.index("param_square")])], dim=1
    )
    constant = torch.cat([facts, h @ weights["lstm_to_mlp.w"] + weights["lstm_to_mlp.b"]], dim=1)
    multiplier = torch.ones_like(rms)
    if spec.step_control:
        log_step = torch.cat([h, x], dim=1) @ weights["step.w"] + weights["step.b"]
        moving = stats[:, STATS.index("grad_square")] > 0.0  # without a gradient, a tensor does not drift
        whole = moving * torch.clamp(rows.updates / WARMUP, max=1.0)
        multiplier = whole * scale * torch.exp(torch.clamp(log_step, -MAX_LOG_STEP, MAX_LOG_STEP))
    column_scale, column_shift = spec.features.column_map(stats, rows.updates, shapes.decays)
    return globals_, rows, Conditioning(column_scale, column_shift, constant, multiplier), x
