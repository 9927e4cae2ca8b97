"""lopt/experiments: closed forms where there are some, and that stopping, repeating and resuming change nothing."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lopt import LearnedOptimizer, Theta
from lopt.meta import checkpoint, es, outer, pairs, trainer
from lopt.meta.config import MetaTrainConfig, Phase
from lopt.meta.executors import Serial
from lopt.meta.pairs import Shared
from lopt.theta import unflatten

#: A meta-training whose outer optimizer is learned; only the tensors of the second phase's group move in it.
SELF = MetaTrainConfig(
    inner_steps=360,
    phases=(Phase(0.5, (10, 10), "all"), Phase(0.5, (10, 10), "mlp")),
    init="random",
    outer="default",
    tasks=("mixture",),
    pairs=3,
    gradient_clip=0.2,
    average=0.0,
    validation_tasks=1,
    validation_horizons=(10,),
)


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


class KilledAt(Serial):
    """Ends in the middle of an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def map(self, function: Any, shared: Any, items: Any) -> Any:
        if shared.iteration == self.iteration:
            raise KeyboardInterrupt
        return super().map(function, shared, items)


def meta_train(out: Path, resume: bool = False, executor: Serial | None = None) -> None:
    trainer.run(SELF, out, resume=resume, executor=executor, console=Console(file=io.StringIO()))


def test_a_learned_outer_optimizer_is_one_stepped_by_hand(tmp_path: Path) -> None:
    """Six iterations: gradients clipped in z, divided by the scale, the mean loss ratio given as both losses."""
    meta_train(tmp_path)
    spec = Theta.init("compact").spec
    params = {name: value.clone().requires_grad_() for name, value in Theta.init("compact", 0).tensors.items()}
    optimizer = LearnedOptimizer(params.values())
    before = {}
    for iteration in range(6):
        phase = iteration // 3
        scale = outer.scales(spec, "prior", SELF.phases[phase].groups)
        theta = torch.cat([value.detach().reshape(-1) for value in params.values()])
        shared = Shared(SELF, spec, theta, scale, phase, 3 * phase, iteration)
        results = [pairs.unroll_pair(shared, (pair, None)) for pair in range(3)]
        eps = torch.stack([pairs.perturbation(SELF, iteration, pair, len(theta)) for pair in range(3)])
        delta = torch.tensor([result.delta for result in results])
        gradient = (es.es_gradient(eps, delta, SELF.sigma) * (scale > 0)).clamp(-0.2, 0.2)
        for (name, value), grad, unit in zip(
            params.items(), unflatten(spec, gradient).values(), unflatten(spec, scale).values(), strict=True
        ):
            before[name] = value.detach().clone()
            value.grad = grad / unit if unit.any() else None
        loss = math.exp(sum(result.meta_loss for result in results) / 3)
        optimizer.observe(valid_loss=loss)
        optimizer.step(loss=loss)
    expected = torch.cat([value.detach().reshape(-1) for value in params.values()])
    assert torch.equal(checkpoint.load(tmp_path / "checkpoint.pt")[2].theta, expected)
    moved = {name for name, value in params.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in params if name.startswith(outer.MLP)}


def test_a_learned_outer_optimizer_resumes_to_the_bit(tmp_path: Path) -> None:
    meta_train(tmp_path / "whole")
    for stop in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            meta_train(tmp_path / f"{stop}", executor=KilledAt(stop))
        meta_train(tmp_path / f"{stop}", resume=True)
        ends = [checkpoint.load(tmp_path / name / "checkpoint.pt")[2].theta for name in ("whole", f"{stop}")]
        assert torch.equal(*ends)
