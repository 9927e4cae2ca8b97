"""The tensors of an optimizer with their state: which take part in a step, where each is stepped, who holds which part.

An optimizer has R tensors; those with a gradient take part in a step, the selected ones.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lopt import kernels
from lopt.distributed import Box, Layout, PartOperands, Ranks, Shares, is_sharded, local_of
from lopt.roles import kinds_of_groups
from lopt.rule import AnySpec, ThetaSpec, tensor_lstm
from lopt.rule.matrices import Kind, Matrix
from lopt.rule.tensor_lstm import Rows
from lopt.state import Groups, init_state, sample


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
            self._seen_state.items(state, *(name for name in ("mom", "rms", "scales") if name in state))

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
        self.scales: list[Tensor] | None = None  # of accumulators in 8 bits
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
        self.scales = [state["scales"] for state in states] if self.dtype == torch.int8 else None


def _flat(accumulators: Tensor) -> Tensor:
    """``[K, *shape]`` -> ``[K, numel]`` of what is on this rank, the same memory."""
    local = local_of(accumulators)
    return local.view(len(local), -1) if local.numel() else local.new_empty(len(local), 0)


def layout_of(tensors: StackedTensors, ranks: Ranks) -> Layout:
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
