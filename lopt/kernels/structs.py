"""NumPy records of the structs in csrc/api: how Python hands numbers and addresses to C++."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lopt.rule import ThetaSpec
from lopt.rule.features import FEATURE_SETS
from lopt.rule.inputs import INPUT_SETS

MAX_DECAYS = 8
FEATURE_SET_INDEX = {name: index for index, name in enumerate(FEATURE_SETS)}

Record = np.ndarray[tuple[()], np.dtype[np.void]]

ACCUMULATE = np.dtype(
    [
        *((name, "i8") for name in ("tensors", "grads", "chunks", "num_tensors", "num_chunks", "clip_limit")),
        ("mom_decay", "f4", MAX_DECAYS),
        ("rms_decay", "f4", MAX_DECAYS),
        *((name, "i8") for name in ("step", "seed")),
        *((name, "i4") for name in ("state_dtype", "unused")),
        *((name, "i8") for name in ("partials", "finished", "stats")),
    ]
)
APPLY = np.dtype(
    [
        *((name, "i8") for name in ("tensors", "grads", "chunks", "num_tensors", "num_chunks", "clip_limit")),
        *((name, "i8") for name in ("scale", "shift", "bias", "step_size", "keep", "weights")),
        *((name, "f4") for name in ("magnitude_rate", "feature_clip")),
        *((name, "i4") for name in ("precision", "state_dtype")),
        *((name, "i8") for name in ("partials", "finished", "hidden")),
    ]
)
SPEC = np.dtype(
    [
        *((name, "i4") for name in ("feature_set", "width", "lstm_width", "from_mlp", "lstm_to_mlp", "from_lstm")),
        *((name, "i4") for name in ("linear_skip", "step_control", "tensor_inputs", "horizon_input")),
        *((name, "i4") for name in ("valid_advances_step", "unused")),
        *((name, "f8") for name in ("train_loss_decay", "valid_loss_decay", "clip_decay")),
        *((name, "f4") for name in ("step_multiplier", "magnitude_rate", "time_limit", "clip_multiplier")),
        ("feature_clip", "f4"),
        ("mom_decay", "f4", MAX_DECAYS),
        ("rms_decay", "f4", MAX_DECAYS),
        ("unused_too", "f4"),
    ]
)
SHAPE = np.dtype([("numel", "i8"), ("log_dims", "f4", 4), ("is_scalar", "i4"), ("is_matrix", "i4")])
ADVANCE = np.dtype(
    [
        *((name, "i8") for name in ("spec", "theta", "shapes", "num_tensors")),
        *(
            (name, "i8")
            for name in ("step", "train_loss", "valid_loss", "clip", "from_lstm", "pending_loss", "nonfinite")
        ),
        *((name, "i8") for name in ("h", "c", "feedback", "initial_scale", "updates")),
        *((name, "i8") for name in ("stats", "lr", "decay", "total_steps", "hidden", "new_train", "new_valid")),
        *((name, "f4") for name in ("train_value", "valid_value")),
        *((name, "i8") for name in ("clip_limit", "scale", "shift", "bias", "step_size", "keep")),
        *((name, "i8") for name in ("to_lstm", "finished")),
    ]
)


def check_sizes(compiled: dict[str, int], expected: dict[str, np.dtype[Any]]) -> None:
    """Raise ImportError where a compiled struct has another size than its record."""
    for name, dtype in expected.items():
        if compiled[name] != dtype.itemsize:
            raise ImportError(
                f"lopt._C has a {name} of {compiled[name]} bytes, Python one of {dtype.itemsize}: rebuild the extension"
            )


def spec_record(spec: ThetaSpec) -> Record:
    """The spec as csrc/rule/tensor_lstm.h reads it."""
    record = np.zeros((), SPEC)
    for name in ("lstm_width", "from_mlp", "lstm_to_mlp", "from_lstm", "linear_skip", "step_control", "horizon_input"):
        record[name] = getattr(spec, name)
    for name in ("valid_advances_step", "train_loss_decay", "valid_loss_decay", "clip_decay", "step_multiplier"):
        record[name] = getattr(spec, name)
    for name in ("magnitude_rate", "time_limit", "clip_multiplier"):
        record[name] = getattr(spec, name)
    record["feature_set"], record["width"] = FEATURE_SET_INDEX[spec.feature_set], spec.mlp_width
    record["tensor_inputs"] = list(INPUT_SETS).index(spec.tensor_inputs)
    record["feature_clip"] = np.inf if spec.feature_clip is None else spec.feature_clip
    record["mom_decay"][: len(spec.mom_decays)] = spec.mom_decays
    record["rms_decay"][: len(spec.rms_decays)] = spec.rms_decays
    return record


def shape_records(shapes: Sequence[Sequence[int]]) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Facts about tensors of these shapes as csrc/rule/tensor_lstm.h reads them."""
    records = np.zeros(len(shapes), SHAPE)
    for record, shape in zip(records, shapes, strict=True):
        record["numel"] = math.prod(shape)
        record["log_dims"] = np.log(np.array([*shape[:4], 1, 1, 1, 1][:4], dtype=np.float32)) - np.float32(1.0)
        record["is_scalar"], record["is_matrix"] = len(shape) == 0, len(shape) >= 2
    return records
