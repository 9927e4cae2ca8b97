"""VeLO: an LSTM of each tensor mixes the weights of its small MLP from a bank, and scales its step.

Source: arXiv:2211.09760, as HyperV2 in google/learned_optimization.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lopt.rule.features import round_decays
from lopt.rule.matrices import Kind
from lopt.rule.published import parts
from lopt.rule.published.adafactor_mlp import GROUPS, columns_of
from lopt.rule.published.rule import Arrays, Now, Rule, State, Update, Weights

PHASES = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)  # of the run, around which the LSTM sees the time
NUM_MEANS = 10  # of the loss, with half-lives from 10 steps to the whole run
MOM_DECAYS, RMS_DECAYS, FACTORED_DECAYS = (0.9, 0.99, 0.999), (0.999,), (0.9, 0.99, 0.999)
RANKS = 5
INPUTS = len(PHASES) + NUM_MEANS - 1 + 1 + RANKS + 2 * len(MOM_DECAYS)
OUTPUTS = 3  # of the MLP, of which the third is not used


@dataclass(frozen=True)
class VeLO(Rule):
    r"""``param <- param - s step_multiplier rms(param) o_0 exp(magnitude_rate o_1)`` with the MLP's outputs o.

    The MLP of a tensor is ``100 mean_p(a_p bank_p)``; a and s are linear in the state of the tensor's LSTM, which sees
    the time as a part of ``total_steps``, the loss, and the tensor's statistics. ``total_steps`` must be told, and a
    loss in each step; one that is missing repeats the last, and before the first the LSTM sees none.

    Args:
        lstm_width: of the LSTM.
        bank_size: number of MLPs in the bank.
        mlp_width: of the two hidden layers.
        validation_input: whether the LSTM has one more input, of which VeLO's authors have versions.
        validation_mode: its value: whether the losses that are told are validation losses.
        bugged_losses: the half-lives of the loss are all 10 steps, as in early weights of VeLO.
        bugged_lstm: the LSTM starts anew in every step, as in early weights of VeLO.
        step_multiplier, magnitude_rate: constants of the step.
    """

    name: ClassVar[str] = "velo"
    source: ClassVar[str] = "arXiv:2211.09760"
    jax_key: ClassVar[str] = "rnn_params|step_size|w"
    pylo_key: ClassVar[str | None] = "final_mix_layer.weight"
    needs_total_steps: ClassVar[bool] = True
    shared: ClassVar[tuple[str, ...]] = ("loss_means", "loss_lowest", "loss_updates")

    lstm_width: int = 512
    bank_size: int = 256
    mlp_width: int = 4
    validation_input: bool = False
    validation_mode: bool = False
    bugged_losses: bool = False
    bugged_lstm: bool = False
    step_multiplier: float = 1e-3
    magnitude_rate: float = 1e-3

    def shapes(self) -> dict[str, tuple[int, ...]]:
        inputs, width, bank = INPUTS + int(self.validation_input), self.lstm_width, self.bank_size
        mlps = parts.mlp_shapes([sum(GROUPS), self.mlp_width, self.mlp_width, OUTPUTS], "bank.")
        return {
            "initial_h": (width,),
            "initial_c": (width,),
            "mix.w": (inputs, width),
            "mix.b": (width,),
            "enter.w": (inputs, width),
            "enter.b": (width,),
            "lstm.w": (2 * width, 4 * width),
            "lstm.b": (4 * width,),
            "controls.w": (width, bank),
            "controls.b": (bank,),
            "step.w": (width, 1),
            "step.b": (1,),
            **{name: (bank, *shape) for name, shape in mlps.items()},
        }

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        """As in the source: normal with ``sigma = 1 / sqrt(in)``, truncated at two sigma; biases are zero."""
        biases = {name: torch.zeros(shape) for name, shape in self.shapes().items() if name.startswith("bank.b")}
        return {**super().init(generator), **biases}

    # ---- Weights of others ------------------------------------------------------------------------------------------

    @classmethod
    def from_jax(cls, arrays: Arrays) -> tuple["VeLO", dict[str, Tensor]]:
        names = {"mix": "linear_1", "enter": "linear_2", "lstm": "rnn/linear"}  # nothing reads the layer "linear"
        names |= {"controls": "rnn_to_controls", "step": "step_size"}
        linear = {
            f"{ours}.{kind}": arrays.get(f"rnn_params|{theirs}|{kind}")
            for ours, theirs in names.items()
            for kind in "wb"
        }
        first = [arrays.get(f"ff_mod_stack|*|w0__{i}") for i in range(len(GROUPS))]
        bank = {f"bank.b{i}": arrays.get(f"ff_mod_stack|*|b{i - 1}") for i in (1, 2, 3)}
        bank |= {"bank.w1": torch.cat(first, dim=1)}
        bank |= {f"bank.w{i}": arrays.get(f"ff_mod_stack|*|w{i - 1}") for i in (2, 3)}
        h, c = (arrays.get(f"lstm_init_state|{name}").reshape(-1) for name in ("hidden", "cell"))
        return cls._of({"initial_h": h, "initial_c": c, **linear, **bank})

    @classmethod
    def from_pylo(cls, arrays: Arrays, optimizer: str | None) -> tuple["VeLO", dict[str, Tensor]]:
        names = {"mix": "mix_layer2", "enter": "final_mix_layer", "lstm": "lstm.linear"}
        names |= {"controls": "rnn_to_controls", "step": "step_size"}
        linear: dict[str, Tensor] = {}
        for ours, theirs in names.items():
            linear[f"{ours}.w"] = arrays.get(f"{theirs}.weight").T.contiguous()
            linear[f"{ours}.b"] = arrays.get(f"{theirs}.bias")
        bank: dict[str, Tensor] = {}
        for i, (w, b) in enumerate(
            (
                ("input_weights_", "input_bias_"),
                ("hidden_weights_.0", "hidden_bias_.0"),
                ("output_weights_", "output_bias_"),
            ),
            1,
        ):
            bank[f"bank.w{i}"], bank[f"bank.b{i}"] = arrays.get(w).mT.contiguous(), arrays.get(b)
        h, c = (arrays.get(f"lstm_init_state.{i}").reshape(-1) for i in (0, 1))
        return cls._of({"initial_h": h, "initial_c": c, **linear, **bank})

    @classmethod
    def _of(cls, tensors: dict[str, Tensor]) -> tuple["VeLO", dict[str, Tensor]]:
        bank, _, width = tensors["bank.w1"].shape
        extra = tensors["mix.w"].shape[0] - INPUTS
        lstm = len(tensors["initial_h"])
        return cls(lstm_width=lstm, bank_size=bank, mlp_width=width, validation_input=extra == 1), tensors

    # ---- State and step ---------------------------------------------------------------------------------------------

    def init_shared(self, weights: Weights) -> State:
        like = weights["initial_h"]
        return {
            "loss_means": like.new_zeros(NUM_MEANS),
            "loss_lowest": like.new_full((NUM_MEANS,), 999999999999.0),
            "loss_updates": like.new_zeros(()),
        }

    def init_param(self, weights: Weights, shape: Sequence[int], kind: Kind) -> State:
        like = weights["initial_h"]
        return {
            "mom": like.new_zeros(len(MOM_DECAYS), *shape),
            "rms": like.new_zeros(len(RMS_DECAYS), *shape),
            **parts.init_factored(like, len(FACTORED_DECAYS), shape),
            "h": weights["initial_h"].clone(),
            "c": weights["initial_c"].clone(),
        }

    def decays(self, weights: Weights) -> tuple[Tensor, ...]:
        """Of momenta, second moments and factored ones."""
        return tuple(round_decays(d, weights["initial_h"]) for d in (MOM_DECAYS, RMS_DECAYS, FACTORED_DECAYS))

    def update(
        self,
        weights: Weights,
        shared: State,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        now: Now,
    ) -> Update:
        like = weights["initial_h"]
        shared, common = self.losses(shared, now, like)
        inputs = torch.stack([self._input(p, s, *common) for p, s in zip(params, states, strict=True)])
        before = [torch.stack([state[name] for state in states]) for name in ("h", "c")]
        length, mlps, (h, c) = self.advance(weights, inputs, before, now)

        decays = self.decays(weights)
        kept, columns, directions, sizes = [], [], [], []
        for t, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
            grad = torch.clamp(grad, -parts.GRADIENT_BOUND, parts.GRADIENT_BOUND)
            mom, rms = parts.next_moments(state, grad, decays, now, t)
            factored = parts.next_factored(state, grad, decays[2])
            seen = columns_of(grad, param, mom, rms, factored, 1e-6)
            out = parts.mlp({name: value[t] for name, value in mlps.items()}, parts.normalise(seen))
            directions.append(out[0] * torch.exp(self.magnitude_rate * out[1]))
            sizes.append(length[t] * torch.sqrt(torch.square(param).mean() + 1e-9) * self.step_multiplier)
            kept.append({"mom": mom, "rms": rms, **factored.state, "h": h[t], "c": c[t]})
            columns.append(seen)
        return Update(directions, sizes, shared, kept, {"lstm_input": inputs, "columns": columns})

    def losses(self, shared: State, now: Now, like: Tensor) -> tuple[State, tuple[Tensor, Tensor]]:
        """State after this step's loss, and what the LSTM sees that is the same for all tensors: time and losses."""
        total = like.new_full((), 10.0) if self.bugged_losses else now.total_steps
        shared = next_losses(shared, now.loss, loss_decays(total))
        time = torch.tanh(10.0 * (now.step.to(like) / now.total_steps - like.new_tensor(PHASES)))
        return shared, (time, loss_inputs(shared, loss_decays(total)))

    def advance(
        self, weights: Weights, inputs: Tensor, before: Sequence[Tensor], now: Now
    ) -> tuple[Tensor, dict[str, Tensor], Sequence[Tensor]]:
        """One step of the LSTM of all tensors: inputs ``[T, in]``, h and c ``[T, lstm_width]`` -> factors of the step
        ``[T]``, the tensors' MLPs ``[T, ...]``, h and c."""
        # The largest over all tensors, and so over all that do not rest; those count as zero, the least there is.
        mixed = torch.relu(inputs @ weights["mix.w"] + weights["mix.b"])
        mixed = torch.where(now.rest[:, None], 0.0, mixed).amax(dim=0)
        h, c = parts.lstm(weights, inputs @ weights["enter.w"] + weights["enter.b"] + mixed, *before)
        shares = h @ weights["controls.w"] + weights["controls.b"]
        length = (h @ weights["step.w"] + weights["step.b"])[:, 0]
        return length, self._mlps(weights, shares), before if self.bugged_lstm else (h, c)

    def _mlps(self, weights: Weights, shares: Tensor) -> dict[str, Tensor]:
        """The weights of the MLP of each tensor ``[T, ...]``, mixed from the bank by ``shares`` ``[T, bank_size]``."""
        bank = {name: value for name, value in weights.items() if name.startswith("bank.")}
        return {
            name.replace("bank.", "mlp."): (shares @ value.reshape(len(value), -1)).reshape(-1, *value.shape[1:])
            * (100.0 / self.bank_size)
            for name, value in bank.items()
        }

    def _input(self, param: Tensor, state: State, time: Tensor, losses: Tensor) -> Tensor:
        """What the LSTM sees of a tensor: its accumulators are those of the step before."""
        scale = torch.rsqrt(torch.clamp(torch.square(param).mean(), min=1e-9))
        mom, rms = state["mom"] * scale, state["rms"] * scale
        mean = parts.column_mean(mom)
        var = parts.column_mean(torch.square(mom - mean)).reshape(-1)
        around = parts.column_mean(torch.square(rms - mean)).reshape(-1)  # of rms around the means of mom: VeLO's
        rank = param.new_tensor(rank_input(param.shape))
        mode = [param.new_tensor([float(self.validation_mode)])] if self.validation_input else []
        sizes = [parts.log_size(x, 10.0) for x in (parts.column_mean(rms).reshape(-1), var, around)]
        return torch.cat([time, losses, sizes[0], rank, *sizes[1:], *mode])

    def inputs_of(self, ranks: Tensor, stats: "Statistics", common: tuple[Tensor, Tensor]) -> Tensor:
        """The same of all tensors ``[T, in]``, from their statistics and ``ranks`` ``[T, 5]``."""
        scale = torch.rsqrt(torch.clamp(stats.param_square, min=1e-9))[:, None]
        mom, rms = stats.mom_mean * scale, stats.rms_mean * scale
        var, rms_var = (x * torch.square(scale) for x in (stats.mom_var, stats.rms_var))
        sizes = [parts.log_size(x, 10.0) for x in (rms, var, rms_var + torch.square(rms - mom))]
        mode = [torch.full_like(scale, float(self.validation_mode))] if self.validation_input else []
        seen = [x.expand(len(ranks), -1) for x in common]
        return torch.cat([*seen, sizes[0], ranks, *sizes[1:], *mode], dim=1)


class Statistics(NamedTuple):
    """Of T tensors, before a step: the mean square of the parameter ``[T]``, means and variances of momenta ``[T, 3]``
    and of second moments ``[T, 1]``."""

    param_square: Tensor
    mom_mean: Tensor
    rms_mean: Tensor
    mom_var: Tensor
    rms_var: Tensor


def rank_input(shape: Sequence[int]) -> list[float]:
    """1 at the number of dimensions above 1, which is below 5, and 0."""
    return [float(sum(size > 1 for size in shape) == i) for i in range(RANKS)]


def loss_decays(total_steps: Tensor) -> Tensor:
    """Decays ``[10]`` of the means of the loss: ``exp(-1 / h)`` with h from 10 to ``total_steps``, evenly in logs."""
    part = torch.linspace(0.0, 1.0, NUM_MEANS, dtype=torch.float64, device=total_steps.device)
    last = torch.log10(total_steps.double())
    return torch.exp(-1.0 / 10.0 ** (1.0 + part * (last - 1.0))).to(total_steps.dtype)


def next_losses(shared: State, loss: Tensor, decays: Tensor) -> State:
    """State after a loss, which counts at most as twice the largest mean; NaN changes nothing."""
    means, lowest, count = (shared[name] for name in VeLO.shared)
    correction = 1.0 - decays ** (count + 1.0)
    largest = torch.where(count == 0.0, loss, torch.amax(means / correction))
    bounded = torch.minimum(torch.abs(largest) * 2.0, loss)
    new = means * decays + bounded * (1.0 - decays)
    after, before = (new, torch.minimum(lowest, new / correction), count + 1.0), (means, lowest, count)
    given = torch.logical_not(torch.isnan(loss))
    return {name: torch.where(given, a, b) for name, a, b in zip(VeLO.shared, after, before, strict=True)}


def loss_inputs(shared: State, decays: Tensor) -> Tensor:
    """How far each mean of the loss is between its lowest and the next slower one ``[9]``, 0 in the first two steps."""
    means, lowest, count = (shared[name] for name in VeLO.shared)
    corrected = means / (1.0 - decays ** torch.clamp(count, min=1.0))
    reach = torch.clamp(corrected[1:] - lowest[:-1], min=1e-8)
    place = torch.clamp((corrected[:-1] - lowest[:-1]) / reach - 1.0, -1.0, 1.0)
    return torch.where(count <= 2.0, torch.zeros_like(place), place)
