"""The fused unroll engine: whole inner training runs of small perceptrons in one call of compiled code.

The same inner run as lopt/meta/unroll.py, for problems that are perceptrons, some fifty times as fast: minibatch,
forward, backward, both device operations and the LSTM in one C++ loop (csrc/unroll/unroll_cpu.cpp). Runs are
independent; they are spread over threads, and results do not depend on how many.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lopt.kernels.extension import NOT_BUILT, module_of
from lopt.kernels.structs import PROBLEM, RUN, spec_record
from lopt.rule import ThetaSpec
from lopt.tasks.seeds import minibatch_key
from lopt.tasks.synthetic import Perceptron
from lopt.tasks.task import SplitName, Task

SPLITS: tuple[SplitName, ...] = ("train", "inner_valid", "outer_valid")
ACTIVATIONS = ("relu", "tanh", "gelu")
LOSSES = ("softmax", "squared_error")
MAX_LAYERS = 5


@dataclass(frozen=True)
class Problem:
    """A perceptron and its data.

    Args:
        sizes: inputs, hidden widths (up to four), outputs.
        activation: of the hidden layers, one of ``ACTIVATIONS``.
        loss: one of ``LOSSES``; means over rows, and over rows and outputs.
        batch: rows of a minibatch.
        data: for each of ``SPLITS`` the inputs ``[rows, sizes[0]]`` float32, and labels ``[rows]`` int64 or targets
            ``[rows, sizes[-1]]`` float32.
    """

    sizes: tuple[int, ...]
    activation: str
    loss: str
    batch: int
    data: tuple[tuple[Tensor, Tensor], ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.sizes) <= MAX_LAYERS + 1 or min(self.sizes) < 1:
            raise ValueError(f"sizes: expected 2 to {MAX_LAYERS + 1} positive widths, got {self.sizes}")
        if self.activation not in ACTIVATIONS or self.loss not in LOSSES:
            raise ValueError(
                f"activation, loss: expected one of {ACTIVATIONS} and one of {LOSSES}, "
                f"got {self.activation!r} and {self.loss!r}"
            )
        if self.batch < 1 or len(self.data) != len(SPLITS):
            raise ValueError(f"batch, data: expected a positive size and {len(SPLITS)} splits, got {self.batch}")
        for split, (inputs, targets) in zip(SPLITS, self.data, strict=True):
            rows = inputs.shape[0]
            shape = (rows,) if self.loss == "softmax" else (rows, self.sizes[-1])
            dtype = torch.int64 if self.loss == "softmax" else torch.float32
            if rows < 1 or inputs.dtype != torch.float32 or tuple(inputs.shape) != (rows, self.sizes[0]):
                raise ValueError(
                    f"{split} inputs: expected float32 [rows, {self.sizes[0]}], "
                    f"got {inputs.dtype} {tuple(inputs.shape)}"
                )
            if targets.dtype != dtype or tuple(targets.shape) != shape:
                raise ValueError(
                    f"{split} targets: expected {dtype} {shape}, got {targets.dtype} {tuple(targets.shape)}"
                )
            if self.loss == "softmax" and (int(targets.min()) < 0 or int(targets.max()) >= self.sizes[-1]):
                raise ValueError(f"{split} targets: expected labels from 0 to {self.sizes[-1] - 1}")
        object.__setattr__(self, "data", tuple((x.contiguous(), y.contiguous()) for x, y in self.data))

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum((a + 1) * b for a, b in zip(self.sizes[:-1], self.sizes[1:], strict=True))

    def record(self) -> np.ndarray[tuple[()], np.dtype[np.void]]:
        """The problem as csrc/unroll/unroll.h reads it; valid while this object lives."""
        record = np.zeros((), PROBLEM)
        record["num_layers"] = len(self.sizes) - 1
        record["sizes"][: len(self.sizes)] = self.sizes
        record["activation"], record["loss"] = ACTIVATIONS.index(self.activation), LOSSES.index(self.loss)
        record["batch"] = self.batch
        record["rows"] = [inputs.shape[0] for inputs, _ in self.data]
        record["inputs"] = [inputs.data_ptr() for inputs, _ in self.data]
        record["targets"] = [targets.data_ptr() for _, targets in self.data]
        return record


def problem_of(task: Task) -> Problem | None:
    """The task as the engine runs it; None for what only the torch unroll can run."""
    if (
        NOT_BUILT
        or not isinstance(task, Perceptron)
        or len(task.sizes) > MAX_LAYERS + 1
        or task.activation not in ACTIVATIONS
    ):
        return None
    loss = "squared_error" if task.regression else "softmax"
    data = tuple((task.splits[split].inputs, task.splits[split].targets) for split in SPLITS)
    return Problem(task.sizes, task.activation, loss, task.batch_size, data)


def initial_params(task: Task, seed: int) -> Tensor:
    """``task.init(seed)`` as one vector ``[num_params]``, in the engine's order."""
    return torch.cat([value.reshape(-1) for value in task.init(seed).values()])


def minibatch_keys(seed: int) -> tuple[int, int, int]:
    """Keys of the streams of :meth:`lopt.tasks.Task.batches` under ``seed``, for ``EngineRun.keys``."""
    train, inner_valid, outer_valid = (minibatch_key(seed, split) for split in SPLITS)
    return train, inner_valid, outer_valid


@dataclass(frozen=True)
class EngineRun:
    """One inner run of a window.

    Args:
        problem: position in the list of problems.
        theta: row of the theta matrix.
        state: from :func:`start`; continued in place.
        keys: of the minibatch streams, one for each of ``SPLITS``.
        total_steps: the length the optimizer is told, 0 for none.
    """

    problem: int
    theta: int
    state: Tensor
    keys: tuple[int, int, int]
    total_steps: int = 0


def _check_stats(spec: ThetaSpec) -> None:
    if spec.stats != "current":
        raise ValueError(
            f"spec: the unroll engine computes with stats='current', got {spec.stats!r}; use another theta"
        )


def start(spec: ThetaSpec, problem: Problem, theta: Tensor, init: Tensor) -> Tensor:
    """State of a run before its first step.

    Args:
        theta: ``[P]`` float32, on the CPU.
        init: ``[num_params]`` float32: w0 ``[in, out]``, b0, w1, b1, ...
    """
    if theta.shape != (spec.num_floats,) or init.shape != (problem.num_params,):
        raise ValueError(
            f"theta, init: expected shapes ({spec.num_floats},) and ({problem.num_params},), "
            f"got {tuple(theta.shape)} and {tuple(init.shape)}"
        )
    _check_stats(spec)
    theta, init = theta.float().contiguous(), init.float().contiguous()
    record, problem_record = spec_record(spec), problem.record()
    addresses = record.ctypes.data, problem_record.ctypes.data, theta.data_ptr(), init.data_ptr()
    engine = module_of("cpu")
    size = engine.start_run(*addresses, 0)
    if size < 0:
        raise ValueError(f"spec: no kernel is compiled for {spec.feature_set!r} with MLP width {spec.mlp_width}")
    state = torch.empty(size)
    engine.start_run(*addresses, state.data_ptr())
    return state


def params_of(spec: ThetaSpec, problem: Problem, state: Tensor) -> Tensor:
    """The parameters ``[num_params]`` in a run's state, a view."""
    return state[: problem.num_params]


def unroll(
    spec: ThetaSpec,
    theta: Tensor,
    problems: Sequence[Problem],
    runs: Sequence[EngineRun],
    steps: int,
    *,
    valid_every: int = 10,
    valid_batches: int = 1,
    loss_every: int = 1,
    num_threads: int = 1,
) -> tuple[Tensor, Tensor]:
    """Continue runs by ``steps`` steps.

    Args:
        theta: ``[n, P]`` float32, one row per perturbation.
        valid_every: steps between the validation losses the optimizer sees.
        valid_batches: ``inner_valid`` minibatches that such a loss is the mean over.
        loss_every: steps between ``outer_valid`` losses; a divisor of ``steps``.

    Returns:
        ``outer_valid`` losses after the update ``[runs, steps / loss_every]`` and train losses before the update
        ``[runs, steps]``; NaN from where a run diverged.
    """
    if min(valid_every, valid_batches) < 1:
        raise ValueError(f"valid_every, valid_batches: expected positive numbers, got {valid_every}, {valid_batches}")
    if steps < 1 or steps % loss_every:
        raise ValueError(f"steps: expected a positive multiple of loss_every={loss_every}, got {steps}")
    theta = theta.float().contiguous()
    _check_stats(spec)
    if theta.dim() != 2 or theta.shape[1] != spec.num_floats:
        raise ValueError(f"theta: expected shape [n, {spec.num_floats}], got {tuple(theta.shape)}")
    outer, train = torch.empty(len(runs), steps // loss_every), torch.empty(len(runs), steps)
    problem_table = np.stack([problem.record() for problem in problems])
    table = np.zeros(len(runs), RUN)
    for i, run in enumerate(runs):
        if not (0 <= run.problem < len(problems) and 0 <= run.theta < len(theta)):
            raise ValueError(f"runs[{i}]: problem {run.problem} or theta {run.theta} out of range")
        table[i]["problem"], table[i]["theta"], table[i]["state"] = run.problem, run.theta, run.state.data_ptr()
        table[i]["keys"] = run.keys
        table[i]["total_steps"] = run.total_steps
        table[i]["outer_losses"], table[i]["train_losses"] = outer[i].data_ptr(), train[i].data_ptr()
    table["steps"], table["loss_every"] = steps, loss_every
    table["valid_every"], table["valid_batches"] = valid_every, valid_batches
    record = spec_record(spec)
    module_of("cpu").unroll(
        record.ctypes.data,
        problem_table.ctypes.data,
        table.ctypes.data,
        len(runs),
        theta.data_ptr(),
        spec.num_floats,
        num_threads,
    )
    return outer, train
