"""How opponents are built: schedules, averages, several optimizers as one, and what comes from packages.

A :data:`Build` makes an optimizer of a trial's hyperparameters, with its schedule inside.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lopt.optimizer import LearnedOptimizer
from lopt.tasks.scripts import Script
from lopt.tasks.task import Task

Trial = Mapping[str, Any]

#: ``build(leaf tensors, steps, trial, task)``; of the task only which of its parameters are what, None where that is
#: not known.
Build = Callable[[Sequence[Tensor], int, Trial, Task | None], Optimizer]


class Joined(Optimizer):
    """Several optimizers, each with parameters of its own, as one: shared groups, shared state."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every part."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for part in self.parts:
            part.step()
        return value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of every part."""
        for part in self.parts:
            part.zero_grad(set_to_none)


class AveragedLearned(LearnedOptimizer):
    """The learned optimizer, evaluated at the average of its iterates."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, average=True)
        self._inside = ExitStack()

    def eval(self) -> None:
        """The parameters become the averages."""
        self._inside.enter_context(self.averaged())

    def train(self) -> None:
        """The parameters become the iterates again."""
        self._inside.close()


class Blind(LearnedOptimizer):
    """The learned optimizer, never told a validation loss."""

    def observe(self, train_loss: Any = None, valid_loss: Any = None, *, weight: float | Tensor = 1.0) -> None:
        """Of the training loss only."""
        super().observe(train_loss, weight=weight)


class Averaged(Joined):
    """An optimizer whose iterates x are averaged: after step k = 1, 2, ... ``a += (1 - d) (x - a)`` with
    ``d = min(decay, k / (k + 9))``. What is evaluated is a."""

    def __init__(self, optimizer: Optimizer, decay: float = 0.998) -> None:
        super().__init__([optimizer])
        self.decay, self.steps = decay, 0
        self.params = [param for group in self.param_groups for param in group["params"]]
        self.averages = [param.detach().clone() for param in self.params]
        self.state["averages"] = self.averages  # type: ignore[index]  # counts as state
        self.register_step_post_hook(self._average)

    @torch.no_grad()
    def _average(self, *_: Any) -> None:
        self.steps += 1
        kept = min(self.decay, self.steps / (self.steps + 9))
        torch._foreach_lerp_(self.averages, self.params, 1 - kept)

    def eval(self) -> None:
        """The parameters become the averages."""
        self._exchange()

    def train(self) -> None:
        """The parameters become the iterates again."""
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for param, average in zip(self.params, self.averages, strict=True):
            kept = param.clone()
            param.copy_(average)
            average.copy_(kept)


def scheduled(optimizer: Optimizer, steps: int, warmup: float = 0.0, falling: bool = True) -> Optimizer:
    """The optimizer, whose learning rates rise in a straight line for the first ``warmup`` of the steps and then, if
    ``falling``, fall to 0 along half a cosine, ``lr (1 + cos(pi t / steps)) / 2``."""
    rising = round(warmup * steps)

    def factor(t: int) -> float:
        if t < rising:
            return (t + 1) / (rising + 1)
        if not falling:
            return 1.0
        return (1 + math.cos(math.pi * (t - rising) / max(steps - rising, 1))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


def torch_optimizer(kind: type[Optimizer]) -> Build:
    return lambda params, steps, trial, task: kind(params, **trial)


def imported(module: str, name: str) -> Build:
    """The class of that name in a module that is imported when it is needed."""

    def build(params: Sequence[Tensor], steps: int, trial: Trial, task: Task | None) -> Optimizer:
        optimizer: Optimizer = getattr(import_module(module), name)(params, **trial)
        return optimizer

    return build


def cosine(build: Build, warmup: float = 0.0) -> Build:
    return lambda params, steps, trial, task: scheduled(build(params, steps, trial, task), steps, warmup)


def averaged(build: Build, warmup: float = 0.0) -> Build:
    """With constant learning rates, but for the warm-up."""

    def averaged(params: Sequence[Tensor], steps: int, trial: Trial, task: Task | None) -> Optimizer:
        return scheduled(Averaged(build(params, steps, trial, task)), steps, warmup, falling=False)

    return averaged


def in_training(build: Build) -> Build:
    """Schedule-free optimizers refuse a step before they are told that training begins."""

    def training(params: Sequence[Tensor], steps: int, trial: Trial, task: Task | None) -> Optimizer:
        optimizer = build(params, steps, trial, task)
        optimizer.train()  # type: ignore[attr-defined]
        return optimizer

    return training


def muon(params: Sequence[Tensor], steps: int, trial: Trial, task: Task | None) -> Optimizer:
    """Muon for hidden matrices and kernels, AdamW for embeddings, first and last layer, vectors.

    A trial's ``lr`` is Muon's and, unless it has ``adamw``, that of AdamW too: Muon's steps are then scaled to its.
    """
    if task is None:
        hidden = [param for param in params if param.ndim >= 2]
        transposed = [False] * len(hidden)
    else:
        named = {name: param for name, param in zip(task.shapes, params, strict=True) if name in task.hidden_weights}
        hidden, transposed = list(named.values()), [name in task.transposed for name in named]
    rest = [param for param in params if not any(param is other for other in hidden)]
    lr, adamw = trial["lr"], trial.get("adamw")
    scale = "match_rms_adamw" if adamw is None else "original"
    parts: list[Optimizer] = []
    if hidden:
        parts.append(MatrixMuon(hidden, transposed, lr=lr, weight_decay=0.01, adjust_lr_fn=scale))
    if rest:
        parts.append(torch.optim.AdamW(rest, **(adamw or {"lr": lr})))
    return Joined(parts)


class MatrixMuon(torch.optim.Muon):
    """Muon for matrices, transposed where they are ``[in, out]``, and for kernels as ``[out, in * window]``."""

    def __init__(self, params: Sequence[Tensor], transposed: Sequence[bool], **options: Any) -> None:
        self.originals = list(zip(params, transposed, strict=True))
        super().__init__([self._matrix(param.detach(), turned) for param, turned in self.originals], **options)
        self.register_step_pre_hook(self._take_gradients)

    @staticmethod
    def _matrix(param: Tensor, transposed: bool) -> Tensor:
        """In the memory of the parameter, or of its gradient."""
        return param.T if transposed else param.view(len(param), -1)

    def _take_gradients(self, *_: Any) -> None:
        """Those of the parameters."""
        for (param, turned), matrix in zip(self.originals, self.param_groups[0]["params"], strict=True):
            matrix.grad = None if param.grad is None else self._matrix(param.grad.contiguous(), turned)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the parameters."""
        for param, _ in self.originals:
            param.grad = None


def script(params: Sequence[Tensor], steps: int, trial: Trial, task: Task | None) -> Optimizer:
    """The script's own line, or with ``lr`` Adam with so many times its learning rate."""
    if not isinstance(task, Script):
        raise ValueError(f"optimizer: script and script-adams are for tasks of the suite scripts, got {task}")
    named = dict(zip(task.shapes, params, strict=True))
    return task.own_line(named, steps) if trial["line"] == "own" else task.adam(named, trial["lr"])


def mechanic(params: Sequence[Tensor], steps: int, trial: Trial, task: Task | None) -> Optimizer:
    # Without stored offsets its first steps, 1e-8 of AdamW's, are lost in the rounding of float32 parameters.
    kind = import_module("mechanic_pytorch").mechanize(torch.optim.AdamW, store_delta=True)
    optimizer: Optimizer = kind(params, **trial)
    return optimizer


def with_steps(kind: Callable[..., Optimizer], **fixed: Any) -> Build:
    """An optimizer that is told the number of steps."""
    return lambda params, steps, trial, task: kind(params, steps, **trial, **fixed)
