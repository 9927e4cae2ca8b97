"""mlp_lopt: an MLP sees gradient, parameter, six momenta and the time, and writes the parameter.

Source: arXiv:1810.10180, as MLPLOpt in google/learned_optimization.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lopt.rule.features import round_decays
from lopt.rule.matrices import Kind
from lopt.rule.published import parts
from lopt.rule.published.rule import Arrays, Now, Rule, State, Update, Weights

COLUMNS = 2  # beside the momenta: gradient, parameter


@dataclass(frozen=True)
class MLPLOpt(Rule):
    r"""``param <- param - step_multiplier o_0 exp(magnitude_rate o_1)`` with the MLP's outputs o.

    Losses and ``total_steps`` do nothing.

    Args:
        mlp_width, mlp_layers: of the hidden layers.
        mom_decays: of the momenta.
        step_multiplier, magnitude_rate: constants of the step.
    """

    name: ClassVar[str] = "mlp_lopt"
    source: ClassVar[str] = "arXiv:1810.10180"
    jax_key: ClassVar[str] = "mlp/~/linear_0|w"
    per_param: ClassVar[tuple[str, ...]] = ("mom",)
    tensors_alone: ClassVar[bool] = True

    mlp_width: int = 32
    mlp_layers: int = 2
    mom_decays: tuple[float, ...] = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
    step_multiplier: float = 1e-3
    magnitude_rate: float = 1e-3

    def shapes(self) -> dict[str, tuple[int, ...]]:
        inputs = COLUMNS + len(self.mom_decays) + len(parts.TIME_SCALES)
        return parts.mlp_shapes([inputs, *[self.mlp_width] * self.mlp_layers, 2])

    @classmethod
    def from_jax(cls, arrays: Arrays) -> tuple["MLPLOpt", dict[str, Tensor]]:
        layers = next(i for i in range(99) if f"mlp/~/linear_{i}|w" not in arrays)
        tensors = {
            f"mlp.{name}{i + 1}": arrays.get(f"mlp/~/linear_{i}|{name}") for i in range(layers) for name in ("w", "b")
        }
        return cls(mlp_width=len(arrays.get("mlp/~/linear_0|b")), mlp_layers=layers - 1), tensors

    def init_param(self, weights: Weights, shape: Sequence[int], kind: Kind) -> State:
        return {"mom": weights["mlp.b1"].new_zeros(len(self.mom_decays), *shape)}

    def decays(self, weights: Weights) -> tuple[Tensor, ...]:
        """Of momenta, and of second moments, of which there are none."""
        mom = round_decays(self.mom_decays, weights["mlp.b1"])
        return mom, mom[:0], mom[:0]

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
        decays, time = self.decays(weights)[0], parts.tanh_times(now.step, like)
        mom = [parts.next_mom(state["mom"], g, decays) for state, g in zip(states, grads, strict=True)]
        mom = [now.stored(t, m, m[:0])[0] for t, m in enumerate(mom)]
        columns = [torch.cat([g[None], p[None], m]) for p, g, m in zip(params, grads, mom, strict=True)]
        outputs = [parts.mlp(weights, parts.normalise(x), time) for x in columns]
        return Update(
            [out[0] * torch.exp(self.magnitude_rate * out[1]) for out in outputs],
            [like.new_tensor(self.step_multiplier)] * len(params),
            shared,
            [{"mom": m} for m in mom],
            {"columns": columns},
        )
