"""A task: an inner problem that an optimizer is meta-trained on or judged by.

A task knows its initial parameters, its loss as a function of them, and minibatches of four splits: ``train``
gives gradients, ``inner_valid`` the validation loss the optimizer may see, ``outer_valid`` the meta-loss,
``test`` is only reported. Everything is a function of seeds, so runs that should share their randomness can.

Source: arXiv:2009.11243, section 3 and appendix C.1 (the four splits).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from lopt.rule.matrices import Kind, Role

if TYPE_CHECKING:
    from lopt.tasks.network import Network

SplitName = Literal["train", "inner_valid", "outer_valid", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "inner_valid", "outer_valid", "test")

#: Names of parameters that are tables with a row for each symbol or position, as of torch.nn.Embedding.
TABLES = ("embedding", "positions")

#: A validation loss that the learned optimizer is told is the mean over so many rows, or a few more. With fewer, noise
#: looks like overfitting, and steps become short too soon.
VALID_ROWS = 256


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``tree`` (tensors in dicts, lists and tuples, named or not) with ``function`` applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {name: map_tensors(function, value) for name, value in tree.items()}
    values = [map_tensors(function, value) for value in tree]
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


class Batch(NamedTuple):
    """Some rows of a split."""

    inputs: Tensor  # [rows, ...]
    targets: Tensor  # [rows, ...]


class NoisyBatch(NamedTuple):
    """Some rows, and the random numbers that a stochastic loss uses: with them, the loss is a pure function."""

    inputs: Tensor  # [rows, ...]
    targets: Tensor  # [rows, ...]
    noise: Tensor  # of a shape that the task knows


class Task(ABC):
    """An inner problem; one of yours needs :meth:`init`, :meth:`loss` and :meth:`batches`.

    A minibatch is a named tuple of tensors, made by ``batches`` and understood by ``loss`` of the same task: a
    :class:`Batch`, or a :class:`NoisyBatch` where the loss is stochastic. Losses can be vmapped over parameters, over
    minibatches (stacked tensor by tensor) and over both.

    Example:
        >>> from lopt.tasks import sample_task
        >>> task = sample_task(seed=7)
        >>> params = task.init(seed=0)
        >>> task.loss(params, next(task.batches(seed=0, split="train"))).shape
        torch.Size([])
    """

    @property
    def name(self) -> str:
        """A short name, for tables; what stands before its first hyphen is the family. By default that of the class."""
        return type(self).__name__

    @property
    def config(self) -> dict[str, Any]:
        """Plain JSON values from which :func:`lopt.tasks.task_from_config` rebuilds a task of lopt's own; of others, by
        default, what they are called."""
        kind = type(self)
        return {"type": f"{kind.__module__}.{kind.__qualname__}", "name": self.name}

    @abstractmethod
    def init(self, seed: int) -> dict[str, Tensor]:
        """Initial parameters, in a fixed order."""

    @abstractmethod
    def loss(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Mean loss ``[]`` over the rows of a minibatch; a pure function, differentiable and vmappable.

        Parameters and minibatch share a device; what else the loss needs comes from :meth:`on`.
        """

    @abstractmethod
    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Any]:
        """Endless minibatches of a split, from number ``start`` on; the same for the same seed."""

    def on(self, device: torch.device, name: str) -> Any:
        """The constant tensors that the attribute ``name`` of the task holds, on a device; copied there once."""
        value = getattr(self, name)
        if device.type == "cpu":
            return value
        copies = self.__dict__.setdefault("_copies", {})
        if (device, name) not in copies:
            copies[device, name] = map_tensors(lambda x: x.to(device), value)
        return copies[device, name]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, in order."""
        return {name: tuple(value.shape) for name, value in self.init(0).items()}

    @property
    def num_params(self) -> int:
        """Number of parameters, all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def transposed(self) -> frozenset[str]:
        """Names of the matrices that are stored ``[in, out]``; others, of rank 2 and more, are as torch's modules store
        them, ``[out, in, ...]``. All of rank 2 are, but not ``TABLES``, ``[rows, width]``;
        a task that differs says so here.

        Example:
            >>> from lopt.tasks import sample_task
            >>> sorted(sample_task(1, ["conv_fc"]).transposed)
            ['w0', 'w1', 'w2', 'w3']
        """
        return frozenset(name for name, shape in self.shapes.items() if len(shape) == 2 and name not in TABLES)

    @property
    def kinds(self) -> list[Kind]:
        """What is known of the parameters beside their shapes, in order: ``roles``, and the fan-in of what is
        ``transposed``."""
        roles, transposed = self.roles, self.transposed
        return [
            Kind(roles.get(name), fan_in=shape[0] if name in transposed else None)
            for name, shape in self.shapes.items()
        ]

    @property
    def roles(self) -> Mapping[str, Role | None]:
        """What :func:`lopt.roles.roles_of_model` would find in the task's model: nothing, where it has no tables."""
        matrices = [name for name, shape in self.shapes.items() if len(shape) >= 2]
        if not any(name in TABLES for name in matrices):
            return {}
        last = matrices[-1]
        return {name: "input" if name in TABLES else "output" if name == last else "hidden" for name in matrices}

    def group(self, params: Iterable[Tensor]) -> dict[str, Any]:
        """A param group for :class:`lopt.LearnedOptimizer` of this task's parameters, in order."""
        kinds = self.kinds
        transposed = [kind.fan_in is not None for kind in kinds]
        return {"params": list(params), "role": [kind.role for kind in kinds], "transposed": transposed}

    def as_matrix(self, name: str, value: Tensor) -> Tensor:
        """The parameter ``name`` as a matrix ``[out, in]``, a view: a dense layer is ``x @ matrix.T``, of a convolution
        the inputs are those of all places of the kernel, and a table is itself.

        Raises:
            ValueError: the parameter has fewer than two dimensions.
        """
        if value.dim() < 2:
            raise ValueError(f"{name}: expected a parameter of two or more dimensions, got {tuple(value.shape)}")
        return value.T if name in self.transposed else value.flatten(1)

    @property
    def hidden_weights(self) -> frozenset[str]:
        """Names of the weights of hidden layers, matrices or kernels: all but embeddings, the first and the last layer.

        What these are follows from order and names; a task for which that is wrong says it itself.
        """
        weights = [name for name, shape in self.shapes.items() if len(shape) >= 2]
        return frozenset(name for name in weights[1:-1] if name.split(".")[0] not in ("embedding", "positions"))

    @property
    def validated(self) -> bool:
        """Whether a loss of inner_valid says how training goes; an optimizer is told one only where it does."""
        return True

    @property
    def loss_floor(self) -> float | None:
        """A value below which no loss can fall; None when none is known."""
        return None

    @property
    def batch_work(self) -> float:
        """Multiply-adds that making a minibatch takes, where they count beside those of the loss."""
        return 0.0

    @property
    def network(self) -> "Network | None":
        """The task as layers, which the fused engine of meta-training runs; None for what only PyTorch can run."""
        return None

    def stored(self, split: SplitName) -> Batch:
        """What the minibatches of a task with a :attr:`network` are drawn from: all rows of a split, or its symbols
        ``[n]`` and no targets."""
        raise NotImplementedError

    def num_batches(self, rows: int) -> int:
        """How many inner_valid minibatches have ``rows`` rows together, or more; 1 where rows are empty.

        Example:
            >>> from lopt.tasks import sample_task
            >>> task = sample_task(0)
            >>> task.batch_size, task.num_batches(100)
            (32, 4)
        """
        tensors = next(self.batches(0, "inner_valid"))[:2]
        return -(-rows // len(tensors[0])) if sum(tensor.numel() for tensor in tensors) else 1

    def initial_loss(self, seed: int, num_batches: int = 8) -> float:
        """Mean ``outer_valid`` loss of ``init(seed)`` over the first minibatches of ``seed``."""
        params = self.init(seed)
        stream = self.batches(seed, "outer_valid")
        with torch.no_grad():
            losses = [self.loss(params, next(stream)) for _ in range(num_batches)]
        return float(torch.stack(losses).mean())
