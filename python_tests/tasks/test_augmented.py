"""lopt/tasks/augmented.py: the same task in other units, and gradients with noise, against what they should be."""

import dataclasses
import json
from itertools import islice
from typing import Any

import pytest
import torch

from lopt.tasks import sample_task, task_from_config
from lopt.tasks.augmented import AugmentedTask, Level, NoisyGradientBatch
from lopt.tasks.families import with_batch_share, with_batch_size
from lopt.tasks.perceptrons import MLP
from lopt.tasks.task import Task

INNER = sample_task(3, ["mlp"])


def gradients(task: Task, params: Any, batch: Any) -> Any:
    return torch.func.grad_and_value(task.loss)(params, batch)


@pytest.mark.parametrize("level", ["global", "tensor", "parameter"])
def test_reparametrisation_is_the_same_task_in_other_units(level: Level) -> None:
    """At ``x / s`` the loss is that of the task at ``x``, and its gradient s times as large."""
    task = AugmentedTask(task=INNER, seed=4, reparametrise=level, decades=2.0)
    params, scaled, batch = INNER.init(1), task.init(1), next(task.batches(1, "train"))
    grads, loss = gradients(INNER, params, batch)
    found, same = gradients(task, scaled, batch)
    assert float(same) == pytest.approx(float(loss), rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(scaled[name] * task.scales[name], params[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            found[name], grad * task.scales[name], rtol=1e-3, atol=1e-5 * float(found[name].max())
        )
    logs = torch.cat([task.scales[name].expand(x.shape).reshape(-1) for name, x in params.items()]).log10()
    distinct = {"global": 1, "tensor": len(params), "parameter": INNER.num_params}[level]
    assert len(logs.unique()) == pytest.approx(distinct, rel=0.01)
    assert float(logs.abs().max()) <= 2.0
    if level == "parameter":  # uniform in the exponent
        assert float(logs.std()) == pytest.approx(2.0 / 3.0**0.5 * 1.0, rel=0.05)
        assert float(logs.mean()) == pytest.approx(0.0, abs=0.1)
    assert task.initial_loss(0) == pytest.approx(INNER.initial_loss(0), rel=1e-5)


def test_gradient_noise_is_in_the_gradient_and_not_in_the_loss() -> None:
    task = AugmentedTask(task=INNER, gradient_noise=0.5)
    params = task.init(0)
    batches, clean_batches = task.batches(0, "train"), INNER.batches(0, "train")
    grads, _ = gradients(INNER, INNER.init(0), next(INNER.batches(0, "train")))
    noises: dict[str, list[torch.Tensor]] = {name: [] for name in params}
    for _ in range(8):
        batch, clean = next(batches), next(clean_batches)
        assert isinstance(batch, NoisyGradientBatch)
        assert torch.equal(batch.batch.inputs, clean.inputs)
        noisy, loss = gradients(task, params, batch)
        exact, expected = gradients(INNER, params, clean)
        assert float(loss) == float(expected)
        for name, value in noisy.items():
            noises[name].append(value - exact[name])
    for name, values in noises.items():
        noise = torch.stack(values)
        deviation = 0.5 * float(grads[name].square().mean().sqrt())
        assert float(noise.std()) == pytest.approx(deviation, rel=4 / (2 * noise.numel()) ** 0.5 + 1e-3)
        assert abs(float(noise.mean())) < 4.5 * deviation / noise.numel() ** 0.5
    assert float((noises["w0"][0] - noises["w0"][1]).abs().max()) > 0.0


def test_noise_is_that_of_the_place_in_the_stream_and_only_in_training() -> None:
    task = AugmentedTask(task=INNER, gradient_noise=0.1)
    third = list(islice(task.batches(5, "train"), 3))[2]
    assert torch.equal(next(task.batches(5, "train", 2)).noise, third.noise)
    assert not torch.equal(next(task.batches(6, "train", 2)).noise, third.noise)
    assert not isinstance(next(task.batches(5, "outer_valid")), NoisyGradientBatch)


def test_vmap_gives_every_run_the_same_noise() -> None:
    task = AugmentedTask(task=INNER, seed=1, reparametrise="tensor", gradient_noise=1.0)
    params = {name: torch.stack([x, 2 * x]) for name, x in task.init(0).items()}
    batch = next(task.batches(0, "train"))
    both, _ = torch.vmap(torch.func.grad_and_value(task.loss), in_dims=(0, None))(params, batch)
    second, _ = gradients(task, {name: x[1] for name, x in params.items()}, batch)
    for name, value in second.items():
        torch.testing.assert_close(both[name][1], value, rtol=1e-4, atol=1e-6)


def test_configs_sizes_and_names() -> None:
    task = AugmentedTask(task=INNER, seed=9, reparametrise="tensor", decades=3.0, gradient_noise=0.2)
    assert task_from_config(json.loads(json.dumps(task.config))) == task
    assert task.name == f"{INNER.name}+tensor-scale+noise"
    assert (task.num_params, task.loss_floor) == (INNER.num_params, 0.0)
    small = with_batch_size(task, 5)
    assert next(small.batches(0, "train")).batch.inputs.shape[0] == 5
    assert isinstance(INNER, MLP)
    half = with_batch_share(INNER, 0.5)
    assert half == dataclasses.replace(
        INNER, data=dataclasses.replace(INNER.data, batch_size=INNER.data.batch_size // 2)
    )
    assert next(with_batch_share(INNER, 1e-9).batches(0, "train")).inputs.shape[0] == 1


@pytest.mark.parametrize("fields", [{"reparametrise": "layer"}, {"decades": -1.0}, {"gradient_noise": -0.1}])
def test_bad_values_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        AugmentedTask(task=INNER, **fields)
