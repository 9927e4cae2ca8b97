"""What several rules are made of. Accumulators and columns are ``[K, *shape]``, for tensors of any rank.

Source: google/learned_optimization, whose constants these are.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.rule.published.rule import Now, State, Weights

TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)  # steps
GRADIENT_BOUND = 1000.0


def per_decay(decays: Tensor, shape: Sequence[int]) -> Tensor:
    """Decays ``[K]`` as ``[K, 1, ...]``, beside a tensor of that shape."""
    return decays.reshape(-1, *(1 for _ in shape))


def next_mom(mom: Tensor, grad: Tensor, decays: Tensor) -> Tensor:
    """Momenta ``d mom + (1 - d) grad`` ``[K, *shape]``, without bias correction."""
    decay = per_decay(decays, grad.shape)
    return decay * mom + (1.0 - decay) * grad


def next_rms(rms: Tensor, grad: Tensor, decays: Tensor) -> Tensor:
    """Second moments ``d rms + (1 - d) grad^2``, ``d`` within [0, 1]."""
    return next_mom(rms, torch.square(grad), torch.clamp(decays, 0.0, 1.0))


def next_moments(state: State, grad: Tensor, decays: Sequence[Tensor], now: Now, t: int) -> tuple[Tensor, Tensor]:
    """Momenta and second moments of tensor ``t`` as they are stored."""
    return now.stored(t, next_mom(state["mom"], grad, decays[0]), next_rms(state["rms"], grad, decays[1]))


def column_mean(columns: Tensor) -> Tensor:
    """Means over the tensor, of each column: ``[C, *shape]`` -> ``[C, 1, ...]``."""
    return columns.reshape(len(columns), -1).mean(dim=1).reshape(-1, *(1 for _ in columns.shape[1:]))


def normalise(columns: Tensor) -> Tensor:
    """``x rsqrt(1e-5 + mean(x^2))`` of each column."""
    return columns * torch.rsqrt(1e-5 + column_mean(torch.square(columns)))


def tanh_times(step: Tensor, like: Tensor) -> Tensor:
    """``tanh(step / scale - 1)`` for eleven scales from 1 to 1e5."""
    return torch.tanh(step.to(like) / like.new_tensor(TIME_SCALES) - 1.0)


def log_size(x: Tensor, scale: float = 1.0) -> Tensor:
    """``clip(ln(1e-8 + |scale x|), -5, 5) / 2``."""
    return 0.5 * torch.clamp(torch.log(1e-8 + torch.abs(x * scale)), -5.0, 5.0)


def mlp_shapes(sizes: Sequence[int], prefix: str = "mlp.") -> dict[str, tuple[int, ...]]:
    """Weights and biases of an MLP of these widths, the first being its number of inputs."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (width, after) in enumerate(pairwise(sizes), 1):
        shapes[f"{prefix}w{i}"], shapes[f"{prefix}b{i}"] = (width, after), (after,)
    return shapes


def mlp(weights: Weights, columns: Tensor, constant: Tensor | None = None) -> Tensor:
    """The MLP with ReLUs, of every element: columns ``[C, *shape]`` -> outputs ``[O, *shape]``.

    Args:
        constant: more inputs, the same for all elements.
    """
    x = columns.movedim(0, -1)
    if constant is not None:
        x = torch.cat([x, constant.expand(*x.shape[:-1], -1)], dim=-1)
    layers = sum(name.startswith("mlp.w") for name in weights)
    for i in range(1, layers + 1):
        x = x @ weights[f"mlp.w{i}"] + weights[f"mlp.b{i}"]
        x = torch.relu(x) if i < layers else x
    return x.movedim(-1, 0)


def lstm(weights: Weights, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM with gates i, g, f, o and 1 on the forget gate: ``[T, in]``, ``[T, H]`` -> new h and c."""
    i, g, f, o = (torch.cat([x, h], dim=1) @ weights["lstm.w"] + weights["lstm.b"]).chunk(4, dim=1)
    c = torch.sigmoid(f + 1.0) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


# ---- Factored second moments ----------------------------------------------------------------------------------------


def factored_dims(shape: Sequence[int]) -> tuple[int, int] | None:
    """The second largest and the largest dimension, of equal ones the last; None below rank 2."""
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda dim: shape[dim])  # stable
    return order[-2], order[-1]


class Factored(NamedTuple):
    """Second moments of a tensor as means along its two largest dimensions, ``[K, *shape]`` or as broadcast to it.

    Below rank 2 both are the second moments themselves, and ``factors`` has one member.
    """

    state: State
    row: Tensor
    column: Tensor
    factors: tuple[Tensor, ...]

    def precondition(self, x: Tensor) -> Tensor:
        """``x`` times the inverse roots of what is known."""
        for factor in self.factors:
            x = x * factor
        return x

    @property
    def columns(self) -> list[Tensor]:
        """The second moments, and their inverse roots."""
        both = [self.row, self.column]
        return [*both, *(torch.rsqrt(x + 1e-8) for x in both)]


def safe_rsqrt(x: Tensor) -> Tensor:
    """``1 / sqrt(max(x, 1e-9))``."""
    return torch.rsqrt(torch.clamp(x, min=1e-9))


def init_factored(like: Tensor, num_decays: int, shape: Sequence[int]) -> State:
    """Zeros: ``row`` without the largest dimension, ``column`` without the second largest; or ``diagonal``."""
    dims = factored_dims(shape)
    if dims is None:
        return {"diagonal": like.new_zeros(num_decays, *shape)}
    second, largest = ([size for dim, size in enumerate(shape) if dim != left_out] for left_out in dims)
    return {"row": like.new_zeros(num_decays, *largest), "column": like.new_zeros(num_decays, *second)}


def next_factored(state: State, grad: Tensor, decays: Tensor) -> Factored:
    """Factored second moments of ``grad^2 + 1e-30`` after one more gradient."""
    square, decays = torch.square(grad) + 1e-30, torch.clamp(decays, 0.0, 1.0)
    dims = factored_dims(grad.shape)
    if dims is None:
        full = next_mom(state["diagonal"], square, decays)
        return Factored({"diagonal": full}, full, full, (safe_rsqrt(full + 1e-9),))
    second, largest = dims
    row, column = (
        next_mom(state[name], square.mean(dim=dim), decays) for name, dim in (("row", largest), ("column", second))
    )
    reduced = second - 1 if second > largest else second  # where the second largest is among those of row
    whole = row.mean(dim=1 + reduced, keepdim=True)
    factors = (
        safe_rsqrt(row / (whole + 1e-9)).unsqueeze(1 + largest),
        safe_rsqrt(column).unsqueeze(1 + second),
    )
    kept = {"row": row, "column": column}
    return Factored(kept, row.unsqueeze(1 + largest), column.unsqueeze(1 + second), factors)


def broadcast(columns: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Groups of columns, each as broadcast to the tensor, as one ``[C, *shape]``."""
    return torch.cat([group.expand(len(group), *shape) for group in columns])


def truncated(generator: torch.Generator, shape: Sequence[int], fan_in: int) -> Tensor:
    """Normal values with ``sigma = 1 / sqrt(fan_in)``, truncated at two sigma."""
    sigma = 1 / math.sqrt(fan_in)
    tensor = torch.empty(tuple(shape))
    torch.nn.init.trunc_normal_(tensor, 0.0, sigma, -2 * sigma, 2 * sigma, generator=generator)
    return tensor
