"""Steps of an optimizer over its tensors: by the reference, or by the kernels.

An optimizer has R tensors; those with a gradient take part in a step, the selected ones. :class:`Tensors` holds their
state, stacked, and says which are selected. :class:`ReferenceStepper` and :class:`KernelStepper` make the steps, both
in the order of :mod:`lopt.rule.step`; an unsharded step of the kernels on one device is one call, others go phase by
phase: of sharded tensors with :class:`lopt.distributed.Exchange` in the seams, of tensors on several devices with
:class:`lopt.kernels.Places` between them.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lopt import kernels
from lopt.distributed import Box, Exchange, Layout, PartOperands, Ranks, ShardedDirections, Shares, is_sharded, local_of
from lopt.distributed.parts import increment_versions
from lopt.roles import kinds_of_groups
from lopt.rule import AnySpec, Theta, ThetaSpec, reference, tensor_lstm
from lopt.rule.features import STATS
from lopt.rule.inputs import Shapes
from lopt.rule.matrices import Kind, Matrix, matrices_of
from lopt.rule.step import run
from lopt.rule.tensor_lstm import Globals, Rows
from lopt.state import init_state, sample

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


def layout_of(tensors: "StackedTensors", ranks: Ranks) -> Layout:
    """Which parts of the tensors all ranks hold, a collective.

    Raises:
        ValueError: ranks have different tensors, or not all of one.
    """
    shapes = [tuple(param.shape) for param in tensors.params]
    ranks.check_device(tensors.rows.h.device)
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


class Name(NamedTuple):
    """Of a place where tensors are stepped together."""

    device: torch.device
    number: int = 0  # of several on one device, as tests have them


def place_of(param: Tensor) -> Name:
    """Where a parameter is stepped."""
    return Name(param.device)


class Control(NamedTuple):
    """What the tensor level decided about a tensor in a step, on the device."""

    step_size: Tensor  # [], NaN where it rests
    gate: Tensor | None  # [] share of the direction that is orthogonalised; None where it is not treated as a whole
    matrix: Matrix


#: Step sizes and gates of the selected tensors; None where the rule has no gates.
Decided = tuple[list[Tensor], Sequence[Tensor | None]]


class Tensors:
    """The non-empty parameters of an optimizer with their state, and which of them are selected.

    ``state[p]`` is created with the first gradient of ``p``. What is in ``state`` already is taken up.

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
        spec: AnySpec,
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
                state[param].update(init_state(spec, weights, self._part(param), dtype, Kind()))
        filled = [param.numel() > 0 for param in everything]
        self.params: list[Tensor] = list(compress(everything, filled))
        self.groups: list[int] = list(compress(indices, filled))
        self.places: list[Name] = [place_of(local_of(part)) for part in self.parts(self.params)]
        self.kinds: list[Kind] = list(compress(kinds_of_groups(groups), filled))
        self.states: list[dict[str, Any] | None] = [
            state[param] if "mom" in state.get(param, {}) else None for param in self.params
        ]
        for row, old in enumerate(self.states):
            if old and local_of(old["mom"]).device != self.places[row].device:  # which a check of gradients refuses
                self.places[row] = Name(local_of(old["mom"]).device)
        self.selected: list[int] = []
        self.foreseen = False  # whether they were selected before their gradients were seen
        self.sharded = any(map(is_sharded, self.parts(self.params)))
        self.operands = PartOperands(self.params, shares) if self.sharded else kernels.Operands(Tensor, self.params)
        self._groups, self._seen_groups = groups, kernels.Seen()
        self._seen_groups.all(groups)
        for group in groups:
            self._seen_groups.items(group, "params", "role", "transposed")
            self._seen_groups.all(group["params"])
        self._see_state([])

    @property
    def home(self) -> torch.device:
        """The device of the tensor level."""
        return sample(self.weights).device

    def _part(self, param: Tensor) -> Tensor:
        return param if self.shares is None else self.shares.part(param)

    def parts(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The parameters as they are stepped: sharded, where this rank has the state of a part."""
        return list(map(self._part, params))

    def moved(self) -> bool:
        """Whether a parameter that has no state yet is elsewhere than it was."""
        rows = (row for row, state in enumerate(self.states) if state is None)
        return any(local_of(self.params[row]).device != self.places[row].device for row in rows)

    def serve(self, groups: Groups, state: Mapping[Tensor, Any]) -> bool:
        """Whether parameters and groups are still these, and nobody has cleared or replaced their state."""
        same = groups is self._groups and state is self.state
        return same and self._seen_groups.same() and self._seen_state.same()

    def _see_state(self, selected: list[Any]) -> None:
        self._seen_state = kernels.Seen()
        self._seen_state.all(self.state)
        for state in selected:
            self._seen_state.items(state, *(name for name in ("mom", "rms") if name in state))

    def select(self, rows: Sequence[int] | None = None) -> None:
        """Take the tensors that have a gradient now, or those that will have one, with state for each."""
        self.foreseen = rows is not None
        self.selected = self.operands.select() if rows is None else list(rows)
        for index in self.selected:
            if self.states[index] is not None:
                continue
            param = self.params[index]
            state = self.state[param]
            state.update(init_state(self.spec, self.weights, self._part(param), self.dtype, self.kinds[index]))
            self.states[index] = state
        self._see_state(self.selected_states)

    @property
    def selected_states(self) -> list[dict[str, Any]]:
        """The states of the selected parameters."""
        return [cast(dict[str, Any], self.states[index]) for index in self.selected]

    def option(self, name: str, groups: Groups) -> Tensor:
        """``[T]`` values of a group option, of the selected tensors."""
        like = sample(self.weights)
        values = [groups[self.groups[index]][name] for index in self.selected]
        return torch.stack([torch.as_tensor(x, dtype=like.dtype, device=like.device).reshape(()) for x in values])

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


class StackedTensors(Tensors):
    """Those of the hierarchical optimizer; ``lstm`` of a state (and with lagged statistics ``stats``) are views of rows
    of the stacked tables here."""

    def __init__(
        self,
        groups: Groups,
        state: MutableMapping[Tensor, dict[str, Any]],
        spec: ThetaSpec,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        shares: Shares | None = None,
    ) -> None:
        super().__init__(groups, state, spec, weights, dtype, shares)
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
        self.mom: list[Tensor] = []  # of the selected ones
        self.rms: list[Tensor] = []
        self.bind()

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

    def select(self, rows: Sequence[int] | None = None) -> None:
        new = [index for index, state in enumerate(self.states) if state is None]
        super().select(rows)
        for index in new:
            state = self.states[index]
            if state is not None:
                self._show(index, state)
        states = self.selected_states
        self.mom, self.rms = ([_flat(state[name]) for state in states] for name in ("mom", "rms"))


def _flat(accumulators: Tensor) -> Tensor:
    """``[K, *shape]`` -> ``[K, numel]`` of what is on this rank, the same memory."""
    local = local_of(accumulators)
    return local.view(len(local), -1) if local.numel() else local.new_empty(len(local), 0)


class ReferenceStepper:
    """Steps by lopt/rule/reference.py."""

    def __init__(self, tensors: StackedTensors, theta: Theta) -> None:
        self.tensors, self.spec = tensors, theta.spec
        self.index = torch.zeros(0, dtype=torch.int64)
        like, shapes = sample(tensors.weights), [tuple(param.shape) for param in tensors.params]
        self.shapes = Shapes.of(theta.spec, shapes, like, tensors.kinds)
        self.matrices = list(self.shapes.matrices)
        self.decided: Decided = [], []

    def select(self) -> None:
        """Take the tensors that have a gradient now."""
        self.tensors.select()
        self.index = torch.tensor(self.tensors.selected, dtype=torch.int64, device=self.tensors.rows.h.device)

    def step(
        self, params: list[Tensor], grads: list[Tensor], groups: Groups, shared: Mapping[str, Tensor], total_steps: int
    ) -> None:
        """One step; ``shared`` is the state of all tensors, written, with the losses since the last step in it."""
        tensors, spec = self.tensors, self.spec
        like = sample(tensors.weights)
        everything = len(tensors.selected) == len(tensors.params)
        stacked = tensors.rows if everything else Rows(*(value[self.index] for value in tensors.rows))
        before = tensors.stats if tensors.stats is None or everything else tensors.stats[self.index]
        globals_ = Globals(*(shared[name] for name in Globals._fields))
        here = [[x.to(like.device) for x in some] for some in (tensors.mom, tensors.rms, params, grads)]
        total, count = shared["pending_loss"]
        with one_thread(like.device):
            params_, state, trace = reference.update(
                spec,
                tensors.weights,
                reference.State(globals_, stacked, here[0], here[1]),
                here[2],
                here[3],
                torch.where(count > 0, total / count, torch.full_like(total, float("nan"))),
                lr=tensors.option("lr", groups),
                weight_decay=tensors.option("weight_decay", groups),
                total_steps=float(total_steps),
                before=before,
                positions=tensors.selected,
                shapes=self.shapes if everything else self.shapes.of_rows(tensors.selected),
            )
        gates = list(trace["conditioning"].gate.unbind())
        self.decided = list(trace["step_size"].unbind()), gates if spec.newton_schulz else [None] * len(gates)
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


class KernelPhases:
    """The phases of :mod:`lopt.rule.step` by kernels, each a call for each place; the tables have R rows, of which the
    selected ones count."""

    def __init__(self, stepper: "KernelStepper", shared: Mapping[str, Tensor]) -> None:
        self.stepper, self.places, self.level = stepper, stepper.places, stepper.level
        self.number, self.updates = shared["step"], stepper.tensors.rows.updates
        self.kept = stepper.plan.stats

    def begin(self) -> None:
        self.level.start()

    def accumulate(self) -> Tensor:
        stats = self.stepper.plan.stats
        self.before = stats.clone() if self.level.lagged else stats
        # In one sweep advance, which counts the step, comes before accumulate.
        self.places.set_step(self.number + 1 if self.level.lagged else self.number)
        return self.places.accumulate()

    def advance(self, stats: Tensor) -> None:
        seen = stats
        if self.level.lagged:
            seen, self.kept = reference.lag(stats, self.before, self.updates)
        self.level.advance(seen)

    def apply(self) -> Tensor:
        return self.places.apply()

    def direction(self) -> None:
        self.places.write()

    def finish(self, means: Tensor) -> None:
        self.level.finish(means)
        if self.level.lagged:
            self.stepper.plan.stats.copy_(self.kept)
            self.stepper.bind()


class PartPhases(KernelPhases):
    """The same for parts of tensors: the plan works on what is on this rank, the level on all tensors, and the exchange
    finishes."""

    def direction(self) -> None:
        stepper, plan = self.stepper, self.stepper.plan
        if stepper.directions is None:
            super().direction()
            return
        if plan.num_tensors:
            plan.module.write(plan.backend, plan.addresses[1], False, *plan.place())
        plan.write_large(self._elsewhere)

    def _elsewhere(self, gate: Tensor, step_size: Tensor) -> None:
        directions, exchange = self.stepper.directions, self.stepper.exchange
        assert directions is not None
        assert exchange is not None
        directions.orthogonalise(exchange, gate, step_size)

    def finish(self, means: Tensor) -> None:
        if self.level.lagged:
            self.stepper.plan.stats.copy_(self.kept)


class KernelStepper:
    """Steps by the compiled kernels, on a GPU five launches: begin, accumulate, advance, apply, finish; with lagged
    statistics four: begin, advance, one sweep, finish. Where directions of matrices are treated as a whole, torch's
    products and a launch that writes come before finish.

    Parameters that are not contiguous pass through a staging copy.

    Args:
        backend_of: the back end on a device; the tensor level is on that of the tables of ``tensors``.

    Raises:
        ValueError: sharded parameters are on several devices, or there are no kernels for one.
    """

    def __init__(
        self,
        backend_of: Callable[[torch.device], str],
        tensors: StackedTensors,
        theta: Theta,
        precision: str,
        ranks: Ranks,
    ) -> None:
        spec, home = theta.spec, tensors.rows.h.device
        self.tensors, self.spec, self.precision, self.backend_of = tensors, spec, precision, backend_of
        self.lagged = spec.stats == "lagged"
        others = sorted({str(place.device) for place in tensors.places if place.device != home})
        if tensors.sharded and others:
            raise ValueError(
                f"params: on {home} and {', '.join(others)}, and ranks hold parts of them; shard parameters of one "
                "device, or train whole ones on several devices in one process"
            )
        layout = layout_of(tensors, ranks) if tensors.sharded else None
        shapes = [tuple(param.shape) for param in tensors.params]
        self.matrices = matrices_of(shapes, tensors.kinds)
        self.split = {row: layout.mine[row].numel for row in range(len(shapes)) if layout and layout.split(row)}
        self.packed = kernels.pack_mlp(spec, tensors.weights)
        flat, inputs = kernels.flat_inputs(spec, len(shapes), home)
        kinds, groups = tensors.kinds, tensors.groups
        self.level = level = kernels.TensorLevel(
            backend_of(home), theta, shapes, tensors.rows, groups, inputs, kinds, lagged=self.lagged
        )
        self.plan = plan = self._plan(Name(home), inputs, tensors.rows.rank)
        if layout is not None:  # a bfloat16 state is rounded by positions in whole tensors
            plan.all_entries["offset"] = [box.start(shape) for box, shape in zip(layout.mine, shapes, strict=True)]
        self.places = kernels.Places(Name(home), plan, flat, tensors.rows.rank, self._place)
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
            whole = {row: self.matrices[row] for row in self.split if self.matrices[row].whole}
            if whole and plan.directions is not None:
                memory, large = plan.directions.parts, plan.directions.large
                self.directions = ShardedDirections(ranks, layout, whole, spec.newton_schulz, memory, large)
            width = spec.mlp_width
            self.exchange = Exchange(ranks, layout, spec.features.num_stats, width, tensors.rows.rank, level.finish)

    def _plan(self, name: Name, inputs: Mapping[str, Tensor], rank: Tensor) -> kernels.Plan:
        """A plan of what is at this place of every tensor."""
        tensors, spec = self.tensors, self.spec
        nothing, none = torch.empty(0), [None] * len(tensors.params)
        here = [place == name for place in tensors.places]
        locals_ = [local_of(part) for part in tensors.parts(tensors.params)]
        plan = kernels.Plan(
            self.backend_of(name.device),
            spec.feature_set,
            [param if present else nothing for param, present in zip(locals_, here, strict=True)],
            none,
            none,
            precision=self.precision,
            state_dtype=tensors.dtype,
            device=name.device,
            width=spec.mlp_width,
            layers=spec.mlp_layers,
        )
        parts = {row: 0 for row, present in enumerate(here) if not present} | self.split
        parts = {row: numel for row, numel in parts.items() if self.matrices[row].whole}
        plan.treat_whole(self.matrices, spec.newton_schulz, rank, parts)
        plan.bind_accumulate(inputs["clip_limit"], spec.mom_decays, spec.rms_decays)
        plan.bind_apply(inputs, self.packed.to(name.device), spec.magnitude_rate, spec.feature_clip)
        return plan

    def _place(self, name: Any) -> kernels.Place:
        flat, inputs = kernels.flat_inputs(self.spec, len(self.tensors.params), name.device)
        return kernels.Place(self._plan(name, inputs, self.tensors.rows.rank.to(name.device, copy=True)), flat)

    @property
    def decided(self) -> Decided:
        """What the last step was, copied."""
        tables = [self.level.inputs[name].clone().unbind() for name in ("step_size", "gate")]
        sizes, gates = ([table[row] for row in self.tensors.selected] for table in tables)
        return sizes, gates if self.spec.newton_schulz else [None] * len(gates)

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
            plan = self.places.plan_at(tensors.places[row])
            if row not in plan.keep_alive:
                plan.hold(row, mom, rms)
        here = tensors.selected if self.exchange is None else self.exchange.select(tensors.selected)
        self.places.select(here, [tensors.places[row] for row in here])
        if self.directions is not None:
            self.directions.select(tensors.selected)
        self.bind()
        # With lagged statistics, a tensor's first step sees its own, so accumulate comes before advance.
        self.some_first = self.lagged and bool((tensors.rows.updates[tensors.selected] == 0).any())

    def bind(self) -> None:
        """Let the level read what the plan at home holds of the selected tensors."""
        alone = self.exchange is None and not self.places.several
        self.level.bind(self.plan, rows=None if alone else self.tensors.selected)

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
        level, tensors = self.level, self.tensors
        copied = self._point(params, grads, converted)
        level.set_options(groups, total_steps)
        level.set_losses(shared, loss)
        if self.exchange is not None:
            self.exchange.shared = shared
            self._step_parts(PartPhases(self, shared), self.exchange)
        elif self.some_first or self.places.several:
            if self.places.several and any(map(kernels.devices.is_capturing, self.devices)):
                raise RuntimeError("CUDA graph: parameters are on several devices; step them outside of graphs")
            run(KernelPhases(self, shared))
        else:
            self.plan.set_step(shared["step"])
            kernels.step(self.plan, self.levels, self.lagged)
        self.some_first = False
        for param, copy in copied:
            param.copy_(copy)
        if tensors.shares is not None:
            tensors.shares.exchange(params)
        increment_versions(params)
        for plan in self.places.plans:
            plan.grads = []  # zero_grad frees their memory

    def _step_parts(self, phases: PartPhases, exchange: Exchange) -> None:
        if not self.lagged or self.some_first:
            run(phases, exchange)
            return
        exchange.settle()
        phases.begin()
        exchange.sum_losses()
        self.level.advance(self.plan.stats)
        self.plan.set_step(phases.number)
        if self.plan.num_tensors:
            self.plan.sweep()
        phases.direction()
        exchange.depart(self.plan.stats, self.plan.hidden)

    def _point(self, params: list[Tensor], grads: list[Tensor], converted: bool) -> list[tuple[Tensor, Tensor]]:
        """Let the plans see parameters and gradients.

        Returns:
            Parameters that are not contiguous, with the copies that are stepped in their place.
        """
        tensors = self.tensors
        known = not (converted or self.converted)  # whether the plan knows the dtypes of the gradients
        self.converted = converted
        if known and tensors.operands.plain and not self.places.several:
            self.plan.point(cast(kernels.Operands, tensors.operands), grads)
            return []
        copied = []
        found: dict[Name, list[tuple[Tensor, Tensor]]] = {}
        for row, part, grad in zip(tensors.selected, tensors.parts(params), grads, strict=True):
            if local_of(part).numel():
                found.setdefault(tensors.places[row], []).append((local_of(part), grad))
        for name, pairs in found.items():
            here = [param for param, _ in pairs]
            copies = kernels.contiguous(here)
            self.places.plan_at(name).set_tensors(copies, kernels.contiguous([grad for _, grad in pairs]))
            copied += [(param, copy) for param, copy in zip(here, copies, strict=True) if copy is not param]
        return copied

    # A step with lagged statistics, a tensor at a time (lopt.in_backward).

    def begin(self, rows: list[int], groups: Groups, shared: Mapping[str, Tensor], total_steps: int) -> None:
        """What comes before the first gradient; ``rows`` will have one, and had one before."""
        level = self.level
        if rows != self.tensors.selected:
            self.select(rows)
        level.set_options(groups, total_steps)
        level.set_losses(shared, None)
        level.start()
        level.advance(self.plan.stats)
        self.places.set_step(shared["step"])
        self.places.send()

    def sweep(self, row: int, grad: Tensor) -> None:
        """One tensor."""
        plan, param = self.places.plan_at(self.tensors.places[row]), self.tensors.params[row]
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
        self.places.collect()
        self.level.finish()

    @property
    def devices(self) -> set[torch.device]:
        """Where something is done in a step."""
        return {self.plan.device, *(plan.device for plan in self.places.plans)}
