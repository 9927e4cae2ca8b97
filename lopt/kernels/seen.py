"""Whether what a step relies on is as it was in the step before: so a step checks only what changed."""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lopt.kernels.extension import _C, NOT_BUILT


class _Seen:
    """Lists and dicts, and whether they hold the objects that they held when they were added."""

    def __init__(self) -> None:
        self._found: list[tuple[Any, tuple[Any, ...], list[Any]]] = []

    def all(self, container: Sequence[Any] | Mapping[Any, Any]) -> None:
        """Everything in a list, or all values of a dict, in their order."""
        self._found.append((container, (), _held(container, ())))

    def items(self, container: Mapping[str, Any], *keys: Any) -> None:
        """What is in a dict under these keys."""
        self._found.append((container, keys, _held(container, keys)))

    def same(self) -> bool:
        """Whether nothing else is there now."""
        return all(_same(old, _held(container, keys)) for container, keys, old in self._found)


def _held(container: Any, keys: tuple[Any, ...]) -> list[Any]:
    if keys:
        return [container.get(key) for key in keys]
    return list(container.values() if isinstance(container, Mapping) else container)


def _same(old: Sequence[Any], new: Sequence[Any]) -> bool:
    return len(old) == len(new) and all(map(is_, old, new))


class _Operands:
    """The parameters of an optimizer, and what they and their gradients were when :meth:`accept` was called.

    Where nothing is compiled, nothing counts as accepted, so that everything is checked in each step.
    """

    #: Whether what the last :meth:`look` saw is as it was accepted, contiguous, and no negated view.
    plain = False

    def __init__(self, tensor_class: type[Tensor], params: list[Tensor]) -> None:
        self._params = params
        self._given: list[int] = []
        self._selected: list[int] = []

    def look(self) -> tuple[list[Tensor], bool, bool]:
        """Gradients of the parameters that have one.

        Returns:
            The gradients, whether it is other parameters than the selected ones that have one, and whether parameters
            and gradients have to be checked: it is others, or something else about them is not as it was accepted.
        """
        grads = [param.grad for param in self._params]
        self._given = [index for index, grad in enumerate(grads) if grad is not None]
        return [grad for grad in grads if grad is not None], self._given != self._selected, True

    def accept(self) -> None:
        """What the last :meth:`look` saw has been checked."""

    def select(self) -> list[int]:
        """Select the parameters whose gradients the last :meth:`look` saw; their positions."""
        self._selected = self._given
        return self._selected

    def replace(self, grads: list[Tensor]) -> None:
        """Other tensors, of the same kind, are in the place of the gradients that the last :meth:`look` saw."""

    def write(self, entries: int, grads: int) -> tuple[bool, bool]:
        """Write addresses of what the last :meth:`look` saw, if it is :attr:`plain`, to the tables of a plan.

        Args:
            entries, grads: addresses of the tables, with a row for each selected parameter.

        Returns:
            Whether any parameter, and whether any gradient is elsewhere than the tables said.
        """
        raise NotImplementedError("nothing is compiled that could read addresses")


def _is_number(tensor: object, like: Tensor) -> bool:
    """Whether a tensor is one number that kernels can read as it is, of the dtype and device of ``like``; where that
    is not known, False."""
    return False


if TYPE_CHECKING or NOT_BUILT:
    Seen = _Seen
    Operands = _Operands
    is_number = _is_number
else:
    try:
        Seen, Operands, is_number = _C.Seen, _C.Operands, _C.is_number
    except AttributeError as error:
        remedy = "rebuild the extension: pip install --no-build-isolation --no-deps -e ."
        raise ImportError(f"lopt._C was built from other sources ({error}); {remedy}") from error
