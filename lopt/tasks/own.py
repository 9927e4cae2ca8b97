"""Tasks of your own in meta-training: which there are, how one is drawn, and whether they keep a task's promises."""

import itertools
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lopt.tasks.families import SAMPLERS, sample_task
from lopt.tasks.seeds import derive, generator
from lopt.tasks.synthetic import FAMILIES
from lopt.tasks.task import SPLITS, Task

#: What tasks are drawn from: a task, a function ``sample(seed) -> Task``, or the name of a family.
Entry = Task | Callable[[int], Task] | str


class OwnTasks:
    """Tasks, functions that make the task called ``seed``, and names of families, drawn equally often.

    One that is given twice is drawn twice as often. In another process the same object is met again, however often it
    is sent there, with all that its tasks have made and loaded.

    Args:
        entries: at least one.

    Raises:
        TypeError: an entry is something else.
        ValueError: there is none, or a name is that of no family.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries: tuple[Entry, ...] | None = tuple(entries)
        if not self.entries:
            raise ValueError("tasks: expected at least one, got none")
        for entry in self.entries:
            if isinstance(entry, (type, nn.Module)) or not (isinstance(entry, (Task, str)) or callable(entry)):
                got = f"the class {entry.__name__}" if isinstance(entry, type) else f"a {type(entry).__name__}"
                raise TypeError(
                    "tasks: expected objects of lopt.tasks.Task, functions that make the task of a seed, or names of "
                    f"families, got {got}; lopt.tasks.from_module makes a task of a module, a loss and data"
                )
        known = [*FAMILIES, *SAMPLERS]
        unknown = [entry for entry in self.entries if isinstance(entry, str) and entry not in known]
        if unknown:
            raise ValueError(f"tasks: {unknown} are no families; expected some of {known}")
        self.described = [_described(entry) for entry in self.entries]
        self._key = uuid.uuid4().hex

    def __reduce__(self) -> tuple[Any, ...]:
        return (_met, (self._key, self.entries)) if self.entries is not None else (self.from_json, (self.to_json(),))

    @property
    def names(self) -> list[str]:
        """What the entries are called."""
        return [entry if isinstance(entry, str) else entry["name"] for entry in self.described]

    def sample(self, seed: int) -> Task:
        """The task called ``seed``.

        Raises:
            ValueError: only the names are known, as from a checkpoint.
            TypeError: a function made something else.
        """
        if self.entries is None:
            raise ValueError(f"tasks: only the names of {self.names} are known; give the tasks again, from Python")
        entry = self.entries[int(generator(seed, "entry").integers(len(self.entries)))]
        if isinstance(entry, Task):
            return entry
        called = derive(seed, "task")
        task = sample_task(called, (entry,)) if isinstance(entry, str) else entry(called)  # type: ignore[arg-type]
        if not isinstance(task, Task):
            raise TypeError(f"tasks: expected {_name(entry)} to make a task, it made a {type(task).__name__}")
        return task

    def check(self) -> None:
        """Try one task of every entry, see :func:`check_task`; errors are those of this and of :meth:`sample`."""
        self.sample(0)
        for entry in {id(entry): entry for entry in self.entries or ()}.values():
            task = OwnTasks([entry]).sample(0)
            if not isinstance(entry, str):
                check_task(task)

    def to_json(self) -> dict[str, Any]:
        """What the entries are, as plain JSON values."""
        return {"own": self.described}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "OwnTasks":
        """Knows what the tasks are called; they themselves are not in JSON."""
        found = cls.__new__(cls)
        found.entries, found.described = None, list(values["own"])
        return found


#: Of other processes, by key; the last few.
_MET: dict[str, OwnTasks] = {}
KEPT = 4


def _met(key: str, entries: tuple[Entry, ...]) -> OwnTasks:
    if key not in _MET:
        tasks = OwnTasks(entries)
        tasks._key = key
        _MET[key] = tasks
        while len(_MET) > KEPT:
            del _MET[next(iter(_MET))]
    return _MET[key]


def _name(entry: Any) -> str:
    return getattr(entry, "__qualname__", type(entry).__qualname__)


def _described(entry: Entry) -> Any:
    if isinstance(entry, str):
        return entry
    config = entry.config if isinstance(entry, Task) else {"type": "function"}
    return {**config, "name": entry.name if isinstance(entry, Task) else _name(entry)}


def check_task(task: Task) -> None:
    """Try a task: what it makes, that a seed is all that it depends on, and that losses can be differentiated.

    Raises:
        TypeError, ValueError: a promise of :class:`lopt.tasks.Task` is broken; with the method and what to do.
    """
    name = f"task {task.name}"
    try:
        hash(task)
    except TypeError as error:
        raise TypeError(f"{name}: cannot be hashed; make the dataclass frozen, with eq=False") from error
    params: Any = task.init(0)
    if not isinstance(params, dict) or not params or not all(isinstance(value, Tensor) for value in params.values()):
        raise TypeError(f"{name}: expected init() to return a dict of tensors, got {_what(params)}")
    integers = [key for key, value in params.items() if not value.is_floating_point()]
    if integers:
        raise TypeError(f"{name}: expected init() to return floating tensors, {integers} are none")
    if not _same(params, task.init(0)):
        raise ValueError(f"{name}: init(0) differs from call to call; draw from a generator that the seed makes")
    for split in SPLITS:
        some = list(itertools.islice(task.batches(0, split), 3))
        if len(some) < 3:
            raise ValueError(f"{name}: batches(0, {split!r}) ends after {len(some)}; minibatches go on without end")
        batch = some[0]
        if not isinstance(batch, tuple) or not batch or not all(isinstance(value, Tensor) for value in batch):
            raise TypeError(
                f"{name}: expected batches() to give tuples of tensors, as lopt.tasks.Batch, got {_what(batch)}"
            )
        again, later = list(itertools.islice(task.batches(0, split), 3)), next(task.batches(0, split, 2))
        if not _same(some, again):
            raise ValueError(
                f"{name}: batches(0, {split!r}) differs from call to call; draw from (seed, split, number)"
            )
        if not _same(some[2], later):
            raise ValueError(
                f"{name}: batches(0, {split!r}, start=2) does not begin with minibatch 2 of batches(0, {split!r})"
            )
    batch = next(task.batches(0, "train"))
    leaves = {key: value.detach().clone().requires_grad_() for key, value in params.items()}
    loss: Any = task.loss(leaves, batch)
    if not isinstance(loss, Tensor) or loss.dim() > 0 or not loss.is_floating_point():
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(f"{name}: expected loss() to return a scalar tensor, the mean over the rows, got {got}")
    if not loss.requires_grad:
        raise ValueError(f"{name}: loss() does not depend on the parameters that it is given")
    if not _same(loss, task.loss(leaves, batch)):
        raise ValueError(f"{name}: loss() differs from call to call; put random numbers into the minibatch")


def _what(value: Any) -> str:
    if isinstance(value, (tuple, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return f"a {type(value).__name__} of {[type(part).__name__ for part in parts]}"
    return f"a {type(value).__name__}"


def _same(a: Any, b: Any) -> bool:
    """Whether two trees of tensors are equal, to the bit and NaN for NaN."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(_same(*pair) for pair in zip(a, b, strict=True))
