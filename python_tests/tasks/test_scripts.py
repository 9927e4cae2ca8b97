"""Scripts as tasks: their losses by hand or against torch's modules, their optimizer lines, the game of dcgan."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn import functional

from lopt.evaluation.model_suites import scripts
from lopt.evaluation.opponents import make_optimizer
from lopt.evaluation.runs import Training
from lopt.evaluation.suites import data_of, unavailable
from lopt.tasks import sample_task, task_from_config
from lopt.tasks.data import catalogue
from lopt.tasks.scripts import SCRIPTS, Script
from lopt.tasks.scripts.game import features, frechet
from lopt.tasks.scripts.graph import graph_of_digits
from lopt.tasks.scripts.script import dropped
from lopt.tasks.scripts.texts import LSTM, spelled
from lopt.tasks.task import SPLITS, Batch, NoisyBatch

TASKS = {task.name: task for task in scripts()}
NAMES = sorted(TASKS)


def need(name: str) -> Script:
    reason = unavailable(TASKS[name])
    if reason is not None:
        pytest.skip(reason)
    return TASKS[name]


def leaves(task: Script, seed: int = 0) -> dict[str, Tensor]:
    return {name: value.requires_grad_() for name, value in task.init(seed).items()}


def test_the_suite_has_every_script_once_on_held_out_data() -> None:
    assert tuple(type(task) for task in TASKS.values()) == SCRIPTS
    assert {data_of(task) for task in TASKS.values()} <= set(catalogue.HELD_OUT)
    assert TASKS["nanogpt"].steps == (360, 1080)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_configs(name: str) -> None:
    task = need(name)
    first, again, other = task.init(1), task_from_config(task.config).init(1), task.init(2)
    assert {key: tuple(value.shape) for key, value in first.items()} == task.shapes
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in task.hidden_weights)
    assert set(task.hidden_weights) <= set(task.shapes)
    for split in ("train", "test"):
        a, b = next(task.batches(3, split)), next(itertools.islice(task.batches(3, split), 1, 2))
        later = next(task.batches(3, split, start=1))
        assert all(torch.equal(x, y) for x, y in zip(b, later, strict=True))
        assert type(a) is type(later)
    losses = [task.loss(first, next(task.batches(3, "train"))) for _ in range(2)]
    assert torch.equal(*losses)  # noise comes with the minibatch
    assert math.isfinite(losses[0].item())


@pytest.mark.parametrize("name", NAMES)
def test_losses_can_be_vmapped(name: str) -> None:
    task = need(name)
    batch, inits = next(task.batches(0, "train")), [task.init(seed) for seed in range(2)]
    stacked = {key: torch.stack([params[key] for params in inits]) for key in inits[0]}
    losses = torch.func.vmap(lambda params: task.loss(params, batch))(stacked)
    expected = torch.stack([task.loss(params, batch) for params in inits])
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_dropped_numbers_are_made_up_for() -> None:
    noise = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for share in (0.2, 0.5):
        x = dropped(torch.ones(200_000), noise, share)
        assert (x == 0).float().mean().item() == pytest.approx(share, abs=0.005)
        assert x.mean().item() == pytest.approx(1.0, abs=0.01)
        assert x.unique().tolist() == pytest.approx([0.0, 1 / (1 - share)])
    assert dropped(noise, None, 0.5) is noise


@pytest.mark.parametrize("name", ["mnist", "gcn", "word_lm"])
def test_only_training_drops(name: str) -> None:
    task = need(name)
    kinds = {split: type(next(task.batches(0, split))) for split in SPLITS}
    assert kinds == {"train": NoisyBatch, "inner_valid": Batch, "outer_valid": Batch, "test": Batch}


# ---- Losses ---------------------------------------------------------------------------------------------------------


def test_nanogpts_embedding_is_its_head() -> None:
    task = need("nanogpt")
    params, batch = leaves(task), next(task.batches(0, "train"))
    assert "head.weight" not in params
    assert task.loss(params, batch).item() == pytest.approx(math.log(128), abs=0.1)
    (gradient,) = torch.autograd.grad(task.loss(params, batch), params["embedding.weight"])
    never = [symbol for symbol in range(128) if not (batch.inputs == symbol).any()]
    assert gradient[never].abs().sum() > 0  # as rows of the head
    assert len(task.hidden_weights) == 4 * 4


def test_makemore_counts_letters_and_one_end() -> None:
    task = need("makemore")
    params, batch = task.init(0), next(task.batches(0, "train"))
    logits = task.run(params, batch.inputs)
    assert logits.shape == (32, 16, 27)
    losses = []
    for row in range(len(batch.inputs)):
        word = batch.inputs[row][batch.inputs[row] > 0].tolist()
        for place, letter in enumerate([*word, 0]):
            losses.append(-torch.log_softmax(logits[row, place], 0)[letter])
    torch.testing.assert_close(task.loss(params, batch), torch.stack(losses).mean())
    words = spelled("topics")
    sets = [{tuple(row) for row in words[split].tolist()} for split in SPLITS]
    assert sum(map(len, sets)) == len(set().union(*sets))
    assert [round(len(words) / sum(map(len, sets)), 1) for words in sets] == [0.7, 0.1, 0.1, 0.1]


def test_lstm_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs, x = LSTM(5), nn.LSTM(5, 5, batch_first=True), torch.randn(3, 7, 5)
    theirs.load_state_dict({f"{name}_l0": value for name, value in ours.state_dict().items()})
    torch.testing.assert_close(ours(x), theirs(x)[0])


def test_mnists_network_by_hand() -> None:
    task = need("mnist")
    params, batch = task.init(0), next(task.batches(0, "test"))
    conv0, conv1, dense0, dense1 = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(4608, 128), nn.Linear(128, 26)
    model = nn.Sequential(conv0, nn.ReLU(), conv1, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), dense0, nn.ReLU(), dense1)
    places = dict(zip(("conv0", "conv1", "dense0", "dense1"), (conv0, conv1, dense0, dense1), strict=True))
    for name, layer in places.items():
        layer.weight.data, layer.bias.data = params[f"{name}.weight"], params[f"{name}.bias"]
    expected = functional.cross_entropy(model(4 * batch.inputs - 1), batch.targets)
    torch.testing.assert_close(task.loss(params, batch), expected)


def test_vae_is_a_bound_by_torchs_distributions() -> None:
    task = need("vae")
    params, batch = task.init(0), next(task.batches(0, "test"))
    assert isinstance(batch, NoisyBatch)
    images = (batch.inputs > 0.5).float().flatten(1)

    def dense(name: str, x: Tensor) -> Tensor:
        return functional.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])

    x = dense("encoder", images).relu()
    code = distributions.Normal(dense("mean", x), (dense("log_variance", x) / 2).exp())
    pixels = dense("decoder1", dense("decoder0", code.mean + code.stddev * batch.noise).relu())
    likelihood = distributions.Bernoulli(logits=pixels).log_prob(images).sum(1)
    divergence = distributions.kl_divergence(code, distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(task.loss(params, batch), (divergence - likelihood).mean(), rtol=1e-4, atol=1e-2)


def test_super_resolution_by_hand() -> None:
    task = need("super_resolution")
    params, batch = task.init(0), next(task.batches(0, "train"))
    small = batch.targets.unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(batch.inputs, small)
    x = small
    for layer, padding in (("conv0", 2), ("conv1", 1), ("conv2", 1), ("conv3", 1)):
        x = functional.conv2d(x, params[f"{layer}.weight"], params[f"{layer}.bias"], padding=padding)
        x = x if layer == "conv3" else x.relu()
    large = x.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2).reshape(16, 1, 32, 32)
    torch.testing.assert_close(task.loss(params, batch), 1e3 * (large - batch.targets).square().mean())
    matrix = params["conv1.weight"].flatten(1)
    torch.testing.assert_close(matrix @ matrix.T, 2 * torch.eye(32), rtol=1e-4, atol=1e-4)


def test_gcn_by_hand() -> None:
    task = need("gcn")
    graph = graph_of_digits()
    assert torch.equal(graph.neighbours, graph.neighbours.T)
    joined = (graph.neighbours > 0).float()
    assert bool(joined.diagonal().all())
    assert joined.sum(1).min() >= 8
    degree = torch.diag(joined.sum(1) ** -0.5)
    torch.testing.assert_close(graph.neighbours, degree @ joined @ degree)
    assert graph.splits["train"].targets.bincount().tolist() == [10] * 10
    nodes = torch.cat([graph.splits[split].inputs for split in SPLITS])
    assert len(nodes.unique()) == len(nodes)
    params, batch = task.init(0), next(task.batches(0, "test"))
    x = (graph.neighbours @ graph.features @ params["dense0.weight"].T).relu()
    scale = graph.neighbours.sum(1, keepdim=True) * params["dense1.bias"]
    logits = graph.neighbours @ x @ params["dense1.weight"].T + scale
    assert not params["dense0.bias"].any()
    expected = functional.cross_entropy(logits[batch.inputs], batch.targets)
    torch.testing.assert_close(task.loss(params, batch), expected, rtol=1e-4, atol=1e-5)


# ---- The game -------------------------------------------------------------------------------------------------------


def test_each_player_follows_its_own_loss() -> None:
    task = need("dcgan")
    params, batch = leaves(task), next(task.batches(0, "train"))
    task.loss(params, batch).backward()
    fakes = task.run(params, "fake", batch.noise)
    real, fake = task.run(params, "judge", batch.inputs), task.run(params, "judge", fakes)
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    cross = functional.binary_cross_entropy_with_logits
    losses = {"discriminator": cross(real, ones) + cross(fake, zeros), "generator": cross(fake, ones)}
    for player, loss in losses.items():
        mine = {name: value for name, value in params.items() if name.startswith(player)}
        gradients = torch.autograd.grad(loss, list(mine.values()), retain_graph=True)
        for value, gradient in zip(mine.values(), gradients, strict=True):
            torch.testing.assert_close(value.grad, gradient, rtol=1e-3, atol=1e-6)
    assert sum(len([name for name in params if name.startswith(player)]) for player in losses) == len(params)


def test_frechet_distance_of_known_distributions() -> None:
    """Independent columns of deviations s and t and means m apart: the sum of m^2 and (s - t)^2."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    rows = (rows - rows.mean(0)) @ torch.linalg.inv(
        torch.linalg.cholesky(rows.T.cov())
    ).T  # exactly mean 0, covariance I
    s, t, m = (
        torch.tensor(values, dtype=torch.float64) for values in ((1.0, 2.0, 0.5), (2.0, 0.5, 0.5), (0.0, 1.0, -2.0))
    )
    found = frechet(rows * s, rows * t + m)
    assert found.item() == pytest.approx((m.square() + (s - t).square()).sum().item(), rel=1e-9)
    assert frechet(rows * s, rows * s).item() == pytest.approx(0.0, abs=1e-9)


def test_what_is_recorded_of_a_game_is_a_distance_of_whole_splits() -> None:
    task: Any = need("dcgan")
    split = task.splits["test"]
    assert split.inputs.shape == (1200, 1, 28, 28)
    assert split.targets.shape == (1200, 32)
    params = task.init(0)
    expected = frechet(features(split.inputs), features(task.run(params, "fake", split.targets)))
    torch.testing.assert_close(task.loss(params, split), expected)
    other = task.splits["outer_valid"]
    same = frechet(features(split.inputs), features(other.inputs))
    assert same < 0.02 * expected


def test_no_validation_loss_of_a_game_is_told() -> None:
    told: list[dict[str, Any]] = []

    class Told(torch.optim.SGD):
        def observe(self, **losses: Any) -> None:
            told.append(losses)

        def step(self, closure: Any = None, *, loss: Any = None) -> Any:
            told.append({"loss": loss})

    for name, expected in (("dcgan", [["loss"]] * 2), ("gcn", [["valid_loss"], ["loss"], ["loss"]])):
        told.clear()
        Training(need(name), lambda params, _: Told(params, lr=0.1), 0, 2).advance(2)
        assert [list(one) for one in told] == expected


# ---- Their optimizers -----------------------------------------------------------------------------------------------


def rates(name: str, steps: int) -> list[list[float]]:
    """Learning rates of every group before each step, with gradients of ones."""
    task = need(name)
    params = leaves(task)
    optimizer = make_optimizer("script", list(params.values()), steps, task=task)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        for param in params.values():
            param.grad = torch.ones_like(param)
        optimizer.step()
        if task.clip is not None:
            norm = torch.stack([param.grad.norm() for param in params.values() if param.grad is not None]).norm()
            assert norm.item() == pytest.approx(task.clip, rel=1e-3)
    return found


def test_nanogpts_line() -> None:
    task = need("nanogpt")
    optimizer = make_optimizer("script", list(leaves(task).values()), 200, task=task)
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(param.ndim == 2 for param in groups[0]["params"])
    assert all(param.ndim == 1 for param in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(task.shapes)
    assert groups[0]["betas"] == (0.9, 0.99)
    found = [first for first, _ in rates("nanogpt", 50)]
    cosine = [1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * t / 49))) for t in range(49)]
    assert found == pytest.approx([5e-4, *cosine])


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("makemore", torch.optim.AdamW, {"lr": 5e-4, "weight_decay": 0.01, "betas": (0.9, 0.99)}),
        ("mnist", torch.optim.Adadelta, {"lr": 1.0}),
        ("vae", torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0}),
        ("gcn", torch.optim.Adam, {"lr": 0.01, "weight_decay": 5e-4}),
        ("super_resolution", torch.optim.Adam, {"lr": 1e-3}),
        ("word_lm", torch.optim.SGD, {"lr": 20.0, "momentum": 0}),
        ("dcgan", torch.optim.Adam, {"lr": 2e-4, "betas": (0.5, 0.999)}),
    ],
)
def test_lines(name: str, kind: type, expected: dict[str, Any]) -> None:
    task = need(name)
    optimizer = make_optimizer("script", list(leaves(task).values()), 10, task=task)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in expected} == expected


def test_rates_of_mnist_and_word_lm() -> None:
    found = [first for (first,) in rates("mnist", 264)]  # 8,400 rows: 131 minibatches of 64 in an epoch
    assert found == pytest.approx([1.0] * 131 + [0.7] * 131 + [0.49] * 2)
    assert rates("word_lm", 2) == [[20.0]] * 2


def test_three_adams() -> None:
    task = need("gcn")
    for trial, factor in enumerate((1.0, 3.0, 1 / 3)):
        optimizer = make_optimizer("script-adams", list(leaves(task).values()), 10, trial, task=task)
        assert type(optimizer) is torch.optim.Adam
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * factor)
        assert optimizer.param_groups[0]["weight_decay"] == 0
    with pytest.raises(ValueError, match="script and script-adams are for tasks of the suite scripts, got"):
        make_optimizer("script", [torch.ones(2, requires_grad=True)], 10, task=sample_task(0, ["mlp"]))
