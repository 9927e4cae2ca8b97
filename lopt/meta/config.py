"""What a meta-training run is: one frozen dataclass, written into everything the run leaves behind."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lopt.meta.es import EstimatorName
from lopt.rule.spec import PRESETS
from lopt.tasks.distribution import TaskDistribution
from lopt.tasks.families import NETWORK_FAMILIES, NetworkFamily
from lopt.tasks.own import OwnTasks
from lopt.tasks.seeds import SEEDS
from lopt.tasks.synthetic import ENGINE_FAMILIES, FAMILIES, Family
from lopt.tasks.task import VALID_ROWS

Groups = Literal["direction", "linear", "mlp", "lstm", "all"]
Objective = Literal["held_out", "train"]
Weighting = Literal["mean", "linear", "last"]
Scaling = Literal["prior", "none"]
Backend = Literal["cpu", "cuda", "sim"]

#: Those that can be named without a mixture.
KNOWN: tuple[Family | NetworkFamily, ...] = (*FAMILIES, *NETWORK_FAMILIES)


#: Fields that older configurations lack, with what they were before there was a choice.
ADDED = {
    "outer": "adam",
    "pairs_per_task": 1,
    "valid_rows": 1,
    "equalise": False,
    "stats": None,
    "staleness": None,
    "keep_runs": False,
    "backend": "cpu",
}

#: Estimators that look at whole runs.
WHOLE_RUNS: tuple[EstimatorName, ...] = ("es", "backprop")


@dataclass(frozen=True)
class Phase:
    """A part of a run: what is trained, on runs of which length, by which estimator.

    Raises:
        ValueError: a field is out of range, with the bad value.
    """

    share: float
    """Share of the budget of inner steps."""

    horizon: tuple[int, int]
    """Shortest and longest inner run in steps; lengths are drawn log-uniformly in between."""

    groups: Groups = "all"
    """Tensors of theta that are trained: ``direction`` (skip and MLP), ``linear`` (skip, step control and gate),
    ``mlp`` (all of these), ``lstm`` (all others) or ``all``."""

    estimator: EstimatorName = "es"
    """Meta-gradient estimator. ``es`` looks at pairs of whole runs, others of :mod:`lopt.meta.es` at windows of them;
    ``backprop`` differentiates whole runs (:mod:`lopt.meta.backprop`)."""

    window: int | None = None
    """Inner steps between two updates of theta; none for those that look at whole runs. Lengths are rounded to whole
    windows."""

    lr: float = 1.0
    """Factor of the learning rate."""

    max_params: int | None = None
    """Tasks with more parameters are drawn again; None for no bound. Small ones give more meta-gradients for the same
    time, and what is learned from them carries over, as the inputs of the optimizer do not depend on size."""

    def __post_init__(self) -> None:
        lengths: tuple[int, ...] = tuple(self.horizon)
        object.__setattr__(self, "horizon", lengths)
        _one_of("groups", self.groups, get_args(Groups))
        _one_of("estimator", self.estimator, get_args(EstimatorName))
        _positive(self, "share", "lr", *(() if self.max_params is None else ("max_params",)))
        if len(lengths) != 2 or not 1 <= lengths[0] <= lengths[1]:
            raise ValueError(f"horizon: expected shortest and longest length with 1 <= shortest, got {lengths}")
        if (self.window is None) != (self.estimator in WHOLE_RUNS):
            whole = " and ".join(WHOLE_RUNS)
            raise ValueError(f"window: expected None for {whole}, a number of steps for others, got {self.window}")
        if self.window is not None and not 1 <= self.window <= lengths[1]:
            raise ValueError(f"window: expected 1 to the longest horizon {lengths[1]}, got {self.window}")


@dataclass(frozen=True)
class MetaTrainConfig:
    """Settings of a meta-training run. Without ``staleness`` they determine theta to the last bit.

    Raises:
        ValueError: a field is out of range, with the bad value.
    """

    inner_steps: int
    """The budget: the run ends when the inner runs of all perturbed thetas together have made so many steps.

    Phases and learning rate follow the share of it that is used, so that nothing depends on a clock."""

    phases: tuple[Phase, ...]
    """The curriculum; the shares add up to 1."""

    recipe: str = "custom"
    """Name of the recipe the settings began as, see :mod:`lopt.meta.recipes`."""

    preset: Literal["spectral", "compact", "paper"] = "compact"
    """Architecture of the learned optimizer, unless ``init`` is a file."""

    init: str = "adam"
    """Where theta starts: ``adam``, an imitation of Adam; ``random``, as in the paper; or a theta file."""

    stats: Literal["current", "lagged"] | None = None
    """Which statistics a step sees, whatever the start has; None leaves it as it is. A theta that was trained with
    current ones is a good start for lagged ones."""

    objective: Objective = "held_out"
    """Loss that counts: of outer_valid minibatches after an update, or of train minibatches before it."""

    weighting: Weighting = "linear"
    """Weights of the losses of a run: equal, growing linearly from 0, or its last quarter only."""

    loss_limit: float = 3.0
    """Upper bound of the loss relative to the initial one, which is also what a non-finite loss counts as."""

    delta_clip: float = 0.05
    """Bound of the difference of meta-loss between the two runs of a pair. The differences have long tails: the median
    is some .01, and with a bound of 1 a few pairs drown the others: the same gradient took 1.4 to 1.8 times as many.
    The price is bias, towards what helps most tasks a little rather than the mean."""

    equalise: bool = False
    """Differences count in units of their family's median (:func:`lopt.meta.es.equalised`), so that each family has a
    say in proportion to its share of the tasks."""

    tasks: tuple[Family | NetworkFamily, ...] | TaskDistribution | OwnTasks = ENGINE_FAMILIES
    """Families of synthetic tasks and of small networks to draw from, each equally often, a family named twice twice as
    often; or any mixture; or tasks of your own. Those that the unroll engine cannot run are some hundred times as
    slow."""

    tell_horizon: float = 0.6
    """Share of the inner runs in which the optimizer is told the length of the run (total_steps)."""

    averaged: float = 0.0
    """Share of the runs not told their length whose meta-loss is that of the average of their iterates."""

    show_valid: float = 0.8
    """Share of the inner runs in which the optimizer sees a validation loss, every tenth step."""

    valid_rows: int = VALID_ROWS
    """Rows of the validation loss, rounded up to whole minibatches. What is noise in it looks like overfitting."""

    pairs: int = 128
    """Antithetic pairs of perturbed thetas in an iteration; of ``backprop`` runs of theta."""

    pairs_per_task: int = 1
    """Pairs that share a task, with its initial parameters and minibatches: runs that PyTorch makes at once, where the
    fused engine cannot. More tasks teach more, so 1 where it can."""

    scaling: Scaling = "prior"
    """Units of theta in which perturbations and steps are equal: ``prior``, those of :func:`lopt.meta.outer.scales`."""

    sigma: float = 0.05
    """Standard deviation of the perturbations, in these units."""

    outer: str = "adam"
    """Outer optimizer: ``adam``; ``sgd``, with the first of ``betas``; or the theta of a learned one, a shipped name or
    a file. The latter has no use for the settings below."""

    lr: float = 0.03
    """Learning rate of Adam or SGD at the start, in these units."""

    final_lr: float = 0.1
    """Learning rate at the end, relative to that at the start; it falls linearly with the share of the budget used."""

    betas: tuple[float, float] = (0.9, 0.99)
    """Decays of the mean and, for Adam, the square of the gradients."""

    average: float = 0.98
    """Decay per iteration of the running mean of theta, which is what is validated and kept; 0 for theta itself.

    The steps of theta are mostly noise of the meta-gradient, and the mean is rid of much of it."""

    gradient_clip: float = 1.0
    """Bound of every component of the meta-gradient, in units of meta-loss per unit of theta."""

    warmup: int = 10
    """Gradients that a component of theta gives to Adam's moments before it moves."""

    warmup_from_file: int = 300
    """The same when theta starts from a file, where the first, noisy steps would undo what was learned."""

    validation_tasks: int = 200
    """Tasks, never trained on, by which theta is judged; the same for every seed."""

    validation_horizons: tuple[int, ...] = (200, 1000)
    """Lengths of the validation runs; there is one with and one without total_steps for every task and length."""

    validate_every: int = 10_000_000
    """Inner steps between two validations. The best theta is kept."""

    checkpoint_every: int = 20
    """Iterations between checkpoints."""

    staleness: int | None = None
    """Iterations that an estimate may be old. None: an iteration waits for all its pairs. Otherwise workers never wait,
    see :mod:`lopt.meta.asynchronous`: it takes the first ``pairs`` that come, and results are not the same bits again.

    While a worker is at an estimate there are about workers / groups of pairs iterations, so have groups enough."""

    keep_runs: bool = False
    """Where workers do not wait: whether checkpoints hold the inner runs between two windows, which then travel once
    between two checkpoints. Otherwise, as where a worker dies, new runs take their place after ``--resume``."""

    backend: Backend = "cpu"
    """Whose engine makes the inner runs that it can make: ``cuda`` for that of a GPU, which every worker then needs. It
    makes all runs of a unit at once, two for each of ``pairs_per_task``, so have many of these: a GPU has a hundred
    multiprocessors or more. ``sim`` is for tests."""

    seed: int = 0
    """Every random number derives from it."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type in (int, float) and not isinstance(getattr(self, field.name), (int, float)):
                raise ValueError(f"{field.name}: expected a number, as in 3 or 0.5, got {getattr(self, field.name)!r}")
        if isinstance(self.tasks, Mapping):  # from JSON
            kind: Any = OwnTasks if "own" in self.tasks else TaskDistribution
            object.__setattr__(self, "tasks", kind.from_json(self.tasks))
        names = ("betas", "validation_horizons", "phases")
        for name in names if isinstance(self.tasks, (TaskDistribution, OwnTasks)) else ("tasks", *names):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        given: tuple[Any, ...] = self.phases  # mappings when they come from JSON
        phases = tuple(phase if isinstance(phase, Phase) else Phase(**phase) for phase in given)
        object.__setattr__(self, "phases", phases)
        for name, allowed in (
            ("preset", tuple(PRESETS)),
            ("stats", (None, "current", "lagged")),
            ("objective", get_args(Objective)),
            ("weighting", get_args(Weighting)),
            ("scaling", get_args(Scaling)),
            ("backend", get_args(Backend)),
        ):
            _one_of(name, getattr(self, name), allowed)
        _positive(self, "inner_steps", "pairs", "pairs_per_task", "validation_tasks", "valid_rows")
        _positive(self, "validate_every", "checkpoint_every")
        _positive(self, "loss_limit", "delta_clip", "sigma", "lr", "final_lr", "gradient_clip")
        if self.pairs % self.pairs_per_task:
            raise ValueError(f"pairs: expected a multiple of pairs_per_task={self.pairs_per_task}, got {self.pairs}")
        if self.pairs_per_task > 1 and any(phase.estimator == "backprop" for phase in self.phases):
            raise ValueError(f"pairs_per_task: expected 1 for backprop, got {self.pairs_per_task}")
        if isinstance(self.tasks, tuple) and (not self.tasks or not set(self.tasks) <= set(KNOWN)):
            raise ValueError(f"tasks: expected some of {list(KNOWN)} or a mixture, got {list(self.tasks)}")
        if not self.phases or abs(sum(phase.share for phase in self.phases) - 1.0) > 1e-6:
            shares = [phase.share for phase in self.phases]
            raise ValueError(f"phases: expected shares that add up to 1, got {shares}")
        if not self.validation_horizons or min(self.validation_horizons) < 1:
            raise ValueError(f"validation_horizons: expected positive lengths, got {self.validation_horizons}")
        betas: tuple[float, ...] = self.betas
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas: expected two decays in [0, 1), got {betas}")
        if not 0.0 <= self.average < 1.0:
            raise ValueError(f"average: expected a decay in [0, 1), got {self.average}")
        for name in ("tell_horizon", "averaged", "show_valid"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")
        for name in ("seed", "warmup", "warmup_from_file"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a non-negative integer, got {getattr(self, name)}")
        if self.staleness is not None and (isinstance(self.staleness, bool) or self.staleness < 0):
            raise ValueError(f"staleness: expected None or a number of iterations, got {self.staleness}")
        if self.keep_runs and self.staleness is None:
            raise ValueError("keep_runs: expected staleness with it; where workers wait, checkpoints hold all runs")
        if self.seed >= SEEDS:
            raise ValueError(f"seed: expected a whole number from 0 to {SEEDS - 1}, got {self.seed}")

    @property
    def groups(self) -> int:
        """Number of groups of pairs that share a task."""
        return self.pairs // self.pairs_per_task

    @property
    def from_file(self) -> bool:
        """Whether theta starts from a file."""
        return self.init not in ("adam", "random")

    def phase_at(self, inner_steps: int) -> int:
        """Number of the phase when ``inner_steps`` of the budget are used."""
        end = 0.0
        for number, phase in enumerate(self.phases):
            end += phase.share
            if inner_steps < end * self.inner_steps:
                return number
        return len(self.phases) - 1

    def lr_at(self, inner_steps: int) -> float:
        """Learning rate when ``inner_steps`` of the budget are used."""
        used = min(1.0, inner_steps / self.inner_steps)
        return self.lr * (1.0 + (self.final_lr - 1.0) * used) * self.phases[self.phase_at(inner_steps)].lr

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.tasks, (TaskDistribution, OwnTasks)):
            values["tasks"] = self.tasks.to_json()
        phases = [dataclasses.asdict(phase) for phase in self.phases]
        values["phases"] = [{**phase, "horizon": list(phase["horizon"])} for phase in phases]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "MetaTrainConfig":
        """The inverse of :meth:`to_json`; unknown or missing fields are errors, except those of ``ADDED``."""
        values = {**ADDED, **values}
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"config: unknown fields {sorted(set(values) - names)}, missing fields {sorted(names - set(values))}; "
                "it was written by another version of lopt"
            )
        return cls(**values)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a positive number, got {value}")
