"""PartOperands: gradients of what of every parameter lies on this rank."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lopt.distributed.parts import local_gradient, local_of
from lopt.distributed.shares import Shares


class PartOperands:
    """As :class:`lopt.kernels.Operands`, for parameters of which some are sharded."""

    plain = False

    def __init__(self, params: Sequence[Tensor], shares: Shares | None = None) -> None:
        self._params, self._shares = params, shares
        self._given: list[int] = []
        self._selected: list[int] = []
        self._found: list[Any] = []
        self._accepted: list[Any] = []

    def look(self) -> tuple[list[Tensor], bool, bool]:
        """Gradients of the parameters that have one, also those of which nothing is here; they are redistributed where
        they lie in another way than the parameter, a collective.

        Returns:
            The gradients, whether it is other parameters than the selected ones that have one, and whether they have to
            be checked, since something else about them is not as it was accepted.
        """
        grads, self._given, self._found = [], [], []
        for index, param in enumerate(self._params):
            if param.grad is not None:
                grad, part = param.grad, param
                if self._shares is None:
                    grad = local_gradient(param, grad)
                else:
                    part, grad = self._shares.part(param), self._shares.gradient(param, grad)
                local = local_of(part)
                grads.append(grad)
                self._given.append(index)
                self._found.append((local.dtype, local.shape, local.device, grad.dtype, grad.shape, grad.device))
        return grads, self._given != self._selected, self._found != self._accepted

    def accept(self) -> None:
        """What the last :meth:`look` saw has been checked."""
        self._accepted = self._found

    def select(self) -> list[int]:
        """Select the parameters whose gradients the last :meth:`look` saw; their positions."""
        self._selected = self._given
        return self._selected

    def replace(self, grads: list[Tensor]) -> None:
        """Other tensors, of the same kind, are in the place of the gradients that the last :meth:`look` saw."""

    def write(self, entries: int, grads: int) -> tuple[bool, bool]:
        """Never called, as nothing is ``plain``."""
        raise NotImplementedError
