"""Celo2: a small MLP makes the direction of a matrix, which is orthogonalised; AdamW does the rest.

Source: arXiv:2602.19142, as CELO2 in PyLO.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lopt.rule.features import round_decays
from lopt.rule.matrices import Kind
from lopt.rule.published import parts
from lopt.rule.published.adafactor_mlp import GROUPS, columns_of
from lopt.rule.published.rule import Arrays, Now, Rule, State, Update, Weights

OUTPUTS = 3  # of the MLP, of which the third is not used
FACTORED = 3
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-8


@dataclass(frozen=True)
class Celo2(Rule):
    r"""``param <- param - learning_rate direction``, with directions whose root mean square is 1 in every matrix.

    Of a matrix ``[..., in, out]`` that is ``orthogonalise(o_0 exp(magnitude_rate o_1))`` with the MLP's outputs o. Of
    vectors, and of embeddings (role ``"input"``), the direction is Adam's. Losses and ``total_steps`` do nothing; a
    schedule comes from outside, by ``lr``.

    Args:
        mlp_width: of the two hidden layers.
        learning_rate: constant of the step; ``lr`` multiplies it.
        adam_multiplier: of the learning rate where the direction is Adam's.
        newton_schulz: iterations that orthogonalise, 0 for none.
        mom_decays, rms_decays, factored_decays: of the accumulators of matrices.
        adam_decays: Adam's two betas.
        magnitude_rate: constant of the step.
    """

    name: ClassVar[str] = "celo2"
    source: ClassVar[str] = "arXiv:2602.19142"
    jax_key: ClassVar[str] = "ff_mod_stack|*|w0__0"
    pylo_key: ClassVar[str | None] = "w0.0"

    mlp_width: int = 8
    learning_rate: float = 1e-3
    adam_multiplier: float = 1.0
    newton_schulz: int = 5
    mom_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_decays: tuple[float, ...] = (0.95,)
    factored_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    adam_decays: tuple[float, ...] = (0.9, 0.95)
    magnitude_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, count in (("mom", 3), ("rms", 1), ("factored", 3), ("adam", 2)):
            decays = getattr(self, f"{name}_decays")
            if len(decays) != count:
                raise ValueError(f"{name}_decays: expected {count}, got {decays}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return parts.mlp_shapes([sum(GROUPS), self.mlp_width, self.mlp_width, OUTPUTS])

    @classmethod
    def from_jax(cls, arrays: Arrays) -> tuple["Celo2", dict[str, Tensor]]:
        first = torch.cat([arrays.get(f"ff_mod_stack|*|w0__{i}") for i in range(len(GROUPS))])
        tensors = {"mlp.w1": first, "mlp.b1": arrays.get("ff_mod_stack|*|b0")}
        for i in (2, 3):
            tensors |= {f"mlp.{kind}{i}": arrays.get(f"ff_mod_stack|*|{kind}{i - 1}") for kind in "wb"}
        return cls(mlp_width=first.shape[-1]), tensors

    @classmethod
    def from_pylo(cls, arrays: Arrays, optimizer: str | None) -> tuple["Celo2", dict[str, Tensor]]:
        first = torch.cat([arrays.get(f"w0.{i}") for i in range(len(GROUPS))])
        tensors = {"mlp.w1": first, "mlp.b1": arrays.get("b0")}
        for i in (2, 3):
            tensors |= {f"mlp.{kind}{i}": arrays.get(f"dense_{kind}.{i - 2}") for kind in "wb"}
        return cls(mlp_width=first.shape[-1]), tensors

    def init_param(self, weights: Weights, shape: Sequence[int], kind: Kind) -> State:
        like = weights["mlp.b1"]
        if not self.is_matrix(shape, kind):
            zeros = {name: like.new_zeros(1, *shape) for name in ("mom", "rms")}
            return {**zeros, "updates": like.new_zeros(())}
        return {
            "mom": like.new_zeros(len(self.mom_decays), *shape),
            "rms": like.new_zeros(len(self.rms_decays), *shape),
            **parts.init_factored(like, len(self.factored_decays), shape),
        }

    @staticmethod
    def is_matrix(shape: Sequence[int], kind: Kind) -> bool:
        """Whether the MLP makes the direction of a tensor, not Adam."""
        return len(shape) >= 2 and kind.role != "input"

    def decays(self, weights: Weights) -> tuple[Tensor, ...]:
        """Of momenta, second moments and factored ones."""
        like = weights["mlp.b1"]
        mom, rms, factored = (round_decays(d, like) for d in (self.mom_decays, self.rms_decays, self.factored_decays))
        return mom, rms, factored

    def update(
        self,
        weights: Weights,
        shared: State,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        now: Now,
    ) -> Update:
        like = weights["mlp.b1"]
        kept, directions, sizes = [], [], []
        for t, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
            grad = torch.clamp(grad, -parts.GRADIENT_BOUND, parts.GRADIENT_BOUND)
            by_adam = "updates" in state
            direction, new = (
                self._adam(grad, state, now, t) if by_adam else self._learned(weights, param, grad, state, now, t)
            )
            sizes.append(like.new_tensor(self.learning_rate * (self.adam_multiplier if by_adam else 1.0)))
            directions.append(direction)
            kept.append(new)
        return Update(directions, sizes, shared, kept, {})

    def _adam(self, grad: Tensor, state: State, now: Now, t: int) -> tuple[Tensor, State]:
        beta1, beta2 = self.adam_decays
        updates = state["updates"] + 1.0
        mom = beta1 * state["mom"] + (1.0 - beta1) * grad
        rms = beta2 * state["rms"] + (1.0 - beta2) * torch.square(grad)
        mom, rms = now.stored(t, mom, rms)
        up, down = mom / (1.0 - beta1**updates), torch.sqrt(rms / (1.0 - beta2**updates))
        return (up / (down + EPSILON))[0], {"mom": mom, "rms": rms, "updates": updates}

    def _learned(
        self, weights: Weights, param: Tensor, grad: Tensor, state: State, now: Now, t: int
    ) -> tuple[Tensor, State]:
        decays = self.decays(weights)
        mom, rms = parts.next_moments(state, grad, decays, now, t)
        factored = parts.next_factored(state, grad, decays[2])
        out = parts.mlp(weights, normalise(columns_of(grad, param, mom, rms, factored, EPSILON)))
        direction = out[0] * torch.exp(self.magnitude_rate * out[1])
        return self.treat(direction), {"mom": mom, "rms": rms, **factored.state}

    def treat(self, direction: Tensor) -> Tensor:
        """Directions of matrices ``[..., in, out]``, from what the MLP says."""
        return normalise(orthogonalise(direction, self.newton_schulz) if self.newton_schulz else direction)


def normalise(x: Tensor) -> Tensor:
    """``x rsqrt(1e-9 + mean(x^2))`` of every matrix."""
    return x * torch.rsqrt(1e-9 + torch.square(x).mean(dim=(-2, -1), keepdim=True))


def orthogonalise(x: Tensor, iterations: int) -> Tensor:
    """Singular values of matrices ``[..., m, n]`` brought together towards 1: ``x <- a x + b (x x') x + c (x x')^2 x``.

    From ``x / |x|``; the result is near ``u v'`` of the singular value decomposition ``u s v'``.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPSILON)
    a, b, c = POLYNOMIAL
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
