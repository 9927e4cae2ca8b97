"""The learned update rule in plain PyTorch: what theta is, what it sees, and the definition of a step."""

from lopt.rule.features import FEATURE_SETS, Column, FeatureSet
from lopt.rule.published import RULES, Rule
from lopt.rule.spec import PRESETS, ThetaSpec
from lopt.rule.theta import WEIGHTS, AnySpec, Theta, hierarchical, shipped, spec_from_json, unflatten

__all__ = [
    "FEATURE_SETS",
    "PRESETS",
    "RULES",
    "WEIGHTS",
    "AnySpec",
    "Column",
    "FeatureSet",
    "Rule",
    "Theta",
    "ThetaSpec",
    "hierarchical",
    "shipped",
    "spec_from_json",
    "unflatten",
]
