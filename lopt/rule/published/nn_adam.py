"""nn_adam: Adam whose learning rate, betas and epsilon an LSTM moves, for every tensor its own.

Source: NNAdam in google/learned_optimization.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lopt.rule.matrices import Kind
from lopt.rule.published import parts
from lopt.rule.published.rule import Arrays, Now, Rule, State, Update, Weights

CONTROLS = ("lr", "beta1", "beta2", "epsilon")  # in this order everywhere
BOUNDS = {"lr": (1e-8, 1e3), "epsilon": (1e-11, 1e4)}
#: What the LSTM sees of a tensor, by name and in this order.
INPUTS = (
    *("beta1", "beta2", "epsilon", "is_bias", "is_scalar", "lr"),
    *("mean_g_mag", "mean_g_sign", "mean_gabs_mag", "mean_m_mag", "mean_m_sign", "mean_p_mag", "mean_p_sign"),
    *("mean_rms", "mean_rms_sign", "var_g", "var_m", "var_p", "var_rms"),
)
SEEN = ("g", "p", "m", "rms")  # of which there are means and variances, in this order
INSIDE = 1e-10  # beside the second moment


@dataclass(frozen=True)
class NNAdam(Rule):
    r"""``param <- param - lr (1 + eps) mom / (eps + sqrt(rms + 1e-10))``, without bias correction.

    An LSTM over the tensors' statistics adds to the four numbers ``.1 ln lr``, ``.1 ln(1 - beta)`` and ``.1 ln eps`` of
    every tensor, after each step. Losses and ``total_steps`` do nothing.

    Args:
        lstm_width: of the LSTM.
        output_scale: of what it adds.
        decay_strength: share of the way back to the first values, in each step.
    """

    name: ClassVar[str] = "nn_adam"
    source: ClassVar[str] = "NNAdam of google/learned_optimization"
    jax_key: ClassVar[str] = "per_layer_lr"

    lstm_width: int = 32
    output_scale: float = 0.01
    decay_strength: float = 0.0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.lstm_width
        return {
            "initial_controls": (len(CONTROLS),),
            "initial_h": (width,),
            "initial_c": (width,),
            "lstm.w": (len(INPUTS) + width, 4 * width),
            "lstm.b": (4 * width,),
            "controls.w": (width, len(CONTROLS)),
            "controls.b": (len(CONTROLS),),
        }

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        """As in the source: Adam with a learning rate of 1e-4, whose controls stay as they are."""
        tensors = {**super().init(generator), "controls.w": torch.zeros(self.shapes()["controls.w"])}
        first = (math.log(1e-4), math.log(1 - 0.9), math.log(1 - 0.999), math.log(1e-8))
        return {**tensors, "initial_controls": 0.1 * torch.tensor(first)}

    @classmethod
    def from_jax(cls, arrays: Arrays) -> tuple["NNAdam", dict[str, Tensor]]:
        h, c = (arrays.get(f"lstm_init_state|{name}").reshape(-1) for name in ("hidden", "cell"))
        return cls(lstm_width=len(h)), {
            "initial_controls": torch.stack([arrays.get(f"per_layer_{name}").reshape(()) for name in CONTROLS]),
            "initial_h": h,
            "initial_c": c,
            "lstm.w": arrays.get("rnn_params|rnn/linear|w"),
            "lstm.b": arrays.get("rnn_params|rnn/linear|b"),
            "controls.w": arrays.get("rnn_to_controls_params|rnn_to_controls|w"),
            "controls.b": arrays.get("rnn_to_controls_params|rnn_to_controls|b"),
        }

    def init_param(self, weights: Weights, shape: Sequence[int], kind: Kind) -> State:
        like = weights["initial_h"]
        return {
            "mom": like.new_zeros(1, *shape),
            "rms": like.new_zeros(1, *shape),
            "controls": weights["initial_controls"].clone(),
            "h": weights["initial_h"].clone(),
            "c": weights["initial_c"].clone(),
        }

    def update(
        self,
        weights: Weights,
        shared: State,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        now: Now,
    ) -> Update:
        controls, h, c = (torch.stack([state[name] for state in states]) for name in ("controls", "h", "c"))
        lr, beta1, beta2, epsilon = meaning(controls).unbind(dim=1)
        moments, seen, directions = [], [], []
        for t, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
            grad = torch.clamp(grad, -parts.GRADIENT_BOUND, parts.GRADIENT_BOUND)
            mom = beta1[t] * state["mom"] + (1.0 - beta1[t]) * grad
            rms = beta2[t] * state["rms"] + (1.0 - beta2[t]) * (grad * grad)
            mom, rms = now.stored(t, mom, rms)
            directions.append((mom / (epsilon[t] + torch.sqrt(rms + INSIDE)))[0] * (1.0 + epsilon[t]))
            seen.append(statistics(param, grad, mom[0], rms[0]))
            moments.append((mom, rms))
        inputs = self.inputs_of(controls, [param.dim() for param in params], torch.stack(seen))
        new, h, c = self.advance(weights, inputs, controls, h, c)
        kept = [
            {"mom": mom, "rms": rms, "controls": new[t], "h": h[t], "c": c[t]} for t, (mom, rms) in enumerate(moments)
        ]
        return Update(directions, list(lr.unbind()), shared, kept, {"lstm_input": inputs})

    def inputs_of(self, controls: Tensor, ranks: Sequence[int], stats: Tensor) -> Tensor:
        """What the LSTM sees of tensors ``[T, 19]``, by their controls ``[T, 4]``, numbers of dimensions, and
        :func:`statistics` ``[T, 9]``."""
        seen = dict(zip(CONTROLS, (0.2 * torch.clamp(controls, -5.0, 5.0)).unbind(dim=1), strict=True))
        for name, rank in (("is_scalar", 0), ("is_bias", 1)):
            seen[name] = controls.new_tensor([1.0 if dims == rank else -1.0 for dims in ranks])
        size, *moments = stats.unbind(dim=1)
        seen["mean_gabs_mag"] = parts.log_size(size)
        for name, mean, variance in zip(SEEN, moments[: len(SEEN)], moments[len(SEEN) :], strict=True):
            magnitude = "mean_rms" if name == "rms" else f"mean_{name}_mag"
            seen[magnitude], seen[f"mean_{name}_sign"] = parts.log_size(mean), torch.sign(mean)
            seen[f"var_{name}"] = parts.log_size(variance)
        return torch.stack([seen[name] for name in INPUTS], dim=1)

    def advance(
        self, weights: Weights, inputs: Tensor, controls: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the LSTM of all tensors: the next controls ``[T, 4]``, h and c."""
        h, c = parts.lstm(weights, inputs, h, c)
        moved = controls + (h @ weights["controls.w"] + weights["controls.b"]) * self.output_scale
        moved = moved - self.decay_strength * (moved - weights["initial_controls"])
        return spelled(meaning(moved)), h, c  # within bounds


def meaning(controls: Tensor) -> Tensor:
    """Learning rate, betas and epsilon ``[T, 4]`` from the numbers that the LSTM moves."""
    lr, beta1, beta2, epsilon = controls.unbind(dim=1)
    rate, size = (torch.clamp(torch.exp(10.0 * x), *BOUNDS[name]) for name, x in (("lr", lr), ("epsilon", epsilon)))
    betas = [1.0 - torch.exp(torch.clamp(10.0 * x, -10.0, 0.0)) for x in (beta1, beta2)]
    return torch.stack([rate, *betas, size], dim=1)


def spelled(values: Tensor) -> Tensor:
    """The inverse of :func:`meaning`."""
    lr, beta1, beta2, epsilon = values.unbind(dim=1)
    return torch.stack([0.1 * torch.log(x) for x in (lr, 1.0 - beta1, 1.0 - beta2, epsilon)], dim=1)


def statistics(param: Tensor, grad: Tensor, mom: Tensor, rms: Tensor) -> Tensor:
    """Of a tensor ``[9]``: the mean of ``|grad|``; means, then variances, of what is in ``SEEN``."""
    values = (grad, param, mom, rms)
    means = [x.mean() for x in values]
    variances = [torch.square(x - mean).mean() for x, mean in zip(values, means, strict=True)]
    return torch.stack([torch.abs(grad).mean(), *means, *variances])
