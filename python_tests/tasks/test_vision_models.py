"""Classifiers of images as people write them: shapes, starts, and their layers by hand."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lopt.tasks import task_from_config
from lopt.tasks.image_tasks import ImageData
from lopt.tasks.vision_models import ImageClassifier, ResidualNet, ViT

DATA = ImageData("shapes", variant=1, batch_size=5)  # generated, the same everywhere


def vit() -> ViT:
    return ViT(data=DATA, patch=DATA.shape[1] // 2, layers=2, width=24, heads=3)


def resnet() -> ResidualNet:
    return ResidualNet(data=DATA, channels=(6, 8))


@pytest.mark.parametrize("task", [vit(), resnet()], ids=lambda task: task.family)
def test_seeds_and_configs(task: ImageClassifier) -> None:
    first = task.init(1)
    assert task_from_config(task.config) == task
    assert {name: tuple(value.shape) for name, value in first.items()} == task.shapes
    again, other = task_from_config(task.config).init(1), task.init(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in task.hidden_weights)
    a, b = (next(task.batches(3, "test")) for _ in range(2))
    assert torch.equal(a.inputs, b.inputs)
    params = {name: torch.stack([first[name], other[name]]) for name in first}
    losses = torch.func.vmap(lambda values: task.loss(values, a))(params)
    torch.testing.assert_close(losses, torch.stack([task.loss(first, a), task.loss(other, a)]), rtol=1e-4, atol=1e-5)


def test_vit_shapes_and_start() -> None:
    task = vit()
    channels, side, _ = DATA.shape
    shapes, params = task.shapes, task.init(0)
    assert shapes["embedding.weight"] == (24, channels, side // 2, side // 2)
    assert shapes["positions.weight"] == (4, 24)
    assert not params["head.weight"].any()
    assert task.loss(params, next(task.batches(0, "train"))).item() == pytest.approx(
        math.log(DATA.num_classes), rel=1e-5
    )
    assert params["positions.weight"].std().item() == pytest.approx(0.02, rel=0.3)
    assert {name.split(".")[0] for name in task.hidden_weights} == {"blocks"}
    assert len(task.hidden_weights) == 2 * 4


def test_vit_against_torchs_layers() -> None:
    """Squares by hand, then torch's encoder layer with the same weights; every place sees every other."""
    task = vit()
    generator = torch.Generator().manual_seed(0)
    params = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in task.init(0).items()}
    batch = next(task.batches(0, "train"))
    half = DATA.shape[1] // 2
    places = [(0, 0), (0, half), (half, 0), (half, half)]
    squares = torch.stack([batch.inputs[:, :, y : y + half, x : x + half].flatten(1) for y, x in places], dim=1)
    x = (2 * squares - 1) @ params["embedding.weight"].flatten(1).T + params["embedding.bias"]
    x = x + params["positions.weight"]
    layer = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", batch_first=True, norm_first=True)
    own = {"norm1": "norm0", "norm2": "norm1", "self_attn.out_proj": "out", "linear1": "up", "linear2": "down"}
    for block in range(2):
        state: dict[str, Tensor] = {}
        for name in layer.state_dict():
            if name.startswith("self_attn.in_proj_"):
                state[name] = params[f"blocks.{block}.qkv.{name.removeprefix('self_attn.in_proj_')}"]
            else:
                part, _, kind = name.rpartition(".")
                state[name] = params[f"blocks.{block}.{own[part]}.{kind}"]
        layer.load_state_dict(state)
        x = layer(x)
    x = functional.layer_norm(x, (24,), params["norm.weight"], params["norm.bias"]).mean(dim=1)
    logits = x @ params["head.weight"].T + params["head.bias"]
    expected = functional.cross_entropy(logits, batch.targets)
    torch.testing.assert_close(task.loss(params, batch), expected, rtol=1e-5, atol=1e-5)


def test_resnet_by_hand() -> None:
    task = resnet()
    params, batch = task.init(0), next(task.batches(0, "train"))

    def norm(x: Tensor, prefix: str) -> Tensor:
        centred = x - x.mean(dim=(0, 2, 3), keepdim=True)
        scaled = centred / (centred.square().mean(dim=(0, 2, 3), keepdim=True) + 1e-5).sqrt()
        return scaled * params[f"{prefix}.weight"][:, None, None] + params[f"{prefix}.bias"][:, None, None]

    x = norm(functional.conv2d(2 * batch.inputs - 1, params["first.weight"], padding=1), "norm").relu()
    for block, stride in ((0, 1), (1, 2)):
        y = functional.conv2d(x, params[f"blocks.{block}.conv0.weight"], stride=stride, padding=1)
        y = norm(y, f"blocks.{block}.norm0").relu()
        y = norm(functional.conv2d(y, params[f"blocks.{block}.conv1.weight"], padding=1), f"blocks.{block}.norm1")
        if block == 1:
            x = functional.conv2d(x, params["blocks.1.shortcut.0.weight"], stride=2)
            x = norm(x, "blocks.1.shortcut.1")
        x = (x + y).relu()
    logits = x.mean(dim=(2, 3)) @ params["head.weight"].T + params["head.bias"]
    expected = functional.cross_entropy(logits, batch.targets)
    torch.testing.assert_close(task.loss(params, batch), expected, rtol=1e-4, atol=1e-5)
    assert "blocks.0.shortcut.0.weight" not in params
    deviation = params["blocks.1.conv1.weight"].std().item()
    assert deviation == pytest.approx(math.sqrt(2 / (8 * 9)), rel=0.15)
    assert task.hidden_weights == {name for name in params if name.startswith("blocks.") and params[name].ndim == 4}
