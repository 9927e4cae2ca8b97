"""Ways to step by one preset that take different time."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch

from lopt.rule import PRESETS, Theta, ThetaSpec
from lopt.rule.published import SmallFC, VeLO

#: Learned optimizers of others that are measured.
RULES: dict[str, SmallFC | VeLO] = {"small_fc_lopt": SmallFC(), "velo": VeLO()}

STATS: tuple[Literal["current", "lagged"], ...] = ("current", "lagged")
STATE_DTYPES = ("float32", "bfloat16", "int8")
PRECISIONS: tuple[Literal["high", "fast"], ...] = ("high", "fast")


@dataclass(frozen=True)
class Variant:
    """A preset, or a rule of others, whether its statistics lag, and two arguments of LearnedOptimizer."""

    preset: str
    stats: Literal["current", "lagged"] = "current"
    state_dtype: str = "float32"
    precision: Literal["high", "fast"] = "high"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("presets", self.preset, (*PRESETS, *RULES)),
            ("stats", self.stats, STATS),
            ("state_dtypes", self.state_dtype, STATE_DTYPES),
            ("precisions", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected some of {', '.join(known)}, got {value!r}")

        if self.preset in RULES and (self.stats != "current" or self.state_dtype == "int8"):
            raise ValueError(f"presets: {self.preset!r} has stats='current' and a state in float32 or bfloat16 alone")

    @property
    def spec(self) -> ThetaSpec | SmallFC | VeLO:
        if self.preset in RULES:
            return RULES[self.preset]
        return dataclasses.replace(PRESETS[self.preset], stats=self.stats)

    @property
    def state(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.state_dtype)
        return dtype

    @property
    def name(self) -> str:
        """For people: what is not as usual."""
        words = [self.preset]
        words += ["lagged stats"] * (self.stats != "current")
        words += [f"{self.state_dtype} state"] * (self.state_dtype != "float32")
        return ", ".join(words + [self.precision] * (self.precision != "high"))

    def theta(self) -> Theta[Any]:
        """Random weights."""
        if self.preset in RULES:
            return Theta.init(self.preset, seed=0)
        return Theta.init(self.preset, seed=0).with_spec(stats=self.stats)


def variants(
    presets: Sequence[str],
    stats: Sequence[str] = ("current",),
    state_dtypes: Sequence[str] = ("float32",),
    precisions: Sequence[str] = ("high",),
) -> tuple[Variant, ...]:
    """Each with each.

    Raises:
        ValueError: one that there is not.
    """
    return tuple(Variant(*some) for some in product(presets, stats, state_dtypes, precisions))  # type: ignore[arg-type]
