"""Tensors on several devices in one optimizer. Without a GPU several places are on the CPU: the same plans, copies."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optimizer_cases import assert_same_bits, make_theta
from test_in_backward import Net, everything, loss_of, net, train
from torch import nn

from lopt import LearnedOptimizer, Theta, tensors
from lopt.rule import PRESETS
from lopt.steppers import KernelStepper
from lopt.tensors import Name

CPU = torch.device("cpu")


def scattered(monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, ...] = (0, 1, 2, 1)) -> None:
    """From now on parameters of new steppers are at these places in turn; 0 is at home."""
    seen: dict[int, int] = {}

    def place_of(param: torch.Tensor) -> Name:
        number = seen.setdefault(param.data_ptr(), len(seen))
        return Name(CPU, numbers[number % len(numbers)])

    monkeypatch.setattr(tensors, "place_of", place_of)


def pair(
    monkeypatch: pytest.MonkeyPatch, preset: str = "spectral", numbers: tuple[int, ...] = (0, 1, 2, 1), **options: Any
) -> Iterator[tuple[nn.Module, LearnedOptimizer]]:
    """A model with its optimizer, twice: at one place, then at several."""
    stats = options.pop("stats", "current")
    for several in (False, True):
        if several:
            scattered(monkeypatch, numbers)
        model = net()
        yield model, LearnedOptimizer(model, make_theta(preset).with_spec(stats=stats), **options)


def assert_alike(found: list[tuple[nn.Module, LearnedOptimizer]]) -> None:
    (model, opt), (other, scattered_opt) = found
    assert isinstance(opt._stepper, KernelStepper)
    assert isinstance(scattered_opt._stepper, KernelStepper)
    assert not opt._stepper.places.several
    assert scattered_opt._stepper.places.several
    assert_same_bits(everything(model, opt), everything(other, scattered_opt))


# ---- The same bits as at one place -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", ["current", "lagged"])
@pytest.mark.parametrize("impl", ["cpu", "sim"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_steps_of_one_place(monkeypatch: pytest.MonkeyPatch, preset: str, impl: str, stats: str) -> None:
    found = []
    for model, opt in pair(monkeypatch, preset, impl=impl, stats=stats):
        train(model, opt, range(3 if impl == "sim" else 6))
        found.append((model, opt))
    assert_alike(found)


@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": torch.bfloat16},
        {"state_dtype": torch.int8},
        {"state_dtype": torch.bfloat16, "stats": "lagged"},
        {"average": True, "maximize": True},
        {"weight_decay": 0.1, "lr": 0.5, "total_steps": 20, "on_nonfinite": "skip"},
        {"numbers": (1, 2)},
        {"numbers": (1,), "stats": "lagged"},
    ],
)
def test_with_options(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    found = []
    for model, opt in pair(monkeypatch, **options):
        train(model, opt)
        found.append((model, opt))
    assert_alike(found)


@pytest.mark.parametrize("stats", ["current", "lagged"])
def test_gradients_that_come_and_go(monkeypatch: pytest.MonkeyPatch, stats: str) -> None:
    """Of all places, of one alone, of home alone."""
    found = []
    for model, opt in pair(monkeypatch, numbers=(0, 0, 1, 2), stats=stats):
        params = [param for param in model.parameters() if param.numel()]
        for step in range(8):
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            kept = ((0, 1, 2, 3), (2,), (0, 1), (0, 3))[step % 4]
            for i, param in enumerate(params):
                if i % 4 not in kept:
                    param.grad = None
            opt.step(loss=loss)
        opt.zero_grad()
        train(model, opt, range(8, 10))
        found.append((model, opt))
    assert_alike(found)


@pytest.mark.parametrize("stats", ["current", "lagged"])
def test_groups_that_are_added(monkeypatch: pytest.MonkeyPatch, stats: str) -> None:
    found = []
    for model, opt in pair(monkeypatch, numbers=(0, 1), stats=stats):
        assert isinstance(model, Net)
        train(model, opt, range(2))
        for _ in range(2):  # at both places
            extra = nn.Parameter(torch.ones(12))
            opt.add_param_group({"params": [extra], "lr": 0.5})
            model.norm.bias.grad, model.norm.bias = None, extra
            train(model, opt, range(2, 4))
        found.append((model, opt))
    assert_alike(found)


def test_steps_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for model, opt in pair(monkeypatch, stats="lagged"):
        if found:
            opt.step_in_backward()
        assert isinstance(model, Net)
        train(model, opt, range(4))
        model.up.requires_grad_(False)
        train(model, opt, range(4, 6))
        model.up.requires_grad_(True)
        train(model, opt, range(6, 8))
        found.append((model, opt))
    assert_alike(found)


def test_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch orthogonalises them at their places; here each has a shape of its own."""
    results = []
    for several in (False, True):
        if several:
            scattered(monkeypatch)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(140, 150, bias=False), nn.Linear(150, 300, bias=False), nn.Linear(300, 140))
        opt = LearnedOptimizer(model, Theta.load("default"))
        for step in range(5):
            opt.zero_grad()
            model(torch.randn(16, 140, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            opt.step()
        results.append((model, opt))
        ranks = [float(opt.state[param]["lstm"]["rank"]) for param in model.parameters()]
        assert any(rank != 1.0 for rank in ranks)
    assert_alike(results)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: both])
def test_states_go_from_one_place_to_several_and_back(
    monkeypatch: pytest.MonkeyPatch, copied: Callable[[Any], Any]
) -> None:
    found = list(pair(monkeypatch, stats="lagged"))
    monkeypatch.undo()
    model, opt = found[0]
    train(model, opt, range(6))
    other, moving = found[1]
    train(other, moving, range(2))
    for numbers in ((0, 1), (0,)):
        scattered(monkeypatch, numbers)
        other, moving = copied((other, moving))
        moving.load_state_dict(copy.deepcopy(moving.state_dict()))
        train(other, moving, range(2, 4) if numbers == (0, 1) else range(4, 6))
        assert isinstance(moving._stepper, KernelStepper)
        assert moving._stepper.places.several == (numbers == (0, 1))
    assert_same_bits(everything(model, opt), everything(other, moving))


def test_ranks_that_were_written_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix that rests keeps the rank that its state says, wherever it is."""
    found = []
    for model, opt in pair(monkeypatch, numbers=(1, 2)):
        train(model, opt, range(1))
        assert isinstance(model, Net)
        with torch.no_grad():
            opt.state[model.mid.weight]["lstm"]["rank"].fill_(0.5)
            model.mid.weight[0, 0] = torch.nan
        for step in range(2):
            for param in model.parameters():
                param.grad = torch.full_like(param, 0.1 + step)
            opt.step()
        assert float(opt.state[model.mid.weight]["lstm"]["rank"]) == 0.5
        found.append((model, opt))
    assert_alike(found)


# ---- What travels ----------------------------------------------------------------------------------------------------


def test_tables_that_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """From each other place statistics, hidden units and ranks in a step, nothing where there is one place."""
    for several, (model, opt) in enumerate(pair(monkeypatch)):
        train(model, opt, range(1))
        assert isinstance(opt._stepper, KernelStepper)
        before = opt._stepper.places.collected
        train(model, opt, range(1, 2))
        assert opt._stepper.places.collected - before == (6 if several else 0)


def test_memory_is_for_the_tensors_of_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for model, opt in pair(monkeypatch):
        train(model, opt, range(1))
        assert isinstance(opt._stepper, KernelStepper)
        found.append(opt._stepper.places.plans)
    whole, plans = found[0][0], found[1]
    assert len(plans) == 3
    assert sum(len(plan.partials) for plan in plans) == len(whole.partials)
    assert whole.directions is not None
    memories = [plan.directions.memory.numel() for plan in plans if plan.directions is not None]
    assert sum(memories) == whole.directions.memory.numel()


# ---- Errors ----------------------------------------------------------------------------------------------------------


def test_parts_on_several_devices_are_refused() -> None:
    model = net()
    opt = LearnedOptimizer(model)
    tensors = opt._ready().tensors
    tensors.sharded, tensors.places[2] = True, Name(torch.device("cuda", 1))
    with pytest.raises(ValueError, match="params: on cpu and cuda:1, and ranks hold parts of them"):
        KernelStepper(opt._backend, tensors, opt.theta, "high", opt._ranks)


def test_a_parameter_that_left_its_state_is_named() -> None:
    model = net()
    opt = LearnedOptimizer(model)
    train(model, opt, range(1))
    assert isinstance(model, Net)
    state = opt.state[model.gain]
    state["mom"] = state["mom"].to("meta")  # as if it had been made elsewhere
    opt.zero_grad()
    loss_of(model, 1).backward()
    with pytest.raises(ValueError, match=r"of shape \(\): on cpu, but the optimizer's state is on meta; move it"):
        opt.step()


# ---- On a GPU --------------------------------------------------------------------------------------------------------


def spread(model: Net, devices: list[torch.device]) -> Net:
    """Modules on these devices in turn."""
    for index, module in enumerate(model.children()):
        module.to(devices[index % len(devices)])
    model.gain.data = model.gain.data.to(devices[0])
    model.empty.data = model.empty.data.to(devices[-1])
    return model


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = (0.1 * torch.randn(param.shape, generator=generator)).to(param.device)


def steps_on(
    devices: list[torch.device], preset: str = "spectral", stats: str = "current", **options: Any
) -> tuple[list[torch.Tensor], LearnedOptimizer]:
    model = spread(net(), devices)  # type: ignore[arg-type]
    opt = LearnedOptimizer(model, make_theta(preset).with_spec(stats=stats), **options)
    for step in range(6):
        gradients(model, step)
        opt.step(loss=1.0 / (1 + step))
        if step == 2:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for param in model.parameters():
        state = opt.state[param]
        assert state["mom"].device == state["rms"].device == param.device
        assert state["lstm"]["h"].device == devices[0] or not param.numel()
    return [param.detach().cpu() for param in model.parameters()], opt


def needs(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA devices")


@pytest.mark.gpu
@pytest.mark.parametrize("first", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "options", [{}, {"stats": "lagged"}, {"state_dtype": torch.bfloat16}, {"on_nonfinite": "skip", "average": True}]
)
def test_cpu_and_gpu(first: str, options: dict[str, Any]) -> None:
    """Near the steps on the CPU: kernels of two kinds, and the tensor level on either."""
    needs(1)
    devices = [CPU, torch.device("cuda", 0)]
    found, opt = steps_on(devices if first == "cpu" else devices[::-1], **options)
    assert opt.implementation == first
    expected, _ = steps_on([CPU], **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 if "state_dtype" in options else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_cpu_and_gpu_by_the_reference(first: str) -> None:
    needs(1)
    devices = [CPU, torch.device("cuda", 0)]
    found, _ = steps_on(devices if first == "cpu" else devices[::-1], impl="reference")
    expected, _ = steps_on([CPU], impl="reference")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("stats", ["current", "lagged"])
@pytest.mark.parametrize("preset", PRESETS)
def test_two_gpus_are_one(preset: str, stats: str) -> None:
    """Bit for bit, but for products of matrices of one shape, which are computed together where they are on one."""
    needs(2)
    found, _ = steps_on([torch.device("cuda", 0), torch.device("cuda", 1)], preset, stats)
    expected, _ = steps_on([torch.device("cuda", 0)], preset, stats)
    if preset != "spectral":
        assert_same_bits(found, expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_backward_pass_through_cpu_and_gpu() -> None:
    """Hooks are called by a thread for each device, on the stream of the backward pass."""
    needs(1)
    results = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        here, there = nn.Linear(12, 24), nn.Linear(24, 12).cuda()
        params = [*here.parameters(), *there.parameters()]
        opt = LearnedOptimizer(params, make_theta("spectral").with_spec(stats="lagged"))
        if in_backward:
            opt.step_in_backward()
        for step in range(5):
            x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
            with torch.cuda.stream(torch.cuda.Stream()) if step % 2 else torch.cuda.device(0):
                loss = there(torch.relu(here(x)).cuda()).square().mean()
                opt.zero_grad()
                opt.observe(train_loss=loss)
                loss.backward()
                opt.step()
            torch.cuda.synchronize()
        results.append([param.detach().cpu() for param in params])
    assert_same_bits(*results)


@pytest.mark.gpu
def test_the_tensor_level_stays() -> None:
    """Where the first parameter is frozen, or another group comes first, it is where it was."""
    needs(1)
    here, there = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="cuda"))
    also = nn.Parameter(torch.ones(3))
    opt = LearnedOptimizer([here, there, also])
    for step in range(3):
        for param in (here, there, also):
            param.grad = torch.ones_like(param) if param.requires_grad else None
        opt.step()
        here.requires_grad_(step > 0)
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2, device="cuda"))]})
    assert opt.param_groups[0]["pending_loss"].device == CPU
    assert opt.state[there]["lstm"]["h"].device == CPU
