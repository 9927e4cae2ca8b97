"""Input sets: what the LSTM sees of one tensor, and the MLP beside its columns, as tables.

A set is a table of names (:class:`InputSet`) and one function that computes all of them from what a step knows
(:class:`Seen`). Sizes of theta and positions in it follow from the tables, as for feature sets
(:mod:`lopt.rule.features`); csrc/rule/inputs.h has the same names in the same order, and import compares them.

The LSTM's input is ``[shared LSTM output, MLP feedback, scalars]`` and, where ``lstm_sees_constants``,
``[facts, time]``; the MLP's per-tensor input is ``[time, facts, LSTM output]``.

Source: arXiv:2009.11243, appendix C.2 to C.4, with the constants of the author's port (``paper``).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lopt.rule import losses
from lopt.rule.constants import (
    EPSILON,
    INPUT_BOUND,
    LAST_SHARE,
    LOG_TIME_SCALE,
    SMALLEST_SCALE,
    TINY,
    WAVES,
)
from lopt.rule.features import round_decays
from lopt.rule.losses import LossState
from lopt.rule.matrices import Kind, Matrix, matrices_of, natural_sizes

if TYPE_CHECKING:
    from lopt.rule.spec import ThetaSpec


@dataclass(frozen=True)
class Shapes:
    """Facts about the tensors that never change, as tensors on the device."""

    numel: Tensor  # [T]
    log_dims: Tensor  # [T, 4] ln(dim) - 1 of the first four dimensions, padded with ones
    is_scalar: Tensor  # [T] +1 for rank 0, else -1
    is_matrix: Tensor  # [T] 1 for rank >= 2, else 0
    natural: Tensor  # [T] natural size (lopt.rule.matrices)
    is_input: Tensor  # [T] 1 for the matrices of the model's input, else 0
    is_output: Tensor  # [T] 1 for those of its output
    is_table: Tensor  # [T] 1 for what is known to be an embedding
    aspect: Tensor  # [T] longer over shorter side of a matrix, 1 for other tensors
    whole: Tensor  # [T] bool, whether the directions of a tensor may be orthogonalised
    matrices: tuple[Matrix, ...]  # [T]
    decays: Tensor  # [num_mom + num_rms]

    @classmethod
    def of(
        cls,
        spec: "ThetaSpec",
        shapes: Sequence[Sequence[int]],
        like: Tensor,
        kinds: Sequence[Kind] | None = None,
    ) -> "Shapes":
        """Facts about tensors of these shapes, in dtype and on device of ``like``.

        Args:
            kinds: what is known about each tensor beside its shape.
        """
        dims = [([*shape[:4]] + [1] * 4)[:4] for shape in shapes]
        matrices = matrices_of(shapes, kinds)
        return cls(
            numel=like.new_tensor([float(math.prod(shape)) for shape in shapes]),
            log_dims=torch.log(like.new_tensor(dims)) - 1.0,
            is_scalar=like.new_tensor([1.0 if len(shape) == 0 else -1.0 for shape in shapes]),
            is_matrix=like.new_tensor([float(len(shape) >= 2) for shape in shapes]),
            natural=like.new_tensor(natural_sizes(matrices)),
            is_input=like.new_tensor([float(matrix.is_input) for matrix in matrices]),
            is_output=like.new_tensor([float(matrix.is_output) for matrix in matrices]),
            is_table=like.new_tensor([float(matrix.is_table) for matrix in matrices]),
            aspect=like.new_tensor([matrix.aspect for matrix in matrices]),
            whole=torch.tensor([matrix.whole for matrix in matrices], device=like.device),
            matrices=tuple(matrices),
            decays=round_decays(spec.mom_decays + spec.rms_decays, like),
        )

    def of_rows(self, rows: Sequence[int]) -> "Shapes":
        """Those of some of the tensors, as facts of the model that all of them make."""
        of_all = ("matrices", "decays")
        names = [field.name for field in dataclasses.fields(self) if field.name not in of_all]
        some = {name: getattr(self, name)[list(rows)] for name in names}
        return Shapes(**some, matrices=tuple(self.matrices[row] for row in rows), decays=self.decays)


class Seen(NamedTuple):
    """What the inputs of one step are computed from."""

    stats: Mapping[str, Tensor]  # [T] each, by the names of STATS and of the feature set's moments
    shapes: Shapes
    corrections: Tensor  # [T, num_mom + num_rms] of the accumulators (lopt.rule.features.bias_corrections)
    scale: Tensor  # [T] initial scale of the parameters
    rank: Tensor  # [T] of the last orthogonalised direction (lopt.rule.orthogonal)
    mean_grad_square: Tensor  # [] over the tensors
    train_loss: Tensor  # [8] LossState
    valid_loss: Tensor  # [8]
    step: Tensor  # [] before its increment
    total_steps: Tensor  # [] planned, 0: unknown


@dataclass(frozen=True)
class InputSet:
    """Names of the inputs, in their order.

    Args:
        scalars: of one tensor, for the LSTM.
        time: of a step, for the MLP; the first ``untold`` do not need ``total_steps``.
        facts: of one tensor, for the MLP.
        lstm_sees_constants: whether the LSTM sees facts and time, too.
        robust: whether a single loss or tensor has a bounded influence on what all tensors share.
        natural: whether learned steps are shares of a tensor's natural size, else of its scale.
        needs_slow: whether the feature set must have a slow second moment.
        moments: of the feature set, needed beside it.
        values: ``values(spec, seen)`` are all inputs by name, ``[T]`` or, where tensors share them, ``[]``.
    """

    name: str
    scalars: tuple[str, ...]
    time: tuple[str, ...]
    untold: int
    facts: tuple[str, ...]
    lstm_sees_constants: bool
    robust: bool
    natural: bool
    needs_slow: bool
    moments: tuple[str, ...]
    values: Callable[["ThetaSpec", Seen], dict[str, Tensor]]

    def time_names(self, horizon: bool) -> tuple[str, ...]:
        """Time inputs of a spec with or without ``horizon_input``."""
        return self.time if horizon else self.time[: self.untold]

    def lstm_names(self, horizon: bool) -> tuple[str, ...]:
        """The LSTM's inputs after its own output and the MLP's feedback."""
        return self.scalars + (self.facts + self.time_names(horizon) if self.lstm_sees_constants else ())

    def constant_names(self, horizon: bool) -> tuple[str, ...]:
        """The MLP's inputs that are the same for all parameters of a tensor, before the LSTM's output."""
        return self.time_names(horizon) + self.facts


def stack(values: Mapping[str, Tensor], names: Sequence[str], num_tensors: int) -> Tensor:
    """``[T, len(names)]``: the values of these names, in their order."""
    return torch.stack([values[name].expand(num_tensors) for name in names], dim=1)


# ---- paper -----------------------------------------------------------------------------------------------------------


def log_magnitude(x: Tensor) -> Tensor:
    """``clip(ln(1e-8 + |x|), -5, 5)``."""
    return torch.clamp(torch.log(EPSILON + torch.abs(x)), -INPUT_BOUND, INPUT_BOUND)


def _paper_values(spec: "ThetaSpec", seen: Seen) -> dict[str, Tensor]:
    """Magnitudes and signs as they are, sinusoids of the step. No validation loss is a validation loss of 0."""
    stats, numel = seen.stats, seen.shapes.numel
    squares = torch.stack([stats["grad_square"], stats["param_square"]]) * numel
    norms = torch.sqrt(torch.clamp(squares, max=torch.finfo(squares.dtype).max))
    means = torch.stack([stats[f"{x}_mean"] for x in ("mom", "rms", "param")])
    variances = torch.stack([stats[f"{x}_var"] for x in ("mom", "rms", "param")])
    names = ("grad_norm", "param_norm", "mom_mean", "rms_mean", "param_mean", "mom_var", "rms_var", "param_var")
    values = dict(zip(names, log_magnitude(torch.cat([norms, means, variances])).unbind(), strict=True))
    values |= dict(zip(("mom_mean_sign", "rms_mean_sign", "param_mean_sign"), torch.sign(means).unbind(), strict=True))
    values |= {f"log_dim{i}": x for i, x in enumerate(seen.shapes.log_dims.unbind(1))}
    values["is_scalar"] = seen.shapes.is_scalar

    train, seen_any = LossState.of(seen.train_loss), LossState.of(seen.train_loss).updates > 0
    valid = losses.corrected_mean(seen.valid_loss, spec.valid_loss_decay)
    for name, loss in (("train_loss", train.last), ("valid_loss", valid)):
        standard = losses.standardise_loss(seen.train_loss, loss, spec.train_loss_decay)
        values[name] = torch.where(seen_any, standard, torch.zeros_like(standard))

    waves = torch.tensor(WAVES, dtype=torch.float32, device=numel.device)
    period = (waves * torch.tensor(math.pi, dtype=torch.float32)).to(numel.dtype)
    values |= dict(zip(PAPER_TIME, torch.sin(seen.step.to(numel.dtype) / period).unbind(), strict=True))

    values["log_tensors"] = torch.full_like(numel, math.log(len(numel)) - 1.0)
    values["log_param_norm"] = torch.log(norms[1] + EPSILON)
    values["log_numel"] = torch.log(numel)
    return values


PAPER_TIME = tuple(f"wave{i}" for i in range(len(WAVES)))

# ---- relative --------------------------------------------------------------------------------------------------------


def _log_ratios(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Logarithms of ratios of roots of values >= 0, infinity included, within +-5."""
    sides = (torch.stack(side) for side in zip(*pairs.values(), strict=True))
    above, below = (torch.clamp(side, max=torch.finfo(side.dtype).max) + TINY for side in sides)
    ratios = torch.clamp(0.5 * torch.log(above / below), -INPUT_BOUND, INPUT_BOUND)
    return dict(zip(pairs, ratios.unbind(), strict=True))


def _relative_values(spec: "ThetaSpec", seen: Seen) -> dict[str, Tensor]:
    """Ratios that do not change when gradients or parameters are rescaled, losses and their rises, logarithmic time.

    Momenta and the slow second moment are without bias. For gradients that are all noise, momentum ``k`` over slow is
    ``sqrt((1 - decay_k) / (1 + decay_k))``; for gradients that never change it is 1.
    """
    stats, shapes, features = seen.stats, seen.shapes, spec.features
    assert features.slow is not None  # by ThetaSpec
    slow = stats[f"rms{features.slow}"] / seen.corrections[:, len(spec.mom_decays) + features.slow]
    grad = stats["grad_square"]
    mom = [stats[f"mom{k}_squared"] / torch.square(seen.corrections[:, k]) for k in range(len(spec.mom_decays))]
    values = _log_ratios(
        {
            "grad_over_slow": (grad, slow),  # this gradient among those before
            **{f"mom{k}_over_slow": (square, slow) for k, square in enumerate(mom)},  # share of signal
            "rms_spread": (stats["rms_var"], torch.square(stats["rms_mean"])),  # how unequal the parameters are
            "param_growth": (stats["param_square"], torch.square(seen.scale)),  # how far the parameters have grown
            "grad_share": (grad, seen.mean_grad_square.expand_as(grad)),  # among the tensors
        }
    )

    train, valid = LossState.of(seen.train_loss), LossState.of(seen.valid_loss)
    decay, valid_decay = spec.train_loss_decay, spec.valid_loss_decay
    trained, both = train.updates > 0, (train.updates > 0) & (valid.updates > 0)
    spread = losses.loss_spread(seen.train_loss, decay)  # a smaller rise of the validation loss may be noise
    known = {
        "train_loss": (trained, losses.standardise_loss(seen.train_loss, train.last, decay)),
        "valid_loss": (
            both,
            losses.standardise_loss(seen.train_loss, losses.corrected_mean(seen.valid_loss, valid_decay), decay),
        ),
        "train_rise": (trained, losses.loss_rise(seen.train_loss, decay)),
        "valid_rise": (both, losses.loss_rise(seen.valid_loss, valid_decay, spread)),
    }
    values |= {name: torch.where(is_known, x, torch.zeros_like(x)) for name, (is_known, x) in known.items()}

    steps, total = seen.step.to(grad.dtype), seen.total_steps.to(grad)
    told = (total > 0).to(grad.dtype)
    values["log_step"] = torch.log1p(torch.clamp(steps, max=spec.time_limit)) / LOG_TIME_SCALE
    values["told"] = told
    values["done"] = told * torch.clamp(steps / torch.clamp(total, min=1.0), max=1.0)
    values["log_left"] = torch.log(1.0 - LAST_SHARE * values["done"])
    values["log_total"] = torch.log1p(torch.clamp(total, max=spec.time_limit)) / LOG_TIME_SCALE
    values["log_step_told"] = told * values["log_step"]

    values["is_matrix"] = shapes.is_matrix
    values["log_numel"] = torch.log(shapes.numel) / LOG_TIME_SCALE
    return values


# ---- natural ---------------------------------------------------------------------------------------------------------


def _natural_values(spec: "ThetaSpec", seen: Seen) -> dict[str, Tensor]:
    """Those of ``relative``, growth beyond a share of the natural size, how fast the training loss still falls, where a
    tensor started, and what it is."""
    shapes = seen.shapes
    natural, start = torch.square(shapes.natural), torch.square(seen.scale)
    least = SMALLEST_SCALE**2 * natural
    values = _relative_values(spec, seen)
    values |= _log_ratios(
        {
            "param_growth": (torch.maximum(seen.stats["param_square"], least), torch.maximum(start, least)),
            "start": (start, natural),
            "rank": (seen.rank, torch.ones_like(seen.rank)),
            "aspect": (shapes.aspect, torch.ones_like(shapes.aspect)),
        }
    )
    values["matrix_start"] = values["start"] * shapes.is_matrix
    values["vector_start"] = values["start"] * (1.0 - shapes.is_matrix)
    fall = losses.loss_fall(seen.train_loss, spec.train_loss_decay)
    values["train_fall"] = torch.where(LossState.of(seen.train_loss).updates > 0, fall, torch.zeros_like(fall))
    values |= {"is_input": shapes.is_input, "is_output": shapes.is_output, "is_table": shapes.is_table}
    return values


_LOSSES = ("train_loss", "valid_loss")
_RELATIVE = (
    *("grad_over_slow", "mom0_over_slow", "mom1_over_slow", "mom2_over_slow"),
    *("rms_spread", "param_growth", "grad_share"),
    *_LOSSES,
    *("train_rise", "valid_rise"),
)
_TIME = ("log_step", "told", "done", "log_left", "log_total", "log_step_told")

#: All input sets; their position is the index the kernels know them by.
INPUT_SETS: dict[str, InputSet] = {
    table.name: table
    for table in (
        InputSet(
            name="paper",
            scalars=(
                *("grad_norm", "is_scalar"),
                *("mom_mean", "mom_mean_sign", "rms_mean", "rms_mean_sign", "param_mean", "param_mean_sign"),
                *("param_norm", "log_dim0", "log_dim1", "log_dim2", "log_dim3"),
                *_LOSSES,
                *("mom_var", "rms_var", "param_var"),
            ),
            time=PAPER_TIME,
            untold=len(PAPER_TIME),
            facts=("log_tensors", "log_param_norm", "log_numel"),
            lstm_sees_constants=False,
            robust=False,
            natural=False,
            needs_slow=False,
            moments=(),
            values=_paper_values,
        ),
        InputSet(
            name="relative",
            scalars=_RELATIVE,
            time=_TIME,
            untold=1,
            facts=("is_matrix", "log_numel"),
            lstm_sees_constants=True,
            robust=True,
            natural=False,
            needs_slow=True,
            moments=("mom0_squared", "mom1_squared", "mom2_squared"),
            values=_relative_values,
        ),
        InputSet(
            name="natural",
            scalars=(*_RELATIVE, "train_fall", "matrix_start", "vector_start", "rank"),
            time=_TIME,
            untold=1,
            facts=("is_matrix", "log_numel", "is_input", "is_output", "is_table", "aspect"),
            lstm_sees_constants=True,
            robust=True,
            natural=True,
            needs_slow=True,
            moments=("mom0_squared", "mom1_squared", "mom2_squared"),
            values=_natural_values,
        ),
    )
}
