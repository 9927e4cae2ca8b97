"""Steps of an optimizer over its tensors: by the reference, or by the kernels.

An optimizer has R tensors; those with a gradient take part in a step, the selected ones. :class:`Tensors` holds their
state, stacked, and says which are selected. :class:`ReferenceStepper` and :class:`KernelStepper` make the steps, both
in the order of :mod:`lopt.rule.step`; an unsharded step of the kernels is one call, one of sharded tensors goes phase
by phase, with :class:`lopt.distributed.Exchange` in the seams.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any, cast

import torch
from torch import Tensor

from lopt import kernels
from lopt.distributed import Box, Exchange, Layout, PartOperands, Ranks, ShardedDirections, Shares, is_sharded, local_of
from lopt.distributed.parts import increment_versions
from lopt.roles import kinds_of_groups
from lopt.rule import Theta, ThetaSpec, reference, tensor_lstm
from lopt.rule.features import STATS
from lopt.rule.inputs import Shapes
from lopt.rule.matrices import Kind, matrices_of
from lopt.rule.step import run
from lopt.rule.tensor_lstm import Globals, Rows
from lopt.state import init_state

Groups = Sequence[dict[str, Any]]


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Arithmetic at tensor level, on the CPU by one thread: BLAS adds in another order for every number of threads."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def layout_of(tensors: "Tensors", ranks: Ranks) -> Layout:
    """Which parts of the tensors all ranks hold, a collective.

    Raises:
        ValueError: ranks have different tensors, or not all of one.
    """
    shapes = [tuple(param.shape) for param in tensors.params]
    if tensors.shares is not None:
        ranks.meet(tensors.params, (), tensors.rows.h.device, required=True)
    found = ranks.gather((shapes, [Box.of(part) for part in tensors.parts(tensors.params)]))
    for other, (theirs, _) in enumerate(found):
        if theirs != shapes:
            raise ValueError(
                f"params: this rank has {len(shapes)} tensors, rank {other} of the process group has {len(theirs)}, or "
                "others; give the group of the ranks that hold parts of the same parameters: process_group=..."
            )
    return Layout([boxes for _, boxes in found], shapes, ranks.index)


class Tensors:
    """The non-empty parameters of an optimizer with their state, and which of them are selected.

    ``state[p]`` is created with the first gradient of ``p``; its ``lstm`` (and with lagged statistics ``stats``) are
    views of rows of the stacked tables here. What is in ``state`` already is taken up.

    Args:
        groups: the optimizer's param groups.
        state: the optimizer's; written.
        dtype: of the accumulators.
        shares: where every rank has the state of a part of replicated parameters.
    """

    def __init__(
        self,
        groups: Groups,
        state: MutableMapping[Tensor, dict[str, Any]],
        spec: ThetaSpec,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        shares: Shares | None = None,
    ) -> None:
        self.shares = shares
        self.spec, self.weights, self.dtype, self.state = spec, weights, dtype, state
        everything = [param for group in groups for param in group["params"]]
        indices = [index for index, group in enumerate(groups) for _ in group["params"]]
        for param in everything:
            if param.numel() == 0 and "mom" not in state[param]:  # never updated, but checkpoints look for its state
                state[param].update(init_state(spec, weights, self._part(param), dtype))
        filled = [param.numel() > 0 for param in everything]
        self.params: list[Tensor] = list(compress(everything, filled))
        self.groups: list[int] = list(compress(indices, filled))
        self.kinds: list[Kind] = list(compress(kinds_of_groups(groups), filled))
        self.states: list[dict[str, Any] | None] = [
            state[param] if "mom" in state.get(param, {}) else None for param in self.params
        ]
        fresh = tensor_lstm.init_rows(spec, weights, 1)
        self.rows = Rows(
            *(
                torch.stack([old["lstm"][name] if old else new[0] for old in self.states] or [new[0]])
                for name, new in fresh._asdict().items()
            )
        )
        self.stats: Tensor | None = None  # [R, S] of the step before, where they lag
        if spec.stats == "lagged":
            new = self.rows.h.new_zeros(spec.features.num_stats)
            self.stats = torch.stack([old["stats"] if old else new for old in self.states] or [new])
        self.bind()
        self.selected: list[int] = []
        self.foreseen = False  # whether they were selected before their gradients were seen
        self.mom: list[Tensor] = []  # of the selected ones
        self.rms: list[Tensor] = []
        self.sharded = any(map(is_sharded, self.parts(self.params)))
        self.operands = PartOperands(self.params, shares) if self.sharded else kernels.Operands(Tensor, self.params)
        self._groups, self._seen_groups = groups, kernels.Seen()
        self._seen_groups.all(groups)
        for group in groups:
            self._seen_groups.items(group, "params", "role", "transposed")
            self._seen_groups.all(group["params"])
        self._see_state([])

    def _part(self, param: Tensor) -> Tensor:
        return param if self.shares is None else self.shares.part(param)

    def parts(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The parameters as they are stepped: sharded, where this rank has the state of a part."""
        return list(map(self._part, params))

    def bind(self) -> None:
        """Make the states show rows of the tables."""
        views = [value.unbind() for value in self.rows]
        self._views = [dict(zip(Rows._fields, row, strict=True)) for row in zip(*views, strict=True)]
        self._stats_views = None if self.stats is None else self.stats.unbind()
        for index, state in enumerate(self.states):
            if state is not None:
                self._show(index, state)

    def _show(self, index: int, state: dict[str, Any]) -> None:
        state["lstm"] = self._views[index]
        if self._stats_views is not None:
            state["stats"] = self._stats_views[index]

    def serve(self, groups: Groups, state: Mapping[Tensor, Any]) -> bool:
        """Whether parameters and groups are still these, and nobody has cleared or replaced their state."""
        same = groups is self._groups and state is self.state
        return same and self._seen_groups.same() and self._seen_state.same()

    def _see_state(self, selected: list[Any]) -> None:
        self._seen_state = kernels.Seen()
        self._seen_state.all(self.state)
        for state in selected:
            self._seen_state.items(state, "mom", "rms")

    def select(self, rows: Sequence[int] | None = None) -> None:
        """Take the tensors that have a gradient now, or those that will have one, with state for each."""
        self.foreseen = rows is not None
        self.selected = self.operands.select() if rows is None else list(rows)
        for index in self.selected:
            if self.states[index] is not None:
                continue
            param = self.params[index]
            state = self.state[param]
            state.update(init_state(self.spec, self.weights, self._part(param), self.dtype))
            self.states[index] = state
            self._show(index, state)
        states: list[Any] = [self.states[index] for index in self.selected]
        self.mom, self.rms = ([_flat(state[name]) for state in states] for name in ("mom", "rms"))
        self._see_state(states)

    @property
    def selected_groups(self) -> list[int]:
        """The param group of each selected parameter."""
        return [self.groups[index] for index in self.selected]

    @property
    def selected_params(self) -> list[Tensor]:
        """The selected parameters."""
        if len(self.selected) == len(self.params):
            return self.params
        return [self.params[index] for index in self.selected]


def _flat(accumulators: Tensor) -> Tensor:
    """``[K, *shape]`` -> ``[K, numel]`` of what is on this rank, the same memory."""
    local = local_of(accumulators)
    return local.view(len(local), -1) if local.numel() else local.new_empty(len(local), 0)


class ReferenceStepper:
    """Steps by lopt/rule/reference.py."""

    def __init__(self, tensors: Tensors, theta: Theta) -> None:
        self.tensors, self.spec = tensors, theta.spec
        self.index = torch.zeros(0, dtype=torch.int64)
        like, shapes = tensors.weights["initial_h"], [tuple(param.shape) for param in tensors.params]
        self.shapes = Shapes.of(theta.spec, shapes, like, tensors.kinds)

    def select(self) -> None:
        """Take the tensors that have a gradient now."""
        self.tensors.select()
        self.index = torch.tensor(self.tensors.selected, dtype=torch.int64, device=self.tensors.rows.h.device)

    def step(
        self, params: list[Tensor], grads: list[Tensor], groups: Groups, shared: Mapping[str, Tensor], total_steps: int
    ) -> None:
        """One step; ``shared`` is the state of all tensors, written, with the losses since the last step in it."""
        tensors, spec = self.tensors, self.spec
        like = tensors.weights["initial_h"]
        everything = len(tensors.selected) == len(tensors.params)
        stacked = tensors.rows if everything else Rows(*(value[self.index] for value in tensors.rows))
        before = tensors.stats if tensors.stats is None or everything else tensors.stats[self.index]
        globals_ = Globals(*(shared[name] for name in Globals._fields))
        total, count = shared["pending_loss"]
        with one_thread(like.device):
            params_, state, trace = reference.update(
                spec,
                tensors.weights,
                reference.State(globals_, stacked, tensors.mom, tensors.rms),
                params,
                grads,
                torch.where(count > 0, total / count, torch.full_like(total, float("nan"))),
                lr=self._option("lr", groups),
                weight_decay=self._option("weight_decay", groups),
                total_steps=float(total_steps),
                before=before,
                positions=tensors.selected,
                shapes=self.shapes if everything else self.shapes.of_rows(tensors.selected),
            )
        for param, new in zip(params, params_, strict=True):
            param.copy_(new)
        for old, new in zip([*tensors.mom, *tensors.rms], [*state.mom, *state.rms], strict=True):
            old.copy_(new)
        for old, new in zip(tensors.rows, state.rows, strict=True):
            old.index_copy_(0, self.index, new)
        if tensors.stats is not None:
            tensors.stats.index_copy_(0, self.index, trace["kept"])
        for name, value in state.globals._asdict().items():
            shared[name].copy_(value)
        shared["pending_loss"].zero_()
        counts = [trace["seen"][:, STATS.index("nonfinite")].sum(), tensor_lstm.rests(trace["seen"]).sum()]
        shared["nonfinite"].add_(torch.stack(counts).to(torch.int64))

    def _option(self, name: str, groups: Groups) -> Tensor:
        """``[T]`` values of a group option."""
        like = self.tensors.weights["initial_h"]
        values = [groups[self.tensors.groups[index]][name] for index in self.tensors.selected]
        return torch.stack([torch.as_tensor(x, dtype=like.dtype, device=like.device).reshape(()) for x in values])


class KernelPhases:
    """The phases of :mod:`lopt.rule.step` by kernels, each a call; the tables have R rows, of which the plan's selected
    ones count."""

    def __init__(self, plan: kernels.Plan, level: kernels.TensorLevel, step: Tensor, updates: Tensor) -> None:
        self.plan, self.level, self.number, self.updates = plan, level, step, updates
        self.kept = plan.stats

    def begin(self) -> None:
        self.level.start()

    def accumulate(self) -> Tensor:
        self.before = self.plan.stats.clone() if self.level.lagged else self.plan.stats
        # In one sweep advance, which counts the step, comes before accumulate.
        self.plan.set_step(self.number + 1 if self.level.lagged else self.number)
        return self.plan.run_accumulate()

    def advance(self, stats: Tensor) -> None:
        seen = stats
        if self.level.lagged:
            seen, self.kept = reference.lag(stats, self.before, self.updates)
        self.level.advance(seen)

    def apply(self) -> Tensor:
        return self.plan.run_apply()

    def direction(self) -> None:
        self.plan.write()

    def finish(self, means: Tensor) -> None:
        self.level.finish(means)
        if self.level.lagged:
            self.plan.stats.copy_(self.kept)
        self.level.bind(self.plan)


class PartPhases(KernelPhases):
    """The same for parts of tensors: the plan works on what is on this rank, the level on all tensors, and the exchange
    finishes."""

    def __init__(self, stepper: "KernelStepper", exchange: Exchange, shared: Mapping[str, Tensor]) -> None:
        super().__init__(stepper.plan, stepper.level, shared["step"], stepper.tensors.rows.updates)
        self.exchange, self.directions = exchange, stepper.directions

    def accumulate(self) -> Tensor:
        if self.plan.num_tensors:
            return super().accumulate()
        self.before = self.plan.stats.clone()
        return self.plan.stats

    def apply(self) -> Tensor:
        return super().apply() if self.plan.num_tensors else self.plan.hidden

    def direction(self) -> None:
        if self.directions is None:
            super().direction()
            return
        if self.plan.num_tensors:
            self.plan.module.write(self.plan.backend, self.plan.addresses[1], False, *self.plan.place())
        self.plan.write_large(self._elsewhere)

    def _elsewhere(self, gate: Tensor, step_size: Tensor) -> None:
        assert self.directions is not None
        self.directions.orthogonalise(self.exchange, gate, step_size)

    def finish(self, means: Tensor) -> None:
        if self.level.lagged:
            self.plan.stats.copy_(self.kept)


class KernelStepper:
    """Steps by the compiled kernels, on a GPU five launches: begin, accumulate, advance, apply, finish; with lagged
    statistics four: begin, advance, one sweep, finish. Where directions of matrices are treated as a whole, torch's
    products and a launch that writes come before finish.

    Parameters that are not contiguous pass through a staging copy.
    """

    def __init__(self, backend: str, tensors: Tensors, theta: Theta, precision: str, ranks: Ranks) -> None:
        spec = theta.spec
        self.tensors, self.lagged = tensors, spec.stats == "lagged"
        none = [None] * len(tensors.params)
        layout = layout_of(tensors, ranks) if tensors.sharded else None
        self.plan = plan = kernels.Plan(
            backend,
            spec.feature_set,
            [local_of(part) for part in tensors.parts(tensors.params)],
            none,
            none,
            precision=precision,
            state_dtype=tensors.dtype,
            device=tensors.rows.h.device,
        )
        shapes = [tuple(param.shape) for param in tensors.params]
        if layout is not None:  # a bfloat16 state is rounded by positions in whole tensors
            plan.all_entries["offset"] = [box.start(shape) for box, shape in zip(layout.mine, shapes, strict=True)]
        self.level = level = kernels.TensorLevel(
            backend, theta, shapes, tensors.rows, tensors.groups, kinds=tensors.kinds, lagged=self.lagged
        )
        matrices = matrices_of(shapes, tensors.kinds)
        split = {row: layout.mine[row].numel for row in range(len(shapes)) if layout and layout.split(row)}
        parts = {row: numel for row, numel in split.items() if matrices[row].whole}
        plan.treat_whole(matrices, spec.newton_schulz, tensors.rows.rank, parts)
        plan.bind_accumulate(level.inputs["clip_limit"], spec.mom_decays, spec.rms_decays)
        packed = kernels.pack_mlp(spec, tensors.weights)
        plan.bind_apply(level.inputs, packed, spec.magnitude_rate, spec.feature_clip)
        self.levels = kernels.Levels([level])
        if tensors.stats is not None:
            plan.stats.copy_(tensors.stats)
            tensors.stats = plan.stats  # the kernels write there
            tensors.bind()
        self.some_first = False
        self.converted = False
        self._alone: dict[int, kernels.Selection] = {}  # by row
        self.exchange: Exchange | None = None
        self.directions: ShardedDirections | None = None
        if layout is not None:
            whole = {row: matrices[row] for row in parts}
            if whole and plan.directions is not None:
                memory, large = plan.directions.parts, plan.directions.large
                self.directions = ShardedDirections(ranks, layout, whole, spec.newton_schulz, memory, large)
            width = spec.mlp_width
            self.exchange = Exchange(ranks, layout, spec.features.num_stats, width, tensors.rows.rank, level.finish)

    def settle(self) -> None:
        """Complete the state, of which the next step would have completed a part: of sharded tensors a collective."""
        if self.exchange is not None:
            self.exchange.settle()

    def select(self, rows: Sequence[int] | None = None) -> None:
        """Take the tensors that have a gradient now, or those that will have one."""
        tensors = self.tensors
        self.settle()
        tensors.select(rows)
        for row, mom, rms in zip(tensors.selected, tensors.mom, tensors.rms, strict=True):
            if row not in self.plan.keep_alive:
                self.plan.hold(row, mom, rms)
        if self.exchange is None:
            self.plan.select(tensors.selected)
            self.level.bind(self.plan)
        else:
            self.plan.select(self.exchange.select(tensors.selected))
            self.level.bind(self.plan, rows=tensors.selected)
            if self.directions is not None:
                self.directions.select(tensors.selected)
        # With lagged statistics, a tensor's first step sees its own, so accumulate comes before advance.
        self.some_first = self.lagged and bool((tensors.rows.updates[tensors.selected] == 0).any())

    def step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        groups: Groups,
        shared: Mapping[str, Tensor],
        total_steps: int,
        loss: Tensor | float | None,
        converted: bool = False,
    ) -> None:
        """One step, of the tensors that ``tensors.operands`` saw; ``groups`` have the options as a step uses them,
        ``shared`` is the state of all tensors, written. ``converted``: the gradients are of another dtype than those
        that were seen."""
        plan, level, tensors = self.plan, self.level, self.tensors
        if self.exchange is not None:
            self._step_parts(self.exchange, params, grads, groups, shared, total_steps, loss)
            return
        copies = params
        known = not (converted or self.converted)  # whether the plan knows the dtypes of the gradients
        self.converted = converted
        if known and tensors.operands.plain:
            plan.point(cast(kernels.Operands, tensors.operands), grads)
        else:
            copies = kernels.contiguous(params)
            plan.set_tensors(copies, kernels.contiguous(grads))
        level.set_options(groups, total_steps)
        level.set_losses(shared, loss)
        if self.some_first:
            run(KernelPhases(plan, level, shared["step"], tensors.rows.updates))
            self.some_first = False
        else:
            plan.set_step(shared["step"])
            kernels.step(plan, self.levels, self.lagged)
        if copies is not params:
            for param, copy in zip(params, copies, strict=True):
                if copy is not param:
                    param.copy_(copy)
        increment_versions(params)
        plan.grads = []  # zero_grad frees their memory

    # A step with lagged statistics, a tensor at a time (lopt.in_backward).

    def begin(self, rows: list[int], groups: Groups, shared: Mapping[str, Tensor], total_steps: int) -> None:
        """What comes before the first gradient; ``rows`` will have one, and had one before."""
        plan, level = self.plan, self.level
        if rows != self.tensors.selected:
            self.select(rows)
        level.set_options(groups, total_steps)
        level.set_losses(shared, None)
        plan.set_step(shared["step"])
        level.start()
        level.advance(plan.stats)

    def sweep(self, row: int, grad: Tensor) -> None:
        """One tensor."""
        plan, param = self.plan, self.tensors.params[row]
        if row not in self._alone:
            self._alone[row] = plan.selection([row])
        copies, together = kernels.contiguous([param]), plan.selected
        plan.use(self._alone[row])
        try:
            plan.set_tensors(copies, kernels.contiguous([grad]))
            plan.sweep()
            plan.write()
        finally:
            plan.use(together)
        if copies[0] is not param:
            param.copy_(copies[0])
        increment_versions([param])

    def finish(self) -> None:
        """What comes after the last tensor."""
        self.level.finish()

    def _step_parts(
        self,
        exchange: Exchange,
        params: list[Tensor],
        grads: list[Tensor],
        groups: Groups,
        shared: Mapping[str, Tensor],
        total_steps: int,
        loss: Tensor | float | None,
    ) -> None:
        """:meth:`step` of parts of tensors."""
        plan, level = self.plan, self.level
        pairs = [(local_of(part), grad) for part, grad in zip(self.tensors.parts(params), grads, strict=True)]
        pairs = [(param, grad) for param, grad in pairs if param.numel()]
        copies = kernels.contiguous([param for param, _ in pairs])
        if pairs:
            plan.set_tensors(copies, kernels.contiguous([grad for _, grad in pairs]))
        level.set_options(groups, total_steps)
        level.set_losses(shared, loss)
        exchange.shared = shared
        run(PartPhases(self, exchange, shared), exchange)
        for (param, _), copy in zip(pairs, copies, strict=True):
            if copy is not param:
                param.copy_(copy)
        if self.tensors.shares is not None:
            self.tensors.shares.exchange(params)
        increment_versions(params)
        plan.grads = []
