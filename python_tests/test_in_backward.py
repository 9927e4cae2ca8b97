"""Steps in the backward pass: the same bits as the usual step, with fewer gradients in memory."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import assert_same_bits, make_theta
from torch import Tensor, nn

from lopt import LearnedOptimizer, Theta
from lopt.rule import PRESETS
from lopt.rule.features import STATS

PRESET = pytest.mark.parametrize("preset", PRESETS)


class Net(nn.Module):
    """Tables, a tied head, matrices of one shape and others, large ones, gains, biases, a kernel that is not
    contiguous, a single number, an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 12)
        self.up, self.mid, self.down = nn.Linear(12, 24), nn.Linear(24, 24, bias=False), nn.Linear(24, 12)
        self.again = nn.Linear(24, 24)
        self.wide, self.tall = nn.Linear(12, 300), nn.Linear(300, 12)
        self.norm = nn.LayerNorm(12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.conv.weight = nn.Parameter(self.conv.weight.detach().transpose(1, 2).contiguous().transpose(1, 2))
        self.gain = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.down(self.again(torch.relu(self.mid(torch.relu(self.up(self.norm(x)))))))
        x = x + self.tall(torch.relu(self.wide(x)))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.gain * (x @ self.table.weight.T)  # a parameter that is used twice


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int) -> Tensor:
    return torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = batch(step)
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def lagged(preset: str = "spectral") -> Theta:
    return make_theta(preset).with_spec(stats="lagged")


def pair(preset: str = "spectral", **options: Any) -> list[tuple[nn.Module, LearnedOptimizer]]:
    """Two models with optimizers, alike; of the second one parameters are stepped in the backward pass."""
    found = []
    for _ in range(2):
        model = net()
        found.append((model, LearnedOptimizer(model, lagged(preset), **options)))
    found[1][1].step_in_backward()
    return found


def train(model: nn.Module, opt: LearnedOptimizer, steps: range = range(6)) -> None:
    for step in steps:
        loss = loss_of(model, step)
        opt.zero_grad()
        opt.observe(train_loss=loss)
        if step % 3 == 1:
            opt.observe(valid_loss=1.1 * loss.detach())
        loss.backward()
        opt.step()


def everything(model: nn.Module, opt: LearnedOptimizer) -> Any:
    return {"params": [param.detach() for param in model.parameters()], **opt.state_dict()}


def assert_same(found: list[tuple[nn.Module, LearnedOptimizer]]) -> None:
    (model, opt), (other, in_backward) = found
    assert_same_bits(everything(model, opt), everything(other, in_backward))


# ---- The same steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "sim"])
@PRESET
def test_the_usual_steps_bit_for_bit(preset: str, impl: str) -> None:
    found = pair(preset, impl=impl)
    for model, opt in found:
        train(model, opt, range(4 if impl == "sim" else 8))
    assert_same(found)
    assert all(param.grad is None for param in found[1][0].parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": torch.bfloat16},
        {"state_dtype": torch.int8},
        {"maximize": True},
        {"average": True},
        {"weight_decay": 0.1, "lr": 0.5, "total_steps": 20},
    ],
)
def test_with_options(options: dict[str, Any]) -> None:
    found = pair(**options)
    for model, opt in found:
        train(model, opt)
    assert_same(found)


def test_one_step_moves_each_parameter_before_the_next_gradient() -> None:
    """They are stepped in the backward pass indeed: before step() all have moved, and no gradient is left."""
    (_, _), (model, opt) = pair()
    train(model, opt, range(1))
    before = [param.detach().clone() for param in model.parameters()]
    loss_of(model, 1).backward()
    for old, param in zip(before, model.parameters(), strict=True):
        assert param.grad is None
        assert param.numel() == 0 or not torch.equal(old, param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_half_size_groups_and_schedules(dtype: torch.dtype) -> None:
    found = []
    for in_backward in (False, True):
        model = net().to(dtype)
        params = list(model.parameters())
        groups = [{"params": params[:5], "lr": 0.5}, {"params": params[5:], "weight_decay": 0.1}]
        opt = LearnedOptimizer(groups, lagged())
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (1 + step))
        if in_backward:
            opt.step_in_backward()
        for step in range(5):
            train(model, opt, range(step, step + 1))
            schedule.step()
        found.append((model, opt))
    assert_same(found)


def test_frozen_parameters_and_those_that_come_and_go() -> None:
    """Frozen ones take no part; when they are unfrozen, the first step of theirs is the usual one of all."""
    found = pair()
    for model, opt in found:
        assert isinstance(model, Net)
        model.up.requires_grad_(False)
        train(model, opt, range(3))
        model.up.requires_grad_(True)
        train(model, opt, range(3, 6))
        model.mid.requires_grad_(False)
        train(model, opt, range(6, 8))
    assert_same(found)


def test_gradients_that_came_by_another_way() -> None:
    found = pair()
    for model, opt in found:
        train(model, opt, range(2))
        loss = loss_of(model, 2)
        opt.observe(train_loss=loss)
        opt.zero_grad()
        params = [param for param in model.parameters() if param.numel()]
        grads = torch.autograd.grad(loss, params)
        half = len(grads) // 2
        for param, grad in zip(params[:half], grads[:half], strict=True):
            param.grad = grad
        torch.autograd.backward(params[half:], grads[half:])
        opt.step()
    assert_same(found)


def test_a_closure() -> None:
    """Its loss comes too late; one that it observes does not."""
    found = pair()
    for model, opt in found:
        for step in range(4):

            def closure(model: nn.Module = model, opt: LearnedOptimizer = opt, step: int = step) -> Tensor:
                loss = loss_of(model, step)
                opt.zero_grad()
                opt.observe(train_loss=loss)
                loss.backward()
                return loss

            assert float(opt.step(closure).detach()) > 0
    assert_same(found)


def test_large_matrices_of_one_shape_are_near() -> None:
    """Torch computes the products of one matrix and of several in other orders."""
    results = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(140, 140, bias=False) for _ in range(3)))
        opt = LearnedOptimizer(model, Theta.load("default").with_spec(stats="lagged"))
        if in_backward:
            opt.step_in_backward()
        for step in range(5):
            x = torch.randn(16, 140, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().mean()
            opt.zero_grad()
            opt.observe(train_loss=loss)
            loss.backward()
            opt.step()
        results.append(torch.stack([param.detach() for param in model.parameters()]))
    assert float((results[0] - results[1]).abs().max()) <= 1e-6
    assert not torch.equal(results[0][0], results[0][1])


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_one_gradient_at_a_time() -> None:
    """Whenever a gradient comes, the bytes of those that parameters hold: usually at last all, otherwise one."""
    sizes = [4 * param.numel() for param in net().parameters()]
    for in_backward, expected in ((False, sum(sizes)), (True, max(sizes))):
        model = net()
        opt = LearnedOptimizer(model, lagged())
        train(model, opt, range(1))
        found: list[int] = []

        def look(_: Tensor, params: tuple[Tensor, ...] = tuple(model.parameters()), to: list[int] = found) -> None:
            to.append(sum(p.grad.numel() * p.grad.element_size() for p in params if p.grad is not None))

        for param in model.parameters():
            param.register_post_accumulate_grad_hook(look)  # hooks are called in the order in which they came
        if in_backward:
            opt.step_in_backward()
            opt.zero_grad()
        train(model, opt, range(1, 2))
        assert max(found) == expected


def test_an_optimizer_that_is_gone_leaves_gradients() -> None:
    model = net()
    opt = LearnedOptimizer(model, lagged())
    opt.step_in_backward()
    train(model, opt, range(2))
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    loss_of(model, 2).backward()
    assert all(param.grad is not None for param in model.parameters() if param.numel())


# ---- What goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theta", "options", "message"),
    [
        ("default", {}, "theta has stats='current': the step of every tensor depends on the gradients of all"),
        (None, {"impl": "reference"}, "impl='reference' keeps every intermediate"),
        (None, {"on_nonfinite": "skip"}, "on_nonfinite='skip' looks at all gradients"),
    ],
)
def test_refusals(theta: str | None, options: dict[str, Any], message: str) -> None:
    opt = LearnedOptimizer(net(), theta or lagged(), **options)
    with pytest.raises(ValueError, match=message):
        opt.step_in_backward()


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, _), (model, opt) = pair()
    train(model, opt, range(1))
    monkeypatch.setattr(type(opt._ranks), "group", object())  # as if a group had been initialised since
    with pytest.raises(ValueError, match="gradients of several ranks meet only after the hooks"):
        loss_of(model, 1).backward()


def test_a_loss_that_comes_too_late() -> None:
    (_, _), (model, opt) = pair()
    loss = loss_of(model, 0)
    loss.backward()
    with pytest.raises(ValueError, match=r"write observe\(train_loss=loss\) before loss.backward\(\)"):
        opt.step(loss=loss)
    opt.observe(train_loss=loss)
    opt.step()


def test_grad_scaler_is_refused() -> None:
    (_, _), (model, opt) = pair()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(TypeError, match="GradScaler: it unscales gradients after backward"):
        scaler.step(opt)


def test_accumulation_is_refused() -> None:
    (_, _), (model, opt) = pair()
    train(model, opt, range(1))
    loss_of(model, 1).backward()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match="got a second gradient before step"):
        loss_of(model, 2).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_first_gradients_may_be_accumulated() -> None:
    """As long as gradients wait for step(), it is the usual one."""
    found = pair()
    for model, opt in found:
        loss_of(model, 0).backward()
        loss_of(model, 1).backward()
        opt.step()
        opt.zero_grad()
        train(model, opt, range(2, 4))
    assert_same(found)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise MemoryError("no memory")


def test_a_backward_pass_that_fails() -> None:
    """step() completes what it began: tensors that got no gradient are as they were, and training goes on."""
    (_, _), (model, opt) = pair()
    train(model, opt, range(2))
    before = copy.deepcopy(everything(model, opt))
    handle = model.norm.register_forward_hook(lambda _, __, out: Fails.apply(out))  # type: ignore[union-attr]
    with pytest.raises(MemoryError, match="no memory"):
        loss_of(model, 2).backward()
    handle.remove()
    with pytest.raises(RuntimeError, match="a backward pass began a step; call step"):
        opt.state_dict()
    opt.step()
    for index, (name, param) in enumerate(model.named_parameters()):
        if name in ("table.weight", "norm.weight", "norm.bias"):
            assert torch.equal(param, before["params"][index])
            assert_same_bits(opt.state_dict()["state"][index], before["state"][index])
        elif param.numel():
            assert not torch.equal(param, before["params"][index])
            assert float(opt.state[param]["lstm"]["updates"]) == 3
    train(model, opt, range(3, 5))
    assert all(bool(torch.isfinite(param).all()) for param in model.parameters())


def test_a_tensor_without_a_gradient_stays_as_it_is() -> None:
    (_, _), (model, opt) = pair()
    train(model, opt, range(2))
    assert isinstance(model, Net)
    state = opt.state[model.gain]
    with torch.no_grad():
        state["stats"][STATS.index("nonfinite")] = 3.0  # as of a gradient that held NaN in the last step
    before, kept = model.gain.detach().clone(), copy.deepcopy(state)
    kept["stats"][STATS.index("nonfinite")] = 0.0
    for step in (2, 3):
        tokens = batch(step)
        loss = (model(tokens) / model.gain.detach()).logsumexp(-1).mean() * 0.1
        opt.observe(train_loss=loss)
        grads = [p for p in model.parameters() if p is not model.gain and p.numel()]
        loss.backward(inputs=grads)
        opt.step()
        assert torch.equal(model.gain, before)
        assert_same_bits(dict(state), kept)
        assert int(opt.nonfinite_gradients) == 3  # counted once


def test_a_state_that_is_changed_before_step() -> None:
    """The step is given up, and training can go on."""
    (_, _), (model, opt) = pair()
    train(model, opt, range(2))
    loss_of(model, 2).backward()
    opt.state[next(model.parameters())] = {}
    with pytest.raises(RuntimeError, match=r"changed between the backward pass and step\(\)"):
        opt.step()
    train(model, opt, range(3, 5))
    assert all(bool(torch.isfinite(param).all()) for param in model.parameters())


def test_a_compiled_model() -> None:
    """Its hooks come, when the compiled part is done."""
    found = pair()
    for model, opt in found:
        train(torch.compile(model, backend="aot_eager"), opt, range(3))  # type: ignore[arg-type]
    assert_same(found)


def test_tensors_that_never_had_a_gradient() -> None:
    """Everything waits for step(), as usual, and a warning says so once."""
    found = []
    for in_backward in (False, True):
        model = net()
        model.unused = nn.Parameter(torch.ones(3))
        opt = LearnedOptimizer(model, lagged())
        if in_backward:
            opt.step_in_backward()
            with pytest.warns(UserWarning, match="1 parameters had no gradient yet, param_groups"):
                train(model, opt, range(1))
        else:
            train(model, opt, range(1))
        train(model, opt, range(1, 3))
        found.append((model, opt))
    assert_same(found)


def test_what_a_backward_pass_cannot_use_is_named() -> None:
    (_, _), (model, opt) = pair()
    train(model, opt, range(1))
    assert isinstance(model, Net)
    table = nn.Embedding(40, 12, sparse=True)
    table.weight = model.table.weight
    model.table = table
    with pytest.raises(RuntimeError, match=r"gradient of param_groups\[0\]\['params'\]\[\d+\] of shape"):
        (model.table(batch(0)).sum()).backward()


# ---- Beside the steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_step_as_usual(copied: Callable[[Any], Any]) -> None:
    (_, _), (model, opt) = pair()
    train(model, opt, range(2))
    twin, other = copied((model, opt))
    train(model, opt, range(2, 4))
    train(twin, other, range(2, 3))
    assert all(param.grad is not None for param in twin.parameters() if param.numel())
    train(twin, other, range(3, 4))
    assert_same([(model, opt), (twin, other)])


def test_resume_and_remove() -> None:
    found = pair()
    for model, opt in found:
        train(model, opt, range(3))
    model, opt = net(), None
    model.load_state_dict(found[1][0].state_dict())
    opt = LearnedOptimizer(model, lagged())
    handle = opt.step_in_backward()
    assert handle is opt.step_in_backward()
    opt.load_state_dict(copy.deepcopy(found[1][1].state_dict()))
    for some in (*found, (model, opt)):
        train(*some, range(3, 5))
    assert_same(found)
    assert_same([found[0], (model, opt)])
    handle.remove()
    train(model, opt, range(5, 7))
    train(*found[0], range(5, 7))
    assert_same([found[0], (model, opt)])
    assert all(param.grad is not None for param in model.parameters() if param.numel())


def test_groups_that_are_added() -> None:
    found = pair()
    for model, opt in found:
        train(model, opt, range(2))
        extra = nn.Parameter(torch.ones(12))
        opt.add_param_group({"params": [extra]})
        model.norm.bias.requires_grad_(False)  # type: ignore[union-attr]
        model.norm.bias = extra  # type: ignore[union-attr]
        train(model, opt, range(2, 4))
    assert_same([(model, opt) for model, opt in found])
    model, opt = found[1]
    loss_of(model, 4).backward()
    with pytest.raises(RuntimeError, match="a backward pass began a step"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
