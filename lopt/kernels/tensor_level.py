"""TensorLevel: what belongs to a tensor or to all of them, around and between the two device operations."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopt.kernels import devices
from lopt.kernels.devices import Table, stream_of
from lopt.kernels.extension import module_of
from lopt.kernels.own import resolved
from lopt.kernels.plan import Plan
from lopt.kernels.seen import Seen
from lopt.kernels.structs import ADVANCE, APPLY_INPUTS, shape_records, spec_record
from lopt.rule.matrices import Kind
from lopt.rule.spec import ThetaSpec
from lopt.rule.tensor_lstm import Rows
from lopt.rule.theta import Theta

ALIGNED = 64  # floats: where one input begins in the memory of all

#: State that all tensors share, as AdvanceParams names it.
SHARED = ("step", "train_loss", "valid_loss", "clip", "from_lstm", "pending_loss", "nonfinite")


def apply_inputs(spec: ThetaSpec, num_tensors: int, device: torch.device) -> dict[str, Tensor]:
    """Uninitialised memory for what :class:`TensorLevel` writes and :meth:`Plan.apply` reads, a row for each tensor."""
    return flat_inputs(spec, num_tensors, device)[1]


def flat_inputs(spec: ThetaSpec, num_tensors: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`apply_inputs`, and all of them as one tensor, by which they can be copied."""
    sizes = {"one": (), "columns": (len(spec.features.columns),), "width": (spec.mlp_width,)}
    shapes = {name: (num_tensors, *sizes[size]) for name, size in APPLY_INPUTS.items()}
    counts = [-(-math.prod(shape) // ALIGNED) * ALIGNED for shape in shapes.values()]
    flat = torch.zeros(sum(counts), device=device)
    parts = zip(shapes.items(), torch.split(flat, counts), strict=True)
    return flat, {name: part[: math.prod(shape)].view(shape) for (name, shape), part in parts}


class TensorLevel:
    """Everything at tensor level, compiled: ``lopt.rule.tensor_lstm.advance`` but for rounding; on a GPU a launch each.

    Nothing is read back to the host. Numbers that groups have as Python floats are written to the device when they
    change, those they have as tensors in every step.

    Args:
        backend: as for :class:`Plan`.
        theta: its spec must have compiled kernels.
        shapes: of the parameter tensors. Without any, only losses can be observed.
        rows: stacked state of the tensors, float32, on their device; written in place.
        groups: of each tensor, its param group, in ascending order; all the first one by default.
        inputs: where to write the inputs of apply, rows of :func:`apply_inputs`; memory of its own by default. So
            several levels, each with its theta, can share a :class:`Plan`.
        kinds: what is known about each tensor beside its shape.
        lagged: the caller gives :meth:`advance` the statistics of the step before (:func:`lopt.rule.reference.lag`).
        state: dtype of the accumulators, of the kernels beside which it is used.

    Raises:
        ValueError: theta was made for lagged statistics and the caller has current ones, or the other way round.
    """

    def __init__(
        self,
        backend: str,
        theta: Theta,
        shapes: Sequence[Sequence[int]],
        rows: Rows,
        groups: Sequence[int] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        kinds: Sequence[Kind] | None = None,
        lagged: bool = False,
        state: torch.dtype = torch.float32,
    ) -> None:
        spec, num_tensors, device = theta.spec, len(shapes), rows.h.device
        if num_tensors and lagged != (spec.stats == "lagged"):
            raise ValueError(
                f"theta: has stats={spec.stats!r}, which this computation does not have; use another theta"
            )
        self.lagged = lagged
        groups = [0] * num_tensors if groups is None else groups

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        self.module, self.device = module_of(backend), device
        self.backend = resolved(backend, spec.feature_set, spec.mlp_width, spec.mlp_layers, state)
        self.lr, self.decay, self.total_steps = empty(num_tensors), empty(num_tensors), empty(1)
        self.inputs = dict(apply_inputs(spec, num_tensors, device) if inputs is None else inputs)
        self.to_lstm = empty(num_tensors, spec.from_lstm)
        self.finished = torch.zeros(1, dtype=torch.int32, device=device)
        self.theta = theta.flatten().to(device, torch.float32).contiguous()
        self.shapes = Table(shape_records(shapes, kinds), device)
        self.all_rows = Table(np.arange(num_tensors), device)
        self._options: list[tuple[int, str, Tensor]] = []  # group, its option, the tensors of the group
        for group in sorted(set(groups)):
            of_group = slice(groups.index(group), len(groups) - list(reversed(groups)).index(group))
            self._options += [(group, "lr", self.lr[of_group]), (group, "weight_decay", self.decay[of_group])]
        self._written: dict[tuple[int, str], float] = {}
        self._settled: Sequence[Mapping[str, Any]] | None = None  # options that need not be written again
        self._settled_steps: int | None = None
        spec_ = spec_record(spec)
        self._keep_alive = rows, spec_
        self._record = record = np.zeros((), ADVANCE)
        record["spec"], record["num_tensors"] = spec_.ctypes.data, num_tensors
        record["shapes"], record["rows"] = self.shapes.address, self.all_rows.address
        for name in ("theta", "lr", "decay", "total_steps", "to_lstm", "finished"):
            record[name] = getattr(self, name).data_ptr()
        for name, value in self.inputs.items():
            record[name] = value.data_ptr()
        for name, value in zip(("h", "c", "feedback", "initial_scale", "updates", "rank"), rows, strict=True):
            record[name] = value.data_ptr()
        #: Address of AdvanceParams.
        self.address = record.ctypes.data
        self._shared: Mapping[str, Tensor] = {}
        self._seen_shared = Seen()
        self._losses = [(record[f"new_{name}"], record[f"{name}_value"]) for name in ("train", "valid")]  # views
        self._untold = [False, False]  # whether it is written there that there is none

    def _call(self, function: Callable[..., None]) -> None:
        function(self.backend, self.address, *stream_of(self.device))

    def set_options(self, groups: Sequence[Mapping[str, Any]], total_steps: int | None) -> None:
        """``lr`` and ``weight_decay`` of the param groups, and the number of steps planned.

        A list that was given in the call before is taken to hold what it held.
        """
        if groups is self._settled and total_steps == self._settled_steps:
            return
        for group, name, target in self._options:
            self._write((group, name), groups[group][name], target)
        self._write((0, "total_steps"), float(total_steps or 0), self.total_steps)
        read_anew = any(isinstance(groups[group][name], Tensor) for group, name, _ in self._options)
        again = read_anew or devices.is_capturing(self.device)
        self._settled, self._settled_steps = None if again else groups, total_steps

    def _write(self, key: tuple[int, str], value: float | Tensor, target: Tensor) -> None:
        if isinstance(value, Tensor) and value.device == target.device:
            self._written.pop(key, None)
            target.copy_(value.reshape(()))
        elif self._written.get(key) != value:
            target.fill_(float(value))  # a kernel's argument: no memory of the host is read later
            captured = devices.is_capturing(self.device)  # and not yet run
            self._written[key] = math.nan if captured else float(value)

    def begin(
        self, shared: Mapping[str, Tensor], train_loss: float | Tensor | None, valid_loss: float | Tensor | None = None
    ) -> None:
        """Before accumulate: takes losses, and writes ``clip_limit``.

        Args:
            shared: the state of all tensors, written in place by this and the other calls of the step.
            train_loss, valid_loss: numbers or float32 tensors of one element on the device; one that is not finite
                counts as none.
        """
        self.set_losses(shared, train_loss, valid_loss)
        self.start()

    def start(self) -> None:
        """:meth:`begin`, of what :meth:`set_losses` was given."""
        self._call(self.module.begin)

    def set_losses(
        self, shared: Mapping[str, Tensor], train_loss: float | Tensor | None, valid_loss: float | Tensor | None = None
    ) -> None:
        """What :meth:`begin` reads, for :func:`step`."""
        if shared is not self._shared or not self._seen_shared.same():
            self._shared, self._seen_shared = shared, Seen()
            self._seen_shared.items(shared, *SHARED)
            for name in SHARED:
                self._record[name] = shared[name].data_ptr()
        for i, loss in enumerate((train_loss, valid_loss)):
            address, number = self._losses[i]
            if isinstance(loss, Tensor):
                address[...] = loss.data_ptr()  # wins over the number
            elif loss is not None or not self._untold[i]:
                address[...], number[...] = 0, math.nan if loss is None else loss
            self._untold[i] = loss is None

    def bind(self, plan: Plan, part: slice | None = None, rows: Sequence[int] | None = None) -> None:
        """Let the phases read what ``plan`` writes, for its selected tensors.

        Args:
            part: this level's rows among the plan's, where several levels share it; all of them must be selected.
            rows: those that take part, in ascending order, where they are others than those the plan works on.
        """
        stats, hidden = (plan.stats, plan.hidden) if part is None else (plan.stats[part], plan.hidden[part])
        self._record["stats"], self._record["hidden"] = stats.data_ptr(), hidden.data_ptr()
        if rows is not None:
            self.some_rows = Table(np.array(rows, dtype=np.int64), self.device)
            self._record["rows"], self._record["num_tensors"] = self.some_rows.address, len(rows)
        elif part is None:
            self._record["rows"], self._record["num_tensors"] = plan.rows.address, plan.num_tensors
        self._bound = plan.rows, stats, hidden  # whose addresses the record has, when the plan may be gone

    def advance(self, stats: Tensor) -> None:
        """Between accumulate and apply: from ``stats`` and the options the inputs of apply."""
        self._record["stats"] = stats.data_ptr()
        self._call(self.module.advance)

    def finish(self, hidden: Tensor | None = None) -> None:
        """After apply: what the next LSTM step sees of ``hidden`` ``[R, width]``, by default the plan's."""
        if hidden is not None:
            self._record["hidden"] = hidden.data_ptr()
        self._call(self.module.finish)


class Levels:
    """The levels that share a plan, as :func:`step` takes them."""

    def __init__(self, levels: Sequence[TensorLevel]) -> None:
        self.levels = levels
        self._addresses = np.array([level.address for level in levels])
        self.address, self.count = self._addresses.ctypes.data, len(levels)


def step(plan: Plan, levels: Levels, lagged: bool = False) -> None:
    """A whole step in one call (csrc/api/step.h), of operands that were bound before; in three where torch
    orthogonalises directions of large matrices.

    Args:
        lagged: advance comes before accumulate and sees what ``plan.stats`` holds; accumulate and apply are then one
            sweep.
    """
    if not plan.module.step(plan.backend, levels.address, levels.count, *plan.addresses, lagged, *plan.place()):
        plan.write_large()
        for level in levels.levels:
            level.finish()
