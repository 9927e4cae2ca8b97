"""small_fc_lopt: a small MLP with Adafactor's factored second moments among its inputs, and learned decays.

Source: arXiv:2203.11860, as AdafacMLPLOpt in google/learned_optimization.
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

#: Offsets of the decays that PyLO's AdafacLO has beside its weights, as arguments of its constructor.
PYLO_OFFSETS = {
    "decay.mom": (0.15216392, 0.14245212, 0.06812963),
    "decay.rms": (0.01079706,),
    "decay.factored": (0.18621896, -0.10864615, -0.06185547),
}


@dataclass(frozen=True)
class SmallFC(Rule):
    r"""``param <- param - step_multiplier o_0 exp(magnitude_rate o_1)`` with the MLP's outputs o.

    A decay is ``1 - (1 - d) exp(10 offset)`` with the learned ``decay.*``, and ``d`` of the fields. Losses and
    ``total_steps`` do nothing.

    Args:
        mlp_width, mlp_layers: of the hidden layers.
        mom_decays, rms_decays, factored_decays: before meta-training.
        step_multiplier, magnitude_rate: constants of the step.
    """

    name: ClassVar[str] = "small_fc_lopt"
    source: ClassVar[str] = "arXiv:2203.11860"
    jax_key: ClassVar[str] = "nn|*|w0"
    pylo_key: ClassVar[str | None] = "network.input.weight"
    tensors_alone: ClassVar[bool] = True

    mlp_width: int = 4
    mlp_layers: int = 2
    mom_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_decays: tuple[float, ...] = (0.999,)
    factored_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    step_multiplier: float = 1e-3
    magnitude_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mom_decays) != len(self.factored_decays) or len(self.rms_decays) != 1:
            raise ValueError(
                f"decays: expected one of rms, and as many of mom as factored, got {len(self.rms_decays)}, "
                f"{len(self.mom_decays)} and {len(self.factored_decays)}"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        k, r = len(self.mom_decays), len(self.rms_decays)
        inputs = 2 + k + r + k * r + r + 6 * k + len(parts.TIME_SCALES)
        decays = {"decay.mom": (k,), "decay.rms": (r,), "decay.factored": (k,)}
        return {**decays, **parts.mlp_shapes([inputs, *[self.mlp_width] * self.mlp_layers, 2])}

    @classmethod
    def from_jax(cls, arrays: Arrays) -> tuple["SmallFC", dict[str, Tensor]]:
        layers = next(i for i in range(99) if f"nn|*|w{i}" not in arrays)
        tensors = {f"mlp.{name}{i + 1}": arrays.get(f"nn|*|{name}{i}") for i in range(layers) for name in ("w", "b")}
        spec = cls(mlp_width=len(arrays.get("nn|*|b0")), mlp_layers=layers - 1)
        offsets = {"decay.mom": "momentum_decays", "decay.rms": "rms_decays", "decay.factored": "adafactor_decays"}
        shapes = (
            spec.shapes()
        )  # optimizers that were made from it have no decays in their files: they are those of the spec
        found = {name: arrays.get(key) if key in arrays else torch.zeros(shapes[name]) for name, key in offsets.items()}
        return spec, {**found, **tensors}

    @classmethod
    def from_pylo(cls, arrays: Arrays, optimizer: str | None) -> tuple["SmallFC", dict[str, Tensor]]:
        hidden = next(i for i in range(99) if f"network.linear_{i}.weight" not in arrays)
        names = ["network.input", *(f"network.linear_{i}" for i in range(hidden)), "network.output"]
        elo = optimizer == "ELO"
        tensors = {name: torch.tensor(offsets) * (0.0 if elo else 1.0) for name, offsets in PYLO_OFFSETS.items()}
        for i, name in enumerate(names, 1):
            tensors[f"mlp.w{i}"] = arrays.get(f"{name}.weight").T.contiguous()
            tensors[f"mlp.b{i}"] = arrays.get(f"{name}.bias")
        return cls(
            mlp_width=len(tensors["mlp.b1"]), mlp_layers=hidden + 1, step_multiplier=1e-3 if elo else 0.01
        ), tensors

    def init_param(self, weights: Weights, shape: Sequence[int], kind: Kind) -> State:
        like = weights["mlp.b1"]
        return {
            "mom": like.new_zeros(len(self.mom_decays), *shape),
            "rms": like.new_zeros(len(self.rms_decays), *shape),
            **parts.init_factored(like, len(self.factored_decays), shape),
        }

    def decays(self, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        """The decays of momenta, second moments and factored ones, with their learned offsets."""
        fields = {"mom": self.mom_decays, "rms": self.rms_decays, "factored": self.factored_decays}
        mom, rms, factored = (
            1.0 - torch.exp(10.0 * (torch.log(1.0 - round_decays(values, offset)) / 10.0 + offset))
            for values, offset in ((values, weights[f"decay.{name}"]) for name, values in fields.items())
        )
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
        decays, time = self.decays(weights), parts.tanh_times(now.step, like)
        kept, inputs, directions = [], [], []
        for t, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
            mom, rms = parts.next_moments(state, grad, decays, now, t)
            factored = parts.next_factored(state, grad, decays[2])
            inverse = torch.rsqrt(rms + 1e-6)
            whole = grad.dim() < 2  # nothing to factor
            groups = [
                *(grad[None], param[None], mom, rms, mom * inverse, inverse),
                factored.precondition(grad[None]),
                *factored.columns,
                mom * (factored.row + 1e-6) ** -0.5 if whole else factored.precondition(mom),
            ]
            columns = parts.broadcast(groups, grad.shape)
            out = parts.mlp(weights, parts.normalise(columns), time)
            directions.append(out[0] * torch.exp(self.magnitude_rate * out[1]))
            kept.append({"mom": mom, "rms": rms, **factored.state})
            inputs.append(columns)
        sizes = [like.new_tensor(self.step_multiplier)] * len(params)
        return Update(directions, sizes, shared, kept, {"columns": inputs})
