"""Learned optimizers that others published: their rules, each a module, in plain PyTorch."""

from collections.abc import Mapping
from typing import Any

from lopt.rule.published.celo2 import Celo2
from lopt.rule.published.mlp_lopt import MLPLOpt
from lopt.rule.published.nn_adam import NNAdam
from lopt.rule.published.rule import Rule
from lopt.rule.published.small_fc import SmallFC
from lopt.rule.published.velo import VeLO

#: All rules, by the name that theta files have; VeLO before Celo2, which has a part of its arrays.
RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (MLPLOpt, SmallFC, NNAdam, VeLO, Celo2)}

__all__ = ["RULES", "Celo2", "MLPLOpt", "NNAdam", "Rule", "SmallFC", "VeLO", "rule_from_json"]


def rule_from_json(values: Mapping[str, Any]) -> Rule:
    """The rule that :meth:`Rule.to_json` wrote.

    Raises:
        ValueError: no such rule is known, or a field is unknown or missing.
    """
    name = values["rule"]
    if name not in RULES:
        raise ValueError(f"rule: expected one of {sorted(RULES)}, got {name!r}; the file needs another version of lopt")
    return RULES[name].from_json(values)
