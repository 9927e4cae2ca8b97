"""The optimizers that a learned one is measured against, by name, each with the hyperparameters that tuning may try.

An opponent with one trial is tuning-free: it runs as its authors recommend. One with more is tuned, for each task, over
its first k trials (``NAME@k``); which of them counts is decided on outer_valid. The number of steps is known to all.

Opponents from packages need ``pip install 'lopt[bench]'``.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lopt.evaluation.task_set import ORDER, Adam8p, NAdamW, adam8p_config, nadamw_config
from lopt.optimizer import LearnedOptimizer
from lopt.rule import Theta
from lopt.tasks.scripts import Script
from lopt.tasks.task import Task

Trial = Mapping[str, Any]

#: Names of the learned optimizer: told the number of steps, not told, and not told with an average of its iterates.
LEARNED = ("lopt", "lopt-untold", "lopt-averaged")

#: Learning rates of a tuned opponent, as factors of its own default, in the order in which a budget takes them: a third
#: of a decade apart, from the default outwards.
FACTORS = tuple(10.0 ** (k / 3) for k in sorted(range(-6, 8), key=lambda k: (abs(k), k)))

#: Learning rates of Adams that are tuned with a warm-up: a quarter of a decade apart, 5.6e-4 to 3.2e-2. Those of Muons,
#: 1.8e-3 to .1, are half a decade higher: on the validation suite of language models their best is.
LRS = tuple(10.0 ** (-2.5 + k / 4) for k in sorted(range(-3, 5), key=lambda k: (abs(k), k)))
MUON_LRS = tuple(10.0**0.5 * lr for lr in LRS)

#: Share of the steps in which a learning rate with warm-up rises.
WARMUP = 0.05


@dataclass(frozen=True)
class Opponent:
    """An optimizer that is not learned.

    Args:
        name: short, for tables and the command line.
        trials: hyperparameters to try, in the order of the budget.
        package: the distribution that must be installed; None for torch and this package alone.
        build: ``build(leaf tensors, steps, trial, task)``, the optimizer with its schedule inside; of the task only
            which of its parameters are what, None where that is not known.
    """

    name: str
    trials: tuple[Trial, ...]
    package: str | None
    build: Callable[[Sequence[Tensor], int, Trial, Task | None], Optimizer]

    @property
    def version(self) -> str | None:
        """Whose code it is, as in "torch 2.13.0"; None if the package is missing."""
        name = self.package or "torch"
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            return None

    @property
    def missing(self) -> str | None:
        """Why it cannot be run here, and the remedy; None if it can."""
        if self.version is None:
            return f"the package {self.package} is missing; pip install 'lopt[bench]'"
        return None


def make_optimizer(
    name: str,
    params: Iterable[Tensor],
    steps: int,
    trial: int = 0,
    *,
    task: Task | None = None,
    theta: Theta | str | PathLike[str] = "default",
    impl: str = "auto",
) -> Optimizer:
    """The optimizer ``name`` for a run of ``steps`` steps: an opponent, or one of ``LEARNED``.

    Args:
        params: leaf tensors that require gradients.
        trial: which of the opponent's trials.
        task: whose parameters ``params`` are, in its order, for opponents that treat hidden layers differently.
        theta, impl: of the learned optimizer; "lopt" is told the number of steps, the others are not.

    Raises:
        ValueError: an unknown name, or a trial that does not exist.
        ModuleNotFoundError: its package is missing; the message says which.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> make_optimizer("adamw-cosine", [x], steps=100).param_groups[0]["lr"]
        0.001
    """
    params = list(params)
    if name in LEARNED:
        if trial != 0:
            raise ValueError(f"trial: {name} has only trial 0, got {trial}")
        given = params if task is None else [task.group(params)]
        kind = _AveragedLearned if name == "lopt-averaged" else LearnedOptimizer
        return kind(given, theta, total_steps=steps if name == "lopt" else None, impl=impl)
    found = opponent(name)
    if not 0 <= trial < len(found.trials):
        raise ValueError(f"trial: expected 0 to {len(found.trials) - 1} of {name}, got {trial}")
    if found.missing is not None:
        raise ModuleNotFoundError(f"optimizer {name}: {found.missing}")
    return found.build(params, steps, found.trials[trial], task)


def opponent(name: str) -> Opponent:
    """The opponent of that name; ``NAME@k`` is the opponent with its first k trials.

    Raises:
        ValueError: an unknown name, or a budget it does not have.

    Example:
        >>> [round(trial["lr"], 6) for trial in opponent("adam-tuned@3").trials]
        [0.001, 0.000464, 0.002154]
    """
    base, at, budget = name.partition("@")
    if base not in OPPONENTS:
        raise ValueError(f"optimizer: expected one of {', '.join((*LEARNED, *OPPONENTS))}, got {name!r}")
    found = OPPONENTS[base]
    if not at:
        return found
    if not budget.isdecimal() or not 1 <= int(budget) <= len(found.trials):
        raise ValueError(f"optimizer: expected {base}@1 to {base}@{len(found.trials)}, got {name!r}")
    return Opponent(name, found.trials[: int(budget)], found.package, found.build)


@contextmanager
def evaluating(optimizer: Optimizer) -> Iterator[None]:
    """While inside, the parameters are those to evaluate: schedule-free optimizers keep others for training."""
    averages = callable(getattr(optimizer, "eval", None))
    if averages:
        optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if averages:
            optimizer.train()  # type: ignore[attr-defined]


# ---- How they are built ---------------------------------------------------------------------------------------------


class _Joined(Optimizer):
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


class _AveragedLearned(LearnedOptimizer):
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


class _Averaged(_Joined):
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


def _scheduled(optimizer: Optimizer, steps: int, warmup: float = 0.0, falling: bool = True) -> Optimizer:
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


Build = Callable[[Sequence[Tensor], int, Trial, Task | None], Optimizer]


def _torch(kind: type[Optimizer]) -> Build:
    return lambda params, steps, trial, task: kind(params, **trial)


def _imported(module: str, name: str) -> Build:
    """The class of that name in a module that is imported when it is needed."""

    def build(params: Sequence[Tensor], steps: int, trial: Trial, task: Task | None) -> Optimizer:
        optimizer: Optimizer = getattr(import_module(module), name)(params, **trial)
        return optimizer

    return build


def _cosine(build: Build, warmup: float = 0.0) -> Build:
    return lambda params, steps, trial, task: _scheduled(build(params, steps, trial, task), steps, warmup)


def _averaged(build: Build, warmup: float = 0.0) -> Build:
    """With constant learning rates, but for the warm-up."""

    def averaged(params: Sequence[Tensor], steps: int, trial: Trial, task: Task | None) -> Optimizer:
        return _scheduled(_Averaged(build(params, steps, trial, task)), steps, warmup, falling=False)

    return averaged


def _in_training(build: Build) -> Build:
    """Schedule-free optimizers refuse a step before they are told that training begins."""

    def training(params: Sequence[Tensor], steps: int, trial: Trial, task: Task | None) -> Optimizer:
        optimizer = build(params, steps, trial, task)
        optimizer.train()  # type: ignore[attr-defined]
        return optimizer

    return training


def _muon(params: Sequence[Tensor], steps: int, trial: Trial, task: Task | None) -> Optimizer:
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
        parts.append(_MatrixMuon(hidden, transposed, lr=lr, weight_decay=0.01, adjust_lr_fn=scale))
    if rest:
        parts.append(torch.optim.AdamW(rest, **(adamw or {"lr": lr})))
    return _Joined(parts)


class _MatrixMuon(torch.optim.Muon):
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


def _script(params: Sequence[Tensor], steps: int, trial: Trial, task: Task | None) -> Optimizer:
    """The script's own line, or with ``lr`` Adam with so many times its learning rate."""
    if not isinstance(task, Script):
        raise ValueError(f"optimizer: script and script-adams are for tasks of the suite scripts, got {task}")
    named = dict(zip(task.shapes, params, strict=True))
    return task.own_line(named, steps) if trial["line"] == "own" else task.adam(named, trial["lr"])


def _mechanic(params: Sequence[Tensor], steps: int, trial: Trial, task: Task | None) -> Optimizer:
    # Without stored offsets its first steps, 1e-8 of AdamW's, are lost in the rounding of float32 parameters.
    kind = import_module("mechanic_pytorch").mechanize(torch.optim.AdamW, store_delta=True)
    optimizer: Optimizer = kind(params, **trial)
    return optimizer


def _with_steps(kind: Callable[..., Optimizer], **fixed: Any) -> Build:
    """An optimizer that is told the number of steps."""
    return lambda params, steps, trial, task: kind(params, steps, **trial, **fixed)


# ---- The table ------------------------------------------------------------------------------------------------------


def _each(lrs: Iterable[float], **fixed: Any) -> tuple[Trial, ...]:
    return tuple({"lr": lr, **fixed} for lr in lrs)


def _lrs(default: float, **fixed: Any) -> tuple[Trial, ...]:
    return _each((default * factor for factor in FACTORS), **fixed)


_ADAM, _ADAMW, _NADAM, _SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.SGD
_NADAMW = _with_steps(NAdamW)
#: What its authors recommend. Source: github.com/KellerJordan/Muon, README.
_MUON: Trial = {"lr": 0.02, "adamw": {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.01}}
_LIST = tuple(nadamw_config(seed) for seed in ORDER)
_SOAP = _cosine(_imported("pytorch_optimizer", "SOAP"))
_SHAMPOO = _cosine(_imported("pytorch_optimizer", "Shampoo"))
_SCHEDULE_FREE = _in_training(_imported("schedulefree", "AdamWScheduleFree"))
_PRODIGY_PLUS = _in_training(_imported("prodigyplus", "ProdigyPlusScheduleFree"))
_PRODIGY_PLUS_TRIAL = {"lr": 1.0, "split_groups": False}  # there is one group; otherwise it says so on the terminal

#: All opponents by name. Where no schedule is named the learning rate is constant.
OPPONENTS: dict[str, Opponent] = {
    found.name: found
    for found in (
        # tuning-free
        Opponent("adam", ({"lr": 1e-3},), None, _torch(_ADAM)),
        Opponent("adamw", ({"lr": 1e-3},), None, _torch(_ADAMW)),
        Opponent("adamw-cosine", ({"lr": 1e-3},), None, _cosine(_torch(_ADAMW))),
        Opponent("adamw-averaged", ({"lr": 1e-3},), None, _averaged(_torch(_ADAMW))),
        Opponent("adam-cosine-3e-2", ({"lr": 3e-2},), None, _cosine(_torch(_ADAM))),
        Opponent("nadam", ({"lr": 2e-3},), None, _torch(_NADAM)),
        Opponent("muon", (_MUON,), None, _cosine(_muon)),
        Opponent("nadamw-list-1", _LIST[:1], None, _NADAMW),
        Opponent("prodigy", ({"lr": 1.0},), "prodigyopt", _imported("prodigyopt", "Prodigy")),
        Opponent("prodigy-cosine", ({"lr": 1.0},), "prodigyopt", _cosine(_imported("prodigyopt", "Prodigy"))),
        Opponent("dog", ({"lr": 1.0},), "dog-optimizer", _imported("dog", "DoG")),
        Opponent("mechanic", ({"lr": 1.0},), "mechanic-pytorch", _mechanic),
        Opponent("schedule-free", ({"lr": 2.5e-3},), "schedulefree", _SCHEDULE_FREE),
        Opponent("prodigy-schedule-free", (_PRODIGY_PLUS_TRIAL,), "prodigy-plus-schedule-free", _PRODIGY_PLUS),
        Opponent("soap", ({"lr": 3e-3},), "pytorch-optimizer", _SOAP),
        # for the suite scripts: the script's own optimizer, and Adam with 1, 3 and 1/3 times its learning rate
        Opponent("script", ({"lr": 1.0, "line": "own"},), None, _script),
        Opponent("script-adams", _each((1.0, 3.0, 1 / 3), line="adam"), None, _script),
        # tuned for each task: 14 learning rates
        Opponent("adam-tuned", _lrs(1e-3), None, _torch(_ADAM)),
        Opponent("adamw-tuned", _lrs(1e-3), None, _torch(_ADAMW)),
        Opponent("adamw-cosine-tuned", _lrs(1e-3), None, _cosine(_torch(_ADAMW))),
        Opponent("nadam-tuned", _lrs(2e-3), None, _torch(_NADAM)),
        Opponent("sgd-tuned", _lrs(1e-2, momentum=0.9), None, _torch(_SGD)),
        Opponent("sgd-cosine-tuned", _lrs(1e-2, momentum=0.9), None, _cosine(_torch(_SGD))),
        Opponent("schedule-free-tuned", _lrs(2.5e-3), "schedulefree", _SCHEDULE_FREE),
        Opponent("soap-tuned", _lrs(3e-3), "pytorch-optimizer", _SOAP),
        Opponent("shampoo-tuned", _lrs(1e-1), "pytorch-optimizer", _SHAMPOO),
        # tuned for each task: 8 learning rates, with warm-up and then cosine, or constant where iterates are averaged
        Opponent("adamw-warmup-tuned", _each(LRS), None, _cosine(_torch(_ADAMW), WARMUP)),
        Opponent("muon-warmup-tuned", _each(MUON_LRS), None, _cosine(_muon, WARMUP)),
        Opponent(
            "soap-warmup-tuned",
            _each(LRS),
            "pytorch-optimizer",
            _cosine(_imported("pytorch_optimizer", "SOAP"), WARMUP),
        ),
        Opponent("adamw-averaged-warmup-tuned", _each(LRS), None, _averaged(_torch(_ADAMW), WARMUP)),
        # tuned for each task: 1000 configurations; mind the budget, as in nadamw-list@10
        Opponent("nadamw-list", _LIST, None, _NADAMW),
        Opponent("nadamw-list-jax", _LIST, None, _with_steps(NAdamW, warmup="max")),
        Opponent("adam8p", tuple(adam8p_config(seed) for seed in range(1000)), None, _with_steps(Adam8p)),
    )
}

#: Names of the opponents that need no tuning, in the order of the table.
TUNING_FREE: tuple[str, ...] = tuple(
    name for name, found in OPPONENTS.items() if len(found.trials) == 1 and name != "script"
)
