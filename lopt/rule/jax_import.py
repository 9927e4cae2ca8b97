"""Meta-parameters of the author's JAX port (``RNNMLPLOpt`` in google/learned_optimization)."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor

from lopt.files import read_npz
from lopt.rule.spec import PRESETS, ThetaSpec

#: Names of the port's arrays.
JAX_NAMES = {
    "initial_from_lstm": "initial_from_lstm",
    "initial_from_mlp": "initial_from_mlp",
    "initial_h": "lstm_init_state|hidden",
    "initial_c": "lstm_init_state|cell",
    "lstm.w": "rnn_params|rnn/linear|w",
    "lstm.b": "rnn_params|rnn/linear|b",
    "lstm_to_mlp.w": "rnn_to_ff_params|rnn_to_ff|w",
    "lstm_to_mlp.b": "rnn_to_ff_params|rnn_to_ff|b",
    "lstm_to_lstm.w": "rnn_to_in_params|rnn_to_in|w",
    "lstm_to_lstm.b": "rnn_to_in_params|rnn_to_in|b",
    "mlp.w1": "ffmod_params|mlp/~/linear_0|w",
    "mlp.b1": "ffmod_params|mlp/~/linear_0|b",
    "mlp.w2": "ffmod_params|mlp/~/linear_1|w",
    "mlp.b2": "ffmod_params|mlp/~/linear_1|b",
    "mlp.w3": "ffmod_params|mlp/~/linear_2|w",
    "mlp.b3": "ffmod_params|mlp/~/linear_2|b",
}


def read_jax(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[ThetaSpec, dict[str, Tensor]]:
    """Spec and tensors of :meth:`lopt.Theta.import_jax`."""
    if not isinstance(source, Mapping):
        path, source = Path(source), {}
        source = read_npz(path) if path.suffix == ".npz" else _read_flax(path)
    flat = _flatten_mapping(source)
    if any(name.startswith("theta|") for name in flat):
        flat = {name[6:]: value for name, value in flat.items() if name.startswith("theta|")}
    spec = dataclasses.replace(PRESETS["paper"], valid_advances_step=True)
    tensors = {}
    for name, shape in spec.shapes().items():
        key = JAX_NAMES[name]
        if key not in flat:
            found = f"found {len(flat)} arrays, the first {sorted(flat)[:3]}"
            raise ValueError(f"import_jax: no array {key!r} for theta[{name!r}]; {found}")
        value = torch.from_numpy(np.array(flat[key], dtype=np.float32))
        if name in ("initial_h", "initial_c"):
            value = value.reshape(-1)  # [1, lstm_width] in the port
        if tuple(value.shape) != shape:
            raise ValueError(f"import_jax: {key!r} has shape {tuple(value.shape)}, expected {shape}")
        tensors[name] = value
    return spec, tensors


def _flatten_mapping(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten_mapping(value, f"{prefix}{name}|"))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _read_flax(path: Path) -> dict[str, Any]:
    """The nested mapping of a flax msgpack file. Extension 1 is an array: (shape, dtype name, bytes)."""

    def read_extension(code: int, data: bytes) -> Any:
        if code != 1:
            raise ValueError(f"import_jax: {path} holds a flax value of type {code}, only arrays are expected")
        shape, dtype, buffer = msgpack.unpackb(data, raw=False, strict_map_key=False)
        return np.frombuffer(buffer, dtype=np.dtype(dtype)).reshape(shape)

    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=read_extension, raw=False, strict_map_key=False)
    except (msgpack.exceptions.UnpackException, msgpack.exceptions.ExtraData, ValueError, TypeError) as error:
        raise ValueError(f"import_jax: {path} is not a readable flax theta.state file ({error})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"import_jax: {path} holds a {type(tree).__name__}, expected a mapping of arrays")
    return tree
