"""What tasks of the sampled families share: a JSON config, parameters from a layout, noise of a stochastic loss.

A sampled task is a frozen dataclass of plain values, among them the names of its data and of its initial values. Its
config is those fields; they make the task again on any machine that has the data.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from lopt.tasks.pieces import Layout, initial_values
from lopt.tasks.seeds import generator
from lopt.tasks.task import Batch, NoisyBatch, Task

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SampledTask(Task):
    """A task whose fields are its config and whose parameters follow from a layout."""

    family: ClassVar[str]

    @cached_property
    def layout(self) -> Layout:
        """Name, shape and initial values of every parameter tensor, in order."""
        raise NotImplementedError

    @property
    def config(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"type": type(self).__name__, **fields}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: weights.shape for name, weights in self.layout.items()}

    def init(self, seed: int) -> dict[str, Tensor]:
        random = generator(seed, "init")
        return {name: initial_values(how, random, shape) for name, (shape, how) in self.layout.items()}


def from_config(cls: type[T], fields: Mapping[str, Any]) -> T:
    """The dataclass ``cls`` from plain JSON values: lists become tuples, mappings the dataclasses they stand for.

    Raises:
        ValueError: fields that do not belong to it, or missing ones.
    """
    hints = get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not set(fields) <= known:
        unknown = sorted(set(fields) - known)
        raise ValueError(f"config: unknown fields {unknown} of {cls.__name__}, expected some of {sorted(known)}")
    try:
        return cls(**{name: _typed(hints[name], value) for name, value in fields.items()})
    except TypeError as error:
        raise ValueError(f"config: {cls.__name__} cannot be made of {sorted(fields)}: {error}") from error


def _typed(hint: Any, value: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        hints = [one for one in get_args(hint) if one is not type(None)]
        return None if value is None else _typed(hints[0], value)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_config(hint, value)  # type: ignore[arg-type]
    if isinstance(value, (list, tuple)):
        if isinstance(hint, type) and hasattr(hint, "_fields"):
            return hint(*value)
        inner = (get_args(hint) or (None,))[0]
        return tuple(_typed(inner, one) for one in value)
    return value


def with_noise(batch: Batch, shape: tuple[int, ...] | None, seed: int, split: str, step: int) -> Batch | NoisyBatch:
    """The minibatch with standard normal values of this shape, those of its place in its stream."""
    if shape is None:
        return batch
    noise = generator(seed, "noise", split, step).standard_normal(shape, dtype=np.float32)
    return NoisyBatch(*batch, torch.from_numpy(noise))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean softmax cross-entropy; logits ``[rows, classes]``. Under vmap quicker than torch's, which is taken
    apart there."""
    return -torch.log_softmax(logits, dim=1).gather(1, labels[:, None]).mean()
