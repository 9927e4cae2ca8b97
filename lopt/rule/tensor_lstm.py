"""Tensor-level state: per-tensor statistics and losses -> LSTM -> what the per-parameter MLP is conditioned on.

Pure functions over T rows, one per parameter tensor: the definition, used by the reference, of what
csrc/rule/tensor_lstm.h does for the compiled back ends. They stay on the device of their inputs, never read a value
back, and can be vmapped.

Source: arXiv:2009.11243, appendix C.2 to C.4, with the constants of the author's port.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.rule import inputs, losses
from lopt.rule.constants import (
    EMPTY_SCALE,
    EPSILON,
    GRAD_OUTLIER,
    LARGEST,
    MAX_LOG_STEP,
    SCALE_GROWTH,
    SCALE_OUTLIER,
    SMALLEST_SCALE,
    TINY,
    WARMUP,
)
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
    train_loss: Tensor  # [8] lopt.rule.losses.LossState
    valid_loss: Tensor  # [8] the same
    clip: Tensor  # [2] ClipState
    from_lstm: Tensor  # [from_lstm]


class Rows(NamedTuple):
    """State of each tensor."""

    h: Tensor  # [T, lstm_width]
    c: Tensor  # [T, lstm_width]
    feedback: Tensor  # [T, from_mlp]
    scale: Tensor  # [T] initial scale of the parameters, 0 until the first step
    updates: Tensor  # [T] how often the accumulators were updated
    rank: Tensor  # [T] of the last direction that was orthogonalised (lopt.rule.orthogonal), 1 before


class Conditioning(NamedTuple):
    """What the per-parameter computation of one step needs to know about each tensor."""

    scale: Tensor  # [T, columns]
    shift: Tensor  # [T, columns]
    constant: Tensor  # [T, num_constant] MLP inputs that are the same for all parameters of a tensor
    multiplier: Tensor  # [T] step multiplier beside step_multiplier; NaN: the tensor rests in this step
    gate: Tensor  # [T] in [0, 1], from the elementwise to the orthogonal direction


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
        rank=like.new_ones(num_tensors),
    )


def observe_train(spec: ThetaSpec, globals_: Globals, loss: Tensor | None) -> Globals:
    """Global state after a training loss. None or a non-finite one repeats the last; before any, nothing changes.

    What lies far from the losses before is bounded for robust inputs (:func:`lopt.rule.losses.next_loss`).
    """
    state = globals_.train_loss
    last, seen = LossState.of(state).last, LossState.of(state).updates > 0
    if loss is None:
        current, usable = last, seen
    else:
        loss = loss.to(state)
        given = torch.isfinite(loss)
        current, usable = torch.where(given, losses.bounded_loss(loss), last), given | seen
    updated = losses.next_loss(state, current, spec.train_loss_decay, spec.inputs.robust)
    return globals_._replace(train_loss=torch.where(usable, updated, state))


def observe_valid(spec: ThetaSpec, globals_: Globals, loss: Tensor) -> Globals:
    """Global state after a validation update; a non-finite loss counts as none.

    For robust inputs it is bounded as a training loss is, and one above the first counts as the first. Otherwise, a few
    steps that overshoot at the beginning would stay in the mean for hundreds of steps, and look like overfitting while
    the loss falls again.
    """
    state, old = globals_.valid_loss, LossState.of(globals_.valid_loss)
    given = torch.isfinite(loss.to(state))
    safe = torch.where(given, losses.bounded_loss(loss.to(state)), torch.zeros_like(old.mean))
    if spec.inputs.robust:
        safe = torch.where(old.updates > 0, torch.minimum(safe, old.first), safe)
    updated = torch.where(given, losses.next_loss(state, safe, spec.valid_loss_decay, spec.inputs.robust), state)
    step = globals_.step + given.to(torch.int64) if spec.valid_advances_step else globals_.step
    return globals_._replace(valid_loss=updated, step=step)


def clip_limit(spec: ThetaSpec, globals_: Globals) -> Tensor:
    """Bound of every gradient element in this step, from the gradients of the steps before."""
    count, value = ClipState.of(globals_.clip)
    unbiased = value / (1.0 - torch.pow(value.new_full((), spec.clip_decay), count))
    return torch.clamp(unbiased * spec.clip_multiplier, max=LARGEST)


def rests(stats: Tensor) -> Tensor:
    """``[T]`` bool: whether a tensor takes no part in a step, since a parameter or an accumulator is not finite."""
    looked_at = [STATS.index(name) for name in ("param_square", "grad_square", "mom_mean", "rms_mean")]
    return torch.logical_not(torch.isfinite(stats[:, looked_at]).all(dim=1))


def bounded_mean(values: Tensor, counts: Tensor, outlier: float) -> Tensor:
    """Mean over tensors that none can dominate: each counts as at most ``outlier`` times the median.

    Args:
        values: ``[T]``, at least 0.
        counts: ``[T]`` bool, which of them count; of an even number the lower of the two in the middle is the median.

    Returns:
        ``[]``, 0 where none counts.
    """
    number = counts.sum()
    ascending = torch.sort(torch.where(counts, values, torch.full_like(values, torch.inf))).values
    middle = torch.clamp(number - 1, min=0) // 2
    capped = torch.minimum(values, outlier * torch.take_along_dim(ascending, middle.reshape(1)))
    return torch.where(counts, capped, torch.zeros_like(capped)).sum() / torch.clamp(number, min=1)


def mean_grad_square(spec: ThetaSpec, grad_square: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the tensors of their mean squared gradients ``[T]``, and how many counted.

    In the paper all, arithmetically; for robust inputs those with a gradient, of which none can dominate. Tensors that
    ``rest`` do not count.
    """
    if spec.inputs.robust:
        counts = torch.logical_not(rest) & (grad_square > 0)
        return bounded_mean(grad_square, counts, GRAD_OUTLIER), counts.sum()
    number = torch.logical_not(rest).sum()
    return torch.where(rest, torch.zeros_like(grad_square), grad_square).sum() / torch.clamp(number, min=1), number


def next_clip(spec: ThetaSpec, globals_: Globals, mean_square: Tensor, number: Tensor) -> Globals:
    """Clipper state after this step, from :func:`mean_grad_square`; as it was where no tensor counted."""
    count, value = ClipState.of(globals_.clip)
    value = spec.clip_decay * value + (1.0 - spec.clip_decay) * torch.sqrt(EPSILON + mean_square)
    return globals_._replace(clip=torch.where(number > 0, torch.stack(ClipState(count + 1.0, value)), globals_.clip))


def seen(
    spec: ThetaSpec,
    globals_: Globals,
    rows: Rows,
    stats: Tensor,
    shapes: Shapes,
    total_steps: Tensor,
    mean_square: Tensor,
) -> Seen:
    """What the inputs at tensor level are computed from; state as it is when the LSTM runs.

    Args:
        mean_square: from :func:`mean_grad_square`.
    """
    by_name = dict(zip((*STATS, *spec.features.moments), stats.unbind(1), strict=True))
    return Seen(
        by_name,
        shapes,
        bias_corrections(rows.updates, shapes.decays),
        rows.scale,
        rows.rank,
        mean_square,
        globals_.train_loss,
        globals_.valid_loss,
        globals_.step,
        total_steps,
    )


def next_feedback(before: Tensor, feedback: Tensor, step_size: Tensor) -> Tensor:
    """What the next LSTM step sees of the MLP ``[T, from_mlp]``; as before where not finite or a tensor rests."""
    known = torch.isfinite(feedback) & torch.logical_not(torch.isnan(step_size))[:, None]
    return torch.where(known, torch.clamp(feedback, -LARGEST, LARGEST), before)


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM step; gates in the order i, g, f, o, and 1 added to the forget gate."""
    i, g, f, o = (torch.cat([x, h], dim=1) @ w + b).chunk(4, dim=1)
    c = torch.sigmoid(f + 1.0) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def typical_scale(rms: Tensor, moves: Tensor, shapes: Shapes) -> Tensor:
    """How large parameters are ``[]``: a mean over matrices of their root mean squares, which none can dominate.

    Matrices with a gradient count; where there is none, all matrices; then all tensors with a gradient; then all. What
    is zero never counts: .1 where everything is.

    Args:
        rms: ``[T]``, 0 for tensors that rest.
        moves: ``[T]`` bool, whether a tensor has a gradient.
    """
    kind = torch.where(rms > 0, 2 * (shapes.is_matrix > 0).long() + moves.long(), -1)
    mean = bounded_mean(rms, (kind == kind.max()) & (rms > 0), SCALE_OUTLIER)
    return torch.where(mean > 0, mean, torch.full_like(mean, EMPTY_SCALE))


def tensor_scale(rms: Tensor, mean: Tensor, shapes: Shapes, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Initial and current scale ``[T]`` of every tensor, from the root mean square ``[T]`` of its parameters.

    A matrix starts with its root mean square, at least .3 of :func:`typical_scale`; other tensors, often zeros or ones
    at first, start between .3 and 1 of it. Later the scale follows the parameters within a factor of two.
    """
    matrix = torch.maximum(rms, SMALLEST_SCALE * mean)
    other = torch.minimum(matrix, mean)
    start = torch.where(shapes.is_matrix > 0, matrix, other)
    initial = torch.where(initial > 0, initial, start)
    return initial, torch.minimum(torch.maximum(rms, initial / SCALE_GROWTH), SCALE_GROWTH * initial)


def natural_scale(rms: Tensor, shapes: Shapes, initial: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`tensor_scale` is for a natural spec: what a tensor started with, and its natural size."""
    return torch.where(initial > 0, initial, torch.clamp(rms, min=math.sqrt(TINY))), shapes.natural


def next_rank(before: Tensor, rank: Tensor, step_size: Tensor, gate: Tensor) -> Tensor:
    """What the next LSTM step sees of the ranks of directions ``[T]``.

    As before where a tensor rests or its gate is shut: so what a shut gate would do away with need not be computed.
    """
    known = torch.isfinite(rank) & torch.logical_not(torch.isnan(step_size)) & (gate > 0)
    return torch.where(known, rank, before)


def step_sizes(spec: ThetaSpec, multiplier: Tensor, lr: Tensor, weight_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Step of every tensor, and the share that is left of its parameters by weight decay, ``[T]`` each.

    ``keep = max(0, 1 - step weight_decay)``: as AdamW scales decay by its learning rate, so this does by the learned
    step, which is what AdamW's learning rate would be for this tensor now.

    Args:
        multiplier: of :class:`Conditioning`; NaN, of a tensor that rests, stays.
        lr: multiplier from outside; at 0 nothing moves.
    """
    step = lr * spec.step_multiplier * multiplier
    step = torch.where((lr > 0) | torch.isnan(multiplier), step, 0.0)
    keep = torch.clamp(1.0 - step * weight_decay, min=0.0)
    return step, torch.where((step > 0) & (weight_decay > 0), keep, 1.0)


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

    A tensor that :func:`rests` counts in nothing that others see, and keeps its row, but for the number of updates.

    Args:
        stats: ``[T, S]`` from ``accumulate``.
        loss: training loss ``[]``, or None.
        total_steps: ``[]`` number of steps planned, 0 when unknown.

    Returns:
        New global state and rows (feedback not yet updated), the conditioning of ``apply``, and the LSTM's input.
    """
    rest, before, num_tensors = rests(stats), globals_, len(stats)
    stats = torch.where(rest[:, None], torch.zeros_like(stats), stats)  # its row of results is thrown away
    grad_square = stats[:, STATS.index("grad_square")]
    mean_square, number = mean_grad_square(spec, grad_square, rest)
    globals_ = observe_train(spec, globals_, loss)
    globals_ = next_clip(spec, globals_, mean_square, number)
    rms = torch.sqrt(stats[:, STATS.index("param_square")])
    if spec.inputs.natural:
        initial, scale = natural_scale(rms, shapes, rows.scale)
    else:
        initial, scale = tensor_scale(rms, typical_scale(rms, grad_square > 0, shapes), shapes, rows.scale)
    new = rows._replace(updates=rows.updates + 1.0, scale=initial)
    values = spec.inputs.values(spec, seen(spec, globals_, new, stats, shapes, total_steps, mean_square))
    scalars = inputs.stack(values, spec.lstm_names, num_tensors)
    x = torch.cat([globals_.from_lstm.expand(num_tensors, -1), rows.feedback, scalars], dim=1)
    h, c = lstm_cell(x, rows.h, rows.c, weights["lstm.w"], weights["lstm.b"])
    to_lstm = h @ weights["lstm_to_lstm.w"] + weights["lstm_to_lstm.b"]
    some = num_tensors - rest.sum()
    from_lstm = torch.where(rest[:, None], 0.0, to_lstm).sum(dim=0) / torch.clamp(some, min=1)
    from_lstm = torch.where(some > 0, from_lstm, before.from_lstm)
    globals_ = globals_._replace(step=globals_.step + 1, from_lstm=from_lstm)

    to_mlp = h @ weights["lstm_to_mlp.w"] + weights["lstm_to_mlp.b"]
    constant = torch.cat([inputs.stack(values, spec.constant_names, num_tensors), to_mlp], dim=1)
    multiplier, gate = torch.ones_like(rms), torch.zeros_like(rms)
    if spec.newton_schulz:
        gate = torch.clamp(0.5 + torch.cat([h, x], dim=1) @ weights["gate.w"] + weights["gate.b"], 0.0, 1.0)
        gate = torch.where(shapes.whole, gate, torch.zeros_like(gate))
    if spec.step_control:
        log_step = torch.cat([h, x], dim=1) @ weights["step.w"] + weights["step.b"]
        if spec.newton_schulz:
            log_step = log_step + weights["gate.step"] * gate
        moving = grad_square > 0.0  # without a gradient, a tensor does not drift
        whole = moving * torch.clamp(new.updates / WARMUP, max=1.0)
        multiplier = whole * scale * torch.exp(torch.clamp(log_step, -MAX_LOG_STEP, MAX_LOG_STEP))
    multiplier = torch.where(rest, torch.nan, multiplier)
    column_scale, column_shift = spec.features.column_map(stats, new.updates, shapes.decays)
    h, c = (torch.where(rest[:, None], old, now) for old, now in ((rows.h, h), (rows.c, c)))
    rows = new._replace(h=h, c=c, scale=torch.where(rest, rows.scale, initial))
    return globals_, rows, Conditioning(column_scale, column_shift, constant, multiplier, gate), x
