"""Averages of the iterates: against the recursion in float64, in and out of the parameters, and in state dicts."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lopt import LearnedOptimizer
from lopt.average import DECAY, decay_at


def make(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.nn.Module, LearnedOptimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(dtype)
    return model, LearnedOptimizer(model, **{"average": True, **options})


def train(model: torch.nn.Module, opt: LearnedOptimizer, steps: int, seed: int = 1) -> list[list[Tensor]]:
    """The parameters after every step."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator).to(next(model.parameters()).dtype)
        opt.zero_grad()
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        opt.step(loss=loss)
        found.append([param.detach().clone() for param in model.parameters()])
    return found


def averages_of(iterates: list[list[Tensor]]) -> list[Tensor]:
    """By the formula, in float64."""
    average = [param.double() for param in iterates[0]]
    for k, params in enumerate(iterates[1:], start=1):
        decay = min(DECAY, (k + 1) / (k + 10))
        average = [decay * old + (1 - decay) * new.double() for old, new in zip(average, params, strict=True)]
    return average


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_the_recursion_over_the_iterates(impl: str, dtype: torch.dtype) -> None:
    model, opt = make(dtype, impl=impl)
    expected = averages_of(train(model, opt, 40))
    for param, value in zip(model.parameters(), expected, strict=True):
        found = opt.state[param]["average"]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-6)


def test_decay_grows_to_its_bound() -> None:
    assert [decay_at(k) for k in (0, 1, 90)] == [0.1, 2 / 11, 0.91]
    assert decay_at(4480) < DECAY == decay_at(4500) == decay_at(10**6)


def test_does_not_change_the_run() -> None:
    with_, without = (train(*make(average=average), 10) for average in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(with_[-1], without[-1], strict=True))


def test_in_place_of_the_parameters_and_back_bit_for_bit() -> None:
    model, opt = make()
    before = train(model, opt, 12)[-1]
    with opt.averaged():
        for param in model.parameters():
            assert torch.equal(param, opt.state[param]["average"])
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
    with pytest.raises(KeyError), opt.averaged():
        raise KeyError("evaluation failed")
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))


def test_a_parameter_without_an_average_stays() -> None:
    """As one that never had a gradient."""
    model, opt = make()
    frozen = torch.nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [frozen]})
    train(model, opt, 3)
    with opt.averaged():
        assert torch.equal(frozen, torch.ones(2))
    assert "average" not in opt.state[frozen]


def test_state_dicts_hold_it() -> None:
    model, opt = make()
    train(model, opt, 7)
    other_model, other = make()
    other_model.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for a, b in ((model, opt), (other_model, other)):
        train(a, b, 6, seed=2)
    for ours, theirs in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(opt.state[ours]["average"], other.state[theirs]["average"])
    assert other.param_groups[0]["averaged_steps"] == 13


def test_what_cannot_be_done_is_said() -> None:
    model, opt = make(average=False)
    with pytest.raises(RuntimeError, match=r"averaged: no averages are kept; write LearnedOptimizer\(..., average"):
        opt.averaged().__enter__()
    model, opt = make()
    train(model, opt, 1)
    with opt.averaged():
        with pytest.raises(RuntimeError, match=r"step: inside averaged\(\)"):
            opt.step()
        with pytest.raises(RuntimeError, match="already inside"):
            opt.averaged().__enter__()
