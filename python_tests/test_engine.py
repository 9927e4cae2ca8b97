"""The unroll engine against the same inner run in plain PyTorch (lopt.rule.reference and autograd)."""

import math

import pytest
import torch
from torch import Tensor

from lopt import Theta
from lopt.meta import engine
from lopt.rule import reference, unflatten
from lopt.tasks.seeds import minibatch_rows

STEPS = 50
KEYS = (11, 2**63 + 7, 13)
VALID_BATCHES = 3  # a validation loss is the mean over so many
CASES = [  # preset, activation, loss, hidden widths, total_steps
    ("compact", "relu", "softmax", (16,), 0),
    ("compact", "tanh", "squared_error", (8, 24), STEPS),
    ("compact", "gelu", "softmax", (), STEPS),
    ("compact", "gelu", "squared_error", (9, 17, 5, 8), 0),
    ("compact", "relu", "squared_error", (16, 16, 16), STEPS),
    ("paper", "tanh", "softmax", (33, 3), 0),
    ("paper", "gelu", "squared_error", (9, 17, 5, 8), 0),
    ("paper", "relu", "squared_error", (16,), 0),
]


def make_problem(activation: str, loss: str, hidden: tuple[int, ...], batch: int = 16) -> engine.Problem:
    generator = torch.Generator().manual_seed(1)
    data = []
    for rows in (100, 40, 60):
        inputs = torch.randn(rows, 12, generator=generator)
        labels = torch.randint(5, (rows,), generator=generator)
        values = torch.randn(rows, 5, generator=generator)
        data.append((inputs, labels if loss == "softmax" else values))
    return engine.Problem((12, *hidden, 5), activation, loss, batch, tuple(data))


def initial_params(problem: engine.Problem) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    parts = []
    for fan_in, fan_out in zip(problem.sizes[:-1], problem.sizes[1:], strict=True):
        parts += [torch.randn(fan_in * fan_out, generator=generator) / math.sqrt(fan_in), torch.zeros(fan_out)]
    return torch.cat(parts)


def torch_unroll(
    theta: Theta, problem: engine.Problem, init: Tensor, steps: int, total_steps: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters after `steps`, outer_valid losses, train losses."""
    spec, weights = theta.spec, theta.to(dtype=dtype).tensors
    layers = list(zip(problem.sizes[:-1], problem.sizes[1:], strict=True))
    shapes = [shape for a, b in layers for shape in ((a, b), (b,))]
    params = [
        part.reshape(shape).to(dtype)
        for part, shape in zip(init.split([math.prod(shape) for shape in shapes]), shapes, strict=True)
    ]
    activation = {"relu": torch.relu, "tanh": torch.tanh, "gelu": torch.nn.functional.gelu}[problem.activation]
    criterion = {"softmax": torch.nn.functional.cross_entropy, "squared_error": torch.nn.functional.mse_loss}

    def loss(params: list[Tensor], split: int, step: int) -> Tensor:
        inputs, targets = problem.data[split]
        rows = torch.from_numpy(minibatch_rows(KEYS[split], step, problem.batch, len(inputs)))
        x, y = inputs[rows].to(dtype), targets[rows]
        for layer in range(len(layers)):
            x = x @ params[2 * layer] + params[2 * layer + 1]
            x = activation(x) if layer + 1 < len(layers) else x
        return criterion[problem.loss](x, y if problem.loss == "softmax" else y.to(dtype))

    state = reference.init_state(spec, weights, params)
    outer, train = [], []
    for step in range(steps):
        if step % 10 == 0:
            valid = torch.stack([loss(params, 1, step // 10 * VALID_BATCHES + i) for i in range(VALID_BATCHES)])
            state = reference.observe_valid(spec, state, valid.mean())
        grads, value = torch.func.grad_and_value(lambda p, s=step: loss(p, 0, s))(params)
        params, state, _ = reference.update(spec, weights, state, params, grads, value, total_steps=float(total_steps))
        train.append(value)
        outer.append(loss(params, 2, step))
    return torch.cat([param.reshape(-1) for param in params]), torch.stack(outer), torch.stack(train)


def engine_unroll(theta: Theta, problem: engine.Problem, init: Tensor, windows: list[int], total_steps: int = 0):
    flat = theta.flatten()
    run = engine.EngineRun(0, 0, engine.start(theta.spec, problem, flat, init), KEYS, total_steps)
    parts = [
        engine.unroll(theta.spec, flat[None], [problem], [run], steps, valid_batches=VALID_BATCHES) for steps in windows
    ]
    outer, train = (torch.cat([part[i][0] for part in parts]) for i in (0, 1))
    return engine.params_of(theta.spec, problem, run.state).clone(), outer, train


@pytest.mark.parametrize(("preset", "activation", "loss", "hidden", "total_steps"), CASES)
def test_equals_the_torch_unroll(preset, activation, loss, hidden, total_steps):
    """Parameters and losses within 1e-5 after 50 steps, or three times the distance of float32 PyTorch from float64.

    That is more for `paper`, whose LSTM sees the sign of a mean: the mean gradient of a softmax layer's bias is zero
    but for rounding; and for `compact` where the validation loss stands still, as its rise counts hundredfold.
    """
    theta = Theta.init_adam(preset)
    theta = theta.unflatten(theta.flatten() + 0.01 * torch.randn(theta.num_floats, generator=torch.manual_seed(3)))
    problem = make_problem(activation, loss, hidden)
    init = initial_params(problem)
    params, outer, train = engine_unroll(theta, problem, init, [STEPS], total_steps)
    in_float32 = torch_unroll(theta, problem, init, STEPS, total_steps, torch.float32)
    in_float64 = torch_unroll(theta, problem, init, STEPS, total_steps, torch.float64)
    moved = (params - init).abs().max()
    assert moved > 0.02
    for ours, single, double in zip((params, outer, train), in_float32, in_float64, strict=True):
        tolerance = max(1e-5, 3 * (single - double).abs().max().item())
        assert (ours - single).abs().max() <= tolerance
        assert (ours - double).abs().max() <= tolerance


@pytest.mark.parametrize("preset", ["compact", "paper"])
def test_windows_of_any_length_give_the_same_bits(preset):
    theta, problem = Theta.init(preset, seed=1), make_problem("relu", "softmax", (16,))
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (12, 1, 1, 1, 1, 1, 5)}, "sizes: expected 2 to 6"),
        ({"activation": "elu"}, "activation, loss"),
        ({"batch": 0}, "batch"),
        ({"sizes": (11, 5)}, "train inputs: expected float32"),
        ({"sizes": (12, 4)}, "labels from 0 to 3"),
    ],
)
def test_bad_problems_are_named(change, message):
    good = make_problem("relu", "softmax", ())
    fields = {"sizes": good.sizes, "activation": "relu", "loss": "softmax", "batch": 16, "data": good.data}
    with pytest.raises(ValueError, match=message):
        engine.Problem(**{**fields, **change})


def test_params_are_views_of_the_state():
    theta, problem = Theta.init("paper"), make_problem("relu", "softmax", (16,))
    init = initial_params(problem)
    state = engine.start(theta.spec, problem, theta.flatten(), init)
    assert torch.equal(engine.params_of(theta.spec, problem, state), init)
    assert unflatten(theta.spec, theta.flatten())["mlp.b1"].shape == (32,)
