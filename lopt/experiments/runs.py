"""What there is to run: a run says everything its result depends on, and does it.

The hash of what it depends on (:attr:`Run.sha256`) finds its row again.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

from lopt.evaluation.runs import Result
from lopt.provenance import file_checksum

Scale = Literal["small", "full"]
T = TypeVar("T")

SEEDS: dict[Scale, tuple[int, ...]] = {"small": (0,), "full": (0, 1, 2)}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the user chose.

    Args:
        scale: ``small`` fits ten minutes of two cores, ``full`` is the real one.
        theta: of the learned optimizer, a shipped name or a file.
        seeds: each decides initial parameters and minibatches.
    """

    scale: Scale = "small"
    theta: str = "default"
    seeds: tuple[int, ...] = (0,)

    def pick(self, small: T, full: T) -> T:
        """The one of the two that belongs to the scale."""
        return small if self.scale == "small" else full


@dataclass(frozen=True, kw_only=True)
class Run(ABC):
    """One run of one optimizer; subclasses say on what.

    Args:
        task: its name in tables and figures.
        optimizer: name as in :mod:`lopt.evaluation.opponents`, or one of the experiment's own.
        x: where it belongs on the axis of the experiment.
        trial, lr: hyperparameters of a tuned opponent; 0 and 1 for others.
        theta: of a learned optimizer; "" for others.
    """

    task: str
    optimizer: str
    steps: int
    seed: int = 0
    x: float = 0.0
    trial: int = 0
    lr: float = 1.0
    theta: str = ""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain JSON values: what the result depends on beside the fields here."""

    @abstractmethod
    def measure(self) -> Result:
        """Do it, on one thread; the same numbers every time, but for the seconds."""

    @property
    def batch(self) -> str:
        """Runs that have this in common are measured together, by ``measure_batch``; empty: each by itself."""
        return ""

    def measure_batch(self, runs: Sequence[Any]) -> list[Result]:
        """Results of runs with the ``batch`` of this one; they differ by rounding from those of ``measure``."""
        return [run.measure() for run in runs]

    @property
    def theta_sha256(self) -> str:
        """Hash of the file of theta."""
        return _checksum(self.theta) if self.theta else ""

    @property
    def sha256(self) -> str:
        """Beginning of the hash of everything the result depends on, but for the code."""
        fields = [self.task, self.optimizer, self.steps, self.seed, self.x, self.trial, self.lr, self.theta_sha256]
        return hashlib.sha256(json.dumps([*fields, self.config], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def cost(self) -> float:
        """Roughly the time it takes, in some unit."""
        return self.steps


_checksum = lru_cache(maxsize=16)(file_checksum)
