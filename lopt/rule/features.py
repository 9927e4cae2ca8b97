"""Feature sets: what the small MLP sees of one parameter, as a table.

Each column is a raw value computed by the kernels (csrc/rule/features.h has the same ones in the same order), mapped by
``x = clamp(raw * scale + shift, -clip, clip)`` with a scale and a shift per tensor and column. The map is where the
tensor normaliser and the bias corrections of the accumulators live, so that neither touches a kernel.

Source: arXiv:2009.11243, appendix C, and its author's port (the ``paper`` set).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.rule.constants import RESTING

#: Columns of the per-tensor statistics, common to all feature sets; the set's moments follow (csrc/rule/stats.h).
STATS = (
    "grad_square",
    "param_square",
    "nonfinite",
    "param_mean",
    "param_var",
    "mom_mean",
    "mom_var",
    "rms_mean",
    "rms_var",
)


@dataclass(frozen=True)
class Column:
    """One per-parameter input.

    ``moment`` names the per-tensor mean that normalises it: ``scale = rsqrt(epsilon + mean)``, or for a logarithmic
    column ``shift = -ln(mean + epsilon) / 2``. ``debias`` lists (accumulator, exponent) pairs: the column is multiplied
    by ``prod (1 - decay^updates)^-exponent``, which for a logarithmic column is a shift.
    """

    name: str
    formula: str
    moment: str | None = None
    debias: tuple[tuple[str, float], ...] = ()
    log: bool = False


@dataclass(frozen=True)
class FeatureSet:
    """A named list of columns, the moments their maps need, and the decays of the accumulators."""

    name: str
    columns: tuple[Column, ...]
    moments: tuple[str, ...]
    mom_decays: tuple[float, ...]
    rms_decays: tuple[float, ...]
    epsilon: float

    @property
    def num_stats(self) -> int:
        """Width of a row of per-tensor statistics."""
        return len(STATS) + len(self.moments)

    @property
    def first_shifted(self) -> int:
        """Position of the first logarithmic column, of which kernels know that those before it have no shift."""
        return next((i for i, column in enumerate(self.columns) if column.log), len(self.columns))

    @property
    def slow(self) -> int | None:
        """Position among the second moments of the one whose tensor mean is a moment, None where there is none."""
        return next((k for k in range(len(self.rms_decays)) if f"rms{k}" in self.moments), None)

    def active(self, rms: Tensor) -> Tensor:
        """1 for parameters that move, 0 for those that rest: their gradients have been zero for 180 steps, or always.

        Without this they would drift, since the MLP of zeros is not zero. Where there is no slow second moment, as in
        the paper, all move.

        Args:
            rms: ``[num_rms, numel]``, second moments.
        """
        if self.slow is None:
            return torch.ones_like(rms[0])
        return (rms[0] > RESTING * rms[self.slow]).to(rms.dtype)

    @property
    def debiased(self) -> bool:
        """Whether any column is corrected for the accumulators' bias."""
        return any(column.debias for column in self.columns)

    def column_index(self, name: str) -> int:
        """Position of the column called ``name``."""
        return [column.name for column in self.columns].index(name)

    def column_map(self, stats: Tensor, updates: Tensor, decays: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of every column from the statistics of every tensor.

        Args:
            stats: ``[T, S]``, per-tensor statistics of this step.
            updates: ``[T]``, how often each tensor's accumulators were updated, this step included.
            decays: ``[num_mom + num_rms]``, in the dtype of ``stats``.

        Returns:
            ``scale, shift``, both ``[T, columns]``.
        """
        table = _column_table(self.name, stats.device, stats.dtype)
        means = stats[:, table.moment] + self.epsilon
        scale = torch.where(table.normalised, torch.rsqrt(means), 1.0)
        shift = torch.where(table.centred, -0.5 * torch.log(means), 0.0)
        if self.debiased:  # logarithms of the corrections, products of (1 - decay^updates)^-exponent
            corrections = -torch.log(bias_corrections(updates, decays))
            scale = scale * torch.exp(corrections @ table.linear_exponents)
            shift = shift + corrections @ table.log_exponents
        return scale, shift


def round_decays(decays: Sequence[float], like: Tensor) -> Tensor:
    """Decays rounded to float32 in any dtype: ``1 - .9999`` differs by 2e-4 between float32 and float64 decays."""
    return torch.tensor(decays, dtype=torch.float32, device=like.device).to(like.dtype)


def bias_corrections(updates: Tensor, decays: Tensor) -> Tensor:
    """``1 - decay^updates`` ``[T, accumulators]``: an accumulator that starts at zero, divided by it, has no bias.

    Args:
        updates: ``[T]`` how often each tensor's accumulators were updated, at least once.
        decays: ``[num_mom + num_rms]``.
    """
    return -torch.expm1(updates[:, None] * torch.log(decays))


class _ColumnTable(NamedTuple):
    """What :meth:`FeatureSet.column_map` looks up, as tensors over the columns."""

    moment: Tensor  # position of the column's moment in a row of statistics; any where there is none
    normalised: Tensor  # bool: divided by the root of its moment
    centred: Tensor  # bool: logarithmic, with half the logarithm of its moment subtracted
    linear_exponents: Tensor  # [accumulators, columns]
    log_exponents: Tensor  # [accumulators, columns]


@functools.cache
def _column_table(name: str, device: torch.device, dtype: torch.dtype) -> _ColumnTable:
    features = FEATURE_SETS[name]
    columns = features.columns
    accumulators = [f"mom{k}" for k in range(len(features.mom_decays))]
    accumulators += [f"rms{k}" for k in range(len(features.rms_decays))]
    exponents = [[dict(column.debias).get(name, 0.0) for column in columns] for name in accumulators]
    log = torch.tensor([column.log for column in columns], device=device)
    has_moment = torch.tensor([column.moment is not None for column in columns], device=device)
    moment = [features.moments.index(column.moment) if column.moment else 0 for column in columns]
    all_exponents = torch.tensor(exponents, device=device, dtype=dtype)
    return _ColumnTable(
        torch.tensor(moment, device=device) + len(STATS),
        has_moment & ~log,
        has_moment & log,
        all_exponents * ~log,
        all_exponents * log,
    )


def _paper() -> FeatureSet:
    decays = (0.5, 0.9, 0.99, 0.999, 0.9999)
    rows = [("grad", "grad"), ("param", "param"), ("log_param", "ln(|param| + 1e-8)")]
    rows += [(f"mom{k}", f"mom{k}") for k in range(5)]
    rows += [(f"rms{k}", f"rms{k}") for k in range(5)]
    rows += [(f"mom{k}_over_rms{k}", f"mom{k} * rsqrt(rms{k} + 1e-6)") for k in range(5)]
    rows += [(f"rsqrt_rms{k}", f"rsqrt(rms{k} + 1e-6)") for k in range(5)]
    return FeatureSet(
        name="paper",
        columns=tuple(Column(name, formula, moment=f"{name}_squared") for name, formula in rows),
        moments=tuple(f"{name}_squared" for name, _ in rows),
        mom_decays=decays,
        rms_decays=decays,
        epsilon=1e-5,
    )


def _compact() -> FeatureSet:
    slow = ("rms1", -0.5)
    columns = [
        Column(f"mom{k}_over_slow", f"mom{k} * rsqrt(rms1 + 1e-24)", debias=((f"mom{k}", 1.0), slow)) for k in range(3)
    ]
    columns += [
        Column("grad_over_slow", "grad * rsqrt(rms1 + 1e-24)", debias=(slow,)),
        Column("mom0_over_quick", "mom0 * rsqrt(rms0 + 1e-24)", debias=(("mom0", 1.0), ("rms0", -0.5))),
        Column("param", "param", moment="param_squared"),
        Column("grad", "grad", moment="grad_squared"),
    ]
    columns += [Column(f"mom{k}", f"mom{k}", moment=f"mom{k}_squared") for k in range(3)]
    columns += [
        Column("log_slow", "ln(rms1 + 1e-24) / 2", moment="rms1", log=True),
        Column(
            "log_ratio",
            "ln((rms0 + 1e-24) / (rms1 + 1e-24)) / 2",
            debias=(("rms0", 0.5), slow),
            log=True,
        ),
    ]
    return FeatureSet(
        name="compact",
        columns=tuple(columns),
        moments=("param_squared", "grad_squared", "mom0_squared", "mom1_squared", "mom2_squared", "rms1"),
        mom_decays=(0.9, 0.99, 0.999),
        rms_decays=(0.95, 0.999),
        epsilon=1e-24,
    )


#: All compiled feature sets; their position is the index the kernels know them by.
FEATURE_SETS: dict[str, FeatureSet] = {feature_set.name: feature_set for feature_set in (_paper(), _compact())}
