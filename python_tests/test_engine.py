"""The unroll engine against the same inner run in plain PyTorch (lopt.rule.reference and autograd)."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from engine_cases import (
    KEYS,
    NETWORKS,
    STEPS,
    SYMBOLS,
    VALID_BATCHES,
    engine_unroll,
    initial_params,
    make_data,
    make_problem,
    separate,
)
from torch import Tensor

from lopt import Theta, kernels
from lopt.meta import engine
from lopt.rule import reference, unflatten
from lopt.rule.inputs import Shapes
from lopt.rule.matrices import Kind
from lopt.tasks.network import Dense, Network, perceptron
from lopt.tasks.seeds import minibatch_rows
from lopt.tasks.task import Batch

CASES = [  # preset, activation, loss, hidden widths, total_steps
    ("compact", "relu", "softmax", (16,), 0),
    ("compact", "tanh", "squared_error", (8, 24), STEPS),
    ("compact", "gelu", "softmax", (), STEPS),
    ("compact", "gelu", "squared_error", (9, 17, 5, 8), 0),
    ("compact", "relu", "squared_error", (16, 16, 16), STEPS),
    ("spectral", "tanh", "softmax", (16,), 0),
    ("spectral", "tanh", "squared_error", (8, 24), STEPS),
    ("spectral", "gelu", "squared_error", (9, 17, 5, 8), 0),
    ("spectral", "relu", "squared_error", (16, 16, 16), STEPS),
    ("paper", "tanh", "softmax", (33, 3), 0),
    ("paper", "gelu", "squared_error", (9, 17, 5, 8), 0),
    ("paper", "relu", "squared_error", (16,), 0),
]


def minibatch(problem: engine.Problem, split: int, step: int, dtype: torch.dtype) -> Batch:
    network, (data, targets) = problem.network, problem.data[split]
    window = network.places * network.inputs
    count = len(data) - window * network.tokens
    rows = torch.from_numpy(minibatch_rows(KEYS[split], step, problem.batch, count))
    if not network.tokens:
        return Batch(data[rows].to(dtype), targets[rows] if network.loss == "softmax" else targets[rows].to(dtype))
    windows = data[rows[:, None] + torch.arange(window + 1)]
    return Batch(windows[:, :-1], windows[:, 1:] if network.end.places > 1 else windows[:, -1])


def torch_loss(problem: engine.Problem, params: Sequence[Tensor], split: int, step: int) -> Tensor:
    named = dict(zip(problem.network.shapes, params, strict=True))
    return problem.network.loss_of(named, minibatch(problem, split, step, params[0].dtype))


def torch_unroll(
    theta: Theta, problem: engine.Problem, init: Tensor, steps: int, total_steps: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters after `steps`, outer_valid losses, train losses."""
    spec, weights = theta.spec, theta.to(dtype=dtype).tensors
    params = separate(problem, init.to(dtype))
    state = reference.init_state(spec, weights, params)
    kept = params[0].new_zeros(len(params), spec.features.num_stats)
    facts = Shapes.of(spec, [tuple(param.shape) for param in params], params[0], problem.kinds)
    outer, train = [], []
    for step in range(steps):
        if step % 10 == 0:
            first = step // 10 * VALID_BATCHES
            valid = torch.stack([torch_loss(problem, params, 1, first + i) for i in range(VALID_BATCHES)])
            state = reference.observe_valid(spec, state, valid.mean())
        grads, value = torch.func.grad_and_value(lambda p, s=step: torch_loss(problem, p, 0, s))(params)
        params, state, trace = reference.update(
            spec, weights, state, params, grads, value, total_steps=float(total_steps), before=kept, shapes=facts
        )
        kept = trace["kept"] if spec.stats == "lagged" else kept
        train.append(value)
        outer.append(torch_loss(problem, params, 2, step))
    return torch.cat([param.reshape(-1) for param in params]), torch.stack(outer), torch.stack(train)


@pytest.fixture(params=kernels._C.simd_available())
def simd(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every instruction set in turn."""
    selected = kernels._C.simd_selected()
    assert kernels._C.simd_select(request.param)
    yield
    kernels._C.simd_select(selected)


@pytest.mark.usefixtures("simd")
@pytest.mark.parametrize("name", NETWORKS)
def test_losses_and_gradients_are_those_of_autograd(name: str) -> None:
    """Of every tensor in float64, but for rounding: to 1e-5 of its largest entry."""
    problem = engine.Problem(NETWORKS[name], 8, make_data(NETWORKS[name]))
    init = initial_params(problem)
    params = [part.requires_grad_() for part in separate(problem, init.double())]
    for split, step in ((0, 0), (2, 5)):
        expected = torch_loss(problem, params, split, step)
        grads = torch.autograd.grad(expected, params)
        loss, grad = engine.loss_and_grad(problem, init, engine.SPLITS[split], KEYS[split], step)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for tensor, ours, theirs in zip(problem.network.shapes, separate(problem, grad), grads, strict=True):
            assert theirs.abs().max() > 1e-6, tensor
            torch.testing.assert_close(ours.double(), theirs, rtol=0.0, atol=1e-5 * float(theirs.abs().max()))


def check_unroll(theta: Theta, problem: engine.Problem, total_steps: int, slack: float = 0.0) -> None:
    """Parameters and losses after 50 steps.

    Within 1e-5 of float32 PyTorch, or ``slack`` times its distance from float64; within 1e-5 of the latter, or three
    (or ``slack``) times that distance.
    """
    theta = theta.unflatten(theta.flatten() + 0.01 * torch.randn(theta.num_floats, generator=torch.manual_seed(3)))
    init = initial_params(problem)
    params, outer, train = engine_unroll(theta, problem, init, [STEPS], total_steps)
    in_float32 = torch_unroll(theta, problem, init, STEPS, total_steps, torch.float32)
    in_float64 = torch_unroll(theta, problem, init, STEPS, total_steps, torch.float64)
    moved = (params - init).abs().max()
    assert moved > 0.02
    for ours, single, double in zip((params, outer, train), in_float32, in_float64, strict=True):
        rounding = (single - double).abs().max().item()
        assert (ours - single).abs().max() <= max(1e-5, slack * rounding)
        assert (ours - double).abs().max() <= max(1e-5, max(slack, 3.0) * rounding)


@pytest.mark.parametrize(("preset", "activation", "loss", "hidden", "total_steps"), CASES)
def test_perceptrons_equal_the_torch_unroll(preset, activation, loss, hidden, total_steps):
    """Within 1e-5, or five times the distance of float32 PyTorch from float64.

    That is more for `paper`, whose LSTM sees the sign of a mean: the mean gradient of a softmax layer's bias is zero
    but for rounding; and for `compact` where the validation loss stands still, as its rise counts hundredfold.
    """
    check_unroll(Theta.init_adam(preset), make_problem(activation, loss, hidden), total_steps, slack=5.0)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        *(("compact", name) for name in list(NETWORKS)[1:]),
        *(("default", name) for name in ("perceptron", "rms norm", "two convolutions", "three heads")),
    ],
)
def test_networks_equal_the_torch_unroll(start: str, name: str) -> None:
    """Started as Adam; and with the shipped theta, which treats matrices as wholes, by what amplifies rounding."""
    problem = engine.Problem(NETWORKS[name], 8, make_data(NETWORKS[name]))
    if start == "compact":
        check_unroll(Theta.init_adam(start), problem, STEPS)
    else:
        check_unroll(Theta.load(start), problem, STEPS, slack=3.0)


@pytest.mark.parametrize("name", ["perceptron", "rms norm", "two convolutions"])
def test_lagged_statistics_equal_the_torch_unroll(name: str) -> None:
    problem = engine.Problem(NETWORKS[name], 8, make_data(NETWORKS[name]))
    check_unroll(Theta.init_adam("compact").with_spec(stats="lagged"), problem, STEPS, slack=3.0)
    check_unroll(Theta.load("default").with_spec(stats="lagged"), problem, STEPS, slack=3.0)


def test_what_is_known_of_tensors_counts() -> None:
    """The first and the last matrix make other steps where they are known to be hidden ones, in the torch unroll too.

    Within three times its rounding: the direction of a table whose symbols are rare has singular values near zero.
    """
    network = NETWORKS["rms norm"]
    data, theta = make_data(network), Theta.load("default")
    plain = engine.Problem(network, 8, data)
    hidden = engine.Problem(network, 8, data, tuple(kind._replace(role="hidden") for kind in plain.kinds))
    check_unroll(theta, hidden, STEPS, slack=3.0)
    init = initial_params(plain)
    ends = [separate(problem, engine_unroll(theta, problem, init, [STEPS])[0]) for problem in (plain, hidden)]
    apart = {name: float((a - b).abs().max()) for name, a, b in zip(network.shapes, *ends, strict=True)}
    assert min(apart["embedding"], apart["head"]) > 1e-3


@pytest.mark.parametrize("stats", ["current", "lagged"])
@pytest.mark.parametrize("preset", ["compact", "spectral", "paper"])
def test_windows_of_any_length_give_the_same_bits(preset, stats):
    theta, problem = Theta.init(preset, seed=1).with_spec(stats=stats), make_problem("relu", "softmax", (16,))
    init = initial_params(problem)
    whole = engine_unroll(theta, problem, init, [60])
    parts = engine_unroll(theta, problem, init, [1, 9, 13, 37])
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


def test_threads_order_and_company_do_not_matter():
    spec = Theta.init("compact").spec
    theta = torch.stack([Theta.init("compact", seed).flatten() for seed in range(3)])
    problems = [make_problem("relu", "softmax", (16,)), make_problem("tanh", "squared_error", (8, 24))]

    def run(order: list[tuple[int, int]], threads: int) -> dict[tuple[int, int], Tensor]:
        runs = [
            engine.EngineRun(p, t, engine.start(spec, problems[p], theta[t], initial_params(problems[p])), KEYS)
            for p, t in order
        ]
        outer, _ = engine.unroll(spec, theta, problems, runs, 30, num_threads=threads)
        return {key: outer[i] for i, key in enumerate(order)}

    order = [(p, t) for p in range(2) for t in range(3)]
    expected = run(order, 1)
    for other in (run(order[::-1], 2), run(order[:2], 1)):
        for key, losses in other.items():
            assert torch.equal(losses, expected[key])


def test_loss_every_only_thins_out():
    theta, problem = Theta.init("compact"), make_problem("relu", "softmax", (16,))
    init, flat = initial_params(problem), theta.flatten()
    thin = engine.EngineRun(0, 0, engine.start(theta.spec, problem, flat, init), KEYS)
    settings = {"valid_batches": VALID_BATCHES, "loss_every": 10}
    outer, train = engine.unroll(theta.spec, flat[None], [problem], [thin], 50, **settings)
    _, all_outer, all_train = engine_unroll(theta, problem, init, [50])
    assert torch.equal(outer[0], all_outer[9::10])
    assert torch.equal(train[0], all_train)


def test_a_diverged_run_ends_and_stays_ended():
    theta = Theta.init_adam("compact").with_spec(step_multiplier=1e30)
    problem = make_problem("relu", "squared_error", (16,))
    flat = theta.flatten()
    run = engine.EngineRun(0, 0, engine.start(theta.spec, problem, flat, initial_params(problem)), KEYS)
    outer, train = engine.unroll(theta.spec, flat[None], [problem], [run], 20)
    assert torch.isfinite(train[0, 0])
    assert torch.isnan(outer[0, -1])
    assert torch.isnan(train[0, -1])
    later, _ = engine.unroll(theta.spec, flat[None], [problem], [run], 5)
    assert not torch.isfinite(later).any()


def test_bad_problems_are_named() -> None:
    good, tokens = make_problem(), NETWORKS["rms norm"]
    deep = perceptron((12, *[4] * engine.MAX_LAYERS, 5), "relu")
    symbols = (torch.zeros(8, dtype=torch.int64), torch.empty(0))
    images = Network((Dense(5, "w"),), inputs=3, places=4)
    for network, batch, data, message in (
        (deep, 16, good.data, f"network: expected at most {engine.MAX_LAYERS} layers, got"),
        (good.network, 0, good.data, "batch, data: expected a positive size"),
        (perceptron((11, 5), "relu"), 16, good.data, r"train inputs: expected float32 \[rows, 11\]"),
        (perceptron((12, 4), "relu"), 16, good.data, "labels from 0 to 3"),
        (perceptron((12, 5), "relu", "squared_error"), 16, good.data, "train targets: expected torch.float32"),
        (images, 16, good.data, "network: expected one place at the end"),
        (tokens, 16, good.data, "train inputs: expected int64 symbols, more than the 8 of a window"),
        (tokens, 16, (symbols,) * 3, "train inputs: expected int64 symbols, more than the 8"),
        (tokens, 16, ((torch.full((9,), SYMBOLS), symbols[1]),) * 3, "train inputs: expected symbols from 0 to 10"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.Problem(network, batch, data)
    with pytest.raises(ValueError, match="kinds: expected one for each of 4 tensors, got 1"):
        engine.Problem(good.network, 16, good.data, (Kind(),))
    with pytest.raises(ValueError, match="params: expected shape"):
        engine.loss_and_grad(good, torch.zeros(3), "train", 0, 0)


def test_params_are_views_of_the_state():
    theta, problem = Theta.init("paper"), make_problem("relu", "softmax", (16,))
    init = initial_params(problem)
    state = engine.start(theta.spec, problem, theta.flatten(), init)
    assert torch.equal(engine.params_of(theta.spec, problem, state), init)
    assert unflatten(theta.spec, theta.flatten())["mlp.b1"].shape == (32,)
