"""What a meta-training run is: one frozen dataclass, written into everything the run leaves behind."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lopt.tasks.synthetic import FAMILIES, Family


@dataclass(frozen=True)
class MetaTrainConfig:
    """Settings of a meta-training run. With its seed they determine theta to the last bit.

    Raises:
        ValueError: a field is out of range, with the bad value.
    """

    preset: Literal["compact", "paper"] = "compact"
    """Architecture of the learned optimizer."""

    init: Literal["adam", "random"] = "adam"
    """Where theta starts: as an imitation of Adam, or at random as in the paper."""

    estimator: Literal["es", "pes"] = "es"
    """Meta-gradient: antithetic evolution strategies, or their persistent form (unbiased under truncation)."""

    iterations: int = 200
    """Outer iterations, one update of theta each."""

    tasks: tuple[Family, ...] = FAMILIES
    """Families to draw tasks from, each equally often; a family named twice is drawn twice as often."""

    num_tasks: int | None = None
    """Number of different tasks; none: every inner run has a task of its own."""

    tasks_per_iteration: int = 2
    """Inner tasks unrolled in an iteration; the pairs are divided evenly among them."""

    pairs: int = 32
    """Antithetic pairs of perturbed thetas in an iteration, on all its tasks together."""

    horizon: tuple[int, int] = (40, 120)
    """Shortest and longest inner run in steps; lengths are drawn log-uniformly in between."""

    truncation: int | None = None
    """Inner steps between two updates of theta (lengths are rounded to whole windows); none: the whole run."""

    tell_horizon: float = 0.75
    """Share of the inner runs in which the optimizer is told the length of the run (total_steps)."""

    loss_limit: float = 3.0
    """Upper bound of the normalised loss, which is also what a non-finite loss counts as."""

    sigma: float = 0.01
    """Standard deviation of the perturbations of theta."""

    lr: float = 3e-3
    """Learning rate of Adam on theta."""

    gradient_clip: float = 0.1
    """Bound of every component of the meta-gradient."""

    validation_runs: int = 6
    """Inner runs of the longest length, on tasks never trained on, by which theta is judged at checkpoints."""

    seed: int = 0
    """Every random number derives from it."""

    checkpoint_every: int = 20
    """Iterations between checkpoints."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "horizon", tuple(self.horizon))
        for name, allowed in (
            ("preset", ("compact", "paper")),
            ("init", ("adam", "random")),
            ("estimator", ("es", "pes")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {list(allowed)}, got {getattr(self, name)!r}")
        positive = ("iterations", "tasks_per_iteration", "pairs", "validation_runs", "checkpoint_every")
        for name in (*positive, *(name for name in ("num_tasks", "truncation") if getattr(self, name) is not None)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("loss_limit", "sigma", "lr", "gradient_clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not self.tasks or not set(self.tasks) <= set(FAMILIES):
            raise ValueError(f"tasks: expected some of {list(FAMILIES)}, got {list(self.tasks)}")
        if self.pairs % self.tasks_per_iteration:
            raise ValueError(
                f"pairs: expected a multiple of tasks_per_iteration ({self.tasks_per_iteration}), got {self.pairs}"
            )
        lengths: tuple[int, ...] = self.horizon
        if len(lengths) != 2 or not 1 <= lengths[0] <= lengths[1]:
            raise ValueError(f"horizon: expected shortest and longest length with 1 <= shortest, got {self.horizon}")
        if self.truncation is not None and self.truncation > self.horizon[1]:
            raise ValueError(
                f"truncation: expected at most the longest horizon {self.horizon[1]}, got {self.truncation}"
            )
        if not 0.0 <= self.tell_horizon <= 1.0:
            raise ValueError(f"tell_horizon: expected a share between 0 and 1, got {self.tell_horizon}")
        if self.seed < 0:
            raise ValueError(f"seed: expected a non-negative integer, got {self.seed}")

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "MetaTrainConfig":
        """The inverse of :meth:`to_json`; unknown or missing fields are errors."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"config: unknown fields {sorted(set(values) - names)}, missing fields {sorted(names - set(values))}; "
                "it was written by another version of lopt"
            )
        return cls(**values)
