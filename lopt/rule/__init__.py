"""The learned update rule in plain PyTorch: what theta is, what it sees, and the definition of a step."""

from lopt.rule.features import FEATURE_SETS, Column, FeatureSet
from lopt.rule.spec import PRESETS, ThetaSpec
from lopt.rule.theta import WEIGHTS, Theta, shipped, unflatten

__all__ = ["FEATURE_SETS", "PRESETS", "WEIGHTS", "Column", "FeatureSet", "Theta", "ThetaSpec", "shipped", "unflatten"]
