"""Networks of every layer for the unroll engine, with data and parameters."""

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from lopt import Theta
from lopt.meta import engine
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

STEPS = 50
KEYS = (11, 2**63 + 7, 13)
VALID_BATCHES = 3  # a validation loss is the mean over so many
SYMBOLS = 11


def block(number: int, width: int, hidden: int, rms: bool, activation: str) -> tuple[Layer, ...]:
    """``x + W1 f(W0 norm(x))``"""
    name = f"block{number}."
    norm = Norm(f"{name}gain", None if rms else f"{name}bias")
    inside = (norm, Dense(hidden, f"{name}w0", f"{name}b0"), Activate(activation), Dense(width, f"{name}w1"))
    return (Branch(), *inside, Join())


def attention(number: int, width: int, heads: int) -> tuple[Layer, ...]:
    """``x + W1 attention(W0 norm(x))``"""
    name = f"attention{number}."
    inside = (Norm(f"{name}gain"), Dense(3 * width, f"{name}w0"), Attention(heads), Dense(width, f"{name}w1"))
    return (Branch(), *inside, Join())


def perceptron_network(activation: str, loss: str, hidden: tuple[int, ...]) -> Network:
    return perceptron((12, *hidden, 5), activation, loss)


def token_network(*layers: Layer, inputs: int = 1, places: int = 1, width: int = 6) -> Network:
    return Network((Embedding(SYMBOLS, width), *layers, Dense(SYMBOLS, "head")), inputs, places, tokens=True)


def image_network(*layers: Layer, side: int = 8, channels: int = 1, loss: str = "softmax") -> Network:
    return Network((*layers, Dense(5, "w", "b")), channels, side * side, loss=loss)


def convolution(number: int, channels: int) -> Convolution:
    return Convolution(channels, f"conv{number}", f"shift{number}")


#: Every kind of layer, with widths above and below those of vectors.
NETWORKS: dict[str, Network] = {
    "perceptron": perceptron_network("tanh", "squared_error", (9, 17)),
    "embedding alone": token_network(inputs=3),
    "layer norm": token_network(Dense(20, "w"), *block(0, 20, 33, False, "gelu"), Norm("gain", "bias"), inputs=4),
    "rms norm": token_network(
        Dense(7, "w", "b"), *block(0, 7, 16, True, "tanh"), *block(1, 7, 5, True, "relu"), Norm("gain"), inputs=8
    ),
    "branch in a branch": token_network(Branch(), *block(0, 6, 8, False, "gelu"), Activate("tanh"), Join()),
    "places": token_network(Positions(), *block(0, 17, 20, False, "relu"), places=6, width=17),
    "one convolution": image_network(convolution(0, 5), Activate("relu"), Mean()),
    "two convolutions": image_network(
        convolution(0, 6), Activate("gelu"), Pool("max"), convolution(1, 18), Activate("tanh"), Pool("mean"), Flatten()
    ),
    "colours": image_network(
        convolution(0, 3), Norm("gain", "bias"), Activate("relu"), Pool("mean"), convolution(1, 4), Pool("max"),
        convolution(2, 2), Mean(), side=12, channels=3, loss="squared_error",
    ),
    "residual convolution": image_network(
        convolution(0, 4), Branch(), Activate("relu"), convolution(1, 4), Join(), Mean(), side=3
    ),
    "one head": token_network(Positions(), *attention(0, 6, 1), Norm("gain"), places=5),
    "three heads": token_network(
        Positions(), *attention(0, 12, 3), *block(0, 12, 20, True, "gelu"), *attention(1, 12, 2), places=19, width=12
    ),
}  # fmt: skip


def make_data(network: Network) -> tuple[tuple[Tensor, Tensor], ...]:
    generator = torch.Generator().manual_seed(1)
    data = []
    for rows in (100, 40, 60):
        if network.tokens:
            data.append((torch.randint(SYMBOLS, (rows,), generator=generator), torch.empty(0)))
            continue
        inputs = torch.randn(rows, network.places * network.inputs, generator=generator)
        labels = torch.randint(5, (rows,), generator=generator)
        values = torch.randn(rows, 5, generator=generator)
        data.append((inputs, labels if network.loss == "softmax" else values))
    return tuple(data)


def make_problem(
    activation: str = "relu", loss: str = "softmax", hidden: tuple[int, ...] = (16,), batch: int = 16
) -> engine.Problem:
    network = perceptron_network(activation, loss, hidden)
    return engine.Problem(network, batch, make_data(network))


def initial_params(problem: engine.Problem) -> Tensor:
    """Weights of a size at which no layer is idle; gains and biases that are not what they usually start as."""
    generator = torch.Generator().manual_seed(2)
    parts = []
    for shape in problem.network.shapes.values():
        values = torch.randn(shape, generator=generator)
        fan_in = math.prod(shape[1:]) if len(shape) == 4 else shape[0]
        parts.append(values / math.sqrt(fan_in) if len(shape) > 1 else 0.1 * values)
    gains = [1.0 if "gain" in name else 0.0 for name in problem.network.shapes]
    return torch.cat([(part + gain).reshape(-1) for part, gain in zip(parts, gains, strict=True)])


def separate(problem: engine.Problem, flat: Tensor) -> list[Tensor]:
    shapes = list(problem.network.shapes.values())
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def engine_unroll(
    theta: Theta,
    problem: engine.Problem,
    init: Tensor,
    windows: Sequence[int],
    total_steps: int = 0,
    *,
    backends: Sequence[str] = ("cpu",),
    averaged: bool = False,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters after all windows, outer_valid losses, train losses; by these back ends in turn."""
    flat = theta.flatten()
    state = engine.start(theta.spec, problem, flat, init)
    settings = {"valid_batches": VALID_BATCHES, **settings}
    parts = []
    for steps, backend in zip(windows, cycle(backends), strict=False):
        state = state.to(engine.device_of(backend))
        run = engine.EngineRun(0, 0, state, KEYS, total_steps, averaged)
        parts.append(engine.unroll(theta.spec, flat[None], [problem], [run], steps, **settings, backend=backend))
    outer, train = (torch.cat([part[i][0] for part in parts]) for i in (0, 1))
    return engine.params_of(theta.spec, problem, state).cpu().clone(), outer, train
