"""Feature sets: what the small MLP sees of one parameter, as a table.

Each column is a raw value computed by the kernels (csrc/features.h has the same columns in the same order), mapped by
``x = clamp(raw * scale + shift, -clip, clip)`` with a scale and a shift per tensor and column. The map is where the
tensor normaliser and the bias corrections of the accumulators live, so that neither touches a kernel.

Source: arXiv:2009.11243, appendix C, and its author's port (the ``paper`` set).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Columns of the per-tensor statistics, common to all feature sets; the set's moments follow (csrc/stats.h).
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
        moments = stats[:, len(STATS) :]
        means = torch.stack(
            [
                moments[:, self.moments.index(column.moment)] if column.moment else torch.zeros_like(updates)
                for column in self.columns
            ],
            dim=1,
        )
        accumulators = [f"mom{k}" for k in range(len(self.mom_decays))]
        accumulators += [f"rms{k}" for k in range(len(self.rms_decays))]
        normalised = stats.new_tensor([float(c.moment is not None and not c.log) for c in self.columns])
        centred = stats.new_tensor([float(c.moment is not None and c.log) for c in self.columns])
        log = stats.new_tensor([float(c.log) for c in self.columns])
        scale = torch.where(normalised > 0, torch.rsqrt(means + self.epsilon), torch.ones_like(means))
        shift = torch.where(centred > 0, -0.5 * torch.log(means + self.epsilon), torch.zeros_like(means))
        if any(column.debias for column in self.columns):
            exponents = stats.new_tensor(
                [[dict(column.debias).get(name, 0.0) for name in accumulators] for column in self.columns]
            )
            # ln of prod (1 - decay^updates)^-exponent
            corrections = -torch.log(-torch.expm1(updates[:, None] * torch.log(decays))) @ exponents.T
            scale = scale * torch.exp(corrections * (1 - log))
            shift = shift + corrections * log
        return scale, shift


def _paper() -> FeatureSet:
    decays = (0.5, 0.9, 0.99, 0.999, 0.9999)
    rows = [("grad", "grad"), ("param", "param"), ("log_param", "ln(|param| + 1e-8)")]
    rows += [(f"mom{k}", f"mom{k}") for k in range(5)]
    rows += [(f"rms{k}", f"rms{k}") for k in range(5)]
    rows += [(f"mom{k}_over_rms{k}", f"mom{k} * rsqrt(rms{k} + 1e-6)") for k in range(5)]
    rows += [(f"rsqrt_rms{k}", f"rsqrt(rms{k} + 1e-6)") for k in range(5)]
    return FeatureSet(
        name="paper",
        columns=tuple(Column(name, formula, moment=f"{name}^2") for name, formula in rows),
        moments=tuple(f"{name}^2" for name, _ in rows),
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
        Column("param", "param", moment="param^2"),
        Column("grad", "grad", moment="grad^2"),
    ]
    columns += [Column(f"mom{k}", f"mom{k}", moment=f"mom{k}^2") for k in range(3)]
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
        moments=("param^2", "grad^2", "mom0^2", "mom1^2", "mom2^2", "rms1"),
        mom_decays=(0.9, 0.99, 0.999),
        rms_decays=(0.95, 0.999),
        epsilon=1e-24,
    )


#: All compiled feature sets; their position is the index the kernels know them by.
FEATURE_SETS: dict[str, FeatureSet] = {feature_set.name: feature_set for feature_set in (_paper(), _compact())}
