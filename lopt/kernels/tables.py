"""Whether the tables and constants of lopt/rule are those that lopt._C was compiled with: names, order, values."""

from typing import Any

import numpy as np

from lopt.rule import constants
from lopt.rule.features import FEATURE_SETS, STATS
from lopt.rule.inputs import INPUT_SETS
from lopt.rule.losses import LossState
from lopt.rule.tensor_lstm import ClipState


def rule_tables() -> dict[str, Any]:
    """What ``lopt._C.rule_tables()`` must return: every table by its name, as plain lists, numbers in float32."""
    tables: dict[str, Any] = {
        "STATS": list(STATS),
        "LossState": list(LossState._fields),
        "ClipState": list(ClipState._fields),
        "FEATURE_SETS": list(FEATURE_SETS),
        "INPUT_SETS": list(INPUT_SETS),
    }
    for name, features in FEATURE_SETS.items():
        tables[f"feature set {name}: columns"] = [column.name for column in features.columns]
        tables[f"feature set {name}: moments"] = list(features.moments)
        tables[f"feature set {name}: accumulators"] = [len(features.mom_decays), len(features.rms_decays)]
        tables[f"feature set {name}: first_shifted"] = features.first_shifted
        tables[f"feature set {name}: slow"] = -1 if features.slow is None else features.slow
        tables[f"feature set {name}: epsilon"] = float(np.float32(features.epsilon))
    for name, inputs in INPUT_SETS.items():
        for part in ("scalars", "time", "facts"):
            tables[f"input set {name}: {part}"] = list(getattr(inputs, part))
        for part in ("untold", "lstm_sees_constants", "robust", "natural"):
            tables[f"input set {name}: {part}"] = getattr(inputs, part)
    for name, value in constants.CONSTANTS.items():
        tables[name] = np.array(value, np.float32).tolist()
    return tables


def check_tables(compiled: dict[str, Any]) -> None:
    """Raise ImportError where the compiled tables are not those of Python."""
    expected = rule_tables()
    for name in [*expected, *compiled]:
        if compiled.get(name) != expected.get(name):
            raise ImportError(
                f"lopt._C has {name} = {compiled.get(name)}, lopt/rule has {expected.get(name)}: "
                "rebuild the extension, or make the two lists alike (csrc/rule and lopt/rule)"
            )
