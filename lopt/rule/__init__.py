"""The learned update rule in plain PyTorch: what theta is, what it sees, and the definition of a step."""

from lopt.rule.features import FEATURE_SETS, Column, FeatureSet
from lopt.rule.published import RULES, Rule
from lopt.rule.spec import PRESETS, ThetaSpec
from lopt.rule.theta import WEIGHTS, Theta, hierarchical, shipped, unflatten

__all__ = [
    "FEATURE_SETS",
    "PRESETS",
    "RULES",
    "WEIGHTS",
    "Column",
    "FeatureSet",
    "Rule",
    "Theta",
    "ThetaSpec",
    "hierarchical",
    "shipped",
    "unflatten",
]
