"""Tensor-level state: per-tensor statistics and losses -> LSTM -> what the per-parameter MLP is conditioned on.

Pure functions over T rows, one per parameter tensor: the definition, used by the reference, of what
csrc/rule/tensor_lstm.h does for the compiled back ends. They stay on the device of their inputs, never read a value
back, and can be vmapped.

Source: arXiv:2009.11243, appendix C.2 to C.4, with the constants of the author's port.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.rule import inputs, losses
from lopt.rule.constants import EMPTY_SCALE, EPSILON, MAX_LOG_STEP, SCALE_GROWTH, SMALLEST_SCALE, WARMUP
from lopt.rule.features import STATS, bias_corrections
from lopt.rule.inputs import Seen, Shapes
from lopt.rule.losses import LossState
from lopt.rule.spec import ThetaSpec

Weights = Mapping[str, Tensor]


class ClipState(NamedTuple):
    """Fields of the gradient clipper's state."""

    steps: Tensor  # starts at 1
    rms: Tensor  # running root mean square of gradients, with the bias of its start

    @classmethod
    def of(cls, state: Tensor) -> "ClipState":
        """The fields of a state ``[2]``."""
        return cls(*state.unbind())


class Globals(NamedTuple):
    """State that all tensors share."""

    step: Tensor  # [] number of updates so far
    train_loss: Tensor  # [6] lopt.rule.losses.LossState
    valid_loss: Tensor  # [6] the same
    clip: Tensor  # [2] ClipState
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


def init_globals(spec: ThetaSpec, weights: Weights) -> Globals:
    """Global state before the first step."""
    like = weights["initial_from_lstm"]
    return Globals(
        step=torch.zeros((), dtype=torch.int64, device=like.device),
        train_loss=losses.init_loss(like),
        valid_loss=losses.init_loss(like),
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


def observe_train(spec: ThetaSpec, globals_: Globals, loss: Tensor | None) -> Globals:
    """Global state after a training loss. None or a non-finite one repeats the last; before any, nothing changes."""
    state = globals_.train_loss
    last, seen = LossState.of(state).last, LossState.of(state).updates > 0
    if loss is None:
        current, usable = last, seen
    else:
        loss = loss.to(state)
        given = torch.isfinite(loss)
        current, usable = torch.where(given, loss, last), given | seen
    updated = losses.next_loss(state, current, spec.train_loss_decay)
    return globals_._replace(train_loss=torch.where(usable, updated, state))


def observe_valid(spec: ThetaSpec, globals_: Globals, loss: Tensor) -> Globals:
    """Global state after a validation update; a non-finite loss counts as none.

    For robust inputs, a loss above the first one counts as the first one. Otherwise, a few steps that overshoot at the
    beginning would stay in the mean for hundreds of steps, and look like overfitting while the loss falls again.
    """
    state, old = globals_.valid_loss, LossState.of(globals_.valid_loss)
    given = torch.isfinite(loss.to(state))
    safe = torch.where(given, loss.to(state), torch.zeros_like(old.mean))
    if spec.inputs.robust:
        safe = torch.where(old.updates > 0, torch.minimum(safe, old.first), safe)
    updated = torch.where(given, losses.next_loss(state, safe, spec.valid_loss_decay), state)
    step = globals_.step + given.to(torch.int64) if spec.valid_advances_step else globals_.step
    return globals_._replace(valid_loss=updated, step=step)


def clip_limit(spec: ThetaSpec, globals_: Globals) -> Tensor:
    """Bound of every gradient element in this step, from the gradients of the steps before."""
    count, value = ClipState.of(globals_.clip)
    return value / (1.0 - torch.pow(value.new_full((), spec.clip_decay), count)) * spec.clip_multiplier


def next_clip(spec: ThetaSpec, globals_: Globals, grad_square: Tensor) -> Globals:
    """Clipper state after this step; ``grad_square`` ``[T]`` are the mean squares of the clipped gradients."""
    count, value = ClipState.of(globals_.clip)
    rms = torch.sqrt(EPSILON + grad_square.mean())
    value = spec.clip_decay * value + (1.0 - spec.clip_decay) * rms
    return globals_._replace(clip=torch.stack(ClipState(count + 1.0, value)))


def seen(spec: ThetaSpec, globals_: Globals, rows: Rows, stats: Tensor, shapes: Shapes, total_steps: Tensor) -> Seen:
    """What the inputs at tensor level are computed from; state as it is when the LSTM runs."""
    by_name = dict(zip((*STATS, *spec.features.moments), stats.unbind(1), strict=True))
    return Seen(
        by_name,
        shapes,
        bias_corrections(rows.updates, shapes.decays),
        rows.scale,
        by_name["grad_square"].mean(),
        globals_.train_loss,
        globals_.valid_loss,
        globals_.step,
        total_steps,
    )


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
    return initial, torch.minimum(torch.maximum(rms, initial / SCALE_GROWTH), SCALE_GROWTH * initial)


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
    values = spec.inputs.values(spec, seen(spec, globals_, rows, stats, shapes, total_steps))
    num_tensors = len(stats)
    scalars = inputs.stack(values, spec.lstm_names, num_tensors)
    x = torch.cat([globals_.from_lstm.expand(num_tensors, -1), rows.feedback, scalars], dim=1)
    h, c = lstm_cell(x, rows.h, rows.c, weights["lstm.w"], weights["lstm.b"])
    rows = rows._replace(h=h, c=c)
    from_lstm = (h @ weights["lstm_to_lstm.w"] + weights["lstm_to_lstm.b"]).mean(dim=0)
    globals_ = globals_._replace(step=globals_.step + 1, from_lstm=from_lstm)

    to_mlp = h @ weights["lstm_to_mlp.w"] + weights["lstm_to_mlp.b"]
    constant = torch.cat([inputs.stack(values, spec.constant_names, num_tensors), to_mlp], dim=1)
    multiplier = torch.ones_like(rms)
    if spec.step_control:
        log_step = torch.cat([h, x], dim=1) @ weights["step.w"] + weights["step.b"]
        moving = stats[:, STATS.index("grad_square")] > 0.0  # without a gradient, a tensor does not drift
        whole = moving * torch.clamp(rows.updates / WARMUP, max=1.0)
        multiplier = whole * scale * torch.exp(torch.clamp(log_step, -MAX_LOG_STEP, MAX_LOG_STEP))
    column_scale, column_shift = spec.features.column_map(stats, rows.updates, shapes.decays)
    return globals_, rows, Conditioning(column_scale, column_shift, constant, multiplier), x
