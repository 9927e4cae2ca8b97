"""Families of small networks: how they start, what they see, and that they are run as layers."""

import dataclasses

import pytest
import torch

from lopt.meta import engine
from lopt.tasks import NETWORK_FAMILIES, sample_task
from lopt.tasks.data import catalogue
from lopt.tasks.families import NetworkFamily
from lopt.tasks.image_tasks import ImageData
from lopt.tasks.network import Attention, Convolution, Embedding, Norm
from lopt.tasks.network_tasks import Blocks, NetworkTask, SmallConvolution, TokenPerceptron, TokenTransformer
from lopt.tasks.streams import StreamData

STREAM = StreamData("copy", vocabulary=20, batch_size=6)


def sampled(family: NetworkFamily, count: int) -> list[NetworkTask]:
    tasks = [sample_task(seed, [family]) for seed in range(count)]
    return [task for task in tasks if isinstance(task, NetworkTask)]


@pytest.mark.parametrize("family", NETWORK_FAMILIES)
def test_half_of_the_networks_start_small_and_half_by_fan_in(family: NetworkFamily) -> None:
    tasks = sampled(family, 200)
    assert len(tasks) == 200
    assert sum(task.small for task in tasks) == pytest.approx(100, abs=4 * 200**0.5 / 2)
    for task in tasks[:20]:
        for name, value in task.init(1).items():
            if value.dim() == 1:
                assert bool((value == float("gain" in name)).all())
            elif value.numel() > 200:
                table = name in ("embedding", "positions")
                fan_in = 1 if table else task.as_matrix(name, value).shape[1]
                expected = 0.02 if task.small else fan_in**-0.5
                assert float(value.std()) == pytest.approx(expected, rel=5 / (2 * value.numel()) ** 0.5)


@pytest.mark.parametrize("family", NETWORK_FAMILIES)
def test_the_engine_runs_every_task_with_the_same_parameters(family: NetworkFamily) -> None:
    for task in sampled(family, 60):
        assert list(task.network.shapes.items()) == list(task.shapes.items())
        problem = engine.problem_of(task)
        assert problem is not None
        assert problem.num_params == task.num_params


def test_token_networks_are_language_models() -> None:
    """What one sees: the last symbols; and every symbol for the other."""
    perceptron = TokenPerceptron(data=STREAM, context=5, blocks=Blocks(2, 8, 2, layer_norm=False))
    transformer = TokenTransformer(data=STREAM, context=5, blocks=Blocks(1, 8, 4), heads=2)
    stream = perceptron.data.symbols("outer_valid")
    for task in (perceptron, transformer):
        inputs, targets = next(task.batches(3, "outer_valid"))
        assert inputs.shape == (6, 5)
        windows = torch.cat([inputs, targets.reshape(6, -1)[:, -1:]], dim=1)
        assert all(any(torch.equal(stream[at : at + 6], window) for at in range(len(stream) - 5)) for window in windows)
    assert torch.equal(targets[:, :-1], inputs[:, 1:])
    assert perceptron.name == "token_perceptron-copy-20-5-2x8-fan-in"
    assert [layer.bias for layer in perceptron.network.layers if isinstance(layer, Norm)] == [None] * 3
    assert not any(name.rpartition(".")[2].startswith("b") for name in perceptron.shapes)
    assert transformer.shapes["block0.attention.w0"] == (8, 24)
    assert transformer.shapes["block0.mlp.w1"] == (32, 8)
    assert sum(isinstance(layer, Attention) for layer in transformer.network.layers) == 1


@pytest.mark.parametrize("family", ["token_perceptron", "token_transformer", "text_transformer"])
def test_a_quarter_of_the_language_models_hide_their_roles(family: NetworkFamily) -> None:
    tasks = sampled(family, 120)
    bare = [task for task in tasks if task.bare]
    assert 16 <= len(bare) <= 44
    assert all(task.name.endswith("-bare") and {kind.role for kind in task.kinds} == {None} for task in bare)
    told = next(task for task in tasks if not task.bare)
    kinds = dict(zip(told.shapes, told.kinds, strict=True))
    matrices = [kind.role for name, kind in kinds.items() if len(told.shapes[name]) >= 2]
    assert (matrices[0], {*matrices[:-1]}, matrices[-1]) == ("input", {"input", "hidden"}, "output")
    fan_in = [kind.fan_in for kind in kinds.values()]
    assert [kind.fan_in for kind in dataclasses.replace(told, bare=True).kinds] == fan_in


def test_a_perceptron_of_tokens_learns_a_chain() -> None:
    """Of order one, as there are more than 32 symbols: down to the entropy of a symbol given the one before."""
    data = StreamData("markov", seed=4, vocabulary=33, train_symbols=50_000, batch_size=64)
    task = TokenPerceptron(data=data, context=2, blocks=Blocks(1, 32, 2))
    params = {name: value.requires_grad_() for name, value in task.init(0).items()}
    optimizer = torch.optim.Adam(params.values(), lr=1e-2)
    for batch, _ in zip(task.batches(0, "train"), range(400), strict=False):
        optimizer.zero_grad()
        task.loss(params, batch).backward()
        optimizer.step()
    batches = task.batches(0, "test")
    with torch.no_grad():
        loss = float(torch.stack([task.loss(params, next(batches)) for _ in range(100)]).mean())
    symbols = data.symbols("train")
    counts = torch.bincount(symbols[:-1] * 33 + symbols[1:], minlength=33**2).reshape(33, 33).double()
    known, alone = (torch.special.entr(part / part.sum()).sum() for part in (counts, counts.sum(dim=1)))
    entropy = float(known - alone)
    assert entropy < float(alone) - 0.5
    assert entropy - 0.05 < loss < entropy + 0.2


def test_images_are_made_small_and_share_their_memory() -> None:
    images = torch.arange(2 * 3 * 40 * 40, dtype=torch.float32).reshape(2, 3, 40, 40) / 10_000
    splits = {split: (images, torch.tensor([0, 1])) for split in ("train", "inner_valid", "outer_valid", "test")}
    catalogue.provide("forty", {split: catalogue.Batch(*rows) for split, rows in splits.items()})
    task = SmallConvolution(data=ImageData("forty"), channels=(4, 6), flat=True)
    assert task.side == 13  # squares of 3 x 3
    rows = task.stored("train").inputs
    assert rows.shape == (2, 169, 3)
    expected = images[1, 2, 3:6, 6:9].mean() * 2 - 1
    torch.testing.assert_close(rows[1, 13 * 1 + 2, 2], expected)
    part = SmallConvolution(data=ImageData("forty", train_share=0.5), channels=(4, 6))
    assert len(part.stored("train").targets) == 1
    assert len(part.stored("test").targets) == 2
    assert part.stored("train").inputs.data_ptr() == rows.data_ptr()


def test_sampled_convolutions_see_at_most_16_pixels() -> None:
    for task in sampled("small_convolution", 100):
        assert isinstance(task, SmallConvolution)
        assert task.side <= 16
        assert 1 <= sum(isinstance(layer, Convolution) for layer in task.network.layers) <= 2
        assert task.norm or not task.small


def test_no_sampled_stream_has_other_symbols_than_its_tables() -> None:
    for task in sampled("token_transformer", 30):
        assert isinstance(task, TokenTransformer)
        first = task.network.layers[0]
        assert isinstance(first, Embedding)
        assert int(task.data.symbols("train").max()) < first.symbols == task.data.vocabulary
