"""What the tests of the kernels share: problems, their exact solutions, and running a back end on them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lopt import kernels
from lopt.kernels.structs import APPLY_INPUTS
from lopt.rule import PRESETS, ThetaSpec, reference
from lopt.rule.features import STATS
from lopt.rule.tensor_lstm import Conditioning

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

SIZES = ((1,), (31,), (129,), (1134,), (8191,), (8192,), (8193,))
RANKS = ((), (7,), (5, 4), (3, 3, 2), (3, 3, 2, 4), (2, 3, 5, 4, 3))
MIXED = (*RANKS, *SIZES)
SHORT = ((), (31,), (3, 43), (8193,))
LONG = ((70_001,), (3,))
WINDOWS = ((128,), (5, 4), (1152,), (8196,), (2, 10_000))  # in fours and in windows of 128, and a few beyond


@dataclass(frozen=True)
class Backend:
    """A back end as ``lopt.kernels.Plan`` names it, and where its tensors live."""

    name: str
    device: torch.device


@dataclass(frozen=True)
class Problem:
    """Inputs of both operations for one list of tensors; ``mom`` and ``rms`` serve each of them as they are."""

    spec: ThetaSpec
    weights: dict[str, Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    mom: list[Tensor]
    rms: list[Tensor]
    clip_limit: Tensor  # [T]
    conditioning: Conditioning
    bias: Tensor  # [T, width] first layer, constant inputs folded in
    step_size: Tensor  # [T]
    keep: Tensor  # [T]
    scales: list[Tensor] | None = None  # of accumulators in 8 bits

    def select(self, index: list[int]) -> "Problem":
        """The same problem for some of its tensors."""
        lists = {name: [getattr(self, name)[t] for t in index] for name in ("params", "grads", "mom", "rms")}
        rows = {name: getattr(self, name)[index] for name in ("clip_limit", "bias", "step_size", "keep")}
        conditioning = Conditioning(*(value[index] for value in self.conditioning))
        return dataclasses.replace(self, **lists, **rows, conditioning=conditioning)


def fold_bias(spec: ThetaSpec, weights: Mapping[str, Tensor], constant: Tensor) -> Tensor:
    """First-layer bias ``[T, width]`` with the inputs ``constant`` ``[T, num_constant]`` folded in."""
    return constant @ weights["mlp.w1"][len(spec.features.columns) :] + weights["mlp.b1"]


def feedback_of(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Mean MLP outputs for the LSTM ``[T, from_mlp]`` from the mean hidden vector ``[T, width]``."""
    return hidden @ weights["mlp.w3"][:, 2:] + weights["mlp.b3"][2:]


def flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """One dimension, in ``dtype``."""
    return x.reshape(-1).to(dtype)


def spec_of(feature_set: str, width: int, layers: int = 2) -> ThetaSpec:
    """A spec in which the magnitude output matters."""
    spec = PRESETS.get(feature_set) or ThetaSpec(feature_set, tensor_inputs="paper", horizon_input=False)
    return dataclasses.replace(spec, mlp_width=width, magnitude_rate=1.0, mlp_layers=layers)


def random_weights(spec: ThetaSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Random values for every tensor of theta, biases and skip included."""
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[0] if shape else 1)
        for name, shape in spec.shapes().items()
    }


TINY = [0.0, -0.0, 1e-45, -1e-40, 1e-30, -1e-10, 1.0]


def pick(values: list[float], shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A tensor of random elements of ``values``."""
    return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]


def random_problem(
    feature_set: str,
    width: int,
    shapes: Sequence[tuple[int, ...]],
    param_dtype: torch.dtype = F32,
    grad_dtype: torch.dtype = F32,
    extreme: bool = False,
    layers: int = 2,
) -> Problem:
    """Tensors of different scales, gradients over three orders of magnitude and partly clipped, column maps as in use.

    ``extreme``: values are picked from tables of zeros, subnormal, tiny and huge numbers instead.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def powers(low: float, high: float, *shape: int) -> Tensor:
        return 10 ** (low + (high - low) * torch.rand(shape, generator=generator))

    spec = spec_of(feature_set, width, layers)
    weights = random_weights(spec, generator)
    params = [((normal(*shape) + 0.3) * powers(-1, 1)).to(param_dtype) for shape in shapes]
    grads = [(normal(*shape) * powers(-2, 1, *shape)).to(grad_dtype) for shape in shapes]
    mom = [0.1 * normal(len(spec.mom_decays), param.numel()) for param in params]
    rms = [powers(-4, 0, len(spec.rms_decays), param.numel()) for param in params]
    if extreme:
        params = [pick([*TINY, 1e15, -1e15], param.shape, generator) for param in params]
        grads = [pick([*TINY, 1e30, -1e30, 3e38], grad.shape, generator) for grad in grads]
        mom = [pick(TINY, m.shape, generator) for m in mom]
        rms = [pick([0.0, 1e-45, 1e-30, 1e-10, 1.0, 100.0], r.shape, generator) for r in rms]
    count = len(shapes)
    clip_limit = 1.0 + torch.rand(count, generator=generator)
    stats = torch.stack(
        [
            reference.accumulate(
                spec, flat(param, torch.float64), flat(grad, torch.float64), m.double(), r.double(), limit
            )[3]
            for param, grad, m, r, limit in zip(params, grads, mom, rms, clip_limit.double(), strict=True)
        ]
    )
    decays = torch.tensor(spec.mom_decays + spec.rms_decays, dtype=torch.float64)
    scale, shift = spec.features.column_map(stats, torch.full((count,), 7.0, dtype=torch.float64), decays)
    constant = normal(count, spec.num_constant)
    return Problem(
        spec,
        weights,
        params,
        grads,
        mom,
        rms,
        clip_limit,
        Conditioning(scale.float(), shift.float(), constant, torch.ones(count), torch.zeros(count)),
        fold_bias(spec, weights, constant),
        step_size=0.1 * torch.rand(count, generator=generator),
        keep=1.0 - 0.1 * torch.rand(count, generator=generator),
    )


@dataclass(frozen=True)
class Accumulated:
    """Results of ``accumulate``."""

    mom: list[Tensor]
    rms: list[Tensor]
    stats: Tensor


@dataclass(frozen=True)
class Applied:
    """Results of ``apply``, parameters not rounded to their dtype."""

    params: list[Tensor]
    hidden: Tensor


def solve_accumulate(problem: Problem, dtype: torch.dtype) -> Accumulated:
    """By lopt/rule/reference.py in ``dtype``."""
    operands = zip(problem.params, problem.grads, problem.mom, problem.rms, problem.clip_limit, strict=True)
    rows = [
        reference.accumulate(problem.spec, flat(param, dtype), flat(grad, dtype), *(x.to(dtype) for x in rest))
        for param, grad, *rest in operands
    ]
    _, mom, rms, stats = zip(*rows, strict=True)
    return Accumulated(list(mom), list(rms), torch.stack(stats))


def solve_apply(problem: Problem, dtype: torch.dtype) -> Applied:
    """By lopt/rule/reference.py in ``dtype``; the last hidden layer from its MLP inputs."""
    weights = {name: value.to(dtype) for name, value in problem.weights.items()}
    params, hidden = [], []
    for t in range(len(problem.params)):
        limit, step_size, keep = (x[t].to(dtype) for x in (problem.clip_limit, problem.step_size, problem.keep))
        param = flat(problem.params[t], dtype)
        direction, _, x, _ = reference.apply(
            problem.spec,
            weights,
            param,
            reference.clip_gradient(flat(problem.grads[t], dtype), limit),
            problem.mom[t].to(dtype),
            problem.rms[t].to(dtype),
            Conditioning(*(value[t].to(dtype) for value in problem.conditioning)),
        )
        params.append(reference.write(param, direction, step_size, keep))
        layer = torch.relu(x @ weights["mlp.w1"] + weights["mlp.b1"])
        if problem.spec.mlp_layers == 2:
            layer = torch.relu(layer @ weights["mlp.w2"] + weights["mlp.b2"])
        hidden.append(layer.mean(dim=0))
    return Applied(params, torch.stack(hidden))


def stats_scale(problem: Problem, exact: Accumulated) -> Tensor:
    """``[T, S]`` size of what is added up to make each statistic.

    Sums, means and moments: the same statistic of absolute values, where nothing cancels. Variances: sd * root mean
    square, their condition (Chan and Lewis 1979). The mean square of a logarithm: plus one, because rounding the
    argument moves a logarithm by one ulp of 1, however near to 0 it is.
    """
    positive = {name: [x.abs() for x in getattr(problem, name)] for name in ("params", "grads", "mom")}
    scale = solve_accumulate(dataclasses.replace(problem, **positive), torch.float64).stats
    for name in ("param", "mom", "rms"):
        mean, var = STATS.index(f"{name}_mean"), STATS.index(f"{name}_var")
        scale[:, var] = torch.sqrt(exact.stats[:, var] * (scale[:, var] + scale[:, mean] ** 2))
    for i, name in enumerate(problem.spec.features.moments):
        if name == "log_param_squared":
            scale[:, len(STATS) + i] += 1.0
    return scale


# Computed once for all back ends.
problem_of = cache(random_problem)
accumulated_of = cache(lambda dtype, *key: solve_accumulate(problem_of(*key), dtype))
applied_of = cache(lambda dtype, *key: solve_apply(problem_of(*key), dtype))
stats_scale_of = cache(lambda *key: stats_scale(problem_of(*key), accumulated_of(torch.float64, *key)))


# ---- Running a kernel -----------------------------------------------------------------------------------------------

GUARD = 3  # elements before and after every tensor, an odd number: addresses are as unaligned as they may be
ALIGNED = 4  # the same for addresses that allow the widest accesses


def sentinel(dtype: torch.dtype) -> float:
    """What lies there."""
    return 77.0 if dtype == torch.uint8 else -77.0


@dataclass
class Run:
    """One plan over guarded copies of a problem's tensors; those called ``unaligned`` lie as with ``guard=GUARD``."""

    problem: Problem
    backend: Backend
    theta_index: Sequence[int] | None = None
    guard: int = GUARD
    precision: str = "high"
    unaligned: Sequence[str] = ()

    def __post_init__(self) -> None:
        problem = self.problem
        self.buffers: list[tuple[Tensor, int]] = []
        self.params = self._guarded("params")
        self.grads = self._guarded("grads")
        self.mom = self._guarded("mom")
        self.rms = self._guarded("rms")
        self.scales = None if problem.scales is None else self._guarded("scales")
        name, spec = self.backend.name, problem.spec
        state = self.params, self.mom, self.rms
        self.plan = kernels.Plan(
            name,
            spec.feature_set,
            *state,
            self.theta_index,
            self.precision,
            width=spec.mlp_width,
            layers=spec.mlp_layers,
            scales=self.scales,
        )
        self.plan.set_tensors(self.params, self.grads)

    def _guarded(self, name: str) -> list[Tensor]:
        guard, tensors = GUARD if name in self.unaligned else self.guard, []
        for x in getattr(self.problem, name):
            buffer = torch.full((x.numel() + 2 * guard,), sentinel(x.dtype), dtype=x.dtype)
            buffer[guard:-guard] = x.reshape(-1)
            self.buffers.append((buffer.to(self.backend.device), guard))
            tensors.append(self.buffers[-1][0][guard:-guard].view(x.shape))
        return tensors

    def accumulate(self) -> Tensor:
        return self.plan.accumulate(self.problem.clip_limit.to(self.backend.device)).cpu()

    def operands(self, weights: Tensor | None = None) -> tuple[Any, ...]:
        """Of ``apply``."""
        problem, spec = self.problem, self.problem.spec
        weights = kernels.pack_mlp(spec, problem.weights)[None] if weights is None else weights
        scale, shift, gate = problem.conditioning.scale, problem.conditioning.shift, problem.conditioning.gate
        rows = problem.clip_limit, scale, shift, problem.bias, problem.step_size, problem.keep, gate
        inputs = {name: x.to(self.backend.device) for name, x in zip(APPLY_INPUTS, rows, strict=True)}
        return inputs, weights.to(self.backend.device), spec.magnitude_rate, spec.feature_clip

    def apply(self, weights: Tensor | None = None) -> Tensor:
        return self.plan.apply(*self.operands(weights)).cpu()

    def check_guards(self) -> None:
        for buffer, guard in self.buffers:
            edges = torch.cat([buffer[:guard], buffer[-guard:]]).float().cpu()
            assert torch.equal(edges, torch.full_like(edges, sentinel(buffer.dtype))), "written outside of a tensor"


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether all bits are the same."""
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(first, second, strict=True))


def outputs(run: Run) -> list[Tensor]:
    """Everything that both operations write, in sequence."""
    stats = run.accumulate()
    hidden = run.apply()
    return [stats, hidden, *(x.cpu() for x in (*run.params, *run.mom, *run.rms))]
