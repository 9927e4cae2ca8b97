"""Ways to step by one preset that take different time."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch

from lopt.rule import PRESETS, Theta, ThetaSpec

STATS: tuple[Literal["current", "lagged"], ...] = ("current", "lagged")
STATE_DTYPES = ("float32", "bfloat16")
PRECISIONS: tuple[Literal["high", "fast"], ...] = ("high", "fast")


@dataclass(frozen=True)
class Variant:
    """A preset, whether its statistics lag, and two arguments of LearnedOptimizer."""

    preset: str
    stats: Literal["current", "lagged"] = "current"
    state_dtype: str = "float32"
    precision: Literal["high", "fast"] = "high"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("presets", self.preset, tuple(PRESETS)),
            ("stats", self.stats, STATS),
            ("state_dtypes", self.state_dtype, STATE_DTYPES),
            ("precisions", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected some of {', '.join(known)}, got {value!r}")

    @property
    def spec(self) -> ThetaSpec:
        return dataclasses.replace(PRESETS[self.preset], stats=self.stats)

    @property
    def state(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.state_dtype)
        return dtype

    @property
    def name(self) -> str:
        """For people: what is not as usual."""
        words = [self.preset]
        words += ["lagged stats"] * (self.stats != "current") + ["bfloat16 state"] * (self.state_dtype != "float32")
        return ", ".join(words + [self.precision] * (self.precision != "high"))

    def theta(self) -> Theta:
        """Random weights."""
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
