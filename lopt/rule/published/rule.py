"""What a learned optimizer of others is here: a frozen spec with its constants, and pure functions for state and step.

A rule knows nothing of torch's optimizers, of groups, files or layouts: tensors come to it in the layout of its source,
matrices ``[in, out]`` and kernels of convolutions ``[..., in, out]``, and it returns directions and step sizes.
:mod:`lopt.rule.published.step` does the rest for all rules.

To add one: a module beside this one with a subclass of :class:`Rule`, and a line in :data:`lopt.rule.published.RULES`.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lopt.rule.matrices import Kind

Weights = Mapping[str, Tensor]
State = dict[str, Tensor]
Own = TypeVar("Own", bound="Rule")


class Now(NamedTuple):
    """What all tensors have in common in a step; tensors ``[]`` but for ``rest``."""

    step: Tensor  # number of updates before this one
    loss: Tensor  # last training loss that is known, NaN before any
    total_steps: Tensor  # number of steps planned, 0 when unknown
    rest: Tensor  # [T] bool: tensors that are left as they are, which must count in nothing that others see
    #: The next ``mom`` and ``rms`` of tensor t as they are stored, where that is narrower.
    stored: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda t, mom, rms: (mom, rms)


class Update(NamedTuple):
    """What a step makes: ``param <- keep param - size direction``, with weight decay in ``keep``."""

    directions: list[Tensor]  # per tensor, in its shape
    sizes: list[Tensor]  # per tensor []
    shared: State
    states: list[State]
    trace: dict[str, Any]  # intermediates, for tests


@dataclasses.dataclass(frozen=True)
class Rule(ABC):
    """A learned optimizer: constants are the fields, what is meta-learned has the names and shapes of :meth:`shapes`.

    Class attributes:
        name: in theta files.
        source: where it was published.
        needs_total_steps: whether it cannot do without the number of steps.
        tensors_alone: whether the step of a tensor depends on no other.
        per_param: names in a tensor's state of accumulators ``[K, *shape]``; the first one is ``mom``.
        shared: names of what all tensors share, in :meth:`init_shared`.
        jax_key, pylo_key: an array by which files of others are known to be of this rule, the first of all rules of
            which it is there; see :meth:`Arrays.get`.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs_total_steps: ClassVar[bool] = False
    tensors_alone: ClassVar[bool] = False
    per_param: ClassVar[tuple[str, ...]] = ("mom", "rms")
    shared: ClassVar[tuple[str, ...]] = ()
    jax_key: ClassVar[str]
    pylo_key: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("decays"):
                object.__setattr__(self, field.name, tuple(map(float, value)))
                if not value or not all(0.0 < decay < 1.0 for decay in value):
                    raise ValueError(f"{field.name}: expected decays in (0, 1), got {value!r}")
            elif field.name.endswith(("width", "size", "layers")):
                if not (isinstance(value, int) and value >= 1):
                    raise ValueError(f"{field.name}: expected a whole number from 1, got {value!r}")
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name}: expected a finite number, got {value!r}")

    # ---- Theta ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of theta; weights are ``[in, out]``, or ``[..., in, out]``."""

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random meta-parameters as in the source: weights are normal with ``sigma = 1 / sqrt(in)``, truncated at two
        sigma, all else is zero."""
        tensors = {name: torch.zeros(shape) for name, shape in self.shapes().items()}
        for tensor in tensors.values():
            if tensor.dim() >= 2:
                sigma = 1 / math.sqrt(tensor.shape[-2])
                torch.nn.init.trunc_normal_(tensor, 0.0, sigma, -2 * sigma, 2 * sigma, generator=generator)
        return tensors

    @property
    def horizon_input(self) -> bool:
        """Whether the number of steps makes a difference."""
        return self.needs_total_steps

    @property
    def preset(self) -> str:
        """What tables call it."""
        return self.name

    @property
    def num_floats(self) -> int:
        """Number of meta-parameters."""
        return sum(map(math.prod, self.shapes().values()))

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values, with the name as ``rule``."""
        return {"rule": self.name, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls: type[Own], values: Mapping[str, Any]) -> Own:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: a field is unknown or missing.
        """
        fields = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items() if name != "rule"}
        names = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != names:
            raise ValueError(
                f"spec: unknown fields {sorted(set(fields) - names)}, missing fields {sorted(names - set(fields))} of "
                f"rule {cls.name!r}; the file was written by another version of lopt"
            )
        return cls(**fields)

    # ---- Weights of others ------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def from_jax(cls: type[Own], arrays: "Arrays") -> tuple[Own, dict[str, Tensor]]:
        """Spec and tensors from the arrays of its JAX implementation."""

    @classmethod
    def from_pylo(cls: type[Own], arrays: "Arrays", optimizer: str | None) -> tuple[Own, dict[str, Tensor]]:
        """Spec and tensors from the state dict of PyLO's module.

        Args:
            optimizer: which of PyLO's, where several have the same module.

        Raises:
            ValueError: PyLO has no such rule.
        """
        raise ValueError(f"import_pylo: PyLO has no {cls.name}")

    # ---- State and step ---------------------------------------------------------------------------------------------

    def init_shared(self, weights: Weights) -> State:
        """What all tensors share before the first step."""
        return {}

    @abstractmethod
    def init_param(self, weights: Weights, shape: Sequence[int], kind: Kind) -> State:
        """State of a tensor before its first step.

        Args:
            shape: in the layout of the source.
            kind: what is known about the tensor.
        """

    def decays(self, weights: Weights) -> tuple[Tensor, ...]:
        """Of momenta, second moments and factored ones ``[K]``, as far as they are the same for all tensors."""
        none = next(iter(weights.values())).new_zeros(0)
        return none, none, none

    @abstractmethod
    def update(
        self,
        weights: Weights,
        shared: State,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        now: Now,
    ) -> Update:
        """One step of all tensors; nothing that is given is written.

        Args:
            weights: tensors of theta; everything is computed in their dtype.
            params, grads: finite, in the layout of the source.
        """


class Arrays:
    """Named arrays of a file of others, as float32 tensors; errors say which one is missing.

    Args:
        what: the function that reads, for errors.
    """

    def __init__(self, what: str, arrays: Mapping[str, Any]) -> None:
        self.what, self.arrays = what, arrays

    def __contains__(self, pattern: str) -> bool:
        return bool(self._found(pattern))

    def _found(self, pattern: str) -> list[str]:
        """Keys that are ``pattern``, or begin and end as it, where it has ``*``."""
        first, star, last = pattern.partition("*")
        if not star:
            return [pattern] if pattern in self.arrays else []
        return [key for key in self.arrays if key.startswith(first) and key.endswith(last)]

    def get(self, pattern: str) -> Tensor:
        """The array of that key.

        Raises:
            ValueError: there is none, or several.
        """
        found = self._found(pattern)
        if len(found) != 1:
            some = ", ".join(map(repr, sorted(self.arrays)[:3])) or "none"
            raise ValueError(
                f"{self.what}: {'several arrays' if found else 'no array'} {pattern!r}; found {len(self.arrays)} "
                f"arrays, the first {some}"
            )
        value = self.arrays[found[0]]
        if not isinstance(value, Tensor):
            value = torch.from_numpy(np.array(value, dtype=np.float32))
        return value.detach().to(torch.float32, copy=True)
