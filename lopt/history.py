"""What a LearnedOptimizer did to every tensor over a run: how far it moved it, and whether as a matrix or elementwise.

There is nothing to tune, but a run can be read: where a step fades too early, which matrices are treated as wholes,
which tensor rests. :class:`History` keeps it, as a table and as a figure.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lopt.distributed import local_of
from lopt.figures import COLOURS, plain, require_matplotlib
from lopt.files import save_figure, write_text
from lopt.optimizer import LearnedOptimizer
from lopt.rule.losses import LossState
from lopt.rule.matrices import Matrix
from lopt.tables import read_lines, text_of

#: Kinds of tensors, and what a figure draws them with.
KINDS = dict(zip(("input", "hidden", "output", "vector"), COLOURS, strict=False))
LOSS = "0.25"  # its colour


class Row(NamedTuple):
    """One tensor in one step."""

    step: int  # from 1
    train_loss: float  # last one told, NaN before any
    tensor: str  # name
    kind: str  # of KINDS
    elements: int
    step_size: float  # what AdamW's learning rate would be for this tensor; 0 where it rests
    gate: float  # share of the direction that is orthogonalised, NaN where it cannot be
    size: float  # root mean square of the parameters after the step; of a sharded tensor, of this rank's part


class _Record(NamedTuple):
    """A step, before anything of it is read from the device."""

    step: Tensor
    train_loss: Tensor
    tensors: list[tuple[int, Tensor, Tensor | None, Tensor]]  # number, step size, gate, size


class History:
    """Keeps what a :class:`LearnedOptimizer` did to every tensor, in every so many steps, until :meth:`remove`.

    Nothing waits for the device before :attr:`rows` is read. What is kept of a step are three numbers for each tensor.
    On several ranks it may be kept by one alone: what it reads is the same on all, but for ``size``.

    Args:
        optimizer: whose steps are followed, from now on.
        model: names its parameters in the table; without it, names are those of named parameters, or numbers.
        every: steps from one record to the next; the first step is one.

    Raises:
        TypeError, ValueError: an argument is none of that kind.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = LearnedOptimizer(model)
        >>> with History(opt, model) as history:
        ...     for _ in range(3):
        ...         loss = model(torch.ones(8, 4)).square().mean()
        ...         opt.zero_grad()
        ...         loss.backward()
        ...         opt.step(loss=loss)
        >>> [(row.step, row.tensor, row.kind) for row in history.rows][-2:]
        [(3, 'weight', 'input'), (3, 'bias', 'vector')]
    """

    def __init__(self, optimizer: LearnedOptimizer, model: nn.Module | None = None, *, every: int = 1) -> None:
        if not isinstance(optimizer, LearnedOptimizer):
            raise TypeError(f"optimizer: expected a LearnedOptimizer, got {type(optimizer).__name__}")
        if every < 1:
            raise ValueError(f"every: expected a number of steps from 1, got {every!r}")
        self._names = {} if model is None else {id(param): name for name, param in model.named_parameters()}
        self._every, self._steps = every, 0
        self._tensors: list[tuple[str, str, int]] = []  # name, kind, elements
        self._numbers: dict[int, int] = {}  # of a parameter's id
        self._records: list[_Record] = []
        self._handle = optimizer.register_step_post_hook(self._after)

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Follow no more steps; what is kept stays."""
        self._handle.remove()

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        assert isinstance(optimizer, LearnedOptimizer)
        self._steps += 1
        if (self._steps - 1) % self._every:
            return
        controls = optimizer.controls()
        if not controls:
            return
        shared, found = optimizer.param_groups[0], []
        names = _names_of(optimizer.param_groups)
        for param, control in controls.items():
            if id(param) not in self._numbers:
                name = self._names.get(id(param), names[param])
                self._numbers[id(param)] = len(self._tensors)
                self._tensors.append((name, kind_of(control.matrix), param.numel()))
            part = local_of(param.detach())
            size = torch.linalg.vector_norm(part, dtype=torch.float32) / math.sqrt(max(part.numel(), 1))
            found.append((self._numbers[id(param)], control.step_size, control.gate, size))
        loss = LossState.of(shared["train_loss"])
        told = torch.where(loss.updates > 0, loss.last, torch.full_like(loss.last, math.nan))
        self._records.append(_Record(shared["step"].clone(), told, found))

    @property
    def rows(self) -> list[Row]:
        """The table so far: a row for each tensor that took part in a recorded step. Reads from the device."""
        table = []
        for record in self._records:
            step, loss = int(record.step), float(record.train_loss)
            for number, step_size, gate, size in record.tensors:
                name, kind, elements = self._tensors[number]
                share = math.nan if gate is None else float(gate)
                table.append(Row(step, loss, name, kind, elements, _or_zero(step_size), share, float(size)))
        return table

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :attr:`rows` into a CSV file; ``lopt plot`` draws it."""
        rows = ([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in self.rows)
        write_text(path, text_of([Row._fields, *rows]))

    def plot(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Draw it into a PNG file, see :func:`plot`."""
        plot(self.rows, path, title)


def _names_of(groups: list[dict[str, Any]]) -> Mapping[Tensor, str]:
    params = [param for group in groups for param in group["params"]]
    given = [name for group in groups for name in group.get("param_names") or [""] * len(group["params"])]
    return {param: name or str(i) for i, (param, name) in enumerate(zip(params, given, strict=True))}


def _or_zero(step_size: Tensor) -> float:
    value = float(step_size)
    return 0.0 if math.isnan(value) else value


def kind_of(matrix: Matrix) -> str:
    """What a tensor is to the tensor level: a model's input (embedding), output (head), a hidden matrix, a vector."""
    if not matrix.rows:
        return "vector"
    return "input" if matrix.is_input else "output" if matrix.is_output else "hidden"


def read(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a file that :meth:`History.save` wrote.

    Raises:
        ValueError: it is something else.
    """
    kinds = [Row.__annotations__[name] for name in Row._fields]
    lines, _ = read_lines(Path(path), "not a table that History.save wrote ({}); write it again")
    if not lines or tuple(lines[0]) != Row._fields:
        raise ValueError(f"{path}: expected a table that History.save wrote, with the columns {', '.join(Row._fields)}")
    try:
        return [Row(*(kind(text) for kind, text in zip(kinds, line, strict=True))) for line in lines[1:]]
    except ValueError as error:
        raise ValueError(f"{path}: not a whole table of a history ({error}); write it again") from error


def plot(rows: list[Row], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw a history into the PNG file ``path``: loss, step sizes, gates and sizes of parameters against the step.

    A line is a tensor, its colour what the tensor is to the model.

    Raises:
        ValueError: there are no rows.
        ModuleNotFoundError: matplotlib is missing.
    """
    if not rows:
        raise ValueError("rows: expected at least one recorded step, got none; train while the History is there")
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9.6, 6.4), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    panels: Any = figure.subplots(2, 2, sharex=True).flat
    losses = {row.step: row.train_loss for row in rows}
    panels[0].plot(list(losses), list(losses.values()), color=LOSS, linewidth=1.2)
    panels[0].set_title("Training loss", loc="left", fontsize=10.5)
    texts = {
        "step_size": "Step (AdamW's learning rate, for this tensor)",
        "gate": "Gate: share of the direction that is orthogonalised",
        "size": "Root mean square of the parameters",
    }
    tensors: dict[str, list[Row]] = {}
    for row in rows:
        tensors.setdefault(row.tensor, []).append(row)
    for axes, (name, text) in zip(panels[1:], texts.items(), strict=True):
        for own in tensors.values():
            values = [getattr(row, name) for row in own]
            steps = [row.step for row in own]
            axes.plot(steps, values, color=KINDS[own[0].kind], alpha=0.7, linewidth=1.0)
        axes.set_title(text, loc="left", fontsize=10.5)
        if name == "gate":
            axes.set_ylim(-0.03, 1.03)
        elif any(getattr(row, name) > 0 for row in rows):
            axes.set_yscale("log")
    present = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    panels[1].legend(
        [Line2D([], [], color=KINDS[kind]) for kind in present], present, frameon=False, fontsize=9, ncols=2
    )
    for axes in panels:
        plain(axes)
    for axes in panels[2:]:
        axes.set_xlabel("step")
    save_figure(path, figure)
