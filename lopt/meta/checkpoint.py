"""The checkpoint of a meta-training run: one file with everything the next iteration depends on.

It holds tensors, numbers, strings, lists and dicts, so that ``torch.load(weights_only=True)`` reads it and nothing is
unpickled. There is no generator state: every random number is a function of the configuration's seed, the iteration and
the pair. A run that continues from a checkpoint is bit-identical to one that never stopped.
"""

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopt import reference
from lopt.meta.config import MetaTrainConfig
from lopt.meta.lanes import Lane
from lopt.meta.unroll import Run, RunState
from lopt.tasks.synthetic import task_from_config
from lopt.tensor_lstm import Globals, Rows
from lopt.theta import ThetaSpec

VERSION = 1  # raised when old checkpoints cannot be continued as they are


class TrainState:
    """A meta-training run after ``iteration`` iterations.

    Args:
        theta: ``[P]``, copied.
        lr: learning rate of the outer optimizer.
        lanes: None for a lane that has not begun.
    """

    def __init__(self, theta: Tensor, lr: float, lanes: Sequence[Lane | None]) -> None:
        self.theta = theta.detach().clone().requires_grad_()
        self.adam = torch.optim.Adam([self.theta], lr=lr)
        self.lanes = list(lanes)
        self.iteration = 0
        self.inner_steps = 0
        self.divergences = 0
        self.cpu_seconds = 0.0
        self.validation: dict[int, float] = {}  # iteration -> meta-loss on the validation runs


COUNTERS = ("iteration", "inner_steps", "divergences", "cpu_seconds", "validation")


def save(path: Path, config: MetaTrainConfig, spec: ThetaSpec, state: TrainState) -> None:
    """Write a checkpoint; a crash at any moment leaves the old file or the new one."""
    content = {
        "version": VERSION,
        "config": json.dumps(config.to_json()),
        "spec": json.dumps(spec.to_json()),
        "theta": state.theta.detach(),
        "adam": state.adam.state_dict(),
        **{name: getattr(state, name) for name in COUNTERS},
        "lanes": [None if lane is None else _pack(lane) for lane in state.lanes],
    }
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path) -> tuple[MetaTrainConfig, ThetaSpec, TrainState]:
    """Read what :func:`save` wrote.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is damaged, or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {str(path)!r} to resume from; start anew, in an empty folder")
    try:
        content = torch.load(path, weights_only=True)
        version = content["version"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint: {path} is damaged or no checkpoint of meta-training ({error})") from error
    if version != VERSION:
        raise ValueError(f"checkpoint: {path} has version {version}, this version of lopt reads version {VERSION}")
    missing = sorted({"config", "spec", "theta", "adam", "lanes", *COUNTERS} - content.keys())
    if missing:
        raise ValueError(f"checkpoint: {path} has no entries {missing}; it is damaged")
    config = MetaTrainConfig.from_json(json.loads(content["config"]))
    spec = ThetaSpec.from_json(json.loads(content["spec"]))
    lanes = [None if packed is None else _unpack(packed) for packed in content["lanes"]]
    state = TrainState(content["theta"], config.lr, lanes)
    state.adam.load_state_dict(content["adam"])
    for name in COUNTERS:
        setattr(state, name, content[name])
    return config, spec, state


def _pack(lane: Lane) -> dict[str, Any]:
    run, optimizer = lane.run, lane.state.optimizer
    return {
        "task": json.dumps(run.task.config),
        "run": [run.seed, run.horizon, run.total_steps, run.valid_every],
        "stop": lane.stop,
        "xi": lane.xi,
        "step": lane.state.step,
        "params": lane.state.params,
        "globals": optimizer.globals._asdict(),
        "rows": optimizer.rows._asdict(),
        "mom": optimizer.mom,
        "rms": optimizer.rms,
    }


def _unpack(packed: dict[str, Any]) -> Lane:
    run = Run(task_from_config(json.loads(packed["task"])), *packed["run"])
    optimizer = reference.State(Globals(**packed["globals"]), Rows(**packed["rows"]), packed["mom"], packed["rms"])
    return Lane(run, packed["stop"], RunState(packed["step"], packed["params"], optimizer), packed["xi"])
