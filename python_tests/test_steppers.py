"""Tensors whose gradients come and go: steps are those of the reference, tables are kept."""

from typing import Any

import pytest
import torch
from optimizer_cases import copies, make_theta

from lopt import LearnedOptimizer
from lopt.kernels import Plan
from lopt.rule import PRESETS, reference
from lopt.rule.inputs import Shapes

SHAPES = ((), (3,), (4, 3), (2, 3, 2), (129,))
ACTIVE = ((0, 1, 2, 3, 4), (0, 2), (1, 2, 4), (3,), (0, 1, 2, 3, 4), (0, 2))


def problem(seed: int = 0) -> tuple[list[Any], list[list[torch.Tensor]]]:
    """Parameters, and gradients of every step."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    grads = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in ACTIVE]
    return params, grads


def take_step(
    opt: LearnedOptimizer, params: list[Any], grads: list[torch.Tensor], active: tuple[int, ...], loss: float = 0.5
) -> None:
    for i, param in enumerate(params):
        param.grad = grads[i].clone().to(param.dtype) if i in active else None
    opt.step(loss=loss)


def expected(preset: str) -> list[torch.Tensor]:
    """By lopt.rule.reference over the tensors of each step alone, in float64."""
    theta = make_theta(preset).to(dtype=torch.float64)
    spec, weights = theta.spec, theta.tensors
    params, grads = problem()
    values = [param.detach().double() for param in params]
    state = reference.init_state(spec, weights, values)
    shapes = Shapes.of(spec, SHAPES, weights["initial_h"])  # what a tensor is, all of them tell
    for step, (given, active) in enumerate(zip(grads, ACTIVE, strict=True)):
        index = torch.tensor(active)
        rows = type(state.rows)(*(value[index] for value in state.rows))
        part = reference.State(state.globals, rows, [state.mom[i] for i in active], [state.rms[i] for i in active])
        own = [values[i] for i in active], [given[i].double() for i in active]
        new, part, _ = reference.update(
            spec, weights, part, *own, torch.tensor(0.5**step), shapes=shapes.of_rows(active)
        )
        for old, value in zip(state.rows, part.rows, strict=True):
            old.index_copy_(0, index, value)
        for k, i in enumerate(active):
            values[i], state.mom[i], state.rms[i] = new[k], part.mom[k], part.rms[k]
        state = state._replace(globals=part.globals)
    return values


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("impl", ["cpu", "sim", "reference"])
def test_steps_are_those_of_the_tensors_that_have_gradients(impl: str, preset: str) -> None:
    """What has no gradient keeps its state, and does not count in what tensors share."""
    params, grads = problem()
    opt = LearnedOptimizer(params, make_theta(preset), impl=impl)
    for step, (given, active) in enumerate(zip(grads, ACTIVE, strict=True)):
        take_step(opt, params, given, active, 0.5**step)
    for param, value in zip(params, expected(preset), strict=True):
        torch.testing.assert_close(param.detach().double(), value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("impl", ["cpu", "sim"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_rows_do_not_depend_on_what_else_is_there(impl: str, state_dtype: torch.dtype) -> None:
    """The same bits as of an optimizer over only those tensors that ever have a gradient."""
    params, grads = problem()
    first, second = params[:3], copies(params[:3])
    opt = LearnedOptimizer([*first, *params[3:]], make_theta("compact"), impl=impl, state_dtype=state_dtype)
    alone = LearnedOptimizer(second, make_theta("compact"), impl=impl, state_dtype=state_dtype)
    for given in grads:
        take_step(opt, [*first, *params[3:]], given, (0, 1, 2))
        take_step(alone, second, given[:3], (0, 1, 2))
    assert len(opt.state) == 3
    for param, other in zip(first, second, strict=True):
        assert torch.equal(param, other)
        assert torch.equal(opt.state[param]["mom"], alone.state[other]["mom"])


def test_state_comes_with_the_first_gradient() -> None:
    params, grads = problem()
    opt = LearnedOptimizer(params, make_theta("compact"))
    take_step(opt, params, grads[0], (0, 2))
    assert set(opt.state) == {params[0], params[2]}
    take_step(opt, params, grads[1], (2, 4))
    assert set(opt.state) == {params[0], params[2], params[4]}
    assert [int(opt.state[params[i]]["lstm"]["updates"]) for i in (0, 2, 4)] == [1, 2, 1]


def test_tables_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tensors have gradients: as experts of a mixture do."""
    made = []
    original = Plan.__init__

    def count(self: Plan, *args: Any, **kwargs: Any) -> None:
        made.append(1)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Plan, "__init__", count)
    params, grads = problem()
    opt = LearnedOptimizer(params, make_theta("compact"))
    for given, active in zip(grads * 2, ACTIVE * 2, strict=True):
        take_step(opt, params, given, active)
    assert len(made) == 1
