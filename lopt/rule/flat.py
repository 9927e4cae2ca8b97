"""One update of all tensors laid end to end: the reference in few operations, to be differentiated.

What :mod:`lopt.rule.reference` does tensor by tensor is done at once for the concatenation of all parameters; only the
means over a tensor know where it begins. There are a third of the operations, which is what an unroll of small tensors
costs. Everything is a pure function of theta, parameters and state, so that autograd gives the gradient of what comes
of an update. The parts are those of the reference, to which results are compared.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.rule import reference, tensor_lstm
from lopt.rule.inputs import Shapes
from lopt.rule.orthogonal import orthogonalise
from lopt.rule.spec import ThetaSpec
from lopt.rule.tensor_lstm import Globals, Rows, Weights


class FlatState(NamedTuple):
    """:class:`lopt.rule.reference.State`, with the accumulators of all tensors end to end."""

    globals: Globals
    rows: Rows
    mom: Tensor  # [num_mom, N]
    rms: Tensor  # [num_rms, N]
    before: Tensor  # [T, S] statistics of the step before, for lagged ones


class Group(NamedTuple):
    """Matrices of one shape whose directions may be orthogonalised."""

    rows: int
    columns: int
    turned: bool
    tensors: Tensor  # their positions among the tensors
    places: Tensor  # the positions of their elements


class Flat:
    """The update of tensors of given shapes.

    Args:
        shapes: of the tensors, in order.
        facts: about them.

    Example:
        >>> from lopt import Theta
        >>> theta = Theta.init("compact")
        >>> facts = Shapes.of(theta.spec, [(2, 3), (2,)], theta.tensors["initial_h"])
        >>> flat = Flat(theta.spec, [(2, 3), (2,)], facts)
        >>> params = flat.join([torch.ones(2, 3), torch.zeros(2)])
        >>> state = flat.init_state(theta.tensors)
        >>> params, state = flat.update(theta.tensors, state, params, torch.ones(8), torch.tensor(1.0))
        >>> [tuple(param.shape) for param in flat.split(params)]
        [(2, 3), (2,)]
    """

    def __init__(self, spec: ThetaSpec, shapes: Sequence[Sequence[int]], facts: Shapes) -> None:
        self.spec, self.facts = spec, facts
        self.shapes = [torch.Size(shape) for shape in shapes]
        self.sizes = [shape.numel() for shape in self.shapes]
        device = facts.numel.device
        self.owner = torch.repeat_interleave(torch.tensor(self.sizes)).to(device)  # [N] which tensor an element is of
        first = [0, *torch.tensor(self.sizes).cumsum(0).tolist()]
        found: dict[tuple[int, int, bool], list[int]] = {}
        for tensor, matrix in enumerate(facts.matrices if spec.newton_schulz else ()):
            if matrix.whole:
                found.setdefault((matrix.rows, matrix.columns, matrix.turned), []).append(tensor)
        self.groups = [
            Group(
                *key,
                torch.tensor(tensors, device=device),
                torch.cat([torch.arange(first[tensor], first[tensor + 1]) for tensor in tensors]).to(device),
            )
            for key, tensors in found.items()
        ]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """``[N]``: all tensors end to end."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def split(self, values: Tensor) -> list[Tensor]:
        """The inverse of :meth:`join`."""
        return [part.view(shape) for part, shape in zip(torch.split(values, self.sizes), self.shapes, strict=True)]

    def init_state(self, weights: Weights) -> FlatState:
        """State before the first step, in the dtype of ``weights``."""
        spec, like = self.spec, weights["initial_h"]
        return FlatState(
            tensor_lstm.init_globals(spec, weights),
            tensor_lstm.init_rows(spec, weights, len(self.sizes)),
            like.new_zeros(len(spec.mom_decays), len(self.owner)),
            like.new_zeros(len(spec.rms_decays), len(self.owner)),
            like.new_zeros(len(self.sizes), spec.features.num_stats),
        )

    def observe_valid(self, state: FlatState, loss: Tensor) -> FlatState:
        """State after a validation loss."""
        return state._replace(globals=tensor_lstm.observe_valid(self.spec, state.globals, loss))

    def means(self, values: Tensor) -> Tensor:
        """Means over the tensors ``[..., T]`` of ``[..., N]``."""
        sums = values.new_zeros(*values.shape[:-1], len(self.sizes)).index_add(-1, self.owner, values)
        return sums / self.facts.numel

    def of_owner(self, values: Tensor) -> Tensor:
        """``[..., N]``: for every element the value ``[..., T]`` of its tensor."""
        return values.index_select(-1, self.owner)

    def statistics(self, grad: Tensor, param: Tensor, mom: Tensor, rms: Tensor, nonfinite: Tensor) -> Tensor:
        """``[T, S]``, those of :func:`lopt.rule.reference.accumulate`."""
        accumulators = (param[None], mom, rms)
        rows = torch.split(self.means(torch.cat(accumulators)), [len(values) for values in accumulators])
        means = [row.mean(dim=0) for row in rows]
        centred = [torch.square(x - self.of_owner(mean)) for x, mean in zip(accumulators, means, strict=True)]
        rows = torch.split(self.means(torch.cat(centred)), [len(values) for values in accumulators])
        variances = [row.mean(dim=0) for row in rows]
        squares = self.means(torch.square(torch.stack([grad, param])))
        both = [value for pair in zip(means, variances, strict=True) for value in pair]
        moments = self.means(reference.moment_values(self.spec, grad, param, mom, rms))
        count = self.means(nonfinite.to(grad)) * self.facts.numel
        return torch.stack([*squares, count, *both, *moments], dim=1)

    def directions(
        self,
        weights: Weights,
        grad: Tensor,
        param: Tensor,
        mom: Tensor,
        rms: Tensor,
        conditioning: tensor_lstm.Conditioning,
    ) -> tuple[Tensor, Tensor]:
        """``[N]`` of :func:`lopt.rule.reference.apply`, and feedback ``[T, from_mlp]``."""
        spec = self.spec
        columns = reference.raw_columns(spec, grad, param, mom, rms)
        columns = columns * self.of_owner(conditioning.scale.T) + self.of_owner(conditioning.shift.T)
        if spec.feature_clip is not None:
            columns = torch.clamp(columns, -spec.feature_clip, spec.feature_clip)
        of_columns, of_tensor = torch.split(weights["mlp.w1"], [len(columns), conditioning.constant.shape[1]])
        hidden = of_columns.T @ columns + self.of_owner((conditioning.constant @ of_tensor + weights["mlp.b1"]).T)
        hidden = torch.relu(hidden)
        if spec.mlp_layers == 2:
            hidden = torch.relu(weights["mlp.w2"].T @ hidden + weights["mlp.b2"][:, None])
        out = weights["mlp.w3"].T @ hidden + weights["mlp.b3"][:, None]
        direction = out[0] + weights["skip"] @ columns if spec.linear_skip else out[0]
        direction = direction * torch.exp(out[1] * spec.magnitude_rate) * spec.features.active(rms)
        return direction, self.means(out[2:]).T

    def update(
        self,
        weights: Weights,
        state: FlatState,
        params: Tensor,
        grads: Tensor,
        loss: Tensor,
        total_steps: float = 0.0,
    ) -> tuple[Tensor, FlatState]:
        """One training update: new parameters ``[N]`` and state.

        Args:
            params, grads: ``[N]``.
            loss: training loss ``[]``.
            total_steps: number of steps planned, 0 when unknown.
        """
        spec = self.spec
        limit = tensor_lstm.clip_limit(spec, state.globals)
        nonfinite = torch.logical_not(torch.isfinite(grads))
        grad = reference.clip_gradient(grads, limit)
        mom, rms = reference.accumulators(spec, grad, state.mom, state.rms)
        stats = self.statistics(grad, reference.bounded(params), mom, rms, nonfinite)
        seen, before = stats, state.before
        if spec.stats == "lagged":
            seen, before = reference.lag(stats, state.before, state.rows.updates)
        total = torch.as_tensor(total_steps, dtype=params.dtype, device=params.device)
        globals_, rows, conditioning, _ = tensor_lstm.advance(
            spec, weights, state.globals, state.rows, seen, self.facts, loss, total
        )
        direction, feedback = self.directions(weights, grad, params, mom, rms, conditioning)
        one, none = torch.ones_like(self.facts.numel), torch.zeros_like(self.facts.numel)
        step_size, _ = tensor_lstm.step_sizes(spec, conditioning.multiplier, one, none)
        rank = rows.rank
        for group in self.groups:
            some = direction.index_select(0, group.places).view(-1, group.rows, group.columns)
            new, ranks = orthogonalise(
                some, conditioning.gate.index_select(0, group.tensors), spec.newton_schulz, turned=group.turned
            )
            direction = direction.index_copy(0, group.places, new.reshape(-1))
            rank = rank.index_copy(0, group.tensors, ranks)
        params = reference.write(params, direction, self.of_owner(step_size), 1.0)
        rows = rows._replace(
            rank=tensor_lstm.next_rank(rows.rank, rank, step_size, conditioning.gate),
            feedback=tensor_lstm.next_feedback(rows.feedback, feedback, step_size),
        )
        return params, FlatState(globals_, rows, mom, rms, before)
