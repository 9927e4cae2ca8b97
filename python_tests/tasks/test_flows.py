"""Flows are densities: they integrate to 1, and a step's log scales are the Jacobian's."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from lopt.tasks.flows import MAF, Flow, RealNVP
from lopt.tasks.image_tasks import ImageData
from lopt.tasks.pieces import Initialiser
from lopt.tasks.task import NoisyBatch

DATA = ImageData(name="mixture", variant=1, batch_size=4)


class TwoColumns(ImageData):
    """A table of two columns, or of ``columns``."""

    columns = 2

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, 1, self.columns)


class FiveColumns(TwoColumns):
    columns = 5


def flow(kind: type[Flow], data: ImageData, steps: int, gain: float = 1.0) -> tuple[Flow, dict[str, Tensor]]:
    fields: dict[str, Any] = {"data": data, "hidden": (16, 8), "steps": steps, "activation": "tanh"}
    task = kind(**fields, initialiser=Initialiser("glorot_normal"))
    return task, {name: gain * value.double() for name, value in task.init(1).items()}


@pytest.mark.parametrize("kind", [RealNVP, MAF])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_flow_integrates_to_one(kind: type[Flow], steps: int) -> None:
    task, params = flow(kind, TwoColumns("mixture"), steps)
    if kind is MAF:
        task.__dict__["masks"] = [mask.double() for mask in task.masks]  # type: ignore[attr-defined]
    line = torch.linspace(-12, 12, 600, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    total = torch.exp(task.log_density(params, grid)).sum() * (line[1] - line[0]) ** 2
    assert float(total) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("kind", [RealNVP, MAF])
def test_log_scales_are_the_logarithm_of_the_jacobian(kind: type[Flow]) -> None:
    task, params = flow(kind, FiveColumns("mixture"), 1, gain=1.5)
    if kind is MAF:
        task.__dict__["masks"] = [mask.double() for mask in task.masks]  # type: ignore[attr-defined]
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[None]
    jacobian = torch.func.jacrev(lambda row: task.step(params, 0, row[None])[0][0])(x[0])
    _, log_scale = task.step(params, 0, x)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, -log_scale[0])
    if kind is MAF:
        assert float(jacobian.triu(1).abs().max()) == 0.0  # output i sees inputs before i only
        assert bool((jacobian != 0).tril(-1).sum() == 10)  # and all of them


def test_loss_is_the_mean_over_noisy_images() -> None:
    task, params = flow(RealNVP, DATA, 2)
    batch = next(task.batches(0, "train"))
    assert isinstance(batch, NoisyBatch)
    x = batch.inputs.double().flatten(1) + 0.01 * batch.noise.double()
    expected = -task.log_density(params, x).mean()
    torch.testing.assert_close(task.loss(params, NoisyBatch(*(part.double() for part in batch))), expected)


@pytest.mark.parametrize("kind", [RealNVP, MAF])
def test_log_scales_stay_finite(kind: type[Flow]) -> None:
    task, params = flow(kind, DATA, 4)
    huge = {name: 1e4 * value.float() for name, value in params.items()}
    x = torch.rand(3, DATA.size)
    assert bool(torch.isfinite(task.step(huge, 0, x)[0]).all())
    assert dataclasses.replace(task, steps=2) != task
