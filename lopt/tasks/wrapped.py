"""A task of a torch module, a loss and data, as they are at hand: :func:`from_module`."""

import copy
import dataclasses
import functools
import inspect
import itertools
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lopt.roles import roles_of_model
from lopt.rule.matrices import Role
from lopt.tasks.seeds import derive, generator, minibatch_key, minibatch_rows
from lopt.tasks.synthetic import SHARES
from lopt.tasks.task import SPLITS, Batch, SplitName, Task, map_tensors

BATCH_SIZE = 32  # of data that says none

SEED = "random_seed"  # field of training minibatches: of what the module draws


def from_module(
    module: nn.Module | Callable[[], nn.Module],
    loss: Callable[..., Tensor] | None,
    data: Any,
    *,
    batch_size: int | None = None,
    name: str | None = None,
) -> Task:
    """A task of a model, a loss and data.

    ``loss(module(inputs), targets)`` of minibatches ``(inputs, targets)``; with more than two entries ``loss(module(a),
    b, c, ...)``, with one ``loss(module(a))``, of dicts ``loss(module(**minibatch))``. Without a loss it is what the
    module returns of the whole minibatch. It is to be a mean over the rows.

    Minibatches are drawn uniformly, with replacement, by seeds; samplers and shuffling of a loader have no say.

    * Batch and instance norms take the statistics of the minibatch, also where a validation loss is measured: running
      ones are no part of the parameters. Other buffers are as they were at first; what a forward pass writes to them is
      lost.
    * Dropout, and what else draws from torch's generator, is on for training minibatches only, with the same numbers
      for all runs of a seed and step.
    * Parameters that need no gradient stay as they are.
    * What ``torch.vmap`` cannot do (LSTM, GRU, ``item()``) goes one run after another, with a warning.

    Args:
        module: makes a module, whose initial values are drawn anew for every seed; or a module, whose values are those
            that every run begins with.
        loss: as in torch.nn.functional; None where the module itself returns the loss.
        data: rows: tensors of the same length, a map-style data set, or a DataLoader of one, whose collate_fn and
            batch_size hold; or a mapping from splits (``train``, ``inner_valid``, ``outer_valid``, ``test``) to such.
            Missing splits are cut out of ``train``. Or a function that returns any of these: it is called once in every
            process, and nothing but the function travels to other processes.
        batch_size: rows of a minibatch; the loader's, or 32.
        name: that of the module's class if not given.

    Raises:
        TypeError: module, loss or data is something else.
        ValueError: a size or a split is not possible.

    Example:
        >>> inputs = torch.linspace(-1, 1, 64)[:, None]
        >>> task = from_module(lambda: nn.Linear(1, 1), nn.functional.mse_loss, (inputs, 2 * inputs), batch_size=8)
        >>> task.name, task.shapes
        ('Linear', {'weight': (1, 1), 'bias': (1,)})
        >>> task.loss({"weight": torch.full((1, 1), 2.0), "bias": torch.zeros(1)}, next(task.batches(0, "test")))
        tensor(0.)
    """
    if not callable(module):
        raise TypeError(f"module: expected a module or a function that makes one, got {type(module).__name__}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: expected a function, or None where the module returns it, got {type(loss).__name__}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
    make = copy.deepcopy(module) if isinstance(module, nn.Module) else module
    return WrappedModule(make=make, criterion=loss, data=data, rows_at_once=batch_size, label=name)


@dataclass(frozen=True, eq=False, kw_only=True)
class WrappedModule(Task):
    """See :func:`from_module`."""

    make: nn.Module | Callable[[], nn.Module]
    criterion: Callable[..., Tensor] | None
    data: Any
    rows_at_once: int | None
    label: str | None

    def __post_init__(self) -> None:
        self.module  # noqa: B018  # what is wrong is said now
        if not _is_function(self.data):
            self.rows  # noqa: B018

    def __getstate__(self) -> dict[str, Any]:
        """The fields: what follows from them is made again elsewhere."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @cached_property
    def module(self) -> nn.Module:
        """One module, for its structure and buffers."""
        module = self._make(0)
        if any(isinstance(param, nn.parameter.UninitializedParameter) for param in module.parameters()):
            raise ValueError("module: some parameters have no shape yet; give their sizes, or call it with a minibatch")
        if not _trained(module):
            raise ValueError("module: expected parameters that require gradients, got none")
        parts: list[Any] = [part for part in module.modules() if getattr(part, "track_running_stats", False)]
        for part in parts:
            part.track_running_stats = False
            part.running_mean = part.running_var = part.num_batches_tracked = None
        return module

    def _make(self, seed: int) -> nn.Module:
        if isinstance(self.make, nn.Module):
            return self.make
        with _drawing(derive(seed, "init")):
            module: Any = self.make()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a function that makes a module, it made a {type(module).__name__}")
        return module

    @cached_property
    def rows(self) -> dict[SplitName, "Rows"]:
        """Those of every split."""
        return _called(self.data) if _is_function(self.data) else _rows_of_splits(self.data)

    @property
    def batch_size(self) -> int:
        """Rows of a minibatch."""
        return self.rows_at_once or self.rows["train"].batch_size or BATCH_SIZE

    @property
    def name(self) -> str:
        return self.label or type(self.module).__name__

    @property
    def config(self) -> dict[str, Any]:
        rows = {split: len(some.numbers) for split, some in self.rows.items()}
        sizes = {"num_params": self.num_params, "batch_size": self.batch_size, "rows": rows}
        return {"type": "from_module", "name": self.name, "module": type(self.module).__qualname__, **sizes}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(param.shape) for name, param in _trained(self.module).items()}

    @property
    def transposed(self) -> frozenset[str]:
        return frozenset()

    @property
    def roles(self) -> Mapping[str, Role | None]:
        roles = roles_of_model(self.module)
        return {name: roles[name] for name in self.shapes}

    def init(self, seed: int) -> dict[str, Tensor]:
        return {name: param.detach().clone() for name, param in _trained(self._make(seed)).items()}

    def num_batches(self, rows: int) -> int:
        return -(-rows // self.batch_size)

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Any]:
        rows, key = self.rows[split], minibatch_key(seed, split)
        for step in itertools.count(start):
            which = torch.from_numpy(minibatch_rows(key, step, self.batch_size, len(rows.numbers)))
            drawn = derive(seed, "drawn", split, step)
            entries = _entries(rows.take(which, drawn))
            more = {SEED: torch.tensor(drawn)} if split == "train" else {}
            yield _kind((*entries, *more))(*entries.values(), *more.values())

    def loss(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        entries = dict(zip(type(batch)._fields, batch, strict=True))
        seed = entries.pop(SEED, None)
        if self.module.training != (seed is not None):
            self.module.train(seed is not None)
        values = list(entries.values())
        if self._named:
            value = self._forward(params, seed, **entries)
        elif self.criterion is None:
            value = self._forward(params, seed, *values)
        else:
            value = self._forward(params, seed, values[0])
        if self.criterion is not None:
            value = self.criterion(value, *(() if self._named else values[1:]))
        if not isinstance(value, Tensor) or value.dim() > 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"loss: expected a scalar tensor, the mean over the rows, got {got}")
        return value

    def _forward(self, params: Mapping[str, Tensor], seed: Tensor | None, *inputs: Any, **named: Any) -> Any:
        """What the module makes of its inputs with these parameters, in training mode if there is a seed."""
        device = next(iter(params.values())).device
        constants = {name: value.clone() for name, value in self.on(device, "constants").items()}  # some are written to
        call = functools.partial(torch.func.functional_call, self.module, {**constants, **params}, inputs, named)
        if seed is None:
            return call()
        with _drawing(int(seed), device):
            return call()

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """Buffers, and parameters that are not trained."""
        frozen = {name: param for name, param in self.module.named_parameters() if not param.requires_grad}
        return {**frozen, **dict(self.module.named_buffers())}

    @cached_property
    def _named(self) -> bool:
        """Whether minibatches are dicts."""
        return isinstance(self.rows["train"].take(torch.zeros(1, dtype=torch.int64), 0), Mapping)


class Rows(NamedTuple):
    """Rows of a data set: tensors, alone, in a tuple or in a dict, or items that are collated."""

    source: Any
    numbers: Tensor  # [n], which of them
    collate: Callable[[list[Any]], Any] | None  # None for tensors
    batch_size: int | None

    def take(self, which: Tensor, seed: int) -> Any:
        """A minibatch; what is drawn while items are made follows from the seed."""
        rows = self.numbers[which]
        if self.collate is None:
            return map_tensors(lambda x: x[rows], self.source)
        with _drawing(seed):
            return self.collate([self.source[row] for row in rows.tolist()])


def _rows_of(split: str, data: Any) -> Rows:
    collate: Callable[[list[Any]], Any] = default_collate
    batch_size = None
    if isinstance(data, DataLoader):
        data, collate, batch_size = data.dataset, data.collate_fn, data.batch_size
    if isinstance(data, TensorDataset) and collate is default_collate:
        data = data.tensors
    entries = list(data.values()) if isinstance(data, Mapping) else data if isinstance(data, (tuple, list)) else [data]
    if entries and all(isinstance(entry, Tensor) and entry.dim() > 0 for entry in entries):
        lengths = [len(entry) for entry in entries]
        if len(set(lengths)) > 1:
            raise ValueError(f"data: expected tensors of the same length for {split}, got lengths {lengths}")
        return Rows(data, torch.arange(lengths[0]), None, batch_size)
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, Mapping):
        raise TypeError(
            f"data: expected for {split} tensors, a data set with len() and items by number, or a DataLoader of one, "
            f"got {type(data).__name__}; make a list of what a stream gives, or a class of Task with batches of its own"
        )
    return Rows(data, torch.arange(len(data)), collate, batch_size)


def _rows_of_splits(data: Any) -> dict[SplitName, Rows]:
    by_split = isinstance(data, Mapping) and not all(isinstance(value, Tensor) for value in data.values())
    if by_split and (not set(data) <= set(SPLITS) or "train" not in data):
        raise ValueError(f"data: expected a mapping from some of {SPLITS}, train among them, got {list(data)}")
    given: Mapping[SplitName, Any] = data if by_split else {"train": data}
    rows = {split: _rows_of(split, given[split]) for split in SPLITS if split in given}
    parts = [split for split in SPLITS if split == "train" or split not in rows]
    whole = rows["train"]
    if len(parts) > 1:
        order = torch.from_numpy(generator(0, "splits").permutation(len(whole.numbers)))
        shares = list(itertools.accumulate(SHARES[split] for split in parts))
        ends = [round(len(order) * share / shares[-1]) for share in shares]
        for split, begin, end in zip(parts, [0, *ends], ends, strict=False):
            rows[split] = whole._replace(numbers=order[begin:end])
    empty = [split for split, some in rows.items() if not len(some.numbers)]
    if empty:
        raise ValueError(
            f"data: expected rows for every split, got none for {empty}, of {len(whole.numbers)} to cut from"
        )
    return {split: rows[split] for split in SPLITS}


@cache
def _called(data: Callable[[], Any]) -> dict[SplitName, Rows]:
    """The rows of a function's data; they stay in the process, for all tasks that come with it."""
    return _rows_of_splits(data())


def _is_function(data: Any) -> bool:
    return inspect.isroutine(data) or isinstance(data, (type, functools.partial))


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in module.named_parameters() if param.requires_grad}


def _entries(minibatch: Any) -> dict[str, Tensor]:
    """The tensors of what was collated, by name."""
    if isinstance(minibatch, Mapping):
        entries = dict(minibatch)
    else:
        values = minibatch if isinstance(minibatch, (tuple, list)) else [minibatch]
        names = Batch._fields if len(values) == 2 else [f"entry{place}" for place in range(len(values))]
        entries = dict(zip(names, values, strict=True))
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"data: expected tensors in a minibatch, got a {type(value).__name__} as {name}; leave it out, or make "
                "tensors in collate_fn"
            )
    return entries


@cache
def _kind(fields: tuple[str, ...]) -> Any:
    """The type of minibatches with these fields."""
    return Batch if fields == Batch._fields else namedtuple("Minibatch", fields)


@contextmanager
def _drawing(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """What is drawn from torch's generators inside follows from the seed; outside, nothing is noticed."""
    if device is None or device.type == "cpu":  # forking costs 50 times as much
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.default_generator.set_state(before)
        return
    with torch.random.fork_rng([device]):
        torch.manual_seed(seed)
        yield
