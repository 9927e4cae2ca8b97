"""Feature sets: what the small MLP sees of one parameter, as a table.

The sets of :data:`FEATURE_SETS` are compiled in; others are made by :class:`FeatureSet`, and known by their name
once they are registered.

Each column is a raw value computed by the kernels (csrc/rule/features.h has the same ones in the same order), mapped by
``x = clamp(raw * scale + shift, -clip, clip)`` with a scale and a shift per tensor and column. The map is where the
tensor normaliser and the bias corrections of the accumulators live, so that neither touches a kernel.

Source: arXiv:2009.11243, appendix C, and its author's port (the ``paper`` set).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.rule.constants import RESTING
from lopt.rule.formulas import SMALLEST, Node, evaluate, inputs_of, parse

#: Most accumulators of a kind (csrc/api/structs.h).
MAX_DECAYS = 8

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


_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Column:
    """One per-parameter input.

    ``formula`` is its raw value, in the language of :mod:`lopt.rule.formulas`; it may use columns before it by name.

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
    """A named list of columns, the moments their maps need, and the decays of the accumulators.

    Args:
        name: a lower-case identifier.
        columns: what the MLP sees of one parameter; the language of their formulas is :mod:`lopt.rule.formulas`.
        mom_decays, rms_decays: of ``mom0``, ``mom1``, ... and ``rms0``, ...: 1 to 8 of each.
        moments: per-tensor means, ``X_squared`` of an input or column ``X``, or ``rms0``, ... Those that columns name
            come after those given here. Where there is a mean of second moments, a parameter whose gradients have been
            zero for long rests (:meth:`active`); ``tensor_inputs="relative"`` and ``"natural"`` need it, and
            ``mom0_squared, mom1_squared, mom2_squared`` of three momenta.
        epsilon: added to a mean before its root or logarithm is taken.

    Raises:
        ValueError: a name, formula, moment or number is wrong, with the column.

    Example:
        >>> features = FeatureSet(
        ...     "adam_and_sign",
        ...     columns=(
        ...         Column("adam", "mom0 * rsqrt(rms0 + 1e-24)", debias=(("mom0", 1.0), ("rms0", -0.5))),
        ...         Column("sign", "grad / (abs(grad) + 1e-12)"),
        ...         Column("param", "param", moment="param_squared"),
        ...     ),
        ...     mom_decays=(0.9,),
        ...     rms_decays=(0.999,),
        ... )
        >>> features.register()
        'adam_and_sign'
    """

    name: str
    columns: tuple[Column, ...]
    mom_decays: tuple[float, ...]
    rms_decays: tuple[float, ...]
    moments: tuple[str, ...] = ()
    epsilon: float = 1e-24

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name: expected a lower-case identifier, got {self.name!r}")
        for name in ("columns", "mom_decays", "rms_decays", "moments"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        named = f"feature set {self.name!r}"
        for name in ("mom_decays", "rms_decays"):
            decays = getattr(self, name)
            if not 1 <= len(decays) <= MAX_DECAYS or not all(0.0 < decay < 1.0 for decay in decays):
                raise ValueError(f"{named}: {name}: expected 1 to {MAX_DECAYS} decays in (0, 1), got {decays}")
        if not SMALLEST <= self.epsilon < math.inf:
            raise ValueError(f"{named}: epsilon: expected a positive float32 number, got {self.epsilon}")
        if not self.columns:
            raise ValueError(f"{named}: columns: expected at least one, got none")
        needed = [column.moment for column in self.columns if column.moment is not None]
        object.__setattr__(self, "moments", tuple(dict.fromkeys([*self.moments, *needed])))
        _ = self.trees, self.moment_trees  # raise what is wrong
        for column in self.columns:
            for accumulator, exponent in column.debias:
                if accumulator not in self.accumulators or not (math.isfinite(exponent) and exponent):
                    raise ValueError(
                        f"{named}: column {column.name!r}: debias: expected an accumulator of {self.accumulators} with "
                        f"a number that is not 0, got {(accumulator, exponent)}"
                    )
        squares = [f"mom{k}_squared" for k in range(len(self.mom_decays))]
        at = [self.moments.index(name) for name in squares if name in self.moments]
        if len(at) == len(squares) and at != list(range(at[0], at[0] + len(at))):
            raise ValueError(f"{named}: moments: expected {squares} side by side in this order, got {self.moments}")

    @property
    def accumulators(self) -> tuple[str, ...]:
        """Names of all of them."""
        mom, rms = range(len(self.mom_decays)), range(len(self.rms_decays))
        return (*(f"mom{k}" for k in mom), *(f"rms{k}" for k in rms))

    @cached_property
    def trees(self) -> tuple[Node, ...]:
        """The formulas of the columns, read."""
        inputs: dict[str, Node] = {name: ("input", name) for name in ("grad", "param", *self.accumulators)}
        known = dict(inputs)
        trees: list[Node] = []
        seen: set[str] = set()
        for column in self.columns:
            where = f"feature set {self.name!r}: column {column.name!r}"
            if not _NAME.fullmatch(column.name) or column.name in seen:
                raise ValueError(f"{where}: expected another lower-case identifier for each column")
            try:
                tree = parse(column.formula, known)
            except ValueError as error:
                raise ValueError(f"{where}: formula: {error}") from None
            if not inputs_of(tree):
                raise ValueError(f"{where}: formula: expected something about the parameter, got {column.formula!r}")
            if tree != inputs.get(column.name, tree):
                raise ValueError(f"{where}: is the name of an input, and the formula is another: {column.formula!r}")
            trees.append(tree)
            seen.add(column.name)
            known[column.name] = tree
        return tuple(trees)

    @cached_property
    def moment_trees(self) -> tuple[Node, ...]:
        """What the moments are means of."""
        known: dict[str, Node] = {name: ("input", name) for name in ("grad", "param", *self.accumulators)}
        known |= {column.name: tree for column, tree in zip(self.columns, self.trees, strict=True)}
        trees: list[Node] = []
        for name in self.moments:
            base = name.removesuffix("_squared")
            if base in known and base != name:
                trees.append(("*", known[base], known[base]))
            elif re.fullmatch(r"rms\d", name) and name in self.accumulators:
                trees.append(("input", name))
            else:
                raise ValueError(
                    f"feature set {self.name!r}: moment {name!r}: expected X_squared, where X is an input or a column "
                    f"({', '.join(known)}), or one of the second moments"
                )
        return tuple(trees)

    def register(self) -> str:
        """Make the set known by its name, for :class:`lopt.ThetaSpec`.

        Returns:
            The name.

        Raises:
            ValueError: another set has that name.
        """
        known = {**FEATURE_SETS, **_REGISTERED}.get(self.name)
        if known is not None and known != self:
            raise ValueError(
                f"feature set {self.name!r}: another one has this name; give one of them another: {known} and {self}"
            )
        if known is None:
            _REGISTERED[self.name] = self
        return self.name

    def to_json(self) -> dict[str, Any]:
        """The table as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "FeatureSet":
        """The inverse of :meth:`to_json`."""
        try:
            columns = [
                Column(**{**column, "debias": tuple((name, float(exponent)) for name, exponent in column["debias"])})
                for column in values["columns"]
            ]
            return cls(**{**values, "columns": tuple(columns)})
        except (KeyError, TypeError) as error:
            raise ValueError(f"feature set: expected what FeatureSet.to_json writes, got {dict(values)}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def values(self, trees: Sequence[Node], grad: Tensor, param: Tensor, mom: Tensor, rms: Tensor) -> Tensor:
        """``[trees, numel]`` of :attr:`trees` or :attr:`moment_trees`."""
        inputs = {"grad": grad, "param": param, **dict(zip(self.accumulators, [*mom, *rms], strict=True))}
        return torch.stack(evaluate(trees, inputs))

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
        names = [column.name for column in self.columns]
        if name not in names:
            raise ValueError(f"feature set {self.name!r}: no column is called {name!r}, but {names}")
        return names.index(name)

    def column_map(self, stats: Tensor, updates: Tensor, decays: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of every column from the statistics of every tensor.

        Args:
            stats: ``[T, S]``, per-tensor statistics of this step.
            updates: ``[T]``, how often each tensor's accumulators were updated, this step included.
            decays: ``[num_mom + num_rms]``, in the dtype of ``stats``.

        Returns:
            ``scale, shift``, both ``[T, columns]``.
        """
        table = _column_table(self, stats.device, stats.dtype)
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
def _column_table(features: FeatureSet, device: torch.device, dtype: torch.dtype) -> _ColumnTable:
    columns = features.columns
    exponents = [[dict(column.debias).get(name, 0.0) for column in columns] for name in features.accumulators]
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
    rows = [("grad", "grad"), ("param", "param"), ("log_param", "ln(abs(param) + 1e-8)")]
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
            "ln(rms0 + 1e-24) / 2 - log_slow",
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
_REGISTERED: dict[str, FeatureSet] = {}


def feature_set(name: str) -> FeatureSet:
    """The set of this name, compiled in or registered.

    Raises:
        ValueError: there is none.
    """
    known = {**FEATURE_SETS, **_REGISTERED}
    if name not in known:
        raise ValueError(
            f"feature_set: expected one of {sorted(FEATURE_SETS)}, got {name!r}; registered are {sorted(_REGISTERED)}, "
            "and FeatureSet.register makes another one known"
        )
    return known[name]
