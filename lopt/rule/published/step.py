"""One update of all tensors by a rule, as a pure function in torch's layout, for any rule.

What rules need not know is done here: gradients and parameters that are not finite, layouts, losses that are missing,
``lr`` and weight decay. It can be vmapped.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.rule import reference
from lopt.rule.constants import LARGEST
from lopt.rule.losses import LossState, init_loss, told
from lopt.rule.matrices import Kind
from lopt.rule.published.parts import factored_dims
from lopt.rule.published.rule import Now, Rule, Weights
from lopt.rule.rounding import Rounding

#: Names of what all tensors share by every rule, beside what it has for itself: numbers of updates, state of the loss.
SHARED = ("step", "train_loss")


class State(NamedTuple):
    """Everything a rule remembers between two steps."""

    shared: dict[str, Tensor]  # SHARED, and the rule's own
    tensors: list[
        dict[str, Tensor]
    ]  # accumulators of the rule's per_param are [K, *shape]; rows and columns lie so, too


class Step(NamedTuple):
    """Result of :func:`update`."""

    params: list[Tensor]
    state: State
    trace: dict[str, Any]


def init_shared(rule: Rule, weights: Weights) -> dict[str, Tensor]:
    """What all tensors share, before the first step."""
    like = next(iter(weights.values()))
    step = torch.zeros((), dtype=torch.int64, device=like.device)
    return {"step": step, "train_loss": init_loss(like), **rule.init_shared(weights)}


def init_param(rule: Rule, weights: Weights, shape: Sequence[int], kind: Kind) -> dict[str, Tensor]:
    """State of a tensor before its first step."""
    order = source_order(shape, kind)
    turned = [shape[dim] for dim in order]
    return _turned(rule, rule.init_param(weights, turned, kind), _inverse(order), factored_dims(turned))


def source_order(shape: Sequence[int], kind: Kind) -> tuple[int, ...]:
    """How a tensor of torch's is permuted into the layout of the sources: ``[out, in, ...]`` to ``[..., in, out]``.

    A matrix that is stored ``[in, out]`` (``transposed``) stays.
    """
    if len(shape) < 2 or kind.fan_in is not None:
        return tuple(range(len(shape)))
    return (*range(2, len(shape)), 1, 0)


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=lambda dim: order[dim]))


def _turned(
    rule: Rule, state: Mapping[str, Tensor], order: Sequence[int], left_out: tuple[int, int] | None
) -> dict[str, Tensor]:
    """A tensor's state with its accumulators permuted, and so the rows and columns of second moments.

    Args:
        left_out: the dimensions, before they are permuted, that ``column`` and ``row`` do not have.
    """
    dims = (0, *(1 + dim for dim in order))

    def turn(name: str, value: Tensor) -> Tensor:
        if name in rule.per_param:
            return value.permute(dims).contiguous()
        if left_out is None or name not in ("row", "column"):
            return value
        gone = 1 + left_out[name == "row"]
        return value.unsqueeze(gone).permute(dims).squeeze(dims.index(gone)).contiguous()

    return {name: turn(name, value) for name, value in state.items()}


def _as(rule: Rule, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A tensor's state with its accumulators in another dtype."""
    return {name: value.to(dtype) if name in rule.per_param else value for name, value in state.items()}


def _finite(tensor: Tensor, infinite: float) -> Tensor:
    """Without NaN, which is 0, and Inf, and within what can be squared."""
    return torch.clamp(torch.nan_to_num(tensor, 0.0, infinite, -infinite), -LARGEST, LARGEST)


def next_loss(state: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """State of the training loss after this step's, where NaN repeats the last one, and the last one that is known."""
    old = LossState.of(state)
    new = told(state, torch.where(torch.isfinite(loss) | (old.updates == 0), loss, old.last))
    known = LossState.of(new)
    return new, torch.where(known.updates > 0, known.last, torch.full_like(known.last, torch.nan))


def sizes_and_keep(sizes: Tensor, lr: Tensor, weight_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Step sizes, of tensors whose rule says ``sizes`` ``[T]``, and what is left of the parameters after weight decay:
    ``s = lr size`` and ``max(1 - s weight_decay, 0)``. NaN stays NaN, of a tensor that rests."""
    sizes = torch.where(torch.isnan(sizes), sizes, torch.where(lr > 0, lr * sizes, 0.0))
    return sizes, torch.where((sizes > 0) & (weight_decay > 0), torch.clamp(1.0 - sizes * weight_decay, min=0.0), 1.0)


def update(
    rule: Rule,
    weights: Weights,
    state: State,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    loss: Tensor,
    *,
    kinds: Sequence[Kind],
    total_steps: float,
    lr: Tensor | float = 1.0,
    weight_decay: Tensor | float = 0.0,
    positions: Sequence[int] | None = None,
) -> Step:
    """One training update of all tensors; accumulators in bfloat16 are rounded stochastically.

    Args:
        weights: the tensors of theta; everything is computed in their dtype.
        params, grads: non-empty tensors of any shape.
        loss: training loss ``[]``; a non-finite one repeats the last one.
        kinds: what is known of the tensors beside their shapes.
        total_steps: number of steps planned, 0 when unknown.
        lr, weight_decay: of all tensors, or ``[T]``.
        positions: of the tensors among all that the optimizer has, by which a narrow state is rounded; 0, 1, ... by
            default.

    Example:
        >>> from lopt import Theta
        >>> theta, kinds = Theta.init("mlp_lopt"), [Kind()]
        >>> state = State(
        ...     init_shared(theta.spec, theta.tensors), [init_param(theta.spec, theta.tensors, (4, 3), kinds[0])]
        ... )
        >>> grads, loss = [torch.ones(4, 3)], torch.tensor(2.0)
        >>> step = update(
        ...     theta.spec, theta.tensors, state, [torch.ones(4, 3)], grads, loss, kinds=kinds, total_steps=0
        ... )
        >>> int(step.state.shared["step"]), step.state.tensors[0]["mom"].shape
        (1, torch.Size([6, 4, 3]))
    """
    like = next(iter(weights.values()))
    orders = [source_order(param.shape, kind) for param, kind in zip(params, kinds, strict=True)]
    values, raw = ([tensor.to(like) for tensor in some] for some in (params, grads))
    # What is not finite counts as zero, an infinite gradient as the largest. Contiguous, since strides change the order
    # of sums.
    here = [_finite(value, 0.0).permute(order).contiguous() for value, order in zip(values, orders, strict=True)]
    clean = [_finite(grad, LARGEST).permute(order).contiguous() for grad, order in zip(raw, orders, strict=True)]
    rest = torch.stack([torch.logical_not(torch.isfinite(value)).any() for value in values])
    left_out = [factored_dims(value.shape) for value in here]
    narrow = [old["mom"].dtype == torch.bfloat16 for old in state.tensors]
    before = [
        _turned(rule, _as(rule, old, like.dtype), order, dims and (order[dims[0]], order[dims[1]]))
        for old, order, dims in zip(state.tensors, orders, left_out, strict=True)
    ]
    train, last = next_loss(state.shared["train_loss"], loss)
    total = torch.as_tensor(float(total_steps), dtype=like.dtype, device=like.device)

    def stored(t: int, mom: Tensor, rms: Tensor) -> tuple[Tensor, Tensor]:
        if not narrow[t]:
            return mom, rms
        dims = (0, *(1 + dim for dim in _inverse(orders[t])))
        both = torch.cat([mom, rms]).permute(dims)
        rounding = Rounding(int(state.shared["step"]), t if positions is None else positions[t])
        rounded = rounding(both.reshape(len(both), -1)).reshape(both.shape).permute(_inverse(dims)).contiguous()
        return rounded[: len(mom)], rounded[len(mom) :]

    now = Now(state.shared["step"], last, total, rest, stored)
    made = rule.update(weights, {name: state.shared[name] for name in rule.shared}, here, clean, before, now)

    rates, decays = (torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in (lr, weight_decay))
    sizes, keep = sizes_and_keep(torch.where(rest, torch.nan, torch.stack(made.sizes)), rates, decays)
    written = [
        reference.write(value, direction.permute(_inverse(order)), sizes[t], keep[t])
        for t, (value, direction, order) in enumerate(zip(values, made.directions, orders, strict=True))
    ]
    tensors = [
        _turned(
            rule,
            {name: torch.where(rest[t], old[name], value) for name, value in new.items()},
            _inverse(orders[t]),
            left_out[t],
        )
        for t, (old, new) in enumerate(zip(before, made.states, strict=True))
    ]
    tensors = [_as(rule, new, torch.bfloat16) if narrow[t] else new for t, new in enumerate(tensors)]
    shared = {"step": state.shared["step"] + 1, "train_loss": train, **made.shared}
    bad = torch.stack([torch.logical_not(torch.isfinite(grad)).sum() for grad in raw]).sum()
    trace = {**made.trace, "step_size": sizes, "nonfinite": torch.stack([bad, rest.sum()])}
    return Step(written, State(shared, tensors), trace)
