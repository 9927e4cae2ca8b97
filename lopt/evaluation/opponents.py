"""The optimizers that a learned one is measured against, by name, each with the hyperparameters that tuning may try.

An opponent with one trial is tuning-free: it runs as its authors recommend. One with more is tuned, for each task, over
its first k trials (``NAME@k``); which of them counts is decided on outer_valid. The number of steps is known to all.

Opponents from packages need ``pip install 'lopt[bench]'``.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

Trial = Mapping[str, Any]

#: Names of the learned optimizer: told the number of steps, and not.
LEARNED = ("lopt", "lopt-untold")

#: Learning rates of a tuned opponent, as factors of its own default, in the order in which a budget takes them: a third
#: of a decade apart, from the default outwards.
FACTORS = tuple(10.0 ** (k / 3) for k in sorted(range(-6, 8), key=lambda k: (abs(k), k)))


@dataclass(frozen=True)
class Opponent:
    """An optimizer that is not learned.

    Args:
        name: short, for tables and the command line.
        trials: hyperparameters to try, in the order of the budget.
        package: the distribution that must be installed; None for torch and this package alone.
        build: ``build(leaf tensors, steps, trial)``, the optimizer with its schedule inside.
    """

    name: str
    trials: tuple[Trial, ...]
    package: str | None
    build: Callable[[Sequence[Tensor], int, Trial], Optimizer]

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
    theta: Theta | str | PathLike[str] = "default",
    impl: str = "auto",
) -> Optimizer:
    """The optimizer ``name`` for a run of ``steps`` steps: an opponent, or "lopt", or "lopt-untold".

    Args:
        params: leaf tensors that require gradients.
        trial: which of the opponent's trials.
        theta, impl: of the learned optimizer; "lopt" is told the number of steps, "lopt-untold" is not.

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
        return LearnedOptimizer(params, theta, total_steps=steps if name == "lopt" else None, impl=impl)
    found = opponent(name)
    if not 0 <= trial < len(found.trials):
        raise ValueError(f"trial: expected 0 to {len(found.trials) - 1} of {name}, got {trial}")
    if found.missing is not None:
        raise ModuleNotFoundError(f"optimizer {name}: {found.missing}")
    return found.build(params, steps, found.trials[trial])


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


def _cosine(optimizer: Optimizer, steps: int) -> Optimizer:
    """The optimizer, whose learning rates fall to 0 along half a cosine: ``lr (1 + cos(pi t / steps)) / 2``."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + math.cos(math.pi * t / steps)) / 2)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


Build = Callable[[Sequence[Tensor], int, Trial], Optimizer]


def _torch(kind: type[Optimizer], cosine: bool = False) -> Build:
    def build(params: Sequence[Tensor], steps: int, trial: Trial) -> Optimizer:
        optimizer = kind(params, **trial)
        return _cosine(optimizer, steps) if cosine else optimizer

    return build


def _imported(module: str, name: str, cosine: bool = False) -> Build:
    """The class of that name in a module that is imported when it is needed."""

    def build(params: Sequence[Tensor], steps: int, trial: Trial) -> Optimizer:
        optimizer: Optimizer = getattr(import_module(module), name)(params, **trial)
        return _cosine(optimizer, steps) if cosine else optimizer

    return build


def _in_training(build: Build) -> Build:
    """Schedule-free optimizers refuse a step before they are told that training begins."""

    def training(params: Sequence[Tensor], steps: int, trial: Trial) -> Optimizer:
        optimizer = build(params, steps, trial)
        optimizer.train()  # type: ignore[attr-defined]
        return optimizer

    return training


def _muon(params: Sequence[Tensor], steps: int, trial: Trial) -> Optimizer:
    """Muon for matrices and AdamW for the rest, with one learning rate: Muon's steps are scaled to AdamW's."""
    matrices = [param for param in params if param.ndim == 2]
    rest = [param for param in params if param.ndim != 2]
    parts: list[Optimizer] = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", weight_decay=0.01, **trial))
    if rest:
        parts.append(torch.optim.AdamW(rest, **trial))
    return _cosine(_Joined(parts), steps)


def _mechanic(params: Sequence[Tensor], steps: int, trial: Trial) -> Optimizer:
    # Without stored offsets its first steps, 1e-8 of AdamW's, are lost in the rounding of float32 parameters.
    kind = import_module("mechanic_pytorch").mechanize(torch.optim.AdamW, store_delta=True)
    optimizer: Optimizer = kind(params, **trial)
    return optimizer


def _with_steps(kind: Callable[..., Optimizer], **fixed: Any) -> Build:
    """An optimizer that is told the number of steps."""
    return lambda params, steps, trial: kind(params, steps, **trial, **fixed)


# ---- The table ------------------------------------------------------------------------------------------------------


def _lrs(default: float, **fixed: Any) -> tuple[Trial, ...]:
    return tuple({"lr": default * factor, **fixed} for factor in FACTORS)


_ADAM, _ADAMW, _NADAM, _SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.SGD
_NADAMW = _with_steps(NAdamW)
_LIST = tuple(nadamw_config(seed) for seed in ORDER)
_SOAP = _imported("pytorch_optimizer", "SOAP", cosine=True)
_SHAMPOO = _imported("pytorch_optimizer", "Shampoo", cosine=True)
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
        Opponent("adamw-cosine", ({"lr": 1e-3},), None, _torch(_ADAMW, cosine=True)),
        Opponent("adam-cosine-3e-2", ({"lr": 3e-2},), None, _torch(_ADAM, cosine=True)),
        Opponent("nadam", ({"lr": 2e-3},), None, _torch(_NADAM)),
        Opponent("muon", ({"lr": 1e-3},), None, _muon),
        Opponent("nadamw-list-1", _LIST[:1], None, _NADAMW),
        Opponent("prodigy", ({"lr": 1.0},), "prodigyopt", _imported("prodigyopt", "Prodigy")),
        Opponent("prodigy-cosine", ({"lr": 1.0},), "prodigyopt", _imported("prodigyopt", "Prodigy", cosine=True)),
        Opponent("dog", ({"lr": 1.0},), "dog-optimizer", _imported("dog", "DoG")),
        Opponent("mechanic", ({"lr": 1.0},), "mechanic-pytorch", _mechanic),
        Opponent("schedule-free", ({"lr": 2.5e-3},), "schedulefree", _SCHEDULE_FREE),
        Opponent("prodigy-schedule-free", (_PRODIGY_PLUS_TRIAL,), "prodigy-plus-schedule-free", _PRODIGY_PLUS),
        Opponent("soap", ({"lr": 3e-3},), "pytorch-optimizer", _SOAP),
        # tuned for each task: 14 learning rates
        Opponent("adam-tuned", _lrs(1e-3), None, _torch(_ADAM)),
        Opponent("adamw-tuned", _lrs(1e-3), None, _torch(_ADAMW)),
        Opponent("adamw-cosine-tuned", _lrs(1e-3), None, _torch(_ADAMW, cosine=True)),
        Opponent("nadam-tuned", _lrs(2e-3), None, _torch(_NADAM)),
        Opponent("sgd-tuned", _lrs(1e-2, momentum=0.9), None, _torch(_SGD)),
        Opponent("sgd-cosine-tuned", _lrs(1e-2, momentum=0.9), None, _torch(_SGD, cosine=True)),
        Opponent("muon-tuned", _lrs(1e-3), None, _muon),
        Opponent("schedule-free-tuned", _lrs(2.5e-3), "schedulefree", _SCHEDULE_FREE),
        Opponent("soap-tuned", _lrs(3e-3), "pytorch-optimizer", _SOAP),
        Opponent("shampoo-tuned", _lrs(1e-1), "pytorch-optimizer", _SHAMPOO),
        # tuned for each task: 1000 configurations; mind the budget, as in nadamw-list@10
        Opponent("nadamw-list", _LIST, None, _NADAMW),
        Opponent("nadamw-list-jax", _LIST, None, _with_steps(NAdamW, warmup="max")),
        Opponent("adam8p", tuple(adam8p_config(seed) for seed in range(1000)), None, _with_steps(Adam8p)),
    )
}

#: Names of the opponents that need no tuning, in the order of the table.
TUNING_FREE: tuple[str, ...] = tuple(name for name, found in OPPONENTS.items() if len(found.trials) == 1)
