"""Weights of others: files and trees of JAX implementations, and PyLO's state dicts."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from lopt.files import read_npz
from lopt.rule.published import RULES, Rule
from lopt.rule.published.rule import Arrays
from lopt.rule.spec import PRESETS, ThetaSpec

#: Names of the arrays of ``RNNMLPLOpt``, the author's port of the paper's optimizer.
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


def read_jax(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[ThetaSpec | Rule, dict[str, Tensor]]:
    """Spec and tensors of :meth:`lopt.Theta.import_jax`."""
    if not isinstance(source, Mapping):
        path, source = Path(source), {}
        source = read_npz(path) if path.suffix == ".npz" else _read_flax(path)
    flat = _flatten_mapping(source)
    for prefix in ("theta|", "params|"):  # of recorded vectors, and of the port's ParameterCheckpoint
        if any(name.startswith(prefix) for name in flat):
            flat = {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}
    arrays = Arrays("import_jax", flat)
    for rule in RULES.values():
        if rule.jax_key in arrays:
            return rule.from_jax(arrays)
    return _paper(arrays)


#: Optimizers of PyLO, and the rule of each.
PYLO = {"AdafacLO": "small_fc_lopt", "MuLO": "small_fc_lopt", "ELO": "small_fc_lopt", "VeLO": "velo", "CELO2": "celo2"}


def read_pylo(
    sources: Sequence[str | os.PathLike[str] | Mapping[str, Any]], optimizer: str | None
) -> tuple[Rule, dict[str, Tensor]]:
    """Spec and tensors of :meth:`lopt.Theta.import_pylo`."""
    if optimizer is not None and optimizer not in PYLO:
        raise ValueError(f"optimizer: expected one of {sorted(PYLO)}, got {optimizer!r}")
    found: dict[str, Any] = {}
    for source in sources:
        found |= _flatten_mapping(source if isinstance(source, Mapping) else _read_torch(Path(source)))
    arrays = Arrays("import_pylo", {name.rpartition("|")[2]: value for name, value in found.items()})
    for name, rule in RULES.items():
        known = rule.pylo_key is not None and rule.pylo_key in arrays
        if known and (optimizer is None or PYLO[optimizer] == name):
            return rule.from_pylo(arrays, optimizer)
    some = ", ".join(sorted(arrays.arrays)[:3]) or "none"
    raise ValueError(
        f"import_pylo: expected the state dict of a network of PyLO ({optimizer or ', '.join(PYLO)}), found "
        f"{len(arrays.arrays)} tensors, the first {some}"
    )


def _read_torch(path: Path) -> Mapping[str, Any]:
    """The mapping in a file of torch.save, of which nothing is run, or of safetensors."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"import_pylo: {path} is no readable file of torch.save or safetensors ({error})") from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"import_pylo: {path} holds a {type(tree).__name__}, expected a state dict")
    return tree


def _paper(arrays: Arrays) -> tuple[ThetaSpec, dict[str, Tensor]]:
    spec, tensors = PRESETS["paper"], {}
    for name, shape in spec.shapes().items():
        key = JAX_NAMES[name]
        value = arrays.get(key)
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
