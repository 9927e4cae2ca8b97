"""The checkpoint of a meta-training run: one file with everything the next iteration depends on.

It holds tensors, numbers, strings, lists and dicts, so that ``torch.load(weights_only=True)`` reads it and nothing is
unpickled. There is no generator state: every random number is a function of the configuration's seed, the iteration and
the pair. A run that continues from a checkpoint is bit-identical to one that never stopped.
"""

import json
import pickle
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopt.files import replacing
from lopt.meta.config import MetaTrainConfig
from lopt.meta.outer import Moments
from lopt.meta.pairs import Carry
from lopt.rule import AnySpec, spec_from_json

#: What torch.load raises for files that were cut short or are something else.
_DAMAGE = (OSError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, ValueError, pickle.UnpicklingError)

VERSION = 4  # raised when old checkpoints cannot be continued as they are


@dataclass
class TrainState:
    """A meta-training run after ``iteration`` iterations."""

    theta: Tensor  # [P]
    average: Tensor  # [P] running mean of theta
    moments: Moments
    best: Tensor  # [P] mean with the lowest validation score
    carries: list[Carry | None]  # of each group of pairs; of those that workers sent where these do not wait
    start_sha256: str | None  # of the file that theta started from
    iteration: int = 0
    phase: int = 0
    phase_begun: int = 0  # iteration
    inner_steps: int = 0
    divergences: int = 0
    cpu_seconds: float = 0.0
    learned: dict[str, Any] = field(default_factory=dict)  # state dict of a learned outer optimizer
    validation: dict[int, float] = field(default_factory=dict)  # iteration -> score

    @classmethod
    def begin(cls, config: MetaTrainConfig, theta: Tensor, start_sha256: str | None = None) -> "TrainState":
        """The state before the first iteration."""
        return cls(theta, theta, Moments.zeros(len(theta)), theta, [None] * config.groups, start_sha256)

    @property
    def best_iteration(self) -> int:
        """The iteration after which theta was ``best``."""
        return min(self.validation, key=lambda iteration: (self.validation[iteration], iteration))


def save(path: Path, config: MetaTrainConfig, spec: AnySpec, state: TrainState) -> None:
    """Write a checkpoint; a crash at any moment leaves the old file or the new one."""
    content = {entry.name: getattr(state, entry.name) for entry in fields(state)}
    content["moments"] = state.moments._asdict()
    content["carries"] = [None if carry is None else carry._asdict() for carry in state.carries]
    content |= {"version": VERSION, "config": json.dumps(config.to_json()), "spec": json.dumps(spec.to_json())}
    with replacing(path) as file:
        torch.save(content, file)


def load(path: Path) -> tuple[MetaTrainConfig, AnySpec, TrainState]:
    """Read what :func:`save` wrote.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is damaged, or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {str(path)!r} to resume from; start anew, in an empty folder")
    damaged = "restore it or start in an empty folder"
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
        version = content.pop("version")
    except _DAMAGE as error:
        text = f"{type(error).__name__}: {str(error).partition('. ')[0]}"
        raise ValueError(
            f"checkpoint: {path} is damaged or no checkpoint of meta-training ({text}); {damaged}"
        ) from error
    if version == 3 and not any(content.get("carries", ())):  # which was otherwise the same
        version = VERSION
    if version != VERSION:
        raise ValueError(f"checkpoint: {path} has version {version}, this version of lopt reads version {VERSION}")
    missing = sorted({"config", "spec", *(entry.name for entry in fields(TrainState))} - content.keys())
    if missing:
        raise ValueError(f"checkpoint: {path} has no entries {missing}; it is damaged: {damaged}")
    try:
        config = MetaTrainConfig.from_json(json.loads(content.pop("config")))
        spec = spec_from_json(json.loads(content.pop("spec")))
        content["moments"] = Moments(**content["moments"])
        content["carries"] = [None if carry is None else Carry(**carry) for carry in content["carries"]]
        return config, spec, TrainState(**content)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"checkpoint: {path}: {error}; {damaged}") from error
