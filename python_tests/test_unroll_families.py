"""The torch unroll on tasks of every family: batched against single, kernels against reference, memory, devices."""

import dataclasses
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lopt import LearnedOptimizer, Theta
from lopt.benchmark.unroll import TORCH_TASKS
from lopt.meta import inner
from lopt.meta.unroll import Run, RunState, activation_bytes, bytes_per_run, start, unroll
from lopt.rule import PRESETS, unflatten
from lopt.rule.matrices import matrices_of
from lopt.tasks import FAMILIES, NETWORK_FAMILIES, SAMPLED_FAMILIES, sample_task
from lopt.tasks.families import with_batch_size
from lopt.tasks.synthetic import Perceptron
from lopt.tasks.task import Batch, Task, map_tensors

THETA = Theta.init_adam("compact")
SPEC = THETA.spec

#: A small task of each family whose runs do not amplify rounding: with others, two runs under the same theta differ by
#: 1e-3 after 20 steps, because gradients that are exactly zero in theory become steps of ordinary size.
SEEDS: dict[str, int] = {**TORCH_TASKS, "teacher": 0, "word_rnn_language_model": 46}
SLOW = ("word_rnn_language_model", "rnn_text_classification", "transformer_language_model", "vit")


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


def population(rows: int) -> Tensor:
    """``[rows, P]`` thetas around Adam."""
    noise = torch.randn(rows, THETA.num_floats, generator=torch.Generator().manual_seed(1))
    return THETA.flatten() + 0.02 * noise


def small_task(family: Any) -> Task:
    return with_batch_size(sample_task(SEEDS[family], [family]), 8, 8)


def largest_error(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Relative to the largest parameter of a tensor, where that is above 1.

    Without the biases of attention's keys: they change no loss, so that their gradients are rounding and nothing else.
    """
    errors = [
        float(((a[name] - b[name]).abs() / a[name].abs().amax().clamp_min(1.0)).max())
        for name in a
        if not name.endswith("qkv.b0")
    ]
    return max(errors)


def test_all_families_are_here() -> None:
    assert set(SEEDS) == {*SAMPLED_FAMILIES, "noisy_quadratic", "teacher"}


@pytest.mark.parametrize("family", list(SEEDS))
def test_32_runs_at_once_are_32_single_runs(family: str) -> None:
    """Parameters after 20 steps within 1e-5, losses too; beside mlp some of the 32 are made singly, to save time."""
    task, thetas = small_task(family), population(32)
    run = Run(task, seed=3, horizon=20, total_steps=20, loss_every=10)
    weights = unflatten(SPEC, thetas)
    batched, losses = unroll(SPEC, weights, run, start(SPEC, weights, run), 20)
    rows = range(0, 32, 1 if family == "mlp" else 15 if family in SLOW else 6)
    moved = max(float((x[0] - task.init(3)[name]).abs().max()) for name, x in batched.params.items())
    assert moved > 5e-3  # what an error of 1e-5 is to be compared with
    for row in rows:
        one = {name: value[row : row + 1] for name, value in weights.items()}
        single, its_losses = unroll(SPEC, one, run, start(SPEC, one, run), 20)
        assert largest_error(single.params, {name: x[row : row + 1] for name, x in batched.params.items()}) < 1e-5
        torch.testing.assert_close(losses.outer[row], its_losses.outer[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", list(SEEDS))
def test_kernels_and_reference_are_the_same_unroll(family: str) -> None:
    run = Run(small_task(family), seed=3, horizon=20, total_steps=20, loss_every=5)
    weights = unflatten(SPEC, population(3))
    kernels, losses = unroll(SPEC, weights, run, start(SPEC, weights, run), 20, impl="cpu")
    reference, expected = unroll(SPEC, weights, run, start(SPEC, weights, run), 20, impl="reference")
    assert largest_error(reference.params, kernels.params) < 1e-5
    for ours, theirs in zip(losses, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(kernels.optimizer[:2], reference.optimizer[:2], strict=True):
        for name in () if "block0.qkv.b0" in kernels.params else ours._fields:
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-3, atol=1e-3)


def spectral(rows: int) -> dict[str, Tensor]:
    """Thetas around the beginning of ``spectral``, with gates from shut to open."""
    theta = Theta.init_adam("spectral")
    noise = torch.randn(rows, theta.num_floats, generator=torch.Generator().manual_seed(1))
    weights = unflatten(theta.spec, theta.flatten() + 0.02 * noise)
    weights["gate.b"] -= torch.linspace(0.0, 1.2, rows)
    return weights


@pytest.mark.parametrize("family", ["conv_fc", "teacher", "transformer_language_model", "rnn_text_classification"])
def test_directions_of_kernels_and_reference_are_the_same_unroll(family: str) -> None:
    """Matrices of every run, each under a theta of its own; tables have the role that the task says."""
    task, weights, spec = small_task(family), spectral(3), PRESETS["spectral"]
    run = Run(task, seed=3, horizon=15, total_steps=15, loss_every=5)
    kernels, losses = unroll(spec, weights, run, start(spec, weights, run), 15, impl="cpu")
    reference, expected = unroll(spec, weights, run, start(spec, weights, run), 15, impl="reference")
    assert largest_error(reference.params, kernels.params) < 1e-5
    for ours, theirs in zip(losses, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ranks, others = kernels.optimizer.rows.rank, reference.optimizer.rows.rank
    torch.testing.assert_close(ranks, others, rtol=2e-3, atol=1e-5)
    whole = [matrix.whole for matrix in matrices_of(list(task.shapes.values()), task.kinds)]
    assert (ranks != 1.0).any(dim=0).tolist() == whole
    assert any(whole)


@pytest.mark.parametrize("preset", ["compact", "spectral", "paper"])
def test_the_cuda_kernels_do_the_same(preset: str) -> None:
    """Under ``sim``, with a theta for every run; regression, as signs of sums that are zero are rounding."""
    theta = Theta.init_adam(preset)
    noise = torch.randn(3, theta.num_floats, generator=torch.Generator().manual_seed(1))
    weights = unflatten(theta.spec, theta.flatten() + 0.02 * noise)
    task = Perceptron(seed=0, data="teacher", regression=True, inputs=6, hidden=(9, 8), outputs=3, batch_size=8)
    run = Run(task, seed=3, horizon=12, loss_every=4)
    cpu, sim = (unroll(theta.spec, weights, run, start(theta.spec, weights, run), 12, impl=b) for b in ("cpu", "sim"))
    assert largest_error(cpu[0].params, sim[0].params) < 1e-5
    torch.testing.assert_close(cpu[1].outer, sim[1].outer, rtol=1e-5, atol=1e-5)
    assert float(cpu[1].outer[:, -1].std()) > 1e-4


def test_kernels_are_the_learned_optimizer_in_a_plain_loop() -> None:
    task, thetas = small_task("conv_fc"), population(4)
    run = Run(task, seed=5, horizon=25, total_steps=25)
    weights = unflatten(SPEC, thetas)
    state, losses = unroll(SPEC, weights, run, start(SPEC, weights, run), 25)
    for row in (0, 3):
        params = {name: value.requires_grad_() for name, value in task.init(5).items()}
        optimizer = LearnedOptimizer(params.values(), THETA.unflatten(thetas[row]), total_steps=25, impl="cpu")
        train, inner_valid = task.batches(5, "train"), task.batches(5, "inner_valid")
        for step in range(25):
            if step % 10 == 0:
                optimizer.observe(valid_loss=task.loss(params, next(inner_valid)).detach())
            optimizer.zero_grad()
            loss = task.loss(params, next(train))
            loss.backward()
            optimizer.step(loss=loss.detach())
            torch.testing.assert_close(losses.train[row, step], loss.detach(), rtol=1e-5, atol=1e-5)
        found = {name: value.detach() for name, value in params.items()}
        assert largest_error(found, {name: value[row] for name, value in state.params.items()}) < 1e-5


@dataclass(frozen=True, kw_only=True)
class Stubborn(Perceptron):
    """A loss that looks at a value, which vmap cannot."""

    def loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        loss = super().loss(params, batch)
        return loss if float(loss.detach()) < 1e9 else loss * 0.0


def test_a_task_that_cannot_be_vmapped_is_looped_over_and_says_so() -> None:
    fields = {"seed": 0, "data": "teacher", "regression": True, "outputs": 3}
    willing, stubborn = Perceptron(**fields), Stubborn(**fields)
    weights = unflatten(SPEC, population(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        results = []
        for task in (willing, stubborn):
            run = Run(task, seed=1, horizon=20, loss_every=10)
            state, first = unroll(SPEC, weights, run, start(SPEC, weights, run), 10)
            results.append((*unroll(SPEC, weights, run, state, 10), first))
    (state, losses, first), (looped, theirs, their_first) = results
    assert len(caught) == 1
    assert f"task {stubborn.name}: its loss cannot be vmapped, so its runs go one by one" in str(caught[0].message)
    assert largest_error(state.params, looped.params) < 1e-5
    torch.testing.assert_close(losses.outer, theirs.outer, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.train, their_first.train, rtol=1e-5, atol=1e-6)


def test_an_error_of_the_loss_itself_is_not_taken_for_one_of_vmap() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Broken(Perceptron):
        def loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
            return batch.inputs @ params["w0"].T

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        _ = Run(Broken(seed=0, data="mixture", inputs=3), seed=0, horizon=1).vectorised


def test_states_travel_and_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled between windows, in groups or together, and a run taken twice stays the same run."""
    task, thetas = small_task("mlp_vae"), population(5)
    run = Run(task, seed=2, horizon=12, loss_every=3)
    whole, losses = inner.unroll(SPEC, thetas, run, inner.start(SPEC, thetas, run), 0, 12)
    monkeypatch.setattr(inner, "MEMORY", 2 * bytes_per_run(SPEC, task))  # groups of 2, 2, 1
    state, first = inner.unroll(SPEC, thetas, run, inner.start(SPEC, thetas, run), 0, 6)
    state = pickle.loads(pickle.dumps(state))
    order = [4, 0, 0]
    after, last = inner.unroll(SPEC, thetas[order], run, inner.select(state, order), 6, 6)
    torch.testing.assert_close(first.train, losses.train[:, :6], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last.train, losses.train[order, 6:], rtol=1e-5, atol=1e-6)
    assert torch.equal(last.outer[1], last.outer[2])
    for name, value in after["params"].items():
        torch.testing.assert_close(value, whole["params"][name][order], rtol=1e-5, atol=1e-5)


def test_memory_of_a_run_is_state_gradients_and_activations() -> None:
    """A linear model: the backward pass keeps its inputs and the log-softmax; state as it is packed."""
    task = Perceptron(seed=0, data="mixture", inputs=50, hidden=(), outputs=4, batch_size=64)
    run = Run(task, seed=0, horizon=5)
    weights = unflatten(SPEC, population(1))
    packed = start(SPEC, weights, run).pack()
    state = sum(4 * x.numel() for x in (*packed["params"].values(), *packed["mom"], *packed["rms"]))
    kept = activation_bytes(task)
    inputs, log_softmax, labels = 4 * 64 * 50, 4 * 64 * 4, 8 * 64
    assert inputs + log_softmax <= kept <= inputs + 2 * log_softmax + labels + 64
    assert bytes_per_run(SPEC, task) == 2 * state + 2 * 4 * task.num_params + 2 * kept
    larger = Perceptron(seed=0, data="mixture", inputs=50, hidden=(), outputs=4, batch_size=128)
    assert activation_bytes(larger) == pytest.approx(2 * kept, rel=0.01)


class _OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of several devices, as a GPU would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor) and x.dim() > 0]
        if len({x.device for x in tensors}) > 1:
            raise RuntimeError(f"{func}: tensors on {[str(x.device) for x in tensors]}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", [*SAMPLED_FAMILIES, *NETWORK_FAMILIES, *FAMILIES])
def test_losses_are_computed_where_parameters_and_minibatches_are(family: Any) -> None:
    """On the meta device: constants of a loss that stay on the CPU would be refused."""
    for seed in range(4):
        task = with_batch_size(sample_task(seed, [family]), 4, 8)
        params, batch = task.init(0), next(task.batches(0, "train"))
        params, batch = map_tensors(lambda x: x.to("meta"), (params, batch))
        for _ in range(2):
            with _OneDevice():
                loss = task.loss(params, batch)
            assert loss.device.type == "meta"
            assert loss.shape == ()


def test_unknown_implementations_are_refused() -> None:
    weights = unflatten(SPEC, population(1))
    run = Run(small_task("mlp"), seed=0, horizon=2)
    with pytest.raises(ValueError, match="impl: expected one of"):
        unroll(SPEC, weights, run, start(SPEC, weights, run), 2, impl="gpu")  # type: ignore[arg-type]
    assert isinstance(RunState.unpack(0, start(SPEC, weights, run).pack()), RunState)


@pytest.mark.parametrize("family", ["token_perceptron", "mlp"])
def test_losses_of_the_average_of_the_iterates(family: str) -> None:
    """By hand, from the parameters after each step; in the engine, too, in windows of any length."""
    task = sample_task(4, (family,)) if family == "token_perceptron" else small_task(family)
    theta = Theta.init_adam("compact")
    thetas = theta.flatten().expand(2, -1) * torch.tensor([[1.0], [1.1]])
    weights = unflatten(theta.spec, thetas)
    plain = Run(task, seed=3, horizon=12, loss_every=3)
    run, state, average = dataclasses.replace(plain, averaged=True), start(theta.spec, weights, plain), {}
    expected = []
    for step in range(12):
        one = dataclasses.replace(plain, loss_every=1)
        state, _ = unroll(theta.spec, weights, one, state, 1)
        for name, value in state.params.items():
            left = min(0.998, (step + 1) / (step + 10)) if step else 0.0
            average[name] = left * average.get(name, value) + (1.0 - left) * value
        if step % 3 == 2:
            batch = next(task.batches(3, "outer_valid", step))
            rows = [task.loss({name: value[row] for name, value in average.items()}, batch) for row in range(2)]
            expected.append(torch.stack(rows))
    _, losses = unroll(theta.spec, weights, run, start(theta.spec, weights, run), 12)
    torch.testing.assert_close(losses.outer, torch.stack(expected, dim=1), rtol=1e-5, atol=1e-6)
    first = inner.unroll(theta.spec, thetas, run, inner.start(theta.spec, thetas, run), 0, 6)
    second = inner.unroll(theta.spec, thetas, run, first[0], 6, 6)
    both = torch.cat([first[1].outer, second[1].outer], dim=1)
    torch.testing.assert_close(both, losses.outer, rtol=1e-5, atol=1e-6)
    own = unroll(theta.spec, weights, plain, start(theta.spec, weights, plain), 12)[1]
    assert not torch.allclose(own.outer, losses.outer, rtol=1e-4)
    torch.testing.assert_close(own.train, losses.train)
