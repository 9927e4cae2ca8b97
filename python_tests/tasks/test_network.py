"""Layers of networks against torch's own modules."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lopt.tasks.network import (
    Activate,
    Attention,
    Branch,
    Convolution,
    Dense,
    Embedding,
    Flatten,
    Join,
    Layer,
    Mean,
    Network,
    Norm,
    Pool,
    Positions,
    perceptron,
)
from lopt.tasks.pieces import Initialiser
from lopt.tasks.task import Batch

WIDTH = 12


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-6)


def run(layer: Layer, x: Tensor, module: nn.Module | None = None, **renamed: str) -> Tensor:
    """The layer alone, with the parameters of a module by other names."""
    params = {renamed[name]: value.detach() for name, value in module.named_parameters()} if module else {}
    params = {name: value.T if value.dim() == 2 and name == "w" else value for name, value in params.items()}
    return Network((layer,), x.shape[2], x.shape[1]).run(params, x)


def test_layers_on_one_place_at_a_time_are_torchs() -> None:
    x = torch.randn(5, 9, WIDTH, generator=torch.Generator().manual_seed(0))
    linear, layer_norm, rms_norm = nn.Linear(WIDTH, 7), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH, eps=1e-5)
    for norm in (layer_norm, rms_norm):
        for param in norm.parameters():
            nn.init.normal_(param)
    close(run(Dense(7, "w", "b"), x, linear, weight="w", bias="b"), linear(x))
    close(run(Norm("g", "b"), x, layer_norm, weight="g", bias="b"), layer_norm(x))
    close(run(Norm("g"), x, rms_norm, weight="g"), rms_norm(x))
    for name, function in (("relu", functional.relu), ("tanh", torch.tanh), ("gelu", functional.gelu)):
        close(run(Activate(name), x), function(x))  # type: ignore[arg-type]


def test_layers_on_images_are_torchs() -> None:
    images = torch.randn(5, WIDTH, 6, 6, generator=torch.Generator().manual_seed(0))
    x = images.flatten(2).transpose(1, 2)
    conv = nn.Conv2d(WIDTH, 4, 3, padding=1)
    for layer, expected in (
        (Pool("max"), functional.max_pool2d(images, 2)),
        (Pool("mean"), functional.avg_pool2d(images, 2)),
        (Mean(), functional.adaptive_avg_pool2d(images, 1)),
    ):
        close(run(layer, x).transpose(1, 2).flatten(), expected.flatten())
    close(
        run(Convolution(4, "k", "b"), x, conv, weight="k", bias="b").transpose(1, 2).flatten(2), conv(images).flatten(2)
    )
    assert torch.equal(run(Flatten(), x)[:, 0], images.flatten(1))


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_torchs(heads: int) -> None:
    x = torch.randn(5, 8, 3 * WIDTH, generator=torch.Generator().manual_seed(0))
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in x.chunk(3, dim=2))
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    close(run(Attention(heads), x), expected)


def test_tables_branches_and_losses() -> None:
    layers = (Embedding(10, 4), Positions(), Branch(), Dense(4, "w"), Join(), Dense(10, "head", "b"))
    network = Network(layers, inputs=1, places=3, tokens=True)
    assert list(network.shapes) == ["embedding", "positions", "w", "head", "b"]
    layout = network.layout(Initialiser("constant", 2.0), Initialiser("constant", 3.0))
    assert [start.initialiser.scale for start in layout.values()] == [3.0, 3.0, 2.0, 2.0, 0.0]
    params = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in network.shapes.items()
    }
    symbols = torch.arange(12).reshape(4, 3) % 10
    x = params["embedding"][symbols] + params["positions"]
    logits = (x + x @ params["w"]) @ params["head"] + params["b"]
    targets = (symbols + 1) % 10
    close(
        network.loss_of(params, Batch(symbols, targets)),
        functional.cross_entropy(logits.flatten(0, 1), targets.flatten()),
    )
    several = Network((Embedding(10, 4), Dense(10, "head")), inputs=3, tokens=True)
    head = torch.randn(12, 10, generator=torch.Generator().manual_seed(2))
    expected = functional.cross_entropy(params["embedding"][symbols].flatten(1) @ head, targets[:, 0])
    close(several.loss_of({**params, "head": head}, Batch(symbols, targets[:, 0])), expected)
    values, line = torch.randn(4, 2), perceptron((3, 2), "relu", "squared_error")
    weights = {"w0": torch.randn(3, 2), "b0": torch.randn(2)}
    rows = torch.randn(4, 3)
    expected = functional.mse_loss(rows @ weights["w0"] + weights["b0"], values)
    close(line.loss_of(weights, Batch(rows, values)), expected)


@pytest.mark.parametrize(
    ("layers", "fields", "message"),
    [
        ((), {}, "layers, inputs, places: expected layers and positive numbers"),
        ((Dense(0, "w"),), {}, "expected layers and positive numbers"),
        ((Dense(3, "w"),), {"tokens": True}, r"layers\[0\]: expected an embedding first"),
        ((Dense(3, "w"), Embedding(3, 3)), {}, r"layers\[1\]: expected an embedding first"),
        ((Branch(), Dense(3, "w"), Join()), {}, r"layers\[2\]: expected width and places of a branch"),
        ((Join(),), {}, r"layers\[0\]: expected width and places of a branch"),
        ((Branch(),), {}, "layers: expected a join for every branch, 1 have none"),
        ((Convolution(2, "k", "b"),), {"places": 8}, r"layers\[0\]: expected a square of places"),
        ((Pool("max"),), {"places": 9}, r"layers\[0\]: expected an even square of places"),
        ((Attention(2),), {}, r"layers\[0\]: expected a width of 3 times all heads"),
        ((Dense(3, "w"),), {"places": 4, "loss": "squared_error"}, "loss: expected one place at the end"),
    ],
)
def test_layers_that_do_not_fit_are_named(layers: tuple[Layer, ...], fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Network(layers, **{"inputs": 4, **fields})  # type: ignore[arg-type]
