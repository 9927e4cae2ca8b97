"""Steps of an optimizer by a rule that others published (:mod:`lopt.rule.published`)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lopt import kernels
from lopt.distributed import is_sharded, local_of
from lopt.distributed.parts import increment_versions, part_like, place_like, whole_of
from lopt.kernels.directions import AT_ONCE
from lopt.rule import Rule, Theta
from lopt.rule.matrices import Kind, matrices_of
from lopt.rule.published import Celo2, NNAdam, VeLO, celo2, nn_adam
from lopt.rule.published import step as published
from lopt.rule.published.rule import Now
from lopt.rule.published.velo import Statistics, rank_input
from lopt.state import Groups, sample
from lopt.tensors import Decided, Tensors, one_thread

#: Shorter side of matrices up to which torch's products are computed by one thread, so that their bits repeat.
ONE_THREAD = 128


def check_options(rule: Rule, *, state_dtype: torch.dtype = torch.float32, sharded_state: bool = False) -> None:
    """Refuse what is not there for rules of others.

    Raises:
        ValueError: with what to do.
    """
    if state_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"state_dtype: rule {rule.name!r} has its state in float32 or bfloat16, got {state_dtype}; leave it out"
        )
    if sharded_state:
        raise ValueError(f"sharded_state: rule {rule.name!r} keeps whole states on every rank; leave it out")


def check_total_steps_of(rule: Rule, total_steps: float | None) -> None:
    """Refuse to step without the number of steps, where the rule needs it.

    Raises:
        ValueError: nobody said it.
    """
    if rule.needs_total_steps and not total_steps:
        raise ValueError(
            f"total_steps: rule {rule.name!r} has a schedule over the whole run; "
            "write LearnedOptimizer(..., total_steps=...)"
        )


def stepper_of(implementation: str, tensors: Tensors, theta: Theta[Any]) -> "RuleStepper | FactoredStepper":
    """What makes the steps."""
    if implementation == "reference":
        return RuleStepper(tensors, theta)
    return FactoredStepper(implementation, tensors, theta)


def step_sizes(tensors: Tensors, groups: Groups, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Step sizes and what is left of the parameters after weight decay, of the selected tensors whose rule says
    ``sizes`` ``[T]``, as in :func:`lopt.rule.published.step.update`."""
    where = torch.tensor(tensors.selected_groups, device=sizes.device)
    lr, decay = (
        torch.stack([torch.as_tensor(group[name], dtype=sizes.dtype, device=sizes.device) for group in groups])[where]
        for name in ("lr", "weight_decay")
    )
    return published.sizes_and_keep(sizes, lr, decay)


class RuleStepper:
    """Steps by lopt/rule/published.

    Of sharded parameters every rank gathers gradients, parameters and accumulators, takes the whole step, and keeps its
    part.
    """

    def __init__(self, tensors: Tensors, theta: Theta[Any]) -> None:
        self.tensors, self.rule = tensors, theta.spec
        self.matrices = matrices_of([tuple(param.shape) for param in tensors.params], tensors.kinds)
        self.decided: Decided = [], []

    def select(self) -> None:
        """Take the tensors that have a gradient now."""
        self.tensors.select()

    def step(
        self, params: list[Tensor], grads: list[Tensor], groups: Groups, shared: Mapping[str, Tensor], total_steps: int
    ) -> None:
        """One step; ``shared`` is the state of all tensors, written, with the losses since the last step in it."""
        tensors, rule, states = self.tensors, self.rule, self.tensors.selected_states
        device = sample(tensors.weights).device
        own = {name: shared[name] for name in (*published.SHARED, *rule.shared)}
        parts = tensors.parts(params)
        whole = [whole_of(place_like(part, grad)) for part, grad in zip(parts, grads, strict=True)]
        with one_thread(device):
            step = published.update(
                rule,
                tensors.weights,
                published.State(own, [{name: whole_of(value) for name, value in state.items()} for state in states]),
                list(map(whole_of, parts)),
                whole,
                _pending(shared),
                kinds=[tensors.kinds[row] for row in tensors.selected],
                total_steps=total_steps,
                lr=tensors.option("lr", groups),
                weight_decay=tensors.option("weight_decay", groups),
                positions=tensors.selected,
            )
        for part, new, old, state in zip(parts, step.params, states, step.state.tensors, strict=True):
            local_of(part).copy_(part_like(part, new[None])[0])
            for name, value in state.items():
                local_of(old[name]).copy_(part_like(part, value) if is_sharded(old[name]) else value)
        if tensors.sharded:
            increment_versions(params)
        for name, value in step.state.shared.items():
            shared[name].copy_(value)
        self.decided = list(step.trace["step_size"].unbind()), [None] * len(params)
        shared["pending_loss"].zero_()
        shared["nonfinite"].add_(step.trace["nonfinite"])


def _keep(
    states: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    now: Now,
) -> None:
    """Write rows of tables ``[T, ...]`` into the states of the tensors that do not rest."""
    for name, old, value in zip(names, before, after, strict=True):
        rows = torch.where(now.rest[:, None], old, value).unbind()
        torch._foreach_copy_([state[name] for state in states], list(rows))


def _pending(shared: Mapping[str, Tensor]) -> Tensor:
    """Mean of the losses since the last step, NaN where there is none."""
    total, count = shared["pending_loss"]
    return torch.where(count > 0, total / count, torch.full_like(total, torch.nan))


class WholeDirections:
    """Directions of matrices that a rule treats as wholes: those of one shape at once, by torch's batched products.

    Args:
        directions: by row, in torch's layout; written.
        kinds: of all rows.
    """

    def __init__(self, rule: Celo2, directions: Mapping[int, Tensor], kinds: Sequence[Kind]) -> None:
        self.rule, self.directions = rule, directions
        self.shapes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for row, direction in directions.items():
            shape = tuple(direction.shape)
            self.shapes.setdefault((shape, published.source_order(shape, kinds[row])), []).append(row)

    def treat(self, rows: Sequence[int]) -> None:
        """Those of these rows."""
        chosen = set(rows)
        for (shape, order), members in self.shapes.items():
            here = [self.directions[row] for row in members if row in chosen]
            size = max(AT_ONCE // math.prod(shape), 1)
            for batch in (here[i : i + size] for i in range(0, len(here), size)):
                self._treat(batch, order)

    def _treat(self, batch: list[Tensor], order: Sequence[int]) -> None:
        dims = (0, *(1 + dim for dim in order))
        inverse = sorted(range(len(dims)), key=lambda dim: dims[dim])
        values = torch.stack(batch).permute(dims).contiguous()
        alone = min(values.shape[-2:]) <= ONE_THREAD
        with one_thread(values.device) if alone else nullcontext():
            new = self.rule.treat(values)
        torch._foreach_copy_(batch, list(new.permute(inverse).unbind()))


class FactoredStepper:
    """Steps by the kernels.

    Parameters that are not contiguous pass through a staging copy.
    """

    def __init__(self, backend: str, tensors: Tensors, theta: Theta[Any]) -> None:
        self.tensors, self.rule = tensors, theta.spec
        shapes = [tuple(param.shape) for param in tensors.params]
        self.matrices = matrices_of(shapes, tensors.kinds)
        decays = [values.tolist() for values in self.rule.decays(tensors.weights)]
        place = tensors.kinds, tensors.home, tensors.dtype
        self.plan = kernels.FactoredPlan(backend, self.rule, decays, shapes, *place)
        self.index = torch.zeros(0, dtype=torch.int64)
        self._alone: dict[int, kernels.FactoredSelection] = {}  # by row
        self.whole: WholeDirections | None = None
        if isinstance(self.rule, VeLO):
            self.ranks = tensors.weights["initial_h"].new_tensor([rank_input(shape) for shape in shapes])
        elif not isinstance(self.rule, NNAdam):
            self.plan.weights[:] = kernels.pack_factored(self.rule, tensors.weights)
        if isinstance(self.rule, Celo2):
            self.whole = WholeDirections(self.rule, self.plan.directions, tensors.kinds)

    @property
    def decided(self) -> Decided:
        """What the last step was, copied."""
        sizes = torch.where(self.plan.rests, torch.nan, self.plan.step_size)[self.index]
        return list(sizes.unbind()), [None] * len(sizes)

    def select(self, rows: Sequence[int] | None = None) -> None:
        """Take the tensors that have a gradient now, or those that will have one."""
        tensors = self.tensors
        tensors.select(rows)
        for row, state in zip(tensors.selected, tensors.selected_states, strict=True):
            self.plan.hold(row, state)
        self.plan.select(tensors.selected)
        self.index = torch.tensor(tensors.selected, dtype=torch.int64, device=tensors.home)

    def step(
        self, params: list[Tensor], grads: list[Tensor], groups: Groups, shared: Mapping[str, Tensor], total_steps: int
    ) -> None:
        """One step; ``shared`` is the state of all tensors, written, with the losses since the last step in it."""
        plan, index, rule, home = self.plan, self.index, self.rule, self.tensors.home
        with self._tensors(params, grads):
            with one_thread(home):
                if isinstance(rule, NNAdam | Celo2):
                    self._control(rule)
            stats = plan.accumulate(shared["step"])
            with one_thread(home):
                train, last = published.next_loss(shared["train_loss"], _pending(shared))
                total = torch.full_like(last, total_steps)
                now = Now(shared["step"], last, total, plan.rests[index])
                if isinstance(rule, VeLO):
                    sizes = self._advance(rule, stats[index], shared, now)
                elif isinstance(rule, NNAdam):
                    sizes = self._move_controls(rule, stats[index], now)
                elif isinstance(rule, Celo2):
                    sizes = self._count_updates(rule, now)
                else:
                    sizes = last.new_full((len(params),), rule.step_multiplier)
                plan.step_size[index], plan.keep[index] = step_sizes(self.tensors, groups, sizes)
            plan.apply()
            if self.whole is not None:
                self.whole.treat(self.tensors.selected)
                plan.write()
        self._finish(shared, train)
        self._count(shared, index)

    @contextmanager
    def _tensors(self, params: list[Tensor], grads: list[Tensor]) -> Iterator[None]:
        """Let the plan see these tensors."""
        copies = kernels.contiguous(params)
        self.plan.set_tensors(copies, kernels.contiguous(grads))
        yield
        for param, copy in zip(params, copies, strict=True):
            if copy is not param:
                param.copy_(copy)
        increment_versions(params)

    def _count(self, shared: Mapping[str, Tensor], index: Tensor) -> None:
        bad = self.plan.stats[index, kernels.MEASURES.index("nonfinite")].double().sum()
        shared["nonfinite"].add_(torch.stack([bad, self.plan.rests[index].sum()]).to(torch.int64))

    def _finish(self, shared: Mapping[str, Tensor], train: Tensor) -> None:
        shared["train_loss"].copy_(train)
        shared["step"].add_(1)
        shared["pending_loss"].zero_()

    # A step of a rule whose tensors know nothing of each other, a tensor at a time (lopt.in_backward).

    def begin(self, rows: list[int], groups: Groups, shared: Mapping[str, Tensor], total_steps: int) -> None:
        """What comes before the first gradient; ``rows`` will have one, and had one before."""
        if rows != self.tensors.selected:
            self.select(rows)
        self._shared = shared
        with one_thread(self.tensors.home):
            self._train, last = published.next_loss(shared["train_loss"], _pending(shared))
            sizes = last.new_full((len(rows),), self.rule.step_multiplier)
            self.plan.step_size[self.index], self.plan.keep[self.index] = step_sizes(self.tensors, groups, sizes)

    def sweep(self, row: int, grad: Tensor) -> None:
        """One tensor."""
        plan, together = self.plan, self.plan.selected
        if row not in self._alone:
            self._alone[row] = plan.selection([row])
        plan.use(self._alone[row])
        try:
            with self._tensors([self.tensors.params[row]], [grad]):
                plan.accumulate(self._shared["step"])
                plan.apply()
        finally:
            plan.use(together)
        self._count(self._shared, torch.tensor([row], device=grad.device))

    def finish(self) -> None:
        """What comes after the last tensor."""
        self._finish(self._shared, self._train)

    @property
    def devices(self) -> set[torch.device]:
        """Where something is done in a step."""
        return {self.tensors.home}

    def _control(self, rule: NNAdam | Celo2) -> None:
        """What Adam's steps are made of, of the tensors that it steps."""
        states, plan = self.tensors.selected_states, self.plan
        if isinstance(rule, NNAdam):
            self._held = torch.stack([state["controls"] for state in states])
            lr, beta1, beta2, epsilon = nn_adam.meaning(self._held).unbind(dim=1)
            self._rates, one = lr, torch.ones_like(lr)
            columns = [beta1, beta2, 1.0 + epsilon, one, nn_adam.INSIDE * one, epsilon]
            plan.controls[self.index] = torch.stack(columns, dim=1)
            return
        rows = [row for row in self.tensors.selected if plan.by_adam[row]]
        if rows:
            updates = torch.stack([states[i]["updates"] for i, row in enumerate(self.tensors.selected) if row in rows])
            decays, one = rule.adam_decays, torch.ones_like(updates)
            gains = [1.0 / (1.0 - decay ** (updates + 1.0)) for decay in decays]
            columns = [*(decay * one for decay in decays), *gains, 0.0 * one, celo2.EPSILON * one]
            plan.controls[torch.tensor(rows, device=updates.device)] = torch.stack(columns, dim=1)

    def _move_controls(self, rule: NNAdam, stats: Tensor, now: Now) -> Tensor:
        """nn_adam's LSTM: writes its state, and returns the sizes of the tensors' steps ``[T]``."""
        states = self.tensors.selected_states
        ranks = [param.dim() for param in self.tensors.selected_params]
        inputs = rule.inputs_of(self._held, ranks, stats[:, kernels.MEASURES.index("grad_size") :])
        before = [self._held, *(torch.stack([state[name] for state in states]) for name in ("h", "c"))]
        _keep(states, ("controls", "h", "c"), before, rule.advance(self.tensors.weights, inputs, *before), now)
        return self._rates

    def _count_updates(self, rule: Celo2, now: Now) -> Tensor:
        """Celo2's sizes of the tensors' steps ``[T]``; counts those of Adam."""
        alone = [self.plan.by_adam[row] for row in self.tensors.selected]
        for state, by_adam, rests in zip(self.tensors.selected_states, alone, now.rest.unbind(), strict=True):
            if by_adam:
                state["updates"].add_(torch.logical_not(rests))
        factors = [rule.adam_multiplier if by_adam else 1.0 for by_adam in alone]
        return now.loss.new_tensor([rule.learning_rate * factor for factor in factors])

    def _advance(self, rule: VeLO, stats: Tensor, shared: Mapping[str, Tensor], now: Now) -> Tensor:
        """VeLO's LSTM: writes its state and the tensors' MLPs, and returns the sizes of their steps ``[T]``."""
        weights, states = self.tensors.weights, self.tensors.selected_states
        new, common = rule.losses({name: shared[name] for name in rule.shared}, now, stats)
        first = kernels.MEASURES.index("mean0")
        means, variances = stats[:, first : first + 4], stats[:, first + 4 :]  # of mom and rms
        parts = means[:, :3], means[:, 3:], variances[:, :3], variances[:, 3:]
        inputs = rule.inputs_of(self.ranks[self.index], Statistics(stats[:, 1], *parts), common)
        before = [torch.stack([state[name] for state in states]) for name in ("h", "c")]
        length, mlps, after = rule.advance(weights, inputs, before, now)
        self.plan.weights[self.index] = kernels.pack_factored(rule, mlps)
        _keep(states, ("h", "c"), before, after, now)
        for name, value in new.items():
            shared[name].copy_(value)
        return length * torch.sqrt(stats[:, 1] + 1e-9) * rule.step_multiplier
