"""Steps of an optimizer over its tensors (:mod:`lopt.tensors`): by the reference, or by the kernels.

Both steppers go in the order of :mod:`lopt.rule.step`. An unsharded step of the kernels on one device is one call;
others go phase by phase: sharded tensors with :class:`lopt.distributed.Exchange` in the seams, several devices with
:class:`lopt.kernels.Places` between them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lopt import kernels
from lopt.distributed import Exchange, Ranks, ShardedDirections, local_of
from lopt.distributed.parts import increment_versions
from lopt.rule import Theta, reference, tensor_lstm
from lopt.rule.features import STATS
from lopt.rule.inputs import Shapes
from lopt.rule.matrices import matrices_of
from lopt.rule.step import run
from lopt.rule.tensor_lstm import Globals, Rows
from lopt.state import Groups, sample
from lopt.tensors import Decided, Name, StackedTensors, layout_of, one_thread


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
        kept = [tensors.mom, tensors.rms, *([] if tensors.scales is None else [tensors.scales])]
        here = [[x.to(like.device) for x in some] for some in (params, grads, *kept)]
        total, count = shared["pending_loss"]
        with one_thread(like.device):
            params_, state, trace = reference.update(
                spec,
                tensors.weights,
                reference.State(globals_, stacked, here[2], here[3]),
                here[0],
                here[1],
                torch.where(count > 0, total / count, torch.full_like(total, float("nan"))),
                lr=tensors.option("lr", groups),
                weight_decay=tensors.option("weight_decay", groups),
                total_steps=float(total_steps),
                before=before,
                positions=tensors.selected,
                shapes=self.shapes if everything else self.shapes.of_rows(tensors.selected),
                scales=None if tensors.scales is None else here[4],
            )
        gates = list(trace["conditioning"].gate.unbind())
        self.decided = list(trace["step_size"].unbind()), gates if spec.newton_schulz else [None] * len(gates)
        for param, new in zip(params, params_, strict=True):
            param.copy_(new)
        for olds, news in zip(kept, (state.mom, state.rms, trace.get("scales", [])), strict=False):
            for old, new in zip(olds, news, strict=True):
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
            backend_of(home),
            theta,
            shapes,
            tensors.rows,
            groups,
            inputs,
            kinds,
            lagged=self.lagged,
            state=tensors.dtype,
        )
        self.plan = plan = self._plan(Name(home), inputs, tensors.rows.rank)
        if layout is not None:  # a narrow state is rounded by positions in whole tensors
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
        scales: Sequence[Tensor | None] = tensors.scales or [None] * len(tensors.mom)
        for row, mom, rms, of_both in zip(tensors.selected, tensors.mom, tensors.rms, scales, strict=True):
            plan = self.places.plan_at(tensors.places[row])
            if row not in plan.keep_alive:
                plan.hold(row, mom, rms, of_both)
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
