"""lopt.meta_train: tasks of one's own give what the same built-in tasks give; a meta-gradient; callbacks; errors."""

import doctest
import importlib
import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

import lopt
from lopt import Theta
from lopt.meta import inner, pairs
from lopt.meta import unroll as torch_unroll
from lopt.meta.config import MetaTrainConfig, Phase
from lopt.meta.executors import LocalProcesses
from lopt.meta.metrics import read_metrics
from lopt.meta.pairs import Shared
from lopt.meta.recipes import recipe
from lopt.meta.units import pack
from lopt.meta.unroll import Run
from lopt.rule import unflatten
from lopt.tasks import Batch, OwnTasks, Task, TaskDistribution, check_task, from_module
from lopt.tasks.seeds import generator, minibatch_key, minibatch_rows
from lopt.tasks.synthetic import Perceptron
from lopt.tasks.task import SplitName

#: Seconds, not hours.
QUICK: dict[str, Any] = {
    "inner_steps": 240,
    "phases": (Phase(1.0, (10, 20), "linear"),),
    "pairs": 4,
    "pairs_per_task": 2,
    "validation_tasks": 1,
    "validation_horizons": (10,),
    "warmup_from_file": 0,
    "average": 0.0,
}


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


def quick_train(*arguments: Any, **changes: Any) -> Theta:
    return lopt.meta_train(*arguments, console=Console(file=io.StringIO()), **{**QUICK, **changes})


# ---- The same mathematics, three times -------------------------------------------------------------------------------


class BuiltIn(Perceptron):
    """As built in, for the fused engine, but that every run begins with the same parameters."""

    def init(self, seed: int) -> dict[str, Tensor]:
        return super().init(0)


BUILT_IN = BuiltIn(seed=0, data="teacher", regression=True, inputs=4, hidden=(6,), outputs=2, batch_size=8)


class ByHand(Task):
    def init(self, seed: int) -> dict[str, Tensor]:
        return {name: value.t().contiguous() for name, value in BUILT_IN.init(seed).items()}

    def loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        hidden = torch.relu(batch.inputs @ params["w0"].T + params["b0"])
        return (hidden @ params["w1"].T + params["b1"] - batch.targets).square().mean()

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        return BUILT_IN.batches(seed, split, start)

    transposed = frozenset()


def module() -> nn.Module:
    made = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    made.load_state_dict(dict(zip(made.state_dict(), ByHand().init(0).values(), strict=True)))
    return made


def rows() -> dict[SplitName, Batch]:
    return BUILT_IN.splits


WRAPPED = from_module(module, functional.mse_loss, rows, batch_size=8)


def test_a_task_by_hand_a_wrapped_module_and_a_built_in_one_give_the_same_losses() -> None:
    theta = Theta.load("default")
    thetas = theta.flatten() + 0.02 * torch.randn(3, theta.num_floats, generator=torch.Generator().manual_seed(1))
    assert [inner.uses_engine(task) for task in (BUILT_IN, ByHand(), WRAPPED)] == [True, False, False]
    losses = []
    for task in (BUILT_IN, ByHand(), WRAPPED):
        run = Run(task, seed=5, horizon=24, total_steps=24, loss_every=3)
        state, first = inner.unroll(theta.spec, thetas, run, inner.start(theta.spec, thetas, run), 0, 12)
        _, second = inner.unroll(theta.spec, thetas, run, state, 12, 12)
        losses.append(torch.cat([first.outer, second.outer, first.train, second.train], dim=1))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Theta, Path]]:
    """The last theta and the folder of a run on each, in this process."""
    found = {}
    for name, task in (("built-in", BUILT_IN), ("by hand", ByHand()), ("module", WRAPPED)):
        out = tmp_path_factory.mktemp(name)
        quick_train(None, out, tasks=task)
        found[name] = Theta.load(out / "theta_last.safetensors"), out
    return found


def test_meta_training_on_them_gives_the_same_theta(trained: dict[str, tuple[Theta, Path]]) -> None:
    theta, folder = trained["built-in"]
    start = Theta.load("default").flatten()
    assert float((theta.flatten() - start).abs().max()) > 0.001
    for name in ("by hand", "module"):
        other, its = trained[name]
        for line, same in zip(read_metrics(folder), read_metrics(its), strict=True):
            assert {key: line[key] for key in line if "meta_loss" in key or "validation" in key} == pytest.approx(
                {key: same[key] for key in line if "meta_loss" in key or "validation" in key}, abs=1e-5
            )
        # Adam makes of a component without a gradient, but for rounding, a whole step.
        moved, too = theta.flatten() - start, other.flatten() - start
        assert float(functional.cosine_similarity(moved, too, dim=0)) > 0.999


def test_processes_give_the_same_bits(trained: dict[str, tuple[Theta, Path]], tmp_path: Path) -> None:
    executor = LocalProcesses(1)
    try:
        for name, task in (("by hand", ByHand()), ("module", WRAPPED)):
            quick_train(None, tmp_path / name, tasks=[task], executor=executor)
            found = Theta.load(tmp_path / name / "theta_last.safetensors")
            assert torch.equal(found.flatten(), trained[name][0].flatten())
    finally:
        executor.close()


def test_a_resumed_run_wants_its_tasks_again(trained: dict[str, tuple[Theta, Path]]) -> None:
    theta, folder = trained["module"]
    again = quick_train("own", folder, tasks=[WRAPPED], resume=True)
    assert torch.equal(Theta.load(folder / "theta_last.safetensors").flatten(), theta.flatten())
    assert again.provenance["config"]["tasks"] == {"own": [WRAPPED.config]}
    with pytest.raises(ValueError, match=r"only the names of \['Sequential'\] are known; give the tasks again"):
        lopt.meta_train(None, folder, resume=True)
    with pytest.raises(
        ValueError, match=r"tasks: the run in .* was begun with .*Sequential.* cannot go on with .*ByHan"
    ):
        lopt.meta_train(None, folder, tasks=[ByHand()], resume=True)
    with pytest.raises(ValueError, match=r"seed: the run in .* was begun with 0, cannot go on with 3"):
        lopt.meta_train(None, folder, tasks=[WRAPPED], resume=True, seed=3)
    with pytest.raises(FileExistsError, match="holds a meta-training run already"):
        quick_train(None, folder, tasks=[WRAPPED])


# ---- A meta-gradient -------------------------------------------------------------------------------------------------


class Bowl(Task):
    """``|x - c|^2 / 2`` with noise in ``c`` for the gradients only."""

    def init(self, seed: int) -> dict[str, Tensor]:
        return {"x": torch.tensor([3.0, -2.0, 1.0])}

    def loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return (params["x"] - batch.targets.to(params["x"])).square().sum() / 2

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        for number in itertools.count(start):
            noise = generator(seed, split, number).standard_normal((1, 3), dtype="float32")
            yield Batch(torch.zeros(1, 0), 0.1 * torch.from_numpy(noise) if split == "train" else torch.zeros(1, 3))


def test_a_meta_gradient_is_that_of_finite_differences() -> None:
    """``delta / (2 sigma)`` of the units of an iteration, in float32, against central differences of the meta-loss of
    the float64 reference along the same perturbations."""
    sigma = 1e-3
    config = recipe("own", **{**QUICK, "tasks": OwnTasks([Bowl()]), "sigma": sigma, "pairs": 6, "delta_clip": 10.0})
    theta = Theta.load("default")
    scale = torch.ones(theta.num_floats)
    shared = Shared(config, theta.spec, theta.flatten(), scale, 0, 0, 0)
    for group in range(config.groups):
        deltas = torch.tensor(pairs.unroll_group(shared, (group, None)).deltas)
        eps = pairs.perturbations(config, (0, group), theta.num_floats)
        run = pairs.sample_run(config, 0, 0, group)

        def meta_loss(flat: Tensor, run: Run = run) -> Tensor:
            weights = unflatten(theta.spec, flat)
            state = torch_unroll.start(theta.spec, weights, run)
            _, losses = torch_unroll.unroll(theta.spec, weights, run, state, run.horizon, impl="reference")
            first = float(Bowl().loss(Bowl().init(0), next(Bowl().batches(0, "test"))))
            ratio = torch.clamp(losses.outer / first, 0.0, config.loss_limit)
            points = ratio.shape[1]
            weight = 2.0 * torch.arange(1, points + 1) / (points + 1)
            return (torch.log(ratio + 0.01) * weight).mean(dim=1)

        step, at = 1e-5, theta.flatten().double()
        slopes = (meta_loss(at + step * eps.double()) - meta_loss(at - step * eps.double())) / (2 * step)
        assert float(slopes.abs().max()) > 0.1
        torch.testing.assert_close(deltas.double() / (2 * sigma), slopes, rtol=0.02, atol=0.02)


# ---- Which tasks -----------------------------------------------------------------------------------------------------


def test_own_tasks_are_drawn_equally_often_and_met_again_elsewhere() -> None:
    made = []

    def make(seed: int) -> Task:
        made.append(seed)
        return Bowl()

    own = OwnTasks([BUILT_IN, make, "quadratic", "quadratic"])
    drawn = [own.sample(seed).name.partition("-")[0] for seed in range(400)]
    counts = {name: drawn.count(name) for name in set(drawn)}
    assert counts == {"teacher": pytest.approx(100, abs=25), "Bowl": len(made), "quadratic": pytest.approx(200, abs=30)}
    assert len(set(made)) == len(made)
    assert own.sample(1).config == own.sample(1).config
    own = OwnTasks([BUILT_IN, "quadratic"])
    there = pickle.loads(pickle.dumps(own))
    assert there is pickle.loads(pickle.dumps(own))
    assert there.to_json() == own.to_json() == {"own": [{**BUILT_IN.config, "name": BUILT_IN.name}, "quadratic"]}
    known = OwnTasks.from_json(own.to_json())
    assert known.names == own.names == [BUILT_IN.name, "quadratic"]
    assert pickle.loads(pickle.dumps(known)).to_json() == own.to_json()
    config = recipe("own", inner_steps=1, tasks=own)
    assert MetaTrainConfig.from_json(config.to_json()).to_json() == config.to_json()
    assert config.to_json()["tasks"] == own.to_json()


def test_families_and_mixtures_are_taken_as_well() -> None:
    mixture = TaskDistribution((("quadratic", 1.0),), max_params=50)
    theta = quick_train("tiny", tasks=mixture, init="default")
    assert theta.provenance["config"]["tasks"] == mixture.to_json()
    theta = quick_train("tiny", tasks=["teacher", "mixture"])
    assert theta.provenance["config"]["tasks"] == ["teacher", "mixture"]
    changed = quick_train(recipe("tiny", inner_steps=10), tasks=["mixture"])
    assert changed.provenance["config"]["inner_steps"] == QUICK["inner_steps"]


class Kept:
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.closed = False

    def update(self, metrics: dict[str, Any]) -> None:
        self.lines.append(metrics)

    def close(self) -> None:
        self.closed = True


def test_callbacks_see_every_iteration(tmp_path: Path) -> None:
    kept = Kept()
    quick_train("tiny", tmp_path, callbacks=[kept])
    assert kept.lines == read_metrics(tmp_path)
    assert [line["iteration"] for line in kept.lines] == list(range(len(kept.lines)))
    assert not kept.closed


def test_hours_are_measured(tmp_path: Path) -> None:
    text = io.StringIO()
    some = {name: value for name, value in QUICK.items() if name != "inner_steps"}
    theta = lopt.meta_train("tiny", tasks=[Bowl()], hours=1e-6, console=Console(file=text, width=200), **some)
    assert f"1e-06 h are --inner-steps {theta.provenance['config']['inner_steps']}\n" in text.getvalue()


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": []}, ValueError, "tasks: expected at least one, got none"),
        (
            {"tasks": [Bowl]},
            TypeError,
            "tasks: expected objects of lopt.tasks.Task, .* got the class Bowl; .*from_module",
        ),
        ({"tasks": [nn.Linear(1, 1)]}, TypeError, "task of a seed, .* got a Linear; lopt.tasks.from_module makes"),
        ({"tasks": 3}, TypeError, "tasks: expected a task, a mixture, or a list, got a int"),
        ({"tasks": [Bowl(), "image"]}, ValueError, r"tasks: \['image'\] are no families; expected some of"),
        ({"tasks": [lambda seed: 3]}, TypeError, "tasks: expected .*lambda.* to make a task, it made a int"),
        ({"hours": 1.0}, ValueError, "hours, inner_steps: expected one of them, got both"),
        ({"resume": True}, ValueError, "out: expected the folder of the run that is resumed, got None"),
        ({"config": "Tiny"}, ValueError, "recipe: expected one of"),
        ({"pair": 2}, ValueError, r"recipe: unknown fields \['pair'\]"),
    ],
)
def test_what_is_wrong_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quick_train(**arguments)


def test_what_cannot_travel_is_told_before_it_does() -> None:
    with pytest.raises(pickle.PicklingError, match=r"units: cannot be sent to another process: .*at the top level of"):
        pack(OwnTasks([from_module(lambda: nn.Linear(4, 2), functional.mse_loss, rows)]))


@dataclass
class Unhashable(Bowl):
    size: int = 3


class Broken(Bowl):
    """A task whose methods are exchanged."""

    def __init__(self, **methods: Any) -> None:
        for name, method in methods.items():
            setattr(self, name, method)


def endless(make: Callable[[int], Any], seed: int, split: str, start: int = 0) -> Iterator[Any]:
    return map(make, itertools.count(start))


def batch_of(number: int) -> Batch:
    return Batch(torch.zeros(1, 0), torch.full((1, 3), float(number)))


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (Unhashable(), TypeError, "cannot be hashed; make the dataclass frozen, with eq=False"),
        (
            Broken(init=lambda seed: [torch.ones(3)]),
            TypeError,
            r"expected init\(\) to return a dict of tensors, got a list",
        ),
        (Broken(init=lambda seed: {"x": torch.ones(3).int()}), TypeError, r"return floating tensors, \['x'\] are none"),
        (
            Broken(init=lambda seed: {"x": torch.rand(3)}),
            ValueError,
            r"init\(0\) differs from call to call; draw from a",
        ),
        (
            Broken(batches=lambda seed, split, start=0: iter([batch_of(0)])),
            ValueError,
            r"'train'\) ends after 1; minib",
        ),
        (Broken(batches=partial(endless, lambda number: [number])), TypeError, r"tuples of tensors, .*, got a list"),
        (Broken(batches=partial(endless, lambda _: (torch.rand(1, 3),))), ValueError, "'train'.* differs from call to"),
        (
            Broken(batches=lambda *_: map(batch_of, itertools.count())),
            ValueError,
            r"start=2\) does not begin with minib",
        ),
        (Broken(loss=lambda params, batch: params["x"]), TypeError, r"to return a scalar tensor, .* got shape \(3,\)"),
        (Broken(loss=lambda params, batch: torch.ones(())), ValueError, r"loss\(\) does not depend on the parameters"),
        (
            Broken(loss=lambda params, batch: params["x"].sum() * torch.rand(())),
            ValueError,
            r"loss\(\) differs from cal",
        ),
    ],
)
def test_broken_promises_are_named(task: Task, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_task(task)


def test_tasks_that_keep_them_pass() -> None:
    for task in (BUILT_IN, ByHand(), WRAPPED, Bowl()):
        check_task(task)
    assert (ByHand().name, ByHand().config["name"]) == ("ByHand", "ByHand")
    key = minibatch_key(3, "train")
    assert torch.equal(
        next(WRAPPED.batches(3, "train")).inputs, BUILT_IN.splits["train"].inputs[minibatch_rows(key, 0, 8, 256)]
    )


@pytest.mark.parametrize("name", ["meta.train", "tasks.wrapped"])
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"lopt.{name}"))
    assert result.failed == 0
    assert result.attempted > 0
