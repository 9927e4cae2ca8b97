"""The optimizers that a learned one is measured against, by name, each with the hyperparameters that tuning may try.

An opponent with one trial is tuning-free: it runs as its authors recommend. One with more is tuned, for each task, over
its first k trials (``NAME@k``); which of them counts is decided on outer_valid. The number of steps is known to all.

Opponents from packages need ``pip install 'lopt[bench]'``.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lopt.evaluation.builders import (
    AveragedLearned,
    Blind,
    Build,
    Trial,
    averaged,
    cosine,
    imported,
    in_training,
    mechanic,
    muon,
    script,
    torch_optimizer,
    with_steps,
)
from lopt.evaluation.table import LEARNED, TOLD
from lopt.evaluation.task_set import ORDER, Adam8p, NAdamW, adam8p_config, nadamw_config
from lopt.optimizer import LearnedOptimizer
from lopt.rule import Theta
from lopt.tasks.task import Task

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
        build: the optimizer with its schedule inside.
    """

    name: str
    trials: tuple[Trial, ...]
    package: str | None
    build: Build

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
        theta, impl: of the learned optimizer; those of ``TOLD`` are told the number of steps, the others are not.

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
        kinds: dict[str, type[LearnedOptimizer]] = {"lopt-averaged": AveragedLearned, "lopt-blind": Blind}
        return kinds.get(name, LearnedOptimizer)(given, theta, total_steps=steps if name in TOLD else None, impl=impl)
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


def _each(lrs: Iterable[float], **fixed: Any) -> tuple[Trial, ...]:
    return tuple({"lr": lr, **fixed} for lr in lrs)


def _lrs(default: float, **fixed: Any) -> tuple[Trial, ...]:
    return _each((default * factor for factor in FACTORS), **fixed)


_ADAM, _ADAMW, _NADAM, _SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.SGD
_NADAMW = with_steps(NAdamW)
#: What its authors recommend. Source: github.com/KellerJordan/Muon, README.
_MUON: Trial = {"lr": 0.02, "adamw": {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.01}}
_LIST = tuple(nadamw_config(seed) for seed in ORDER)
_SOAP = cosine(imported("pytorch_optimizer", "SOAP"))
_SHAMPOO = cosine(imported("pytorch_optimizer", "Shampoo"))
_SCHEDULE_FREE = in_training(imported("schedulefree", "AdamWScheduleFree"))
_PRODIGY_PLUS = in_training(imported("prodigyplus", "ProdigyPlusScheduleFree"))
_PRODIGY_PLUS_TRIAL = {"lr": 1.0, "split_groups": False}  # there is one group; otherwise it says so on the terminal

#: All opponents by name. Where no schedule is named the learning rate is constant.
OPPONENTS: dict[str, Opponent] = {
    found.name: found
    for found in (
        # tuning-free
        Opponent("adam", ({"lr": 1e-3},), None, torch_optimizer(_ADAM)),
        Opponent("adamw", ({"lr": 1e-3},), None, torch_optimizer(_ADAMW)),
        Opponent("adamw-cosine", ({"lr": 1e-3},), None, cosine(torch_optimizer(_ADAMW))),
        Opponent("adamw-averaged", ({"lr": 1e-3},), None, averaged(torch_optimizer(_ADAMW))),
        Opponent("adam-cosine-3e-2", ({"lr": 3e-2},), None, cosine(torch_optimizer(_ADAM))),
        Opponent("nadam", ({"lr": 2e-3},), None, torch_optimizer(_NADAM)),
        Opponent("muon", (_MUON,), None, cosine(muon)),
        Opponent("nadamw-list-1", _LIST[:1], None, _NADAMW),
        Opponent("prodigy", ({"lr": 1.0},), "prodigyopt", imported("prodigyopt", "Prodigy")),
        Opponent("prodigy-cosine", ({"lr": 1.0},), "prodigyopt", cosine(imported("prodigyopt", "Prodigy"))),
        Opponent("dog", ({"lr": 1.0},), "dog-optimizer", imported("dog", "DoG")),
        Opponent("mechanic", ({"lr": 1.0},), "mechanic-pytorch", mechanic),
        Opponent("schedule-free", ({"lr": 2.5e-3},), "schedulefree", _SCHEDULE_FREE),
        Opponent("prodigy-schedule-free", (_PRODIGY_PLUS_TRIAL,), "prodigy-plus-schedule-free", _PRODIGY_PLUS),
        Opponent("soap", ({"lr": 3e-3},), "pytorch-optimizer", _SOAP),
        # for the suite scripts: the script's own optimizer, and Adam with 1, 3 and 1/3 times its learning rate
        Opponent("script", ({"lr": 1.0, "line": "own"},), None, script),
        Opponent("script-adams", _each((1.0, 3.0, 1 / 3), line="adam"), None, script),
        # tuned for each task: 14 learning rates
        Opponent("adam-tuned", _lrs(1e-3), None, torch_optimizer(_ADAM)),
        Opponent("adamw-tuned", _lrs(1e-3), None, torch_optimizer(_ADAMW)),
        Opponent("adamw-cosine-tuned", _lrs(1e-3), None, cosine(torch_optimizer(_ADAMW))),
        Opponent("nadam-tuned", _lrs(2e-3), None, torch_optimizer(_NADAM)),
        Opponent("sgd-tuned", _lrs(1e-2, momentum=0.9), None, torch_optimizer(_SGD)),
        Opponent("sgd-cosine-tuned", _lrs(1e-2, momentum=0.9), None, cosine(torch_optimizer(_SGD))),
        Opponent("schedule-free-tuned", _lrs(2.5e-3), "schedulefree", _SCHEDULE_FREE),
        Opponent("soap-tuned", _lrs(3e-3), "pytorch-optimizer", _SOAP),
        Opponent("shampoo-tuned", _lrs(1e-1), "pytorch-optimizer", _SHAMPOO),
        # tuned for each task: 8 learning rates, with warm-up and then cosine, or constant where iterates are averaged
        Opponent("adamw-warmup-tuned", _each(LRS), None, cosine(torch_optimizer(_ADAMW), WARMUP)),
        Opponent("muon-warmup-tuned", _each(MUON_LRS), None, cosine(muon, WARMUP)),
        Opponent(
            "soap-warmup-tuned",
            _each(LRS),
            "pytorch-optimizer",
            cosine(imported("pytorch_optimizer", "SOAP"), WARMUP),
        ),
        Opponent("adamw-averaged-warmup-tuned", _each(LRS), None, averaged(torch_optimizer(_ADAMW), WARMUP)),
        # tuned for each task: 1000 configurations; mind the budget, as in nadamw-list@10
        Opponent("nadamw-list", _LIST, None, _NADAMW),
        Opponent("nadamw-list-jax", _LIST, None, with_steps(NAdamW, warmup="max")),
        Opponent("adam8p", tuple(adam8p_config(seed) for seed in range(1000)), None, with_steps(Adam8p)),
    )
}

#: Names of the opponents that need no tuning, in the order of the table.
TUNING_FREE: tuple[str, ...] = tuple(
    name for name, found in OPPONENTS.items() if len(found.trials) == 1 and name != "script"
)
