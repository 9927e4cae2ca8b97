"""lopt/tasks/wrapped.py: losses against torch's modules in a plain loop; splits, minibatches, and randomness."""

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lopt.meta.unroll import Run
from lopt.tasks import Task, check_task, from_module
from lopt.tasks.task import SPLITS

INPUTS = torch.randn(120, 5, generator=torch.Generator().manual_seed(0))
LABELS = (INPUTS @ torch.randn(5, 3, generator=torch.Generator().manual_seed(1))).argmax(1)


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def regularised() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 3))


class Items(Dataset[Any]):
    """Rows as dicts, with noise from torch's generator."""

    def __len__(self) -> int:
        return 120

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"x": INPUTS[row] + 0.1 * torch.randn(5), "y": LABELS[row]}


class WithLoss(nn.Module):
    """Returns the loss; counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.calls: Tensor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return functional.cross_entropy(self.linear(x), y) + 0 * self.calls


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, :, None])[0][:, -1])


def data() -> tuple[Tensor, Tensor]:
    return INPUTS, LABELS


def stacked(task: Task, runs: int = 3) -> dict[str, Tensor]:
    """Parameters of several runs."""
    each = [task.init(seed) for seed in range(runs)]
    return {name: torch.stack([params[name] for params in each]) for name in each[0]}


@pytest.mark.parametrize("make", [perceptron, regularised])
def test_training_is_that_of_a_plain_loop(make: Callable[[], nn.Module]) -> None:
    """SGD on the task, and on the module with its own backward pass; the masks of dropout by the same seeds."""
    task = from_module(make, functional.cross_entropy, data, batch_size=16)
    params = {name: value.requires_grad_() for name, value in task.init(3).items()}
    module = make()
    module.load_state_dict({name: value.detach() for name, value in params.items()}, strict=False)
    for batch, _ in zip(task.batches(7, "train"), range(4), strict=False):
        loss = task.loss(params, batch)
        grads = torch.autograd.grad(loss, list(params.values()))
        torch.manual_seed(int(batch.random_seed))
        expected = functional.cross_entropy(module.train()(batch.inputs), batch.targets)
        assert torch.equal(loss, expected)
        module.zero_grad()
        expected.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for param, grad, (name, own) in zip(params.values(), grads, module.named_parameters(), strict=True):
                torch.testing.assert_close(grad, own.grad, rtol=1e-6, atol=1e-8, msg=name)
                param -= 0.1 * grad
                own.copy_(param)


def test_initial_values_are_torchs_for_functions_and_the_modules_own_otherwise() -> None:
    task = from_module(perceptron, functional.cross_entropy, data)
    before = torch.get_rng_state()
    first, second = task.init(0), task.init(1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(not torch.equal(first[name], second[name]) for name in first)
    assert float(first["0.weight"].abs().max()) <= 5**-0.5
    module = perceptron()
    task = from_module(module, functional.cross_entropy, data)
    with torch.no_grad():
        kept = module[0].weight.clone()  # type: ignore[index]
        module[0].weight.zero_()  # type: ignore[index]
    assert torch.equal(task.init(0)["0.weight"], kept)
    assert torch.equal(task.init(1)["0.weight"], kept)
    module[0].requires_grad_(False)  # type: ignore[index]
    task = from_module(module, functional.cross_entropy, data)
    assert list(task.shapes) == ["2.weight", "2.bias"]
    batch = next(task.batches(0, "test"))
    assert torch.equal(task.loss(task.init(0), batch), functional.cross_entropy(module(batch.inputs), batch.targets))


def test_splits_are_given_or_cut_out_of_the_training_rows() -> None:
    def numbers(data: Any) -> dict[str, set[int]]:
        task: Any = from_module(lambda: nn.Linear(1, 1), functional.mse_loss, data, batch_size=50)
        seen = {}
        for split in SPLITS:
            batches = task.batches(0, split)
            seen[split] = {int(row) for _ in range(40) for row in next(batches)[0].view(-1).tolist()}
        return seen

    rows = torch.arange(80.0)[:, None]
    found = numbers((rows, rows))
    assert [len(found[split]) for split in SPLITS] == [40, 10, 20, 10]
    assert set.union(*found.values()) == set(range(80))
    test = -1 - rows[:7]
    found = numbers({"train": (rows, rows), "test": TensorDataset(test, test)})
    assert found["test"] == {-1 - row for row in range(7)}
    assert [len(found[split]) for split in SPLITS[:3]] == [46, 11, 23]
    assert set.union(*(found[split] for split in SPLITS[:3])) == set(range(80))


def collated(rows: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([row[0] for row in rows]) * 2, torch.stack([row[1] for row in rows])


def test_data_of_every_kind() -> None:
    tensors = from_module(perceptron, functional.cross_entropy, data, batch_size=6)
    expected = next(tensors.batches(5, "outer_valid"))
    pairs = list(zip(INPUTS, LABELS, strict=True))
    for same in (
        TensorDataset(*data()),
        DataLoader(TensorDataset(*data()), batch_size=6),
        DataLoader(pairs, batch_size=6, shuffle=True),  # type: ignore[arg-type]
        pairs,
        data(),
    ):
        size = None if isinstance(same, DataLoader) else 6
        found = next(from_module(perceptron, functional.cross_entropy, same, batch_size=size).batches(5, "outer_valid"))
        assert torch.equal(found.inputs, expected.inputs)
        assert torch.equal(found.targets, expected.targets)
    loader = DataLoader(pairs, batch_size=6, collate_fn=collated)  # type: ignore[arg-type]
    found = next(from_module(perceptron, functional.cross_entropy, loader).batches(5, "outer_valid"))
    assert torch.equal(found.inputs, 2 * expected.inputs)
    whole = from_module(WithLoss, None, data, batch_size=6)
    named = from_module(WithLoss, lambda loss: 3 * loss, {"x": INPUTS, "y": LABELS}, batch_size=6)
    params = whole.init(0)
    once = whole.loss(params, next(whole.batches(0, "test")))
    assert float(once) == pytest.approx(float(named.loss(params, next(named.batches(0, "test")))) / 3)
    one = from_module(lambda: nn.Linear(5, 5), lambda y: y.square().mean(), INPUTS)
    batch = next(one.batches(0, "test"))
    assert float(one.loss(one.init(0), batch)) == pytest.approx(
        float(functional.linear(batch[0], *one.init(0).values()).square().mean())
    )
    for task in (whole, named, one):
        check_task(task)
        assert task.num_batches(100) == -(-100 // task.batch_size)  # type: ignore[attr-defined]


def test_a_seed_is_all_that_matters_also_for_data_with_noise() -> None:
    task = from_module(WithLoss, None, Items(), batch_size=4)
    check_task(task)
    copy = pickle.loads(pickle.dumps(task))
    before = torch.get_rng_state()
    for split in SPLITS:
        a, b = next(task.batches(2, split, 3)), next(copy.batches(2, split, 3))
        assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))
        assert torch.equal(task.loss(task.init(1), a), copy.loss(copy.init(1), b))
    assert torch.equal(before, torch.get_rng_state())


CALLS = []


def counted() -> tuple[Tensor, Tensor]:
    CALLS.append(0)
    return data()


def test_a_function_of_data_is_called_once_and_nothing_of_it_travels() -> None:
    task: Any = from_module(perceptron, functional.cross_entropy, counted)
    again = pickle.dumps(task)
    assert len(again) < 1000
    assert pickle.loads(again).rows is task.rows
    assert len(CALLS) == 1


def test_runs_at_once_are_those_one_by_one() -> None:
    """Norms, and dropout with the same mask for all runs; validation without dropout."""
    task = from_module(regularised, functional.cross_entropy, data, batch_size=16)
    run, params = Run(task, seed=0, horizon=1), stacked(task)
    assert run.vectorised
    for split in ("train", "outer_valid"):
        batch = next(task.batches(4, split))  # type: ignore[arg-type]
        at_once = torch.vmap(task.loss, in_dims=(0, None), randomness="same")(params, batch)
        single = [task.loss({name: value[row] for name, value in params.items()}, batch) for row in range(3)]
        torch.testing.assert_close(at_once, torch.stack(single))
    train, other = next(task.batches(4, "train")), next(task.batches(4, "train", 1))
    changed = train._replace(random_seed=other.random_seed)
    assert float(task.loss(task.init(0), train)) != float(task.loss(task.init(0), changed))
    module = regularised().eval()
    module[1].track_running_stats = False  # type: ignore[index, assignment]
    module[1].running_mean = module[1].running_var = None  # type: ignore[index, assignment]
    module.load_state_dict(task.init(0), strict=False)
    assert torch.equal(task.loss(task.init(0), batch), functional.cross_entropy(module(batch.inputs), batch.targets))


@pytest.mark.parametrize("make", [Recurrent, WithLoss])
def test_what_vmap_cannot_do_goes_one_by_one_with_a_warning(make: Callable[[], nn.Module]) -> None:
    task = from_module(make, None if make is WithLoss else functional.cross_entropy, data, batch_size=8, name="mine")
    if make is Recurrent:
        with pytest.warns(UserWarning, match="task mine: its loss cannot be vmapped, so its runs go one by one"):
            assert not Run(task, seed=0, horizon=1).vectorised
    batch = next(task.batches(0, "train"))
    losses = [float(task.loss(task.init(0), batch)) for _ in range(2)]
    assert losses[0] == losses[1]  # nothing is left behind in a buffer
    check_task(task)


def stream() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, None, data), TypeError, "module: expected a module or a function that makes one, got int"),
        ((dict, None, data), TypeError, "module: expected a function that makes a module, it made a dict"),
        ((nn.ReLU, None, data), ValueError, "module: expected parameters that require gradients, got none"),
        ((lambda: nn.LazyLinear(3), None, data), ValueError, "module: some parameters have no shape yet"),
        (
            (perceptron, "mse", data),
            TypeError,
            "loss: expected a function, or None where the module returns it, got str",
        ),
        ((perceptron, None, stream()), TypeError, "data: expected for train tensors, a data set with .* got generator"),
        ((perceptron, None, {"valid": data}), ValueError, r"data: expected a mapping from some of .* got \['valid'\]"),
        ((perceptron, None, (INPUTS, LABELS[:3])), ValueError, r"same length for train, got lengths \[120, 3\]"),
        (
            (perceptron, None, INPUTS[:2]),
            ValueError,
            "data: expected rows for every split, got none for .* of 2 to cut",
        ),
    ],
)
def test_what_is_no_task_is_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_module(*arguments)


def test_losses_that_are_none_are_refused() -> None:
    for loss, got in ((None, r"shape \(32, 3\)"), (lambda a, b: 0.5, "a float")):
        task = from_module(nn.Linear(5, 3), (lambda a, b: a) if loss is None else loss, data)
        with pytest.raises(ValueError, match=rf"loss: expected a scalar tensor, the mean over the rows, got {got}"):
            task.loss(task.init(0), next(task.batches(0, "train")))
    task = from_module(perceptron, functional.cross_entropy, [("text", 3)] * 30)
    with pytest.raises(TypeError, match="data: expected tensors in a minibatch, got a tuple as inputs"):
        next(task.batches(0, "train"))
    with pytest.raises(ValueError, match="batch_size: expected a positive number, got 0"):
        from_module(perceptron, functional.cross_entropy, data, batch_size=0)
