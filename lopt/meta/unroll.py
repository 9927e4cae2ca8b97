"""Unroll: inner training runs of one task under a batch of thetas at once, in PyTorch.

All runs of an unroll share task, initial parameters and minibatches (common random numbers) and differ in theta::

    every valid_every steps:  the optimizer observes the mean loss of some inner_valid minibatches
    loss, grad = value and gradient of the task's loss on a train minibatch     vmapped over the runs
    params     = one step of the optimizer                                      all tensors of all runs at once
    every loss_every steps:   the loss of an outer_valid minibatch is recorded, or that of the average of the iterates

The optimizer's step is made by the compiled operations, with a row of theta for every tensor, or by
lopt.rule.reference, vmapped, which is the definition; that of a rule of others by lopt.rule.published, vmapped. A task
whose loss cannot be vmapped goes through its runs one by one, with a warning.

A run ends at its first train or outer_valid loss that is not finite: its later losses are NaN, and so are its
parameters after the window. This runs any task; perceptrons have a faster engine of the same meaning.

One file: what a run is, the three ways to step it, and the loop, which are read together.

Source: arXiv:2009.11243, section 3.2 (what each split is for).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lopt import kernels
from lopt.average import decay_at
from lopt.implementations import has_kernels, warn_not_built
from lopt.meta.objective import Losses, Unit
from lopt.rule import AnySpec, Rule, Theta, ThetaSpec, reference
from lopt.rule.features import STATS
from lopt.rule.inputs import Shapes
from lopt.rule.matrices import matrices_of
from lopt.rule.published import step as published
from lopt.rule.tensor_lstm import Globals, Rows
from lopt.state import sample
from lopt.tasks.task import SplitName, Task, map_tensors

Impl = Literal["auto", "reference", "cpu", "cuda", "sim"]
FLOAT = 4  # bytes
OF_RULE = 120  # floats for each parameter: columns of a rule of others, as they are, normalised, and in the MLP


@dataclass(frozen=True)
class Run:
    """What an inner run is, apart from theta and from how far it has come.

    Args:
        task: the inner problem.
        seed: of initial parameters and minibatches.
        horizon: length of the whole run in steps.
        total_steps: the length the optimizer is told, 0 for none.
        valid_every: steps between two validation losses the optimizer sees, the first before step 0; 0 for none.
        valid_batches: inner_valid minibatches that a validation loss is the mean over.
        loss_every: steps between two outer_valid losses; divides every window.
        averaged: whether outer_valid losses are those of the average of the iterates (:mod:`lopt.average`).
    """

    task: Task
    seed: int
    horizon: int
    total_steps: int = 0
    valid_every: int = 10
    valid_batches: int = 1
    loss_every: int = 1
    averaged: bool = False

    @cached_property
    def unit(self) -> Unit:
        """By what the losses are normalised."""
        return Unit.of(self.task.initial_loss(self.seed), self.task.loss_floor)

    @cached_property
    def vectorised(self) -> bool:
        """Whether the task's loss can be vmapped over runs, which is tried; a task for which it cannot is named in a
        warning."""
        params, batch = self.task.init(self.seed), next(self.task.batches(self.seed, "train"))
        pair = {name: value.expand(2, *value.shape) for name, value in params.items()}
        try:
            _of_runs(self.task)(pair, batch)
        except RuntimeError as error:
            self.task.loss(params, batch)  # an error of its own is not about vmap
            warnings.warn(
                f"task {self.task.name}: its loss cannot be vmapped, so its runs go one by one: {error}", stacklevel=2
            )
            return False
        return True


class RunState(NamedTuple):
    """Where a batch of runs stands; every tensor has a leading dimension of runs."""

    step: int
    params: dict[str, Tensor]
    optimizer: Any  # reference.State; of a rule of others published.State
    stats: Tensor  # [runs, T, S] of the step before, for lagged statistics; otherwise [runs, T, 0]
    average: dict[str, Tensor]  # of the iterates, where it is asked for; otherwise the first parameters

    def pack(self) -> dict[str, Any]:
        """Parameters and optimizer state as dicts and lists of tensors."""
        beside = {"params": self.params, "stats": self.stats, "average": self.average}
        if isinstance(self.optimizer, published.State):
            return {**beside, **self.optimizer._asdict()}
        plain = {name: getattr(self.optimizer, name)._asdict() for name in ("globals", "rows")}
        accumulators = {"mom": self.optimizer.mom, "rms": self.optimizer.rms}
        return {**beside, **plain, **accumulators}

    @classmethod
    def unpack(cls, step: int, packed: Mapping[str, Any]) -> "RunState":
        """The inverse of :meth:`pack`."""
        state: Any
        if "tensors" in packed:
            state = published.State(packed["shared"], packed["tensors"])
        else:
            globals_, rows = Globals(**packed["globals"]), Rows(**packed["rows"])
            state = reference.State(globals_, rows, packed["mom"], packed["rms"])
        return cls(step, packed["params"], state, packed["stats"], packed["average"])


def start(spec: AnySpec, weights: Mapping[str, Tensor], run: Run) -> RunState:
    """State before the first step of ``run``, for every theta of ``weights`` (tensors ``[runs, ...]``), where these
    are."""
    like = sample(weights)
    num_runs = like.shape[0]
    params = {name: value.to(like).expand(num_runs, *value.shape) for name, value in run.task.init(run.seed).items()}
    no_stats = like.new_zeros(num_runs, len(params), 0)
    if isinstance(spec, Rule):
        return RunState(0, params, torch.vmap(partial(_init_of_rule, spec, run))(weights), no_stats, params)
    optimizer = torch.vmap(lambda w, p: reference.init_state(spec, w, list(p.values())))(weights, params)
    stats = like.new_zeros(num_runs, len(params), spec.features.num_stats) if spec.stats == "lagged" else no_stats
    return RunState(0, params, optimizer, stats, params)


def _init_of_rule(rule: Rule, run: Run, weights: Mapping[str, Tensor]) -> published.State:
    shapes = [value.shape for value in run.task.init(run.seed).values()]
    pairs = zip(shapes, run.task.kinds, strict=True)
    tensors = [published.init_param(rule, weights, shape, kind) for shape, kind in pairs]
    return published.State(published.init_shared(rule, weights), tensors)


class _Published:
    """The optimizer's steps by a rule of others, vmapped. Validation losses do nothing.

    A rule that cannot do without the number of steps is told the horizon where nothing is to be told.
    """

    def __init__(self, rule: Rule, weights: Mapping[str, Tensor], run: Run, state: RunState) -> None:
        self.params, self.optimizer, self.stats = state.params, state.optimizer, state.stats
        names, kinds = list(state.params), run.task.kinds
        total_steps = run.total_steps or (run.horizon if rule.needs_total_steps else 0)

        def update(
            weights: Mapping[str, Tensor], params: dict[str, Tensor], state: published.State, grads: Any, loss: Tensor
        ) -> tuple[dict[str, Tensor], published.State]:
            lists = [params[name] for name in names], [grads[name] for name in names]
            step = published.update(rule, weights, state, *lists, loss, kinds=kinds, total_steps=total_steps)
            return dict(zip(names, step.params, strict=True)), step.state

        self.weights, self._update = weights, torch.vmap(update)

    def step(self, grads: dict[str, Tensor], loss: Tensor, valid_loss: Tensor | None) -> None:
        """One update of all runs; losses ``[runs]``."""
        self.params, self.optimizer = self._update(self.weights, self.params, self.optimizer, grads, loss)


class _Reference:
    """The optimizer's steps by lopt.rule.reference, vmapped."""

    def __init__(self, spec: ThetaSpec, weights: Mapping[str, Tensor], run: Run, state: RunState) -> None:
        self.params, self.optimizer, self.stats = state.params, state.optimizer, state.stats
        names = list(state.params)
        shapes = [tuple(value.shape[1:]) for value in state.params.values()]
        facts = Shapes.of(spec, shapes, weights["initial_h"], run.task.kinds)

        def update(
            weights: Mapping[str, Tensor],
            params: dict[str, Tensor],
            state: reference.State,
            before: Tensor,
            grads: Any,
            loss: Tensor,
        ) -> tuple[dict[str, Tensor], reference.State, Tensor]:
            lists = [params[name] for name in names], [grads[name] for name in names]
            values, state, trace = reference.update(
                spec, weights, state, *lists, loss, total_steps=float(run.total_steps), before=before, shapes=facts
            )
            kept = trace["kept"] if spec.stats == "lagged" else before
            return dict(zip(names, values, strict=True)), state, kept

        self.weights, self._update = weights, torch.vmap(update)
        self._observe = torch.vmap(lambda state, loss: reference.observe_valid(spec, state, loss))

    def step(self, grads: dict[str, Tensor], loss: Tensor, valid_loss: Tensor | None) -> None:
        """One update of all runs; losses ``[runs]``."""
        if valid_loss is not None:
            self.optimizer = self._observe(self.optimizer, valid_loss)
        state = self.weights, self.params, self.optimizer, self.stats
        self.params, self.optimizer, self.stats = self._update(*state, grads, loss)


class _Kernels:
    """The optimizer's steps by the compiled operations: the tensors of all runs in one plan, a tensor level per run.

    Parameters, gradients and state are copies that stay where they are, so that addresses are taken once.
    """

    def __init__(self, backend: str, spec: ThetaSpec, weights: Mapping[str, Tensor], run: Run, state: RunState) -> None:
        copies = map_tensors(lambda x: x.clone(memory_format=torch.contiguous_format), state[1:4])
        self.params: dict[str, Tensor] = copies[0]
        self.optimizer: reference.State = copies[1]
        self.lagged, self.first = spec.stats == "lagged", state.step == 0
        self.grads = {name: torch.empty_like(value) for name, value in self.params.items()}
        shapes, num_runs = [tuple(value.shape[1:]) for value in self.params.values()], len(weights["initial_h"])
        count = len(shapes)

        def by_run(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [tensor[row] for row in range(num_runs) for tensor in tensors]

        params = by_run(list(self.params.values()))
        mom, rms = by_run(self.optimizer.mom), by_run(self.optimizer.rms)
        theta_index = [row for row in range(num_runs) for _ in shapes]
        gradients = by_run(list(self.grads.values()))
        self.plan = plan = kernels.Plan(
            backend, spec.feature_set, params, mom, rms, theta_index, width=spec.mlp_width, layers=spec.mlp_layers
        )
        packed = kernels.pack_mlp(spec, weights)
        inputs = kernels.apply_inputs(spec, num_runs * count, packed.device)
        plan.bind_accumulate(inputs["clip_limit"], spec.mom_decays, spec.rms_decays)
        plan.bind_apply(inputs, packed, spec.magnitude_rate, spec.feature_clip)
        matrices = matrices_of(shapes, run.task.kinds) * num_runs
        plan.treat_whole(matrices, spec.newton_schulz, self.optimizer.rows.rank.view(-1))
        plan.set_tensors(params, gradients)
        self.stats: Tensor = copies[2]
        if self.lagged:
            plan.stats.copy_(self.stats.reshape(plan.stats.shape))
            self.stats = plan.stats.view(self.stats.shape)  # the kernels write there
        levels = []
        self.shared = []
        self.parts: list[slice] = []
        for row in range(num_runs):
            theta = Theta(spec, {name: value[row] for name, value in weights.items()})
            rows = Rows(*(value[row] for value in self.optimizer.rows))
            part = slice(row * count, (row + 1) * count)
            own = {name: value[part] for name, value in inputs.items()}
            level = kernels.TensorLevel(
                backend, theta, shapes, rows, inputs=own, kinds=run.task.kinds, lagged=self.lagged
            )
            level.set_options([{"lr": 1.0, "weight_decay": 0.0}], run.total_steps)
            level.bind(plan, part)
            shared = {name: value[row] for name, value in self.optimizer.globals._asdict().items()}
            shared["pending_loss"] = torch.zeros(2, device=packed.device)
            shared["nonfinite"] = torch.zeros(2, dtype=torch.int64, device=packed.device)
            levels.append(level)
            self.shared.append(shared)
            self.parts.append(part)
        self.levels = kernels.Levels(levels)

    def step(self, grads: dict[str, Tensor], loss: Tensor, valid_loss: Tensor | None) -> None:
        """One update of all runs; losses ``[runs]``."""
        for name, grad in grads.items():
            self.grads[name].copy_(grad)
        losses = loss.contiguous(), None if valid_loss is None else valid_loss.contiguous()
        valid = [None] * len(loss) if losses[1] is None else losses[1].unbind()
        given = zip(self.levels.levels, self.shared, losses[0].unbind(), valid, strict=True)
        for level, shared, train_loss, inner_valid in given:
            level.set_losses(shared, train_loss, inner_valid)
        if self.lagged and self.first:
            self._first_step()
        else:
            kernels.step(self.plan, self.levels, self.lagged)
        self.first = False

    def _first_step(self) -> None:
        """With lagged statistics: tensors see their own, as there is nothing before them."""
        pairs = list(zip(self.levels.levels, self.parts, strict=True))
        for level, _ in pairs:
            level.start()
        stats = self.plan.run_accumulate()
        for level, part in pairs:
            level.advance(stats[part])
        hidden = self.plan.run_apply()
        self.plan.write()
        for level, part in pairs:
            level.finish(hidden[part])
        stats[:, STATS.index("nonfinite")] = 0.0  # seen


def _stepper(
    impl: Impl, spec: AnySpec, weights: Mapping[str, Tensor], run: Run, state: RunState
) -> _Reference | _Kernels | _Published:
    if impl not in get_args(Impl):
        raise ValueError(f"impl: expected one of {get_args(Impl)}, got {impl!r}")
    if isinstance(spec, Rule):
        if impl not in ("auto", "reference"):
            raise ValueError(
                f"impl={impl!r}: inner runs of rule {spec.name!r} go by torch; use impl='auto' or 'reference'"
            )
        return _Published(spec, weights, run, state)
    like = sample(weights)
    if impl == "auto":
        if kernels.NOT_BUILT:
            warn_not_built()
        fits = not kernels.NOT_BUILT and like.dtype == torch.float32 and like.device.type in kernels.BACKENDS
        impl = like.device.type if fits and has_kernels(spec, like.device.type) else "reference"  # type: ignore[assignment]
    return _Reference(spec, weights, run, state) if impl == "reference" else _Kernels(impl, spec, weights, run, state)


LossOfRuns = Callable[[dict[str, Tensor], Any], Tensor]


def _of_runs(task: Task) -> LossOfRuns:
    """The loss of all runs at once; what it draws by a seed of the minibatch, all draw alike."""
    vmapped: LossOfRuns = torch.vmap(task.loss, in_dims=(0, None), randomness="same")
    return vmapped


def _loss_of_runs(task: Task, vectorised: bool) -> LossOfRuns:
    """Losses ``[runs]`` of parameters ``[runs, ...]`` on one minibatch."""
    if vectorised:
        return _of_runs(task)

    def one_by_one(params: dict[str, Tensor], batch: Any) -> Tensor:
        rows = zip(*(value.unbind() for value in params.values()), strict=True)
        return torch.stack([task.loss(dict(zip(params, row, strict=True)), batch) for row in rows])

    return one_by_one


def _grads_and_losses(losses_of: LossOfRuns, params: dict[str, Tensor], batch: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient and loss of every run. The gradient of the sum is that of each; vmap under autograd is quicker than
    autograd under vmap, whose backward pass has batching rules to look up."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    with torch.enable_grad():
        losses = losses_of(leaves, batch)
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads, strict=True)), losses.detach()


def _averaged(average: dict[str, Tensor], params: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """The average of the iterates with those after ``step``."""
    weight = 1.0 if step == 0 else 1.0 - decay_at(step)
    return {name: torch.lerp(average[name], value, weight) for name, value in params.items()}


def activation_bytes(task: Task) -> int:
    """What the backward pass of one loss keeps, beside the parameters."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    params = {name: value.requires_grad_() for name, value in task.init(0).items()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.loss(params, next(task.batches(0, "train")))
    for value in params.values():
        kept.pop(value.untyped_storage().data_ptr(), None)
    del loss
    return sum(kept.values())


def bytes_per_run(spec: AnySpec, task: Task) -> int:
    """About what an unroll needs for one run at its peak: state before and after, gradients twice, activations twice.

    With ``n`` parameters, ``K`` momenta and second moments and ``A`` :func:`activation_bytes`, it is
    ``4 n (2 (1 + K) + 2) + 2 A``, and of a rule of others, which keeps all its columns, ``480 n`` more. ``A`` counts
    what is the same for all runs, as the minibatch, for each; the second ``A`` is for what the backward pass makes.
    Data sets are not in it.
    """
    if isinstance(spec, Rule):
        accumulators, work = _state_of_rule(spec, task), OF_RULE * task.num_params
    else:
        accumulators, work = task.num_params * (len(spec.mom_decays) + len(spec.rms_decays)), 0
    return FLOAT * (2 * (task.num_params + accumulators) + 2 * task.num_params + work) + 2 * activation_bytes(task)


def _state_of_rule(rule: Rule, task: Task) -> int:
    """Floats of a rule's state, counted without memory for them."""
    weights = {name: torch.empty(shape, device="meta") for name, shape in rule.shapes().items()}
    pairs = zip(task.init(0).values(), task.kinds, strict=True)
    states = [published.init_param(rule, weights, value.shape, kind) for value, kind in pairs]
    return sum(value.numel() for state in states for value in state.values())


def unroll(
    spec: AnySpec,
    weights: Mapping[str, Tensor],
    run: Run,
    state: RunState,
    steps: int,
    *,
    impl: Impl = "auto",
    vectorised: bool | None = None,
) -> tuple[RunState, Losses]:
    """Continue the runs of ``state`` by ``steps`` steps, on the device of ``weights``.

    Needs :func:`bytes_per_run` for each run, whatever the number of steps. The given state is left as it is.

    Args:
        weights: tensors of theta with a leading dimension of runs, as :func:`lopt.rule.theta.unflatten` makes them.
        impl: what makes the optimizer's steps: ``reference``, or the kernels of a back end. ``auto`` takes the kernels
            of the device where they are compiled for ``spec`` and the weights are float32.
        vectorised: whether gradients of all runs are taken at once; by default if the task can.

    Raises:
        ValueError: the window passes the horizon of the run, or is no multiple of ``loss_every``.
    """
    if not 0 < steps <= run.horizon - state.step:
        raise ValueError(
            f"steps: expected 1 to {run.horizon - state.step}, at step {state.step} of {run.horizon}, got {steps}"
        )
    if steps % run.loss_every:
        raise ValueError(f"steps: expected a multiple of loss_every={run.loss_every}, got {steps}")
    task, like = run.task, sample(weights)
    device = like.device

    def minibatches(split: SplitName, first: int) -> Iterator[Any]:
        for batch in task.batches(run.seed, split, first):
            yield map_tensors(lambda x: x.to(device, non_blocking=True), batch)

    train, shown = minibatches("train", state.step), run.valid_every > 0
    seen = -(-state.step // run.valid_every) if shown else 0
    inner_valid = minibatches("inner_valid", seen * run.valid_batches)
    losses_of = _loss_of_runs(task, run.vectorised if vectorised is None else vectorised)

    def valid_losses(params: dict[str, Tensor]) -> Tensor:
        some = [losses_of(params, next(inner_valid)) for _ in range(run.valid_batches)]
        return torch.stack(some).double().mean(dim=0).to(some[0].dtype)

    train_losses, outer_losses, average = [], [], state.average
    ended = torch.zeros(len(like), dtype=torch.bool, device=device)
    nan = like.new_full((), torch.nan)
    with torch.no_grad():
        optimizer = _stepper(impl, spec, weights, run, state)
        for step in range(state.step, state.step + steps):
            observed = shown and step % run.valid_every == 0
            valid_loss = valid_losses(optimizer.params) if observed else None
            grads, loss = _grads_and_losses(losses_of, optimizer.params, next(train))
            optimizer.step(grads, loss, valid_loss)
            if run.averaged:
                average = _averaged(average, optimizer.params, step)
            train_losses.append(torch.where(ended, nan, loss))
            ended = ended | ~torch.isfinite(loss)
            if (step + 1) % run.loss_every == 0:
                params = average if run.averaged else optimizer.params
                loss = losses_of(params, next(minibatches("outer_valid", step)))
                outer_losses.append(torch.where(ended, nan, loss))
                ended = ended | ~torch.isfinite(loss)
    params = optimizer.params
    if bool(ended.any()):
        params = {
            name: torch.where(ended.reshape(-1, *[1] * (value.dim() - 1)), nan, value) for name, value in params.items()
        }
    losses = Losses(torch.stack(outer_losses, dim=1), torch.stack(train_losses, dim=1))
    return RunState(state.step + steps, params, optimizer.optimizer, optimizer.stats, average), losses
