"""An average of the iterates, kept beside the parameters for runs whose end nobody knows.

A run that is not told its number of steps does not shrink them towards an end, and its parameters keep wandering about
what they have found. Their average is rid of that::

    average <- decay average + (1 - decay) parameter      decay = min(.998, (k + 1) / (k + 10)) in the k-th update

Early it forgets quickly, as the first parameters are far away; later it reaches over some 500 steps.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lopt.distributed import is_sharded, local_of, whole_of

DECAY = 0.998

State = MutableMapping[Tensor, dict[str, Any]]


def decay_at(updates: int) -> float:
    """The decay of the update that comes after ``updates`` of them.

    Example:
        >>> decay_at(0), decay_at(8), decay_at(100_000)
        (0.1, 0.5, 0.998)
    """
    return min(DECAY, (updates + 1) / (updates + 10))


class Averages:
    """The averages of an optimizer's parameters, in ``state[p]["average"]``, if they are wanted.

    Each is float32, or float64 for such a parameter, and begins as the parameter after its first step. The number of
    updates is in the param groups as ``averaged_steps``.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.swapped = wanted, False

    def check(self) -> None:
        """Refuse a step while parameters are averages."""
        if self.swapped:
            raise RuntimeError("step: inside averaged(), where parameters are averages; leave it before the next step")

    def initial(self, part: Tensor) -> dict[str, Tensor]:
        """What the state of a parameter has of it, as it is stepped, if it is the first iterate."""
        dtype = torch.promote_types(part.dtype, torch.float32)
        return {"average": part.detach().to(dtype, copy=True)} if self.wanted else {}

    def update(
        self, params: Sequence[Tensor], parts: Sequence[Tensor], state: State, groups: Sequence[dict[str, Any]]
    ) -> None:
        """Take these parameters, as they are stepped, into their averages."""
        if self.wanted:
            self._update(params, parts, state, groups)

    @torch.no_grad()
    def _update(
        self, params: Sequence[Tensor], parts: Sequence[Tensor], state: State, groups: Sequence[dict[str, Any]]
    ) -> None:
        known: list[tuple[Tensor, Tensor]] = []
        for param, part in zip(params, parts, strict=True):
            if "average" in state[param]:
                known.append((local_of(state[param]["average"]), local_of(part)))
            else:
                state[param].update(self.initial(part))
        if known:
            averages = [average for average, _ in known]
            values = [part.detach().to(average.dtype) for average, part in known]
            torch._foreach_lerp_(averages, values, 1.0 - decay_at(groups[0].get("averaged_steps", 0)))
        for group in groups:
            group["averaged_steps"] = group.get("averaged_steps", 0) + 1

    @contextmanager
    def in_place(self, params: Sequence[Tensor], state: State) -> Iterator[None]:
        """The averages in place of the parameters that have one, and the parameters back afterwards, bit for bit."""
        if not self.wanted:
            raise RuntimeError("averaged: no averages are kept; write LearnedOptimizer(..., average=True)")
        if self.swapped:
            raise RuntimeError("averaged: already inside, parameters are averages now")
        averaged = [param for param in params if "average" in state.get(param, {})]
        with torch.no_grad():
            kept = [param.detach().clone() for param in averaged]
            for param in averaged:
                average = state[param]["average"]
                param.copy_(average if is_sharded(param) == is_sharded(average) else whole_of(average))
        self.swapped = True
        try:
            yield
        finally:
            self.swapped = False
            with torch.no_grad():
                for param, value in zip(averaged, kept, strict=True):
                    param.copy_(value)
