"""``ThetaSpec(mlp_layers=1)``: one hidden layer, in the reference by hand, in files, and as two layers of which the
second changes nothing.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lopt import PRESETS, LearnedOptimizer, Theta, ThetaSpec
from lopt.benchmark.traffic import learned
from lopt.rule import reference
from lopt.rule.tensor_lstm import Conditioning

F64 = torch.float64
ONE = dataclasses.replace(PRESETS["compact"], mlp_layers=1)


def test_shapes_and_files(tmp_path: Path) -> None:
    two, one = PRESETS["compact"].shapes(), ONE.shapes()
    assert {name: two[name] for name in two if name not in ("mlp.w2", "mlp.b2")} == one
    assert PRESETS["compact"].num_floats - ONE.num_floats == 8 * 8 + 8
    assert learned("", PRESETS["compact"]).flops - learned("", ONE).flops == 2 * 8 * 8
    theta = Theta.init(ONE, seed=3)
    theta.save(tmp_path / "one.safetensors")
    again = Theta.load(tmp_path / "one.safetensors")
    assert again.spec == ONE
    assert torch.equal(again.flatten(), theta.flatten())
    # Files of two layers are what they were before there was one.
    assert "mlp_layers" not in PRESETS["compact"].to_json()
    assert ThetaSpec.from_json(PRESETS["compact"].to_json()) == PRESETS["compact"]


@pytest.mark.parametrize("layers", [0, 3])
def test_other_numbers(layers: int) -> None:
    with pytest.raises(ValueError, match=f"mlp_layers: expected 1 or 2 hidden layers, got {layers}"):
        ThetaSpec(mlp_layers=layers)


def test_by_hand() -> None:
    """Of three parameters, from weights and columns in plain sums."""
    spec = dataclasses.replace(ONE, magnitude_rate=0.5)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    weights = {name: normal(*shape) for name, shape in spec.shapes().items()}
    param, grad, mom, rms = normal(3), normal(3), normal(3, 3), normal(2, 3).square() + 0.1
    columns, constant = len(spec.features.columns), normal(spec.num_constant)
    conditioning = Conditioning(normal(columns), normal(columns), constant, torch.ones((), dtype=F64), torch.zeros(()))
    direction, feedback, x, out = reference.apply(spec, weights, param, grad, mom, rms, conditioning)
    for i in range(3):
        hidden = [
            max(0.0, float(weights["mlp.b1"][j] + sum(x[i, c] * weights["mlp.w1"][c, j] for c in range(x.shape[1]))))
            for j in range(8)
        ]
        outputs = [
            float(weights["mlp.b3"][o] + sum(h * weights["mlp.w3"][j, o] for j, h in enumerate(hidden)))
            for o in range(2 + spec.from_mlp)
        ]
        assert out[i].tolist() == pytest.approx(outputs, rel=1e-12)
        skip = float(x[i, :columns] @ weights["skip"])
        expected = (outputs[0] + skip) * float(torch.exp(torch.tensor(0.5 * outputs[1], dtype=F64)))
        assert float(direction[i]) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(feedback, out[:, 2:].mean(dim=0))


def test_a_second_layer_that_changes_nothing() -> None:
    """Hidden units are not negative: with the identity after them, two layers are one, in float64 over four steps."""
    one = Theta.init(ONE, seed=1).to(dtype=F64)
    identity = {"mlp.w2": torch.eye(8, dtype=F64), "mlp.b2": torch.zeros(8, dtype=F64)}
    two = Theta(PRESETS["compact"], {**one.tensors, **identity})
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(12, 5, generator=generator, dtype=F64)
    grads, ends = [torch.randn(12, 5, generator=generator, dtype=F64) for _ in range(4)], []
    for theta in (one, two):
        params = [start.clone()]
        state = reference.init_state(theta.spec, theta.tensors, params)
        for grad in grads:
            params, state, _ = reference.update(theta.spec, theta.tensors, state, params, [grad])
        ends.append(params[0])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ends[0], start)


def test_adam_of_one_layer() -> None:
    """The first step of ``init_adam`` of ``paper``, whose hidden units carry a column, is that of two layers."""
    ends = []
    for layers in (1, 2):
        theta = Theta.init_adam(dataclasses.replace(PRESETS["paper"], mlp_layers=layers))
        param = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 50))
        param.grad = torch.linspace(2.0, -1.0, 50)
        LearnedOptimizer([param], theta=theta, impl="reference").step()
        ends.append(param.detach())
    torch.testing.assert_close(*ends)
