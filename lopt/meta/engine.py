"""The fused unroll engine: whole inner training runs of small networks in one call of compiled code.

The same inner run as lopt/meta/unroll.py, for tasks that are networks of its layers (lopt/tasks/network.py), for
perceptrons some fifty times as fast: minibatch, forward, backward, both device operations and the LSTM in one C++ loop
(csrc/unroll). Runs are independent; they are spread over threads, or over the blocks of a GPU (cuda/unroll.cu), and
results do not depend on how many.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lopt.kernels.devices import Table, stream_of
from lopt.kernels.extension import NOT_BUILT, module_of
from lopt.kernels.gpus import check_gpu
from lopt.kernels.own import described
from lopt.kernels.structs import PROBLEM, RUN, shape_records, spec_record
from lopt.rule import ThetaSpec
from lopt.rule.matrices import Kind
from lopt.tasks.network import (
    Activate,
    Activation,
    Attention,
    Branch,
    Convolution,
    Dense,
    Embedding,
    Flatten,
    Join,
    Layer,
    Mean,
    Network,
    Norm,
    Pool,
    Positions,
)
from lopt.tasks.seeds import minibatch_key
from lopt.tasks.task import SplitName, Task

SPLITS: tuple[SplitName, ...] = ("train", "inner_valid", "outer_valid")

# Positions in the enums of csrc/unroll/unroll.h.
KINDS: tuple[type[Layer], ...] = (
    Dense,
    Activate,
    Norm,
    Branch,
    Join,
    Embedding,
    Positions,
    Convolution,
    Pool,
    Mean,
    Flatten,
    Attention,
)
ACTIVATIONS: tuple[Activation, ...] = ("relu", "tanh", "gelu")
POOLS = ("max", "mean")
LOSSES = ("softmax", "squared_error")

CPU = torch.device("cpu")

#: Most layers of a network.
MAX_LAYERS = PROBLEM["kinds"].shape[0] if PROBLEM.names else 0


def _option(layer: Layer) -> int:
    match layer:
        case Dense(_, _, bias):
            return int(bias is not None)
        case Activate(function):
            return ACTIVATIONS.index(function)
        case Norm(_, bias):
            return int(bias is None)
        case Embedding(symbols):
            return symbols
        case Pool(kind):
            return POOLS.index(kind)
        case Attention(heads):
            return heads
    return 0


@dataclass(frozen=True)
class Problem:
    """A network and its data.

    Args:
        network: at most ``MAX_LAYERS`` layers.
        batch: rows of a minibatch.
        data: for each of ``SPLITS`` the inputs ``[rows, ...]`` float32, ``places * inputs`` numbers in a row, and
            labels ``[rows]`` int64 or targets ``[rows, outputs]`` float32. Or symbols ``[n]`` int64 of which windows
            are drawn, and nothing.
        kinds: what the optimizer knows of the parameters, in order; by default which matrices lie ``[in, out]``.

    Raises:
        ValueError: too many layers, or data that does not belong to the network.
    """

    network: Network
    batch: int
    data: tuple[tuple[Tensor, Tensor], ...]
    kinds: tuple[Kind, ...] = ()

    @cached_property
    def shapes(self) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        """Facts about the parameter tensors."""
        return shape_records(list(self.network.shapes.values()), self.kinds)

    def __post_init__(self) -> None:
        network = self.network
        if not self.kinds:
            fan_in = [shape[0] if name in network.transposed else None for name, shape in network.shapes.items()]
            object.__setattr__(self, "kinds", tuple(Kind(fan_in=known) for known in fan_in))
        if len(self.kinds) != len(network.shapes):
            raise ValueError(f"kinds: expected one for each of {len(network.shapes)} tensors, got {len(self.kinds)}")
        if len(network.layers) > MAX_LAYERS:
            raise ValueError(f"network: expected at most {MAX_LAYERS} layers, got {len(network.layers)}")
        if self.batch < 1 or len(self.data) != len(SPLITS):
            raise ValueError(f"batch, data: expected a positive size and {len(SPLITS)} splits, got {self.batch}")
        for split, (inputs, targets) in zip(SPLITS, self.data, strict=True):
            (self._check_symbols if network.tokens else self._check_rows)(split, inputs, targets)
        object.__setattr__(self, "data", tuple((x.contiguous(), y.contiguous()) for x, y in self.data))

    def _check_symbols(self, split: str, inputs: Tensor, targets: Tensor) -> None:
        window, symbols = self.network.places * self.network.inputs, self.network.layers[0]
        assert isinstance(symbols, Embedding)
        known = min(symbols.symbols, self.network.end.width)
        if inputs.dtype != torch.int64 or inputs.dim() != 1 or len(inputs) <= window:
            raise ValueError(
                f"{split} inputs: expected int64 symbols, more than the {window} of a window, "
                f"got {inputs.dtype} {tuple(inputs.shape)}"
            )
        if int(inputs.min()) < 0 or int(inputs.max()) >= known:
            raise ValueError(f"{split} inputs: expected symbols from 0 to {known - 1}")

    def _check_rows(self, split: str, inputs: Tensor, targets: Tensor) -> None:
        rows, size, outputs = inputs.shape[0], self.network.places * self.network.inputs, self.network.end.width
        labels = self.network.loss == "softmax"
        shape, dtype = ((rows,), torch.int64) if labels else ((rows, outputs), torch.float32)
        if self.network.end.places > 1:
            raise ValueError(f"network: expected one place at the end, as rows have one target, got {self.network.end}")
        if rows < 1 or inputs.dtype != torch.float32 or inputs[0].numel() != size:
            raise ValueError(
                f"{split} inputs: expected float32 [rows, {size}], got {inputs.dtype} {tuple(inputs.shape)}"
            )
        if targets.dtype != dtype or tuple(targets.shape) != shape:
            raise ValueError(f"{split} targets: expected {dtype} {shape}, got {targets.dtype} {tuple(targets.shape)}")
        if labels and (int(targets.min()) < 0 or int(targets.max()) >= outputs):
            raise ValueError(f"{split} targets: expected labels from 0 to {outputs - 1}")

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.network.shapes.values())

    @cached_property
    def _copies(self) -> "dict[torch.device, tuple[Table, tuple[tuple[Tensor, Tensor], ...]]]":
        return {}

    def record(self, device: torch.device = CPU) -> np.ndarray[tuple[()], np.dtype[np.void]]:
        """The problem as csrc/unroll/unroll.h reads it, with addresses on a device; valid while this object lives."""
        if device not in self._copies:
            data = tuple((inputs.to(device), targets.to(device)) for inputs, targets in self.data)
            self._copies[device] = Table(self.shapes, device), data
        shapes, data = self._copies[device]
        record, network = np.zeros((), PROBLEM), self.network
        count, window = len(network.layers), network.places * network.inputs
        record["num_layers"] = count
        record["kinds"][:count] = [KINDS.index(type(layer)) for layer in network.layers]
        record["options"][:count] = [_option(layer) for layer in network.layers]
        record["outputs"][:count] = [place.width for place in (*network.flow[1:], network.end)]
        record["tokens"], record["places"], record["inputs"] = network.tokens, network.places, network.inputs
        record["loss"], record["batch"] = LOSSES.index(network.loss), self.batch
        record["shapes"] = shapes.address
        record["rows"] = [len(inputs) - window * network.tokens for inputs, _ in self.data]
        record["data"] = [inputs.data_ptr() for inputs, _ in data]
        record["targets"] = [targets.data_ptr() for _, targets in data]
        return record


def problem_of(task: Task) -> Problem | None:
    """The task as the engine runs it; None for what only the torch unroll can run."""
    network = None if NOT_BUILT else task.network
    if network is None or len(network.layers) > MAX_LAYERS:
        return None
    batch = len(next(task.batches(0, "train"))[0])
    data = tuple((rows.inputs, rows.targets) for rows in map(task.stored, SPLITS))
    return Problem(network, batch, data, tuple(task.kinds))


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
        state: from :func:`start`, on the device of the engine; continued in place.
        keys: of the minibatch streams, one for each of ``SPLITS``.
        total_steps: the length the optimizer is told, 0 for none.
        averaged: whether ``outer_valid`` losses are those of the average of the iterates.
    """

    problem: int
    theta: int
    state: Tensor
    keys: tuple[int, int, int]
    total_steps: int = 0
    averaged: bool = False


def start(spec: ThetaSpec, problem: Problem, theta: Tensor, init: Tensor) -> Tensor:
    """State of a run before its first step, on the CPU; the same for all engines.

    Args:
        theta: ``[P]`` float32, on the CPU.
        init: ``[num_params]`` float32, the tensors of ``problem.network.shapes`` one after the other.
    """
    if theta.shape != (spec.num_floats,) or init.shape != (problem.num_params,):
        raise ValueError(
            f"theta, init: expected shapes ({spec.num_floats},) and ({problem.num_params},), "
            f"got {tuple(theta.shape)} and {tuple(init.shape)}"
        )
    theta, init = theta.float().contiguous(), init.float().contiguous()
    record, problem_record = spec_record(spec), problem.record()
    addresses = record.ctypes.data, problem_record.ctypes.data, theta.data_ptr(), init.data_ptr()
    engine = module_of("cpu")
    size = engine.start_run(*addresses, 0)
    if size < 0:
        what = described(spec.feature_set, spec.mlp_width, spec.mlp_layers)
        raise ValueError(f"spec: no kernel is compiled in for {what}")
    state = torch.empty(size)
    engine.start_run(*addresses, state.data_ptr())
    return state


def params_of(spec: ThetaSpec, problem: Problem, state: Tensor) -> Tensor:
    """The parameters ``[num_params]`` in a run's state, a view."""
    return state[: problem.num_params]


def device_of(backend: str) -> torch.device:
    """Where the engine of a back end runs: the current GPU for ``cuda``, the CPU for ``cpu`` and ``sim``.

    Raises:
        ValueError: there is no such back end.
        RuntimeError: it is not part of this build, or there is no GPU on which it runs.
    """
    module_of(backend)
    if backend != "cuda":
        return CPU
    if not torch.cuda.is_available():
        raise RuntimeError(
            "backend 'cuda': torch finds no GPU; use backend='cpu', or a machine with an NVIDIA GPU and a torch built "
            "for CUDA"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    check_gpu(device)
    return device


def loss_and_grad(
    problem: Problem, params: Tensor, split: SplitName, key: int, step: int, backend: str = "cpu"
) -> tuple[float, Tensor]:
    """Loss of minibatch ``step`` of a stream, and its gradient.

    Args:
        params: ``[num_params]``, as in :func:`start`.
        backend: whose engine computes it.
    """
    if params.shape != (problem.num_params,):
        raise ValueError(f"params: expected shape ({problem.num_params},), got {tuple(params.shape)}")
    module, device = module_of(backend), device_of(backend)
    params = params.to(device, torch.float32).contiguous()
    loss, grad = torch.empty(1, device=device), torch.empty(problem.num_params, device=device)
    table, host = Table(problem.record(device), device), problem.record()
    index, stream = stream_of(device)
    scratch = torch.empty(module.unroll_scratch(backend, 0, host.ctypes.data, 1, index), device=device)
    place = SPLITS.index(split), key, step
    addresses = params.data_ptr(), loss.data_ptr(), grad.data_ptr(), scratch.data_ptr()
    module.loss_and_gradient(backend, table.address, host.ctypes.data, *place, *addresses, index, stream)
    return float(loss), grad.cpu()


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
    backend: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Continue runs by ``steps`` steps.

    Args:
        theta: ``[n, P]`` float32, one row per perturbation.
        valid_every: steps between the validation losses the optimizer sees, the first before step 0; 0 for none.
        valid_batches: ``inner_valid`` minibatches that such a loss is the mean over.
        loss_every: steps between ``outer_valid`` losses; a divisor of ``steps``.
        num_threads: of the CPU.
        backend: whose engine runs them, on :func:`device_of` it: ``cpu``; ``cuda``, all runs at once, a block for
            each; or ``sim``, that of CUDA on the CPU, for tests. They give the same numbers but for rounding, and
            continue each other's runs.

    Returns:
        ``outer_valid`` losses after the update ``[runs, steps / loss_every]`` and train losses before the update
        ``[runs, steps]``, on the CPU; NaN from where a run diverged.

    Raises:
        ValueError: an argument is out of range, or a state is not on the device.
        RuntimeError: see :func:`device_of`; or a network has numbers that the engine of a GPU cannot count.
    """
    if valid_every < 0 or valid_batches < 1:
        raise ValueError(
            f"valid_every, valid_batches: expected at least 0 and 1, got {valid_every} and {valid_batches}"
        )
    if steps < 1 or steps % loss_every:
        raise ValueError(f"steps: expected a positive multiple of loss_every={loss_every}, got {steps}")
    module, device = module_of(backend), device_of(backend)
    theta = theta.to(device, torch.float32).contiguous()
    if theta.dim() != 2 or theta.shape[1] != spec.num_floats:
        raise ValueError(f"theta: expected shape [n, {spec.num_floats}], got {tuple(theta.shape)}")
    for i, run in enumerate(runs):
        if not (0 <= run.problem < len(problems) and 0 <= run.theta < len(theta)):
            raise ValueError(f"runs[{i}]: problem {run.problem} or theta {run.theta} out of range")
        if run.state.device != device:
            raise ValueError(f"runs[{i}]: expected a state on {device}, where {backend!r} runs, got {run.state.device}")
    outer = torch.empty(len(runs), steps // loss_every, device=device)
    train = torch.empty(len(runs), steps, device=device)
    host_problems = np.stack([problem.record() for problem in problems])
    problem_table = Table(np.stack([problem.record(device) for problem in problems]), device)
    host_runs = np.zeros(len(runs), RUN)
    for i, run in enumerate(runs):
        row = host_runs[i]
        row["problem"], row["theta"], row["state"] = run.problem, run.theta, run.state.data_ptr()
        row["keys"] = run.keys
        row["total_steps"], row["averaged"] = run.total_steps, run.averaged
        row["outer_losses"], row["train_losses"] = outer[i].data_ptr(), train[i].data_ptr()
    host_runs["steps"], host_runs["loss_every"] = steps, loss_every
    host_runs["valid_every"], host_runs["valid_batches"] = valid_every, valid_batches
    run_table, record = Table(host_runs, device), spec_record(spec)
    index, stream = stream_of(device)
    stride = module.unroll_scratch(backend, record.ctypes.data, host_problems.ctypes.data, len(problems), index)
    scratch = torch.empty(len(runs), max(0, stride), device=device)
    module.unroll(
        backend,
        record.ctypes.data,
        problem_table.address,
        host_problems.ctypes.data,
        run_table.address,
        host_runs.ctypes.data,
        len(runs),
        theta.data_ptr(),
        spec.num_floats,
        scratch.data_ptr(),
        stride,
        num_threads,
        index,
        stream,
    )
    return outer.cpu(), train.cpu()
