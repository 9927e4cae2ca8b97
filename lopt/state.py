"""State of LearnedOptimizer: what is created, what a state dict must hold, and how it is taken up."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lopt.rule import ThetaSpec, tensor_lstm
from lopt.rule.tensor_lstm import Globals

GLOBALS = (*Globals._fields, "pending_loss", "nonfinite")  # kept in param_groups[0]


def init_globals(spec: ThetaSpec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State that all tensors share, before the first step."""
    like = weights["initial_h"]
    with torch.inference_mode(False), torch.no_grad():  # the first validation loss may come from inference mode
        return {
            **tensor_lstm.init_globals(spec, weights)._asdict(),
            "pending_loss": like.new_zeros(2),  # sum and number of the losses observed since the last step
            "nonfinite": torch.zeros((), dtype=torch.int64, device=like.device),
        }


def init_state(spec: ThetaSpec, weights: Mapping[str, Tensor], numel: int, dtype: torch.dtype) -> dict[str, Any]:
    """State of a parameter tensor of ``numel`` elements, before its first step; accumulators in ``dtype``."""
    like = weights["initial_h"]
    state: dict[str, Any] = {
        "mom": like.new_zeros(len(spec.mom_decays), numel, dtype=dtype),
        "rms": like.new_zeros(len(spec.rms_decays), numel, dtype=dtype),
        "lstm": {name: value[0] for name, value in tensor_lstm.init_rows(spec, weights, 1)._asdict().items()},
    }
    if spec.stats == "lagged":
        state["stats"] = like.new_zeros(spec.features.num_stats)
    return state


def check_state(
    state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    spec: ThetaSpec,
    weights: Mapping[str, Tensor],
) -> None:
    """Compare names and shapes in a state dict with those of an optimizer.

    Raises:
        ValueError: the state belongs to other parameters, another optimizer, or a theta of another architecture.
    """
    shared = {name: tuple(value.shape) for name, value in init_globals(spec, weights).items()}
    rows = tensor_lstm.init_rows(spec, weights, 1)._asdict()
    groups = list(zip(state_dict["param_groups"], param_groups, strict=False))
    pairs = (pair for theirs, ours in groups for pair in zip(theirs["params"], ours["params"], strict=False))
    states = [(index, state_dict["state"][index], p) for index, p in pairs if state_dict["state"].get(index)]
    for index, state, param in states:
        expected = {
            "mom": (len(spec.mom_decays), param.numel()),
            "rms": (len(spec.rms_decays), param.numel()),
            **{f"lstm.{name}": tuple(value.shape[1:]) for name, value in rows.items()},
            **({"stats": (spec.features.num_stats,)} if spec.stats == "lagged" else {}),
        }
        _check_shapes(f"state[{index}]", state, expected)
    if groups and (states or any(name in groups[0][0] for name in shared)):
        _check_shapes("param_groups[0]", groups[0][0], shared)


def _check_shapes(place: str, found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        value: Any = found
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        came = tuple(value.shape) if isinstance(value, Tensor) else "nothing"
        if came != shape:
            raise ValueError(
                f"state_dict: {place}[{name!r}] expected shape {shape}, found {came}; it belongs to "
                "another parameter, another optimizer, or a theta of another architecture"
            )


def restore_state(
    source: Mapping[str, Any],
    param_groups: Sequence[dict[str, Any]],
    state: MutableMapping[Tensor, Any],
    like: Tensor,
    dtype: torch.dtype,
) -> None:
    """Take state from ``source`` again, since torch casts what is floating to the parameters' dtype.

    Args:
        source: the state dict that was loaded.
        param_groups, state: the optimizer's, after ``Optimizer.load_state_dict``; written.
        like: has device and dtype of the state.
        dtype: of the accumulators.
    """

    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: copy(item) for name, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        kept = like.dtype if value.is_floating_point() else value.dtype
        return value.detach().to(device=like.device, dtype=kept, copy=True)

    ids = [index for group in source["param_groups"] for index in group["params"]]
    params = [param for group in param_groups for param in group["params"]]
    for index, param in zip(ids, params, strict=True):
        if index in source["state"]:
            new = copy(source["state"][index])
            for name in {"mom", "rms"} & set(new):
                new[name] = new[name].to(dtype)
            state[param] = new
    for name in GLOBALS:
        if name in param_groups[0]:
            param_groups[0][name] = copy(param_groups[0][name])
