"""The opponents, each held to what its authors say of it, with numbers: closed forms, known bounds, published vectors.

golden/opt_list.npz was recorded from the published JAX code of the NAdamW list (num_steps 10): ``start|T``,
``grads{i}|T`` [10, shape] and ``params{i}|T`` after each step, of entries i = 0 and 3 of the list.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lopt import LearnedOptimizer
from lopt.evaluation import opponents
from lopt.evaluation.opponents import (
    FACTORS,
    LRS,
    MUON_LRS,
    OPPONENTS,
    TUNING_FREE,
    evaluating,
    make_optimizer,
    opponent,
)
from lopt.evaluation.runs import state_bytes, train_task
from lopt.evaluation.table import LEARNED
from lopt.evaluation.task_set import ORDER, Adam8p, NAdamW, adam8p_config, nadamw_config
from lopt.tasks import sample_task
from lopt.tasks.image_tasks import ImageData
from lopt.tasks.language_models import Decoder
from lopt.tasks.perceptrons import MLP
from lopt.tasks.pieces import Initialiser
from lopt.tasks.task import SPLITS, Task
from lopt.tasks.text_tasks import TextData

Arrays = dict[str, np.ndarray]
HE = Initialiser("he_normal")
HERE = [name for name, found in OPPONENTS.items() if found.missing is None and not name.startswith("script")]


def need(name: str) -> None:
    reason = OPPONENTS[name].missing
    if reason is not None:
        pytest.skip(reason)


def leaf(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def descend(
    name: str, params: Sequence[Tensor], loss: Callable[[], Tensor], steps: int, trial: int = 0
) -> torch.optim.Optimizer:
    """The optimizer after ``steps`` steps on a loss without noise."""
    optimizer = make_optimizer(name, params, steps, trial)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return optimizer


# ---- The table ------------------------------------------------------------------------------------------------------


def test_budgets() -> None:
    assert {len(found.trials) for found in OPPONENTS.values()} == {1, 3, 8, 14, 1000}
    tuned = [name for name in OPPONENTS if name.endswith("-tuned")]
    assert all(len(OPPONENTS[name].trials) == (8 if "-warmup-" in name else 14) for name in tuned)
    assert sorted(math.log10(lr) for lr in LRS) == pytest.approx([-2.5 + k / 4 for k in range(-3, 5)])
    assert set(TUNING_FREE) == {name for name, found in OPPONENTS.items() if len(found.trials) == 1} - {"script"}
    assert FACTORS[0] == 1.0
    assert sorted(math.log10(f) for f in FACTORS) == pytest.approx([k / 3 for k in range(-6, 8)])
    sizes = [abs(math.log10(f)) for f in FACTORS]
    assert sizes == sorted(sizes)  # a small budget stays near the default
    assert opponent("adam8p@10").trials == tuple(adam8p_config(seed) for seed in range(10))
    assert OPPONENTS["nadamw-list-1"].trials == opponent("nadamw-list@1").trials


@pytest.mark.parametrize("name", ["adm", "adam@0", "adam@2", "adam@", "adam8p@1001", "lopt@1"])
def test_unknown_names_and_budgets(name: str) -> None:
    with pytest.raises(ValueError, match="optimizer: expected"):
        make_optimizer(name, [leaf([1.0])], 10)


def test_unknown_trial() -> None:
    with pytest.raises(ValueError, match="trial: expected 0 to 13 of adam-tuned, got 14"):
        make_optimizer("adam-tuned", [leaf([1.0])], 10, trial=14)
    with pytest.raises(ValueError, match="trial: lopt has only trial 0, got 1"):
        make_optimizer("lopt", [leaf([1.0], torch.float32)], 10, trial=1)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = opponents.Opponent("x", ({},), "no-such-distribution", lambda *_: pytest.fail("not to be built"))
    monkeypatch.setitem(OPPONENTS, "x", absent)
    with pytest.raises(ModuleNotFoundError, match=r"optimizer x: the package no-such-distribution is missing; pip"):
        make_optimizer("x", [leaf([1.0])], 10)


@pytest.mark.parametrize("name", HERE)
def test_same_run_same_bits(name: str) -> None:
    """A quadratic with tensors of several ranks falls, twice by the same bits."""

    def run() -> tuple[list[Tensor], float, float]:
        generator = torch.Generator().manual_seed(1)
        shapes: list[tuple[int, ...]] = [(5, 4), (3, 2, 3, 3), (), (7,)]
        params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

        def loss() -> Tensor:
            return torch.stack([param.square().sum() for param in params]).sum()

        start = loss().item()
        optimizer = descend(name, params, loss, 60)
        with evaluating(optimizer):
            return [param.detach().clone() for param in params], start, loss().item()

    (first, start, end), (second, _, again) = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert end == again
    assert end < start


@pytest.mark.parametrize("name", LEARNED)
def test_learned_is_told_the_steps_or_not(name: str) -> None:
    optimizer = make_optimizer(name, [leaf([1.0], torch.float32)], 77)
    assert isinstance(optimizer, LearnedOptimizer)
    assert optimizer.total_steps == (77 if name in ("lopt", "lopt-blind") else None)


def test_averages_of_the_learned_one() -> None:
    """The same steps as untold; what is recorded is the average that the optimizer keeps."""
    task = small_task()
    made: list[LearnedOptimizer] = []

    def averaged(params: list[Tensor], steps: int) -> torch.optim.Optimizer:
        optimizer = make_optimizer("lopt-averaged", params, steps, task=task)
        assert isinstance(optimizer, LearnedOptimizer)
        made.append(optimizer)
        return optimizer

    curve = train_task(task, averaged, 0, 30, record_every=10)
    plain = train_task(task, lambda p, n: make_optimizer("lopt-untold", p, n, task=task), 0, 30)
    assert curve.batch_losses == plain.batch_losses
    (optimizer,) = made
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, final, iterate in zip(params, curve.params.values(), plain.params.values(), strict=True):
        torch.testing.assert_close(final, optimizer.state[param]["average"])
        torch.testing.assert_close(param.detach(), iterate, rtol=0, atol=0)
        assert not torch.equal(final, iterate)


# ---- torch's ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "lr"), [("adam", 1e-3), ("adamw", 1e-3), ("adam-tuned", 1e-3 * 10 ** (-1 / 3))])
def test_first_step_of_adam_is_the_learning_rate(name: str, lr: float) -> None:
    x = leaf([3.0, -0.2])
    descend(name, [x], lambda: 5 * x.square().sum(), 1, trial=1 if name == "adam-tuned" else 0)
    decay = 0.01 if name == "adamw" else 0.0
    start = torch.tensor([3.0, -0.2], dtype=torch.float64)
    torch.testing.assert_close(x.detach(), start * (1 - lr * decay) - lr * start.sign(), rtol=0, atol=1e-10)


def test_cosine_schedule() -> None:
    """On a loss of slope 1 every Adam step is its learning rate: the path is the sum of half a cosine."""
    x = leaf(0.0)
    descend("adam-cosine-3e-2", [x], lambda: -x, 20)
    expected = sum(0.03 * (1 + math.cos(math.pi * t / 20)) / 2 for t in range(20))
    assert x.item() == pytest.approx(expected, rel=1e-6)


def test_momentum_on_a_quadratic() -> None:
    """SGD with momentum b and step a on x^2 / 2 is ``x_{t+1} = (1 + b - a) x_t - b x_{t-1}``."""
    x = leaf(1.0)
    descend("sgd-tuned", [x], lambda: x.square() / 2, 30)
    before, now = 1.0, 1.0 - 0.01
    for _ in range(29):
        before, now = now, (1 + 0.9 - 0.01) * now - 0.9 * before
    assert x.item() == pytest.approx(now, rel=1e-12)


def test_nadam_looks_ahead() -> None:
    """NAdam's first step, with torch's momentum decay: ``mu_t = .9 (1 - .5 * .96^(t * .004))``."""
    x = leaf(1.0)
    descend("nadam", [x], lambda: x, 1)
    mu = [0.9 * (1 - 0.5 * 0.96 ** (t * 0.004)) for t in (1, 2)]
    ahead = (1 - mu[0]) / (1 - mu[0]) + mu[1] * 0.1 / (1 - mu[0] * mu[1])
    assert x.item() == pytest.approx(1 - 2e-3 * ahead, rel=1e-7)


def test_warmup_then_cosine() -> None:
    """On a loss of slope 1 the path is the sum of the rates: of 40 steps two rise, to a third and two, then cosine."""
    x = leaf(0.0)
    descend("adamw-warmup-tuned", [x], lambda: -x, 40)
    rates = [1 / 3, 2 / 3, *((1 + math.cos(math.pi * t / 38)) / 2 for t in range(38))]
    path = 0.0
    for rate in rates:
        path = path * (1 - LRS[0] * rate * 0.01) + LRS[0] * rate
    assert x.item() == pytest.approx(path, rel=1e-6)


@pytest.mark.parametrize("name", ["adamw-averaged", "adamw-averaged-warmup-tuned"])
def test_averages_of_iterates(name: str) -> None:
    """On a loss of slope 1 an AdamW step is its rate; averages are short at first; training goes on at the iterates."""
    x = leaf([0.0, 5.0], torch.float32)
    optimizer = descend(name, [x], lambda: -x.sum(), 40)
    lr, rising = (1e-3, 0) if name == "adamw-averaged" else (LRS[0], 2)
    now, average = np.array([0.0, 5.0]), np.array([0.0, 5.0])
    for t in range(40):
        rate = lr * min(1.0, (t + 1) / (rising + 1))
        now = now * (1 - rate * 0.01) + rate
        kept = min(0.998, (t + 1) / (t + 10))
        average = kept * average + (1 - kept) * now
    assert x.tolist() == pytest.approx(now.tolist(), rel=1e-5)
    with evaluating(optimizer):
        assert x.tolist() == pytest.approx(average.tolist(), rel=1e-5)
    assert x.tolist() == pytest.approx(now.tolist(), rel=1e-5)
    assert 24 <= state_bytes(optimizer) < 24 + 100  # two moments and the average of two numbers


def test_averages_of_iterates_are_better_on_a_noisy_quadratic() -> None:
    """Adam's constant rate leaves a variance that grows with it; their average has a small part of it."""
    generator = torch.Generator().manual_seed(0)
    x = leaf([3.0] * 500)
    optimizer = make_optimizer("adamw-averaged-warmup-tuned", [x], 2000, LRS.index(max(LRS)))
    for _ in range(2000):
        optimizer.zero_grad()
        x.grad = x.detach() + torch.randn(500, generator=generator, dtype=torch.float64)
        optimizer.step()
    iterate = float(x.detach().square().mean())
    with evaluating(optimizer):
        assert float(x.detach().square().mean()) < 0.3 * iterate


def matrices() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix, a slope for it that is far from orthogonal, a kernel and its slope."""
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(6, 4, generator=generator) @ torch.diag(torch.tensor([1.0, 0.3, 0.1, 0.03]))
    kernel_slope = torch.randn(4, 2, 3, 3, generator=generator)
    kernel = torch.zeros(4, 2, 3, 3, requires_grad=True)
    return torch.zeros(6, 4, requires_grad=True), slope, kernel, kernel_slope


def test_muon_steps_are_orthogonal_matrices() -> None:
    """Singular values of Muon's step lie in .5 to 1.5, its authors say, here times its rate and sqrt(max(1, rows /
    columns)); a kernel is a matrix with a row for each output."""
    w, slope, kernel, kernel_slope = matrices()
    b = torch.zeros(3, requires_grad=True)
    optimizer = descend("muon", [w, kernel, b], lambda: (slope * w).sum() + (kernel_slope * kernel).sum() - b.sum(), 1)
    for step, size in ((w, math.sqrt(6 / 4)), (kernel.flatten(1), 1.0)):
        values = torch.linalg.svdvals(-step.detach() / (0.02 * size))
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.5
    torch.testing.assert_close(b.detach(), torch.full((3,), 3e-4), rtol=1e-5, atol=0)  # AdamW
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]  # both follow the cosine


def test_tuned_muon_is_torchs_with_one_rate() -> None:
    """Three steps of torch's Muon and AdamW, their rates by hand; gradients are of one step, not of all so far."""
    w, slope, kernel, kernel_slope = matrices()
    b = torch.zeros(3, requires_grad=True)

    def loss(w: Tensor, kernel: Tensor, b: Tensor) -> Tensor:
        return (slope * w).sum().exp() + (kernel_slope * kernel).sum().exp() + (b - 1).square().sum()

    descend("muon-warmup-tuned", [w, kernel, b], lambda: loss(w, kernel, b), 3)
    ours = [value.detach().clone() for value in (w, kernel.flatten(1), b)]
    w, _, kernel, _ = matrices()
    params = [w.detach(), kernel.detach().flatten(1), torch.zeros(3)]
    for param in params:
        param.requires_grad_()
    parts = [
        torch.optim.Muon(params[:2], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(params[2:]),
    ]
    for t in range(3):
        for part in parts:
            part.param_groups[0]["lr"] = MUON_LRS[0] * (1 + math.cos(math.pi * t / 3)) / 2
            part.zero_grad()
        loss(params[0], params[1].view(4, 2, 3, 3), params[2]).backward()
        for part in parts:
            part.step()
    for actual, expected in zip(ours, params, strict=True):
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["muon", "muon-warmup-tuned"])
def test_muon_leaves_the_ends_of_a_task_to_adamw(name: str) -> None:
    """Adam's first step has one size; embeddings, positions and head have it, and the matrices in between do not."""
    task = Decoder(data=TextData("markov", vocabulary=128, length=9, batch_size=2), width=16, heads=2)
    assert {part.partition(".")[2] for part in task.hidden_weights if part.startswith("blocks.1")} == {
        f"1.{part}.weight" for part in ("qkv", "out", "up", "down")
    }
    params = {name: value.requires_grad_() for name, value in task.init(0).items()}
    before = task.init(0)
    optimizer = make_optimizer(name, list(params.values()), 100, task=task)
    task.loss(params, next(task.batches(0, "train"))).backward()
    optimizer.step()
    rate = 3e-4 if name == "muon" else MUON_LRS[0] / 6
    for key, value in params.items():
        step = (value.detach() - before[key] * (1 - rate * 0.01)).abs()
        adam = bool(step.max() <= 1.001 * rate) and bool(step.median() > 0.9 * rate or key == "embedding.weight")
        assert adam == (key not in task.hidden_weights), key


def test_muon_sees_matrices_of_tasksets_layout_with_outputs_first() -> None:
    """Wide matrices [in, out] are steps of sqrt(out / in) in size, as if they were transposed."""
    task = MLP(data=ImageData("shapes", batch_size=32), hidden=(8, 32, 8), activation="tanh", initialiser=HE)
    params = {name: value.requires_grad_() for name, value in task.init(0).items()}
    assert task.hidden_weights == {"w1", "w2"}
    optimizer = make_optimizer("muon", list(params.values()), 10, task=task)
    task.loss(params, next(task.batches(0, "train"))).backward()
    optimizer.step()
    for key, size in (("w1", 2.0), ("w2", 1.0)):
        values = torch.linalg.svdvals((params[key].detach() - task.init(0)[key]) / (0.02 * size))
        assert 0.6 < float(values.median()) < 1.3


def test_hidden_weights_of_tasks() -> None:
    expected = {
        "char_rnn_language_model": {"core"},
        "transformer_language_model": {f"block{number}" for number in range(4)},
        "vit": {f"block{number}" for number in range(4)},
    }
    for family, parts in expected.items():
        for seed in range(5):
            task = sample_task(seed, [family])  # type: ignore[list-item]
            assert {name.split(".")[0] for name in task.hidden_weights} <= parts
    assert sample_task(0, ["quadratic"]).hidden_weights == frozenset()


# ---- TaskSet's ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [0, 3])
@pytest.mark.parametrize("name", ["nadamw-list", "nadamw-list-jax"])
def test_list_equals_the_published_code(name: str, entry: int, golden: Callable[[str], Arrays]) -> None:
    arrays = golden("opt_list")
    names = [key.partition("|")[2] for key in arrays if key.startswith("start|")]
    params = [torch.tensor(arrays[f"start|{tensor}"], requires_grad=True) for tensor in names]
    optimizer = make_optimizer(name, params, 10, trial=entry)
    for step in range(10):
        for tensor, param in zip(names, params, strict=True):
            param.grad = torch.tensor(arrays[f"grads{entry}|{tensor}"][step])
        optimizer.step()
        for tensor, param in zip(names, params, strict=True):
            expected = torch.tensor(arrays[f"params{entry}|{tensor}"][step])
            torch.testing.assert_close(param.detach(), expected, rtol=0, atol=2.4e-7)


def test_list_is_the_published_one() -> None:
    """Facts of the published list: a permutation, its first entries, how many warm up."""
    configs = [nadamw_config(seed) for seed in ORDER]
    assert sorted(ORDER) == list(range(1000))
    first = configs[0]
    expected = {"lr": 1.1948335721160095e-3, "beta1": 0.9360043452616368, "beta2": 0.9989497406214962}
    expected |= {"eps": 5.875814422073298e-6, "weight_decay": 1.0141964334059882e-2}
    expected |= {"constant_fraction": 0.747304046223346, "l2": 0.0, "warmup_fraction": 0.0, "min_lr_fraction": 0.0}
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-14)
    assert [i for i in range(10) if configs[i]["nesterov"]] == [1, 6, 7, 8]
    assert [i for i in range(10) if configs[i]["warmup_fraction"] > 0] == [1, 2, 7]
    assert sum(config["warmup_fraction"] > 0 for config in configs) == 516
    assert next(i for i, config in enumerate(configs) if config["l2"] > 0) == 13


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        # 100 steps: warm-up 10 (or the plateau, 40), flat to 40, half a cosine from 1 to .2
        ("min", {0: 0.0, 5: 0.5, 10: 1.0, 40: 1.0, 70: 0.6, 100: 0.2}),
        ("max", {0: 0.0, 5: 0.125, 10: 0.25, 40: 1.0, 70: 0.6, 100: 0.2}),
    ],
)
def test_schedule_of_the_list(warmup: Any, expected: dict[int, float]) -> None:
    config = {**nadamw_config(0), "lr": 1.0, "warmup_fraction": 0.1, "min_lr_fraction": 0.2, "constant_fraction": 0.4}
    optimizer = NAdamW([leaf(0.0)], 100, **config, warmup=warmup)
    (group,) = optimizer.param_groups
    found = {step: optimizer.learning_rate({**group, "step": step}) for step in expected}
    assert found == pytest.approx(expected)


def test_nesterov_decay_and_l2_by_hand() -> None:
    """One step in exact arithmetic of ``grad`` = 2 at ``param`` = 1; the published L2 makes weights grow."""
    x = leaf(1.0)
    options = {"lr": 0.1, "beta1": 0.5, "beta2": 0.75, "eps": 1.0, "nesterov": True, "weight_decay": 0.01, "l2": 0.5}
    options |= {"warmup_fraction": 0.0, "min_lr_fraction": 1.0, "constant_fraction": 0.5}
    optimizer = NAdamW([x], 10, **options)  # type: ignore[arg-type]
    (2 * x).backward()
    optimizer.step()
    grad = 2 - 0.5
    mom, rms = 0.5 * grad, 0.25 * grad**2
    size = 0.1 * math.sqrt(1 - 0.75) / (1 - 0.5)
    expected = 1 - size * ((0.5 * mom + 0.5 * grad) / (math.sqrt(rms) + 1.0) + 0.01)
    assert x.item() == pytest.approx(expected, rel=1e-12)


def test_adam8p_by_hand() -> None:
    """Two steps on the slope 3, written out as in appendix D of the paper."""
    options = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 0.01, "l1": 0.2, "l2": 0.3}
    options |= {"linear_decay": 1e-5, "exponential_decay": 1e-4}
    x = leaf(-2.0)
    optimizer = Adam8p([x], 50, **options)
    mom = rms = 0.0
    value = -2.0
    for t in range(2):
        optimizer.zero_grad()
        (3 * x).backward()
        optimizer.step()
        grad = 3 + 2 * 0.3 * value + 0.2 * math.copysign(1, value)
        mom, rms = 0.8 * mom + 0.2 * grad, 0.9 * rms + 0.1 * grad**2
        at = 10_000 * t / 50
        lr = 0.1 * (1 - 1e-5 * at) * math.exp(-1e-4 * at)
        value -= lr * mom / (1 - 0.8 ** (t + 1)) / (math.sqrt(rms / (1 - 0.9 ** (t + 1)) + 1e-10) + 0.01)
        assert x.item() == pytest.approx(value, rel=1e-12)


def test_adam8p_sampler_stays_in_the_published_ranges() -> None:
    configs = [adam8p_config(seed) for seed in range(200)]
    ranges = {"lr": (1e-8, 1e1), "eps": (1e-10, 1e3), "l1": (1e-8, 1e1), "l2": (1e-8, 1e1)}
    ranges |= {"linear_decay": (1e-7, 1e-4), "exponential_decay": (1e-6, 1e-3)}
    for name, (low, high) in ranges.items():
        logs = np.log([config[name] for config in configs])
        assert np.log(low) <= logs.min()
        assert logs.max() <= np.log(high)
        assert logs.mean() == pytest.approx((np.log(low) + np.log(high)) / 2, abs=0.07 * np.log(high / low))


# ---- Packages -------------------------------------------------------------------------------------------------------


def test_schedule_free_evaluates_the_mean_of_its_iterates() -> None:
    """``x_T = mean of z_1 .. z_T``, at which gradients are taken on the line to z; z moves by normalised gradients."""
    need("schedule-free")
    x, steps, lr = leaf(1.0), 40, 2.5e-3
    optimizer = descend("schedule-free", [x], lambda: x.square(), steps)
    z, mean, rms = 1.0, 1.0, 0.0
    for t in range(1, steps + 1):
        grad = 2 * (0.1 * z + 0.9 * mean)
        rms = 0.999 * rms + 0.001 * grad**2
        z -= lr * grad / (math.sqrt(rms / (1 - 0.999**t)) + 1e-8)
        mean += (z - mean) / t
    with evaluating(optimizer):
        assert x.item() == pytest.approx(mean, rel=1e-9)
    assert x.item() == pytest.approx(0.1 * z + 0.9 * mean, rel=1e-9)  # back in training


def test_prodigy_estimates_the_distance_from_below() -> None:
    """On a convex function its estimate d never exceeds the distance to the solution, and comes near it."""
    need("prodigy")
    distance = 10.0
    x = leaf(distance)
    optimizer = descend("prodigy", [x], lambda: x.abs(), 1000)
    estimate = float(optimizer.param_groups[0]["d"])
    assert distance / 10 < estimate <= distance
    assert abs(x.item()) < 1.0


def test_dog_is_the_distance_over_the_gradients() -> None:
    """``x -= rbar / sqrt(G) g`` with rbar the largest distance from the start and G the sum of squared gradients."""
    need("dog")
    x = leaf([3.0, -1.0])
    descend("dog", [x], lambda: x.square().sum() / 2, 300)
    point, start = np.array([3.0, -1.0]), np.array([3.0, -1.0])
    rbar, total = 1e-6 * (1 + np.linalg.norm(start)), 1e-8
    for _ in range(300):
        rbar, total = max(rbar, np.linalg.norm(point - start)), total + point @ point
        point = point - rbar / math.sqrt(total) * point
    np.testing.assert_allclose(x.detach().numpy(), point, rtol=1e-5, atol=1e-15)
    assert np.linalg.norm(point) < 1e-9


def test_mechanic_does_not_care_about_the_base_learning_rate() -> None:
    """AdamW stays far away with one base learning rate and oscillates with the other; tuned by mechanic both arrive."""
    need("mechanic")

    def end(name: str, lr: float) -> float:
        x = leaf([5.0, -3.0], torch.float32)
        optimizer = make_optimizer(name, [x], 300)
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(300):
            optimizer.zero_grad()
            x.square().sum().backward()
            optimizer.step()
        return x.detach().square().sum().item()

    assert end("adamw", 1e-4) > 33.0
    assert end("mechanic", 1e-4) < 0.1
    assert end("mechanic", 1.0) < 1e-6


def test_prodigy_schedule_free_finds_a_step_size() -> None:
    """It starts at d = 1e-6 and, without any learning rate, brings a quadratic with 10 decades of head room down."""
    need("prodigy-schedule-free")
    x = leaf([1.0, -2.0, 0.5], torch.float32)
    optimizer = descend("prodigy-schedule-free", [x], lambda: x.square().sum(), 800)
    assert float(optimizer.param_groups[0]["d"]) > 1e-3
    with evaluating(optimizer):
        assert float(x.detach().square().sum()) < 0.01 * 5.25


def test_soap_is_adam_in_the_eigenbasis_of_shampoo() -> None:
    """A rotation of the problem rotates its path: Adam's, for one, changes."""
    need("soap")
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    curvature = leaf([[10.0], [3.0], [1.0], [0.3]]).detach()

    def end(name: str, rotation: Tensor) -> Tensor:
        w = leaf([[0.0] * 3] * 4)
        descend(name, [w], lambda: (curvature * (rotation.T @ w - target)).square().sum(), 50)
        return rotation.T @ w.detach()

    def change(name: str) -> float:
        plain, turned = end(name, torch.eye(4, dtype=torch.float64)), end(name, turn)
        return float((plain - turned).norm() / plain.norm())

    assert change("soap") < 0.05
    assert change("adam") > 0.5


def test_shampoo_first_step() -> None:
    """``W -= lr L^-1/4 G R^-1/4`` with ``L = e I + G G^T`` and ``R = e I + G^T G``: for G = U S V^T, about lr U V^T."""
    need("shampoo-tuned")
    slope = torch.tensor([[3.0, 1.0], [0.5, -2.0]])
    w = torch.zeros(2, 2, requires_grad=True)
    descend("shampoo-tuned", [w], lambda: (slope * w).sum(), 1)
    u, _, vt = torch.linalg.svd(slope)
    torch.testing.assert_close(w.detach(), -0.1 * u @ vt, rtol=1e-4, atol=1e-5)


# ---- Runs of any task -----------------------------------------------------------------------------------------------


def small_task() -> Task:
    return sample_task(3, ["mlp"])


def test_run_records_what_a_loop_would() -> None:
    task = small_task()
    curve = train_task(task, lambda p, n: make_optimizer("adam", p, n), 1, 30, record_every=12)
    assert curve.steps == (0, 12, 24, 30)
    assert len(curve.batch_losses) == 30
    assert list(curve.losses) == list(SPLITS)
    params = {name: value.requires_grad_() for name, value in task.init(1).items()}
    optimizer = torch.optim.Adam(params.values(), lr=1e-3)
    stream = task.batches(1, "train")
    for recorded in curve.batch_losses:
        optimizer.zero_grad()
        loss = task.loss(params, next(stream))
        assert loss.item() == recorded
        loss.backward()
        optimizer.step()
    assert all(torch.equal(curve.params[name], value) for name, value in params.items())
    assert curve.times[0] == 0.0
    assert all(a < b for a, b in zip(curve.times, curve.times[1:], strict=False))
    assert not curve.diverged


def test_every_optimizer_starts_at_the_same_losses() -> None:
    task = small_task()
    starts = [
        train_task(task, lambda p, n, name=name: make_optimizer(name, p, n), 0, 2).initial  # type: ignore[misc]
        for name in ("adam", "lopt", "nadamw-list-1")
    ]
    assert starts[0] == starts[1] == starts[2]


def test_run_without_end_is_a_divergence_and_stops() -> None:
    calls = []

    class Explode(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            calls.append(1)
            with torch.no_grad():
                for group in self.param_groups:
                    for param in group["params"]:
                        param.fill_(math.nan)

    curve = train_task(small_task(), lambda p, _: Explode(p), 0, 20, record_every=5)
    assert curve.diverged
    assert len(calls) == 1
    assert curve.steps == (0, 5, 10, 15, 20)
    assert all(math.isnan(value) for values in curve.losses.values() for value in values[1:])


@pytest.mark.parametrize("what", ["param", "grad", "loss"])
def test_an_error_in_a_step_is_divergence_where_something_is_not_finite_or_large(what: str) -> None:
    task = small_task()

    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            (first, *_) = self.param_groups[0]["params"]
            if what == "loss":  # steps far up the hill, and then fails
                if first.grad.abs().max() < 1e3:
                    for param in self.param_groups[0]["params"]:
                        param.data.mul_(1e6)
                    return
            else:
                (first.data if what == "param" else first.grad).fill_(math.nan)
            raise torch.linalg.LinAlgError("no way down")

    curve = train_task(task, lambda p, _: Fails(p, lr=0.1), 0, 8, record_every=4)
    assert curve.diverged
    assert len(curve.batch_losses) == (2 if what == "loss" else 1)
    assert math.isnan(curve.final["train"])


def test_an_error_in_a_step_is_raised_otherwise() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            assert len(self.state) > 0, "out of luck"

    task = small_task()
    message = rf"^Fails on {task.name}, step 0, loss \S+, parameters and gradients finite: AssertionError: out of luck"
    with pytest.raises(RuntimeError, match=message):
        train_task(task, lambda p, _: Fails(p), 0, 20)


@pytest.mark.parametrize(
    ("name", "floats"),
    [("sgd-tuned", 1), ("adam", 2), ("nadamw-list-1", 2), ("adam8p", 2), ("dog", 1), ("schedule-free", 2)],
)
def test_state_bytes(name: str, floats: int) -> None:
    """Four bytes for each number that an optimizer keeps per parameter, and a few for a tensor."""
    need(name)
    x = torch.randn(1000, requires_grad=True)
    optimizer = descend(name, [x], lambda: x.square().sum(), 3)
    assert 4000 * floats <= state_bytes(optimizer) < 4000 * floats + 100
