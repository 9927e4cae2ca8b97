"""The whole optimizer in plain PyTorch: the definition of correct.

Pure functions of any floating dtype, in one file to be read beside the paper: nothing is folded, fused or reduced
early, and every intermediate is in the trace that :func:`update` returns. The kernels (csrc/, cuda/) compute the same
two operations, :func:`accumulate` and :func:`apply`, and are tested against this file. Everything can be vmapped.

One update, with K decays, in order::

    grad   = clamp(grad, -limit, limit)                     limit from the steps before; NaN counts as 0
    mom_k  = d_k mom_k + (1 - d_k) grad                     no bias correction
    rms_k  = d_k rms_k + (1 - d_k) grad^2
    h, c   = LSTM(statistics of the tensor, losses, time)   one row per tensor
    o      = MLP(per-parameter columns, per-tensor inputs)
    d      = o_0 exp(magnitude_rate o_1)                    of a matrix, as far as its gate opens, orthogonalised
    param -= d step_multiplier
    feedback = mean of o_2: over the tensor                 input of the next LSTM step

Source: arXiv:2009.11243, appendix C, and its author's port (rnn_mlp_lopt in google/learned_optimization).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.rule import tensor_lstm
from lopt.rule.constants import LARGEST, LARGEST_PARAM
from lopt.rule.features import FEATURE_SETS, STATS, round_decays
from lopt.rule.inputs import Shapes
from lopt.rule.matrices import Matrix
from lopt.rule.orthogonal import orthogonalise
from lopt.rule.rounding import Coding, Rounding, decoded
from lopt.rule.spec import ThetaSpec
from lopt.rule.step import NOTHING, Seams, run
from lopt.rule.tensor_lstm import Conditioning, Globals, Rows, Weights


class State(NamedTuple):
    """Everything the optimizer remembers between two steps."""

    globals: Globals
    rows: Rows
    mom: list[Tensor]  # per tensor [num_mom, numel]
    rms: list[Tensor]  # per tensor [num_rms, numel]


class Update(NamedTuple):
    """Result of :func:`update`."""

    params: list[Tensor]
    state: State
    trace: dict[str, Any]


def init_state(spec: ThetaSpec, weights: Weights, params: Sequence[Tensor]) -> State:
    """State before the first step, in the dtype of ``weights``."""
    like = weights["initial_h"]
    return State(
        tensor_lstm.init_globals(spec, weights),
        tensor_lstm.init_rows(spec, weights, len(params)),
        [like.new_zeros(len(spec.mom_decays), param.numel()) for param in params],
        [like.new_zeros(len(spec.rms_decays), param.numel()) for param in params],
    )


def clip_gradient(grad: Tensor, limit: Tensor) -> Tensor:
    """Elementwise clamp to ``+-limit``; NaN becomes 0."""
    grad = torch.where(torch.isnan(grad), torch.zeros_like(grad), grad)
    return torch.minimum(torch.maximum(grad, -limit), limit)


def raw_columns(spec: ThetaSpec, grad: Tensor, param: Tensor, mom: Tensor, rms: Tensor) -> Tensor:
    """``[columns, numel]`` raw per-parameter inputs from the clipped gradient and the new accumulators.

    Those of the sets that are compiled in, all decays at once, are what their formulas say, as tests compare.
    """
    if spec.feature_set not in FEATURE_SETS:
        return spec.features.values(spec.features.trees, grad, param, mom, rms)
    if spec.feature_set == "paper":
        inverse = torch.rsqrt(rms + 1e-6)
        log_param = torch.log(torch.abs(param) + 1e-8)
        return torch.cat([grad[None], param[None], log_param[None], mom, rms, mom * inverse, inverse])
    inverse = torch.rsqrt(rms + 1e-24)
    log_rms = 0.5 * torch.log(rms + 1e-24)
    return torch.cat(
        [
            mom * inverse[1],
            torch.stack([grad * inverse[1], mom[0] * inverse[0], param, grad]),
            mom,
            torch.stack([log_rms[1], log_rms[0] - log_rms[1]]),
        ]
    )


def moment_values(spec: ThetaSpec, grad: Tensor, param: Tensor, mom: Tensor, rms: Tensor) -> Tensor:
    """``[moments, numel]``, of which the column maps need the means over the tensor."""
    if spec.feature_set not in FEATURE_SETS:
        return spec.features.values(spec.features.moment_trees, grad, param, mom, rms)
    if spec.feature_set == "paper":
        return torch.square(raw_columns(spec, grad, param, mom, rms))
    return torch.cat([torch.square(torch.cat([param[None], grad[None], mom])), rms[1:2]])


def moments(spec: ThetaSpec, grad: Tensor, param: Tensor, mom: Tensor, rms: Tensor) -> Tensor:
    """``[moments]`` means over the tensor that the column maps need."""
    return moment_values(spec, grad, param, mom, rms).mean(dim=1)


def bounded(param: Tensor) -> Tensor:
    """Parameters as the statistics see them: NaN for what is not finite."""
    return torch.where(torch.isfinite(param), torch.clamp(param, -LARGEST, LARGEST), torch.nan)


def accumulators(spec: ThetaSpec, grad: Tensor, mom: Tensor, rms: Tensor) -> tuple[Tensor, Tensor]:
    """Momenta and second moments after a clipped gradient."""
    mom_decay = round_decays(spec.mom_decays, grad)[:, None]
    rms_decay = round_decays(spec.rms_decays, grad)[:, None]
    return mom_decay * mom + (1.0 - mom_decay) * grad, rms_decay * rms + (1.0 - rms_decay) * torch.square(grad)


def accumulate(
    spec: ThetaSpec,
    param: Tensor,
    grad: Tensor,
    mom: Tensor,
    rms: Tensor,
    limit: Tensor,
    rounding: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First operation, for one tensor: clip, update the accumulators, reduce statistics.

    Args:
        param, grad: ``[numel]``.
        mom, rms: ``[num_mom, numel]``, ``[num_rms, numel]``.
        limit: ``[]`` clip limit.
        rounding: how a narrow state is rounded, at once; statistics see what the next step will see.

    Returns:
        Clipped gradient, new mom, new rms, and the statistics ``[S]`` in the order of csrc/rule/stats.h.
    """
    nonfinite = torch.logical_not(torch.isfinite(grad)).sum().to(grad.dtype)
    grad = clip_gradient(grad, limit)
    param = bounded(param)
    mom, rms = accumulators(spec, grad, mom, rms)
    if rounding is not None:
        rounded = rounding(torch.cat([mom, rms]))
        mom, rms = rounded[: len(mom)], rounded[len(mom) :]
    common = [
        torch.square(grad).mean(),
        torch.square(param).mean(),
        nonfinite,
        *(value for x in (param, mom, rms) for value in (x.mean(), x.var(correction=0))),
    ]
    return grad, mom, rms, torch.cat([torch.stack(common), moments(spec, grad, param, mom, rms)])


def apply(
    spec: ThetaSpec,
    weights: Weights,
    param: Tensor,
    grad: Tensor,
    mom: Tensor,
    rms: Tensor,
    conditioning: Conditioning,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Second operation, for one tensor: features, MLP, direction.

    Args:
        param, grad, mom, rms: as :func:`accumulate` returned them (``grad`` clipped).
        conditioning: one row of it.

    Returns:
        Direction ``[numel]``; feedback ``[from_mlp]``; MLP input and output ``[numel, ...]``.
    """
    columns = raw_columns(spec, grad, param, mom, rms) * conditioning.scale[:, None] + conditioning.shift[:, None]
    if spec.feature_clip is not None:
        columns = torch.clamp(columns, -spec.feature_clip, spec.feature_clip)
    x = torch.cat([columns.T, conditioning.constant.expand(param.shape[0], -1)], dim=1)
    hidden = torch.relu(x @ weights["mlp.w1"] + weights["mlp.b1"])
    if spec.mlp_layers == 2:
        hidden = torch.relu(hidden @ weights["mlp.w2"] + weights["mlp.b2"])
    out = hidden @ weights["mlp.w3"] + weights["mlp.b3"]
    direction = out[:, 0]
    if spec.linear_skip:
        direction = direction + columns.T @ weights["skip"]
    direction = direction * torch.exp(out[:, 1] * spec.magnitude_rate) * spec.features.active(rms)
    return direction, out[:, 2:].mean(dim=0), x, out


def whole_direction(spec: ThetaSpec, direction: Tensor, matrix: Matrix, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Third operation, for a matrix that may be treated as a whole: new direction ``[numel]``, and its rank ``[]``."""
    known = torch.where(torch.abs(direction) <= LARGEST_PARAM, direction, torch.zeros_like(direction))
    known = known.reshape(matrix.rows, matrix.columns)
    new, rank = orthogonalise(known, gate, spec.newton_schulz, turned=matrix.turned)
    return new.reshape(-1), rank


def write(param: Tensor, direction: Tensor, step_size: Tensor | float, keep: Tensor | float) -> Tensor:
    """Last operation, for one tensor: ``keep param - step_size direction``, as it was where it would not stay finite.

    Args:
        param, direction: ``[numel]``.
        step_size, keep: of :func:`lopt.rule.tensor_lstm.step_sizes`.
    """
    moved = keep * param - direction * step_size
    moved = torch.where(torch.abs(moved) <= LARGEST_PARAM, moved, param)  # also NaN, of a step of NaN
    still = (torch.as_tensor(step_size) == 0) & (torch.as_tensor(keep) == 1)  # lr = 0 changes no bit
    return torch.where(still, param, moved)


def lag(stats: Tensor, before: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """What a step with ``stats="lagged"`` sees, and what the next one will.

    A tensor's first step has nothing before it and sees its own statistics; the next one sees them again, without the
    number of non-finite gradients, which is counted once.

    Args:
        stats, before: ``[T, S]`` of this step and of the one before.
        updates: ``[T]`` how often the accumulators were updated before this step.
    """
    first = (updates == 0)[:, None]
    counted = torch.arange(stats.shape[1], device=stats.device) == STATS.index("nonfinite")
    return torch.where(first, stats, before), torch.where(first & counted, 0.0, stats)


def observe_valid(spec: ThetaSpec, state: State, loss: Tensor) -> State:
    """State after a validation loss."""
    return state._replace(globals=tensor_lstm.observe_valid(spec, state.globals, loss))


class ReferencePhases:
    """The phases of one step (:mod:`lopt.rule.step`) on plain tensors; arguments are those of :func:`update`.

    Nothing that was given is written: the result is :meth:`result`.
    """

    def __init__(
        self,
        spec: ThetaSpec,
        weights: Weights,
        state: State,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        loss: Tensor | None,
        lr: float | Tensor,
        weight_decay: float | Tensor,
        total_steps: float | Tensor,
        before: Tensor | None,
        positions: Sequence[int] | None,
        shapes: Shapes | None,
        scales: Sequence[Tensor] | None,
    ) -> None:
        self.spec, self.weights, self.state, self.loss = spec, weights, state, loss
        self.lr, self.weight_decay, self.before = lr, weight_decay, before
        like = weights["initial_h"]
        # Contiguous, since strides change the order of sums.
        self.params = [param.reshape(-1).to(like.dtype).contiguous() for param in params]
        self.grads = [grad.reshape(-1).to(like.dtype).contiguous() for grad in grads]
        self.total_steps = torch.as_tensor(total_steps, dtype=like.dtype, device=like.device)
        self.shapes = shapes or Shapes.of(spec, [tuple(param.shape) for param in params], like)
        self.positions = range(len(params)) if positions is None else positions
        self.scales = scales
        self.trace: dict[str, Any] = {}

    def begin(self) -> None:
        self.limit = tensor_lstm.clip_limit(self.spec, self.state.globals)

    def _rounding(self, position: int) -> Rounding:
        # In one sweep advance, which counts the step, comes before accumulate.
        return Rounding(int(self.state.globals.step) + int(self.spec.stats == "lagged"), position)

    def _accumulate(self, t: int, position: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of one tensor; ``stored`` gets what its state is then."""
        mom, rms, dtype = self.state.mom[t], self.state.rms[t], self.limit.dtype
        rounding: Rounding | Coding | None = None
        if self.scales is not None:
            rounding = Coding(self._rounding(position), len(mom))
            mom, rms = decoded(mom, rms, self.scales[t])
        elif mom.dtype == torch.bfloat16:
            rounding = self._rounding(position)
        operands = self.params[t], self.grads[t], mom.to(dtype), rms.to(dtype)
        result = accumulate(self.spec, *operands, self.limit, rounding)
        self.stored.append(rounding.stored if isinstance(rounding, Coding) else result[1:3])
        return result

    def accumulate(self) -> Tensor:
        self.stored: list[tuple[Tensor, ...]] = []
        accumulated = [self._accumulate(t, position) for t, position in enumerate(self.positions)]
        self.clipped, self.mom, self.rms = ([item[k] for item in accumulated] for k in range(3))
        return torch.stack([item[3] for item in accumulated])

    def advance(self, stats: Tensor) -> None:
        self.stats = self.seen = self.kept = stats
        if self.spec.stats == "lagged":
            if self.before is None:
                raise ValueError(
                    "before: a theta with stats='lagged' needs the statistics of the step before, got none"
                )
            self.seen, self.kept = lag(stats, self.before, self.state.rows.updates)
        self.globals, self.rows, self.conditioning, self.lstm_input = tensor_lstm.advance(
            self.spec,
            self.weights,
            self.state.globals,
            self.state.rows,
            self.seen,
            self.shapes,
            self.loss,
            self.total_steps,
        )

    def apply(self) -> Tensor:
        self.applied = [
            apply(
                self.spec,
                self.weights,
                param,
                self.clipped[t],
                self.mom[t],
                self.rms[t],
                Conditioning(*(value[t] for value in self.conditioning)),
            )
            for t, param in enumerate(self.params)
        ]
        return torch.stack([item[1] for item in self.applied])

    def direction(self) -> None:
        lr, decay = (
            torch.as_tensor(x, dtype=self.stats.dtype, device=self.stats.device).expand(len(self.params))
            for x in (self.lr, self.weight_decay)
        )
        self.step_size, keep = tensor_lstm.step_sizes(self.spec, self.conditioning.multiplier, lr, decay)
        self.directions, ranks = [item[0] for item in self.applied], list(self.rows.rank.unbind())
        for t, matrix in enumerate(self.shapes.matrices if self.spec.newton_schulz else ()):
            if matrix.whole:
                self.directions[t], ranks[t] = whole_direction(
                    self.spec, self.directions[t], matrix, self.conditioning.gate[t]
                )
        self.written = [
            write(param, direction, self.step_size[t], keep[t])
            for t, (param, direction) in enumerate(zip(self.params, self.directions, strict=True))
        ]
        rank = tensor_lstm.next_rank(self.rows.rank, torch.stack(ranks), self.step_size, self.conditioning.gate)
        self.rows = self.rows._replace(rank=rank)

    def finish(self, means: Tensor) -> None:
        self.rows = self.rows._replace(feedback=tensor_lstm.next_feedback(self.rows.feedback, means, self.step_size))

    def result(self, params: Sequence[Tensor]) -> "Update":
        """New parameters in the shapes of ``params``, new state, and every intermediate."""
        new_params = [new.reshape(param.shape) for new, param in zip(self.written, params, strict=True)]
        trace = {
            "clip_limit": self.limit,
            "grad": self.clipped,
            "stats": self.stats,
            "seen": self.seen,
            "kept": self.kept,
            "lstm_input": self.lstm_input,
            "conditioning": self.conditioning,
            "mlp_input": [item[2] for item in self.applied],
            "mlp_output": [item[3] for item in self.applied],
            "direction": self.directions,
            "step_size": self.step_size,
        }
        if self.scales is not None:
            trace["scales"] = [item[2] for item in self.stored]
        mom, rms = ([item[k] for item in self.stored] for k in range(2))
        return Update(new_params, State(self.globals, self.rows, mom, rms), trace)


def update(
    spec: ThetaSpec,
    weights: Weights,
    state: State,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    loss: Tensor | None = None,
    *,
    lr: float | Tensor = 1.0,
    weight_decay: float | Tensor = 0.0,
    total_steps: float | Tensor = 0.0,
    before: Tensor | None = None,
    positions: Sequence[int] | None = None,
    shapes: Shapes | None = None,
    scales: Sequence[Tensor] | None = None,
    seams: Seams = NOTHING,
) -> Update:
    """One training update of all tensors: the phases of :mod:`lopt.rule.step` in their order.

    Args:
        weights: the tensors of theta; everything is computed in their dtype.
        state: ``mom`` and ``rms`` in that dtype, or in bfloat16: then they are rounded stochastically.
        params, grads: non-empty tensors of any shape.
        loss: training loss ``[]``; None or a non-finite one repeats the last one.
        lr, weight_decay: of all tensors, or ``[T]``.
        total_steps: number of steps planned, 0 when unknown.
        before: ``[T, S]`` for ``stats="lagged"``: ``trace["kept"]`` of the step before, zeros in the first.
        positions: of the tensors among all that the optimizer has, by which a narrow state is rounded; 0, 1, ... by
            default.
        shapes: facts about ``params``, where more is known than their shapes, or they are a part of a model.
        scales: where ``mom`` and ``rms`` are in 8 bits, those of their blocks; ``trace["scales"]`` has the new ones.
        seams: what is done between the phases.

    Raises:
        ValueError: theta needs ``before``, which was not given.

    Example:
        >>> from lopt import Theta
        >>> theta = Theta.init("paper")
        >>> params, grads = [torch.ones(3)], [torch.ones(3)]
        >>> state = init_state(theta.spec, theta.tensors, params)
        >>> params, state, trace = update(theta.spec, theta.tensors, state, params, grads, torch.tensor(2.0))
        >>> trace["mlp_input"][0].shape
        torch.Size([3, 54])
    """
    phases = ReferencePhases(
        spec, weights, state, params, grads, loss, lr, weight_decay, total_steps, before, positions, shapes, scales
    )
    run(phases, seams)
    return phases.result(params)
