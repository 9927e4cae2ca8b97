"""LearnedOptimizer in the hands of a user: real models, trainers' habits, and what changes under way."""

import copy
import doctest
import importlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optimizer_cases import IMPLS, PRESETS, assert_same_bits, make_optimizer, snapshot
from torch import Tensor, nn

from lopt.optimizer import LearnedOptimizer
from lopt.rule import Theta

every_impl = pytest.mark.parametrize("impl", IMPLS)
STEPS = 20


@pytest.fixture(autouse=True)
def _one_thread(set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(1)  # so that forward and backward passes repeat bit for bit


def make_model(seed: int = 0) -> nn.Module:
    """A convolution and two dense layers; the largest tensor is two chunks long for the kernels."""
    torch.manual_seed(seed)
    head = [nn.Linear(4 * 6 * 6, 80), nn.ReLU(), nn.Linear(80, 8)]
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), *head)


def batches(steps: int = STEPS, size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of 8 x 8 whose class is the row with the bright stripe."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        label = torch.randint(0, 8, (size,), generator=generator)
        image = 0.5 * torch.randn(size, 1, 8, 8, generator=generator)
        image[torch.arange(size), 0, label] += 1.0
        yield image, label


def loss_of(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Not softmax: its gradients sum to zero, and the sign of such a sum, an input of the LSTM, is rounding error."""
    image, label = batch
    target = nn.functional.one_hot(label, 8).float()
    return nn.functional.binary_cross_entropy_with_logits(model(image).float(), target)


def train(model: nn.Module, opt: LearnedOptimizer, steps: int = STEPS) -> list[float]:
    losses = []
    for batch in batches(steps):
        opt.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        opt.step(loss=loss)
        losses.append(loss.item())
    return losses


def params_of(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


# ---- Implementations and threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_implementations_agree_over_twenty_steps(preset: str) -> None:
    """Within 1e-5 of how far the parameters of a tensor moved (root mean squares), as float32 and float64 do."""
    start = params_of(make_model())
    results, losses = {}, {}
    for impl in IMPLS:
        model = make_model()
        losses[impl] = train(model, make_optimizer(model.parameters(), impl, preset))
        results[impl] = params_of(model)
    for impl in ("cpu", "sim"):
        for before, expected, found in zip(start, results["reference"], results[impl], strict=True):
            moved = (expected - before).square().mean().sqrt()
            assert (found - expected).square().mean().sqrt() <= 1e-5 * moved
        assert losses[impl] == pytest.approx(losses["reference"], rel=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("impl", ["cpu", "sim"])
def test_number_of_threads_changes_no_bit(impl: str, preset: str) -> None:
    results = []
    for threads in (1, 2, 5):
        model = make_model()
        opt = make_optimizer(model.parameters(), impl, preset)
        opt.register_step_pre_hook(lambda *_, n=threads: torch.set_num_threads(n))
        opt.register_step_post_hook(lambda *_: torch.set_num_threads(1))
        train(model, opt)
        results.append(snapshot(opt))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


# ---- Trainers' habits ------------------------------------------------------------------------------------------------


def expected_model(steps: int = STEPS, **options: Any) -> tuple[nn.Module, LearnedOptimizer]:
    """The plain loop with step(loss=...)."""
    model = make_model()
    opt = make_optimizer(model.parameters(), **options)
    train(model, opt, steps)
    return model, opt


def test_closure_of_lightning() -> None:
    """zero_grad, forward and backward happen in the closure, under no_grad outside."""
    model = make_model()
    opt = make_optimizer(model.parameters())
    for batch in batches():

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            loss = loss_of(model, batch)
            opt.zero_grad()
            loss.backward()
            return loss.detach()

        with torch.no_grad():
            opt.step(closure=closure)
    assert_same_bits(snapshot(opt), snapshot(expected_model()[1]))


def test_trainer_that_passes_no_loss_and_a_hook_that_does() -> None:
    """Hugging Face calls step() with nothing; a forward hook on the loss module observes instead."""
    model, criterion = make_model(), nn.MSELoss()
    opt = make_optimizer(model.parameters())
    criterion.register_forward_hook(lambda _module, _inputs, loss: opt.observe(train_loss=loss))
    other_model = make_model()
    other = make_optimizer(other_model.parameters())
    for image, label in batches(5):
        target = nn.functional.one_hot(label, 8).float()
        criterion(model(image), target).backward()
        opt.step()
        model.zero_grad()
        loss = nn.functional.mse_loss(other_model(image), target)
        loss.backward()
        other.step(loss=loss)
        other_model.zero_grad()
    assert_same_bits(snapshot(opt), snapshot(other))


def test_gradient_accumulation() -> None:
    """Four micro-batches with their losses observed are one batch."""
    model, (other_model, other) = make_model(), expected_model(5)
    opt = make_optimizer(model.parameters())
    for image, label in batches(5):
        for part in zip(image.chunk(4), label.chunk(4), strict=True):
            loss = loss_of(model, part)
            (loss / 4).backward()
            opt.observe(train_loss=loss)
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(params_of(model), params_of(other_model), rtol=0, atol=1e-5)
    mean, expected = opt.param_groups[0]["train_loss"], other.param_groups[0]["train_loss"]
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad(set_to_none: bool) -> None:
    model = make_model()
    opt = make_optimizer(model.parameters())
    for batch in batches():
        loss = loss_of(model, batch)
        loss.backward()
        opt.step(loss=loss)
        opt.zero_grad(set_to_none=set_to_none)
        assert all((param.grad is None) == set_to_none for param in model.parameters())
    assert_same_bits(params_of(model), params_of(expected_model()[0]))


def test_grad_scaler() -> None:
    """The default path: the scaler unscales (powers of two, so exactly), and leaves out a step that overflowed."""
    model = make_model()
    opt = make_optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, batch in enumerate(batches()):
        if i == 7:
            before = snapshot(opt)
            scaler.scale(loss_of(model, batch)).backward()
            next(model.parameters()).grad[0] = float("inf")
            assert scaler.step(opt, loss=1.0) is None
            scaler.update()
            assert scaler.get_scale() == 512.0
            assert_same_bits(snapshot(opt), before)
            assert int(opt.nonfinite_gradients) == 0  # the optimizer never saw them
            opt.zero_grad()
        loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.step(opt, loss=loss)
        scaler.update()
        opt.zero_grad()
    assert_same_bits(snapshot(opt), snapshot(expected_model()[1]))


def test_gradient_clipping_between_backward_and_step() -> None:
    model, other_model = make_model(), make_model()
    opt, other = make_optimizer(model.parameters()), make_optimizer(other_model.parameters())
    for batch in batches(5):
        for each, optimizer in ((model, opt), (other_model, other)):
            optimizer.zero_grad()
            loss = loss_of(each, batch)
            loss.backward()
            if each is model:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            else:
                norm = torch.stack([param.grad.norm() for param in each.parameters()]).norm()
                for param in each.parameters():
                    param.grad *= torch.clamp(0.01 / (norm + 1e-6), max=1.0)
            optimizer.step(loss=loss)
    assert_same_bits(params_of(model), params_of(other_model))


def test_named_parameters() -> None:
    model, other_model = make_model(), make_model()
    opt = make_optimizer(model.named_parameters())
    train(model, opt, 3)
    other = make_optimizer(other_model.parameters())
    train(other_model, other, 3)
    assert_same_bits(params_of(model), params_of(other_model))
    assert opt.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    other.load_state_dict(opt.state_dict())
    opt.load_state_dict(other.state_dict())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model(backend: str) -> None:
    torch.compiler.reset()
    model = make_model()
    compiled = torch.compile(model, backend=backend)
    opt = make_optimizer(compiled.parameters())
    for batch in batches(5):
        opt.zero_grad()
        loss = loss_of(compiled, batch)
        loss.backward()
        opt.step(loss=loss)
    torch.testing.assert_close(params_of(model), params_of(expected_model(5)[0]), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of a loss, by torch.compile, where a graph ends
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_training_step(backend: str) -> None:
    """Model and loss are compiled, the optimizer's methods run as they are."""
    model = make_model()
    opt = make_optimizer(model.parameters())

    def train_step(batch: tuple[Tensor, Tensor]) -> None:
        opt.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        opt.observe(valid_loss=loss.detach())
        opt.step(loss=loss)

    found = []
    for run in (train_step, torch.compile(train_step, backend=backend)):
        torch.compiler.reset()
        model = make_model()
        opt = make_optimizer(model.parameters())
        for batch in batches(5):
            run(batch)
        found.append(params_of(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_compiler_leaves_the_steps_of_every_object_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a subclass with a step of its own, and in a process that has only unpickled an optimizer."""

    class Counting(LearnedOptimizer):
        steps = 0

        def step(self, closure: Any = None, *, loss: Any = None) -> Any:
            self.steps += 1
            return super().step(closure, loss=loss)

    model = make_model()
    opt = Counting(model.parameters())
    train_step = torch.compile(lambda: opt.step(loss=1.0), backend="eager")
    before = copy.deepcopy(params_of(model))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    train_step()
    assert opt.steps == 1
    assert all(not torch.equal(old, new) for old, new in zip(before, params_of(model), strict=True))

    pickled = pickle.dumps(make_optimizer(model.parameters()))
    plain = LearnedOptimizer.step.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(LearnedOptimizer, "step", plain)
    monkeypatch.delattr(plain, "eager")
    pickle.loads(pickled)
    assert LearnedOptimizer.step is not plain


# ---- What changes under way ------------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_converted_to_16_bits_and_back(impl: str, dtype: torch.dtype) -> None:
    """State stays float32 and goes on; the step after a conversion is that of converted parameters."""
    model = make_model()
    opt = make_optimizer(model.parameters(), impl)
    train(model, opt, 3)
    model.to(dtype)
    before = copy.deepcopy((list(model.parameters()), opt))
    for param, twin in zip(model.parameters(), before[0], strict=True):
        param.grad = torch.full_like(param, 0.5)
        twin.data = twin.data.float()
        twin.grad = torch.full_like(twin.data, 0.5)
    opt.step(loss=1.0)
    before[1].step(loss=1.0)
    assert_same_bits(params_of(model), [param.detach().to(dtype) for param in before[0]])
    assert_same_bits(opt.state_dict()["state"], before[1].state_dict()["state"])
    model.float()
    train(model, opt, 2)
    assert all(param.dtype == torch.float32 for param in model.parameters())
    assert int(opt.param_groups[0]["step"]) == 6


class Tied(nn.Module):
    """A layer used twice and an output that shares the embedding's weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight

    def forward(self, token: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.layer(self.embedding(token)))))


def test_tied_and_shared_weights() -> None:
    model = Tied()
    opt = make_optimizer(model.parameters())
    params = [model.embedding.weight, model.layer.weight, model.layer.bias, model.head.bias]
    others = [nn.Parameter(param.detach().clone()) for param in params]
    other = make_optimizer(others)
    for step in range(4):
        token = torch.arange(step, step + 7)
        opt.zero_grad()
        nn.functional.cross_entropy(model(token), token + 1).backward()
        for param, twin in zip(params, others, strict=True):
            twin.grad = param.grad.clone()
        opt.step()
        other.step()
    assert_same_bits(params, others)
    assert model.head.weight is model.embedding.weight
    assert len(opt.state) == 4


def test_progressive_unfreezing() -> None:
    model = make_model()
    opt = make_optimizer(model.parameters())
    first, last = list(model[0].parameters()), list(model[5].parameters())
    frozen = [param.detach().clone() for param in first]
    model[0].requires_grad_(False)
    train(model, opt, 3)
    assert_same_bits([param.detach() for param in first], frozen)
    assert all(param not in opt.state for param in first)
    model[0].requires_grad_(True)
    model[5].requires_grad_(False)
    opt.zero_grad()
    stopped = [param.detach().clone() for param in last]
    states = copy.deepcopy([opt.state[param] for param in last])
    train(model, opt, 2)
    assert_same_bits([param.detach() for param in last], stopped)
    assert_same_bits([opt.state[param] for param in last], states)
    model[5].requires_grad_(True)
    train(model, opt, 2)
    assert [int(opt.state[param]["lstm"]["updates"]) for param in (*first, *last)] == [4, 4, 5, 5]
    assert not any(torch.equal(param, old) for param, old in zip(first, frozen, strict=True))


def test_weight_normalisation_and_recurrent_layers() -> None:
    """Parametrised weights and nn.LSTM, whose parameters are used through views; the float64 reference follows."""
    results = {}
    for impl, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(1)
        lstm, linear = nn.LSTM(4, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))
        model = nn.ModuleList([lstm, linear]).to(dtype)
        opt = make_optimizer(model.parameters(), impl)
        data = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
        for _ in range(4):
            opt.zero_grad()
            loss = (linear(lstm(data)[0]) - data[..., :2]).square().mean()
            loss.backward()
            opt.step(loss=loss)
        results[impl] = [param.detach().double() for param in model.parameters()]
    torch.testing.assert_close(results["cpu"], results["reference"], rtol=0, atol=1e-5)


def test_the_loss_falls() -> None:
    """With a theta that starts as Adam, the only one here that was not drawn at random."""
    for preset in PRESETS:
        model = make_model()
        losses = train(model, LearnedOptimizer(model.parameters(), Theta.init_adam(preset)))
        assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_model_that_is_moved_after_its_optimizer_was_made(impl: str, device: torch.device) -> None:
    """Trainers move models, and load an optimizer's own state into it before: as if it had been made afterwards."""
    dtype = torch.float64 if impl == "reference" else torch.float32
    results = []
    for first in (True, False):
        model = make_model()
        if not first:
            model.to(device, dtype)
        opt = LearnedOptimizer(model, impl=impl)
        if first:
            opt.load_state_dict(opt.state_dict())
            model.to(device, dtype)
        for data, label in batches(3):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(data.to(device, dtype)), label.to(device))
            loss.backward()
            opt.observe(train_loss=loss)
            opt.step()
        assert opt.implementation == (impl if impl == "reference" else device.type)
        results.append((model, opt))
    (model, opt), (expected, expected_opt) = results
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
        assert opt.state[a]["mom"].dtype == expected_opt.state[b]["mom"].dtype == dtype


# ---- Documentation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["optimizer", "rule.spec", "rule.theta", "rule.reference"])
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"lopt.{name}"))
    assert result.failed == 0
    assert result.attempted > 0
