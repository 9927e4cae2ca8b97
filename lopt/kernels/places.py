"""Places: plans over tensors that lie on several devices, and what travels between them and the tensor level.

The tensor level is at home, on one device; it sees the statistics of all R tensors there. On every device a plan steps
the tensors that are there, as if it held parts of all of them and nothing of the others. Small tables travel::

    begin, advance        at home
      send                clip limits, then all inputs of apply       -> every place
    accumulate, apply     at every place
      gather              statistics, then means of hidden units and ranks of directions -> home
    finish                at home

A copy from one GPU to another waits for both current streams and for nothing on the host; one between a GPU and the CPU
waits for the GPU. With one place nothing travels.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from lopt.kernels.plan import Plan


class Place:
    """A plan, with memory of its own for what it reads of the tensor level.

    Args:
        plan: of the tensors here; the operands of its operations are bound.
        inputs: flat memory of all inputs of apply.
    """

    def __init__(self, plan: Plan, inputs: Tensor) -> None:
        self.plan, self.inputs = plan, inputs
        self.step = torch.zeros((), dtype=torch.int64, device=plan.device)
        self.rows = self.rows_home = torch.zeros(0, dtype=torch.int64)

    def send(self, inputs: Tensor, rank: Tensor) -> None:
        """Bring what the tensor level wrote."""
        self.inputs.copy_(inputs)
        if self.plan.directions is not None:
            self.plan.rank.copy_(rank)

    def gather(self, table: Tensor, home: Tensor) -> None:
        """Take the rows of a table to that of the same kind at home."""
        home[self.rows_home] = table[self.rows].to(home.device)


class Places:
    """The plans of R tensors, of which the first is at home.

    Args:
        home: where the tensor level is; any name of a place.
        plan: the one there.
        inputs: flat memory of the inputs of apply at home.
        rank: ``[R]``, the ranks of directions at home.
        make: makes another place, when the first tensor there is selected.

    Attributes:
        collected: number of tables that came home so far.
    """

    def __init__(
        self, home: Hashable, plan: Plan, inputs: Tensor, rank: Tensor, make: Callable[[Hashable], Place]
    ) -> None:
        self.home, self._inputs, self._rank, self._make = plan, inputs, rank, make
        self._name, self._places = home, dict[Hashable, Place]()
        self._others: list[Place] = []  # with selected tensors
        self.collected = 0

    @property
    def several(self) -> bool:
        """Whether selected tensors are elsewhere than at home."""
        return bool(self._others)

    def plan_at(self, name: Hashable) -> Plan:
        """The plan of a place."""
        if name == self._name:
            return self.home
        if name not in self._places:
            self._places[name] = self._make(name)
        return self._places[name].plan

    def select(self, rows: Sequence[int], names: Sequence[Hashable]) -> None:
        """Let the operations work on these tensors.

        Args:
            rows: in ascending order.
            names: the place of each.
        """
        found: dict[Hashable, list[int]] = {}
        for row, name in zip(rows, names, strict=True):
            found.setdefault(name, []).append(row)
        self.home.select(found.pop(self._name, []))
        self._others = []
        for name, here in found.items():
            self.plan_at(name).select(here)
            place = self._places[name]
            place.rows = torch.tensor(here, device=place.plan.device)
            place.rows_home = torch.tensor(here, device=self.home.device)
            self._others.append(place)

    @property
    def plans(self) -> list[Plan]:
        """Those with selected tensors; the one at home last, for on the CPU the host waits for it."""
        return [place.plan for place in self._others] + ([self.home] if self.home.num_tensors else [])

    def set_step(self, step: Tensor) -> None:
        """The number of steps so far, by which a narrow state is rounded."""
        self.home.set_step(step)
        for place in self._others:
            place.step.copy_(step)
            place.plan.set_step(place.step)

    def send(self) -> None:
        """Let all places know what the tensor level wrote."""
        for place in self._others:
            place.send(self._inputs, self._rank)

    def accumulate(self) -> Tensor:
        """``[R, S]`` statistics at home."""
        self.send()
        for plan in self.plans:
            plan.run_accumulate()
        self._gather("stats")
        return self.home.stats

    def apply(self) -> Tensor:
        """``[R, width]`` means of hidden units at home."""
        self.send()
        for plan in self.plans:
            plan.run_apply()
        self._gather("hidden")
        return self.home.hidden

    def write(self) -> None:
        """Directions -> parameters."""
        for plan in self.plans:
            plan.write()
        self._gather("rank")

    def collect(self) -> None:
        """All tables, where tensors were swept one by one."""
        for name in ("stats", "hidden", "rank"):
            self._gather(name)

    def _gather(self, name: str) -> None:
        home = self._rank if name == "rank" else getattr(self.home, name)
        for place in self._others:
            if name != "rank" or place.plan.directions is not None:
                place.gather(getattr(place.plan, name), home)
                self.collected += 1
