"""What the tests of LearnedOptimizer share: a theta without zeros, tensors of all ranks, comparisons by bits."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lopt.optimizer import LearnedOptimizer
from lopt.rule import Theta, reference

IMPLS = ("cpu", "sim", "reference")
PRESETS = ("compact", "spectral", "paper")
SHAPES = ((), (5,), (129, 3), (2, 3, 4), (3, 2, 3, 3), (2, 1, 3, 2, 2))  # ranks 0 to 5


@functools.cache
def make_theta(preset: str = "compact") -> Theta:
    """Random meta-parameters, none of them zero, so that every input matters; the steps are large enough to be seen."""
    theta = Theta.init(preset, seed=1)
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in theta.tensors.items()
    }
    return Theta(theta.spec, tensors, theta.provenance).with_spec(step_multiplier=0.02)


def make_params(shapes: Iterable[Sequence[int]] = SHAPES, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(0.3 * torch.randn(tuple(shape), generator=generator)) for shape in shapes]


def copies(params: Iterable[Tensor]) -> list[Parameter]:
    return [Parameter(param.detach().clone()) for param in params]


def make_optimizer(params: Any, impl: str = "cpu", preset: str = "compact", **options: Any) -> LearnedOptimizer:
    return LearnedOptimizer(params, make_theta(preset), impl=impl, **options)


def make_grads(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """Gradients that depend on the step and the position only."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(param.shape, generator=generator) for param in params]


def set_grads(params: Sequence[Tensor], step: int) -> None:
    for param, grad in zip(params, make_grads(params, step), strict=True):
        param.grad = grad.to(param.device, param.dtype)


def make_loss(step: int) -> float:
    return 2.0 / (1 + step) + 0.1 * (step % 3)


def run(opt: LearnedOptimizer, params: Sequence[Tensor], steps: int, first: int = 0) -> None:
    """``steps`` steps with the gradients and losses of step ``first`` and later."""
    for step in range(first, first + steps):
        set_grads(params, step)
        opt.step(loss=make_loss(step))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits: NaN equals itself, -0 does not equal 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(a: Any, b: Any, where: str = "value") -> None:
    """Compare two trees of mappings, sequences, tensors and plain values."""
    if isinstance(a, Mapping):
        assert set(a) == set(b), where
        for name in a:
            assert_same_bits(a[name], b[name], f"{where}[{name!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(left, right, f"{where}[{i}]")
    elif isinstance(a, Tensor):
        assert same_bits(a, b), f"{where}: {a} != {b}"
    else:
        assert a == b, f"{where}: {a} != {b}"


def snapshot(opt: LearnedOptimizer) -> Any:
    """A copy of everything a step may change: parameters and state."""
    params = [param for group in opt.param_groups for param in group["params"]]
    return clone_tree({"params": [param.detach() for param in params], **opt.state_dict()})


def clone_tree(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: clone_tree(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clone_tree(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


class Float64:
    """lopt/rule/reference.py in float64, driven by hand; it lets every tensor have its own lr and weight decay."""

    def __init__(self, preset: str, params: Iterable[Tensor]) -> None:
        theta = make_theta(preset)
        self.spec, self.weights = theta.spec, theta.to(dtype=torch.float64).tensors
        self.params = [param.detach().to(torch.float64, copy=True) for param in params]
        self.state = reference.init_state(self.spec, self.weights, self.params)

    def add(self, params: Iterable[Tensor]) -> None:
        new = [param.detach().to(torch.float64, copy=True) for param in params]
        old, fresh = self.state, reference.init_state(self.spec, self.weights, new)
        rows = [torch.cat(pair) for pair in zip(old.rows, fresh.rows, strict=True)]
        self.params += new
        self.state = reference.State(old.globals, type(old.rows)(*rows), old.mom + fresh.mom, old.rms + fresh.rms)

    def step(
        self,
        grads: Iterable[Tensor],
        loss: float | None = None,
        lr: Sequence[float] | float = 1.0,
        weight_decay: Sequence[float] | float = 0.0,
    ) -> None:
        observed = None if loss is None else torch.tensor(loss, dtype=torch.float64)
        grads = [grad.double() for grad in grads]
        rates = [torch.tensor(option, dtype=torch.float64).expand(len(grads)) for option in (lr, weight_decay)]
        update = reference.update(
            self.spec, self.weights, self.state, self.params, grads, observed, lr=rates[0], weight_decay=rates[1]
        )
        self.params, self.state = update.params, update.state

    def observe_valid(self, loss: float) -> None:
        self.state = reference.observe_valid(self.spec, self.state, torch.tensor(loss, dtype=torch.float64))

    def assert_close(self, params: Iterable[Tensor], tolerance: float = 2e-6) -> None:
        for i, (expected, param) in enumerate(zip(self.params, params, strict=True)):
            error = (param.detach().double() - expected).abs().max().item()
            assert error <= tolerance, f"tensor {i} of shape {tuple(param.shape)}: error {error}"
