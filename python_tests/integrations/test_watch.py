"""watch_loss: what the optimizer is told, and that a run with it equals the same run with ``observe`` by hand."""

import doctest
import importlib
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lopt import LearnedOptimizer
from lopt.integrations import watch_loss
from lopt.integrations.unwrap import unwrap


class Model(nn.Module):
    """Returns what ``form`` makes of outputs and loss."""

    def __init__(self, form: Callable[[Tensor, Tensor | None], Any] = lambda out, loss: loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.form = form

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = self.layers(x)
        return self.form(out, None if y is None else nn.functional.mse_loss(out, y))


FORMS: dict[str, Callable[[Tensor, Tensor | None], Any]] = {
    "loss": lambda out, loss: loss,
    "tuple": lambda out, loss: (out, loss),
    "mapping": lambda out, loss: {"logits": out} if loss is None else {"loss": loss, "logits": out},
    "attribute": lambda out, loss: SimpleNamespace(loss=loss, logits=out),
}


def rows(step: int, count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(count, 4, generator=generator)
    return x, x.prod(dim=1, keepdim=True)


def loss_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return output[1]
    return output["loss"] if isinstance(output, dict) else output.loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("evaluate", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_watched_model_equals_observing_by_hand(form: str, evaluate: Callable[[], Any]) -> None:
    """Three minibatches in a step, an evaluation with batches of 8, 8 and 3 rows after every second one."""

    def run(by_hand: bool) -> tuple[list[Tensor], dict[str, Any]]:
        model = Model(FORMS[form])
        optimizer = LearnedOptimizer(model, total_steps=6)
        watch = None if by_hand else watch_loss(model, optimizer)
        for step in range(6):
            for micro in range(3):
                loss = loss_of(model(*rows(10 * step + micro)))
                (loss / 3).backward()
                if by_hand:
                    optimizer.observe(train_loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % 2 == 0:
                model.eval()
                with evaluate():
                    model(rows(7)[0])  # no loss
                    losses = [(loss_of(model(*rows(1000 + n, n))).detach(), n) for n in (8, 8, 3)]
                    if by_hand:
                        optimizer.observe(valid_loss=sum(loss * n for loss, n in losses) / 19)
                model.train()
        if watch is not None:
            watch.remove()
        return list(model.parameters()), optimizer.state_dict()["param_groups"][0]

    (params, group), (expected, expected_group) = run(False), run(True)
    for a, b in zip(params, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(group["train_loss"], expected_group["train_loss"])
    assert torch.equal(group["valid_loss"], expected_group["valid_loss"])


def test_a_watched_loss_module_and_a_checkpoint_after_an_evaluation() -> None:
    """A loss module is never in evaluation mode: what has no graph is validation. A resumed run equals a whole one."""

    def run(steps: range, state: tuple[dict[str, Any], dict[str, Any]] | None = None) -> Any:
        model, criterion = Model().layers, nn.MSELoss()
        optimizer = LearnedOptimizer(model)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        with watch_loss(criterion, optimizer):
            for step in steps:
                x, y = rows(step)
                criterion(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    x, y = rows(100 + step, 64)
                    criterion(model(x), y)
            return model.state_dict(), optimizer.state_dict()

    first = run(range(3))
    (params, resumed), (expected, whole) = run(range(3, 6), first), run(range(6))
    assert first[1]["param_groups"][0]["valid_loss"][2] == 3  # updates: the last one, too
    assert whole["param_groups"][0]["valid_loss"][2] == 6
    assert all(torch.equal(params[name], expected[name]) for name in expected)
    for name in ("train_loss", "valid_loss"):
        assert torch.equal(resumed["param_groups"][0][name], whole["param_groups"][0][name])


class Owner:
    """Sends losses backward, as an Accelerator and a Fabric do."""

    def backward(self, tensor: Tensor, **kwargs: Any) -> str:
        tensor.backward(**kwargs)
        return "done"


def test_a_watched_backward() -> None:
    """The loss is told before backward has freed the graph, times the scale, and with it the mean of the step."""
    owner, model = Owner(), Model()
    optimizer = LearnedOptimizer(model)
    with watch_loss(owner, optimizer, scale=2.0):
        losses = [model(*rows(step)) for step in range(2)]
        assert [owner.backward(loss / 2, retain_graph=False) for loss in losses] == ["done", "done"]
    assert vars(owner) == {}
    owner.backward(model(*rows(2)))  # not watched
    told = sum(loss.item() for loss in losses)
    assert optimizer.param_groups[0]["pending_loss"].tolist() == pytest.approx([told, 2.0])


def test_two_watches_of_two_optimizers() -> None:
    """Each sees the losses of its own source."""
    models = [Model(), Model()]
    optimizers = [LearnedOptimizer(model) for model in models]
    watches = [watch_loss(model, optimizer) for model, optimizer in zip(models, optimizers, strict=True)]
    losses = [model(*rows(step)) for step, model in enumerate(models)]
    for optimizer, loss in zip(optimizers, losses, strict=True):
        assert optimizer.param_groups[0]["pending_loss"].tolist() == [loss.item(), 1.0]
    for watch in watches:
        watch.remove()
    models[0](*rows(5))
    assert float(optimizers[0].param_groups[0]["pending_loss"][1]) == 1.0


def test_errors_say_what_was_expected() -> None:
    model = Model()
    optimizer = LearnedOptimizer(model)
    with pytest.raises(TypeError, match=r"expected a LearnedOptimizer, got SGD; name the optimizer"):
        watch_loss(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="expected a module that returns a loss, an Accelerator or a Fabric, got T"):
        watch_loss(torch.ones(()), optimizer)
    assert not optimizer._optimizer_step_pre_hooks  # nothing is left of what was refused
    with (
        watch_loss(model.layers, optimizer),
        pytest.raises(TypeError, match=r"Sequential returned a tensor of shape \(8, 1\), expected a loss"),
    ):
        model(*rows(0))
    with (
        watch_loss(Model(lambda out, loss: (loss, loss)), optimizer) as watch,
        pytest.raises(TypeError, match="Model returned 2 tensors of one element"),
    ):
        watch._forward(model, (), {}, (torch.ones(()), torch.ones(1)))


@pytest.mark.parametrize("name", ["watch", "unwrap"])
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"lopt.integrations.{name}"))
    assert result.failed == 0
    assert result.attempted > 0


def test_unwrap_takes_the_innermost() -> None:
    inner = LearnedOptimizer(Model())
    assert unwrap(SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner))) is inner
    assert unwrap(inner) is inner
    assert unwrap(SimpleNamespace(optimizer=None)) is None


def test_no_trainer_is_imported_before_it_is_asked_for() -> None:
    script = (
        "import sys, lopt.integrations\n"
        "for name in ('transformers', 'accelerate', 'lightning', 'pytorch_lightning'):\n"
        "    assert name not in sys.modules\n"
        "    sys.modules[name] = None\n"  # as if it were not installed
        "for name in ('TransformersCallback', 'LightningCallback'):\n"
        "    try:\n"
        "        getattr(lopt.integrations, name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "lopt.integrations.TransformersCallback needs transformers and accelerate (import of transformers halted; None "
        "in sys.modules); run: pip install transformers accelerate",
        "lopt.integrations.LightningCallback needs lightning (import of pytorch_lightning halted; None in "
        "sys.modules); run: pip install lightning",
    ]
    with pytest.raises(AttributeError, match="has no attribute 'KerasCallback'"):
        _ = __import__("lopt.integrations").integrations.KerasCallback
