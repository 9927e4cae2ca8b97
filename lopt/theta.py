"""theta: the meta-parameters of a learned optimizer, and the spec that says what they parametrise.

A :class:`Theta` is a :class:`ThetaSpec` (the architecture: feature set, sizes, constants) with one named float32 tensor
per entry of ``spec.shapes()``. It is created at random as in the paper (:meth:`Theta.init`), as an imitation of Adam
(:meth:`Theta.init_adam`), from a file, or from the weights of the author's JAX port.

Source: arXiv:2009.11243, section 3.3 and appendix C; constants of the port.
"""

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lopt.features import FEATURE_SETS, FeatureSet

FORMAT = 2  # of the safetensors file; raised when old files cannot be read as they are
WEIGHTS = Path(__file__).parent / "weights"

#: Kinds of inputs at tensor level, with the number of scalars about one tensor that the LSTM sees.
TENSOR_INPUTS = {"paper": 18, "relative": 13}


@dataclass(frozen=True)
class ThetaSpec:
    """The architecture of a learned optimizer: everything about it that is not meta-learned.

    Args:
        feature_set: name of the per-parameter inputs, a key of :data:`lopt.features.FEATURE_SETS`.
        mlp_width: width of the two hidden layers of the per-parameter MLP. Kernels exist for 8, 16 and 32.
        lstm_width: hidden size of the per-tensor LSTM.
        from_mlp: values the MLP sends to the LSTM (averaged over the tensor).
        lstm_to_mlp: values the LSTM sends to the MLP of its tensor.
        from_lstm: values all tensors share through the next step's LSTM input.
        mom_decays, rms_decays: decays of the accumulators, as many as the feature set has.
        step_multiplier: constant factor of every update.
        magnitude_rate: ``c`` in ``update = direction * exp(c * magnitude)``.
        linear_skip: adds a linear map of the per-parameter inputs to the direction.
        step_control: multiplies a tensor's update by its scale (root mean square) and by the exponential of a linear
            map of the LSTM's state and inputs; the first ten updates of a tensor by .1, .2, ... 1, too. A tensor whose
            gradient is zero everywhere does not move.
        tensor_inputs: ``"paper"``: the LSTM sees magnitudes and signs as they are, the MLP 11 sinusoids of the step.
            ``"relative"``: the LSTM sees ratios that do not depend on the scale of gradients and parameters, and not
            the dimensions of the tensor, which differ between small tasks and large models and between layouts; both
            see the logarithm of the step, at most ``time_limit``. Needs a feature set with a slow second moment.
        horizon_input: adds the inputs that need ``total_steps``; only with ``tensor_inputs="relative"``.
        time_limit: steps beyond which logarithmic time stands still (the longest run seen in meta-training).
        train_loss_decay, valid_loss_decay: decays of the two loss averages.
        clip_decay, clip_multiplier: of the gradient clipper.
        feature_clip: bound of the normalised per-parameter inputs, None for none.
        valid_advances_step: whether an observed validation loss counts as a step, as in the author's port.
        stats: which statistics of the tensors the LSTM, the column maps and the gradient clipper see. ``"current"``: of
            this step, so that a step reads everything twice. ``"lagged"``: of the step before (in a tensor's first step
            its own), so that one sweep can update accumulators and parameters: 92 instead of 140 bytes per parameter
            for ``paper``. A theta is meta-trained for one of them.

    Raises:
        ValueError: a field is out of range, with the bad value.

    Example:
        >>> PRESETS["paper"].num_floats
        35799
    """

    feature_set: str = "compact"
    mlp_width: int = 8
    lstm_width: int = 8
    from_mlp: int = 4
    lstm_to_mlp: int = 4
    from_lstm: int = 4
    mom_decays: tuple[float, ...] = FEATURE_SETS["compact"].mom_decays
    rms_decays: tuple[float, ...] = FEATURE_SETS["compact"].rms_decays
    step_multiplier: float = 0.04
    magnitude_rate: float = 0.1
    linear_skip: bool = True
    step_control: bool = True
    tensor_inputs: str = "relative"
    horizon_input: bool = True
    time_limit: float = 10_000.0
    train_loss_decay: float = 0.9
    valid_loss_decay: float = 0.95
    clip_decay: float = 0.99
    clip_multiplier: float = 10.0
    feature_clip: float | None = 5.0
    valid_advances_step: bool = False
    stats: str = "current"

    def __post_init__(self) -> None:
        if self.feature_set not in FEATURE_SETS:
            raise ValueError(f"feature_set: expected one of {sorted(FEATURE_SETS)}, got {self.feature_set!r}")
        for name in ("mom_decays", "rms_decays"):
            decays = tuple(float(decay) for decay in getattr(self, name))
            object.__setattr__(self, name, decays)
            expected = len(getattr(self.features, name))
            if len(decays) != expected or not all(0.0 < decay < 1.0 for decay in decays):
                raise ValueError(
                    f"{name}: feature set {self.feature_set!r} needs {expected} decays in (0, 1), got {decays}"
                )
        for name in ("mlp_width", "lstm_width", "from_mlp", "lstm_to_mlp", "from_lstm"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive size, got {getattr(self, name)}")
        for name in ("train_loss_decay", "valid_loss_decay", "clip_decay"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}: expected a value in (0, 1), got {getattr(self, name)}")
        for name in ("step_multiplier", "clip_multiplier", "time_limit"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not math.isfinite(self.magnitude_rate):
            raise ValueError(f"magnitude_rate: expected a finite number, got {self.magnitude_rate}")
        if self.feature_clip is not None and not self.feature_clip > 0.0:
            raise ValueError(f"feature_clip: expected None or a positive bound, got {self.feature_clip}")
        if self.tensor_inputs not in TENSOR_INPUTS:
            raise ValueError(f"tensor_inputs: expected one of {sorted(TENSOR_INPUTS)}, got {self.tensor_inputs!r}")
        if self.stats not in ("current", "lagged"):
            raise ValueError(f"stats: expected 'current' or 'lagged', got {self.stats!r}")
        if self.tensor_inputs == "relative" and self.features.slow is None:
            raise ValueError(f"tensor_inputs: 'relative' is not available with feature set {self.feature_set!r}")
        if self.horizon_input and self.tensor_inputs != "relative":
            raise ValueError("horizon_input: only available with tensor_inputs='relative'")

    @property
    def features(self) -> FeatureSet:
        """The table of per-parameter inputs."""
        return FEATURE_SETS[self.feature_set]

    @property
    def num_time(self) -> int:
        """Number of time inputs."""
        return 11 if self.tensor_inputs == "paper" else 6 if self.horizon_input else 1

    @property
    def num_facts(self) -> int:
        """Number of inputs about the tensor itself, beside time (:func:`lopt.tensor_lstm.tensor_facts`)."""
        return 3 if self.tensor_inputs == "paper" else 2

    @property
    def num_constant(self) -> int:
        """Number of MLP inputs that are constant in a tensor: time, facts about the tensor, LSTM output."""
        return self.num_time + self.num_facts + self.lstm_to_mlp

    @property
    def num_lstm_input(self) -> int:
        """Number of LSTM inputs per tensor."""
        time = self.num_time if self.tensor_inputs == "relative" else 0
        return self.from_lstm + self.from_mlp + TENSOR_INPUTS[self.tensor_inputs] + time

    @property
    def valid_rise(self) -> int:
        """Position of the rise of the validation loss among the LSTM's inputs; only with relative inputs."""
        return self.num_lstm_input - self.num_time - self.num_facts - 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of theta, in the order of :meth:`Theta.flatten`. Weights are ``[in, out]``."""
        lstm, width = self.lstm_width, self.mlp_width
        shapes: dict[str, tuple[int, ...]] = {
            "initial_from_lstm": (self.from_lstm,),
            "initial_from_mlp": (self.from_mlp,),
            "initial_h": (lstm,),
            "initial_c": (lstm,),
            "lstm.w": (self.num_lstm_input + lstm, 4 * lstm),  # gates in the order i, g, f, o
            "lstm.b": (4 * lstm,),
            "lstm_to_mlp.w": (lstm, self.lstm_to_mlp),
            "lstm_to_mlp.b": (self.lstm_to_mlp,),
            "lstm_to_lstm.w": (lstm, self.from_lstm),
            "lstm_to_lstm.b": (self.from_lstm,),
            "mlp.w1": (len(self.features.columns) + self.num_constant, width),
            "mlp.b1": (width,),
            "mlp.w2": (width, width),
            "mlp.b2": (width,),
            "mlp.w3": (width, 2 + self.from_mlp),  # direction, magnitude, values for the LSTM
            "mlp.b3": (2 + self.from_mlp,),
        }
        if self.linear_skip:
            shapes["skip"] = (len(self.features.columns),)
        if self.step_control:
            shapes["step.w"] = (lstm + self.num_lstm_input,)
            shapes["step.b"] = ()
        return shapes

    @property
    def num_floats(self) -> int:
        """Number of meta-parameters."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ThetaSpec":
        """The inverse of :meth:`to_json`; unknown or missing fields are errors, but ``stats``, once always current."""
        names = {f.name for f in dataclasses.fields(cls)}
        missing = names - set(values) - {"stats"}
        if missing or not set(values) <= names:
            raise ValueError(
                f"spec: unknown fields {sorted(set(values) - names)}, missing fields {sorted(missing)}; "
                "the file was written by another version of lopt"
            )
        return cls(**{**values, "mom_decays": tuple(values["mom_decays"]), "rms_decays": tuple(values["rms_decays"])})


#: ``paper``: the optimizer of arXiv:2009.11243 as its author published it. ``compact``: our default, for large models.
PRESETS: dict[str, ThetaSpec] = {
    "paper": ThetaSpec(
        feature_set="paper",
        mlp_width=32,
        lstm_width=64,
        from_mlp=16,
        lstm_to_mlp=17,
        from_lstm=18,
        mom_decays=FEATURE_SETS["paper"].mom_decays,
        rms_decays=FEATURE_SETS["paper"].rms_decays,
        step_multiplier=1e-3,
        magnitude_rate=1e-3,
        linear_skip=False,
        step_control=False,
        tensor_inputs="paper",
        horizon_input=False,
        feature_clip=None,
        valid_advances_step=True,
    ),
    "compact": ThetaSpec(),
}


def _preset(name: str) -> ThetaSpec:
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]


@dataclass(frozen=True)
class Theta:
    """Meta-parameters: a spec, one float tensor per entry of ``spec.shapes()``, and where they come from.

    Raises:
        ValueError: the tensors' names or shapes are not the spec's.

    Example:
        >>> theta = Theta.init("paper", seed=0)
        >>> theta.flatten().shape
        torch.Size([35799])
    """

    spec: ThetaSpec
    tensors: dict[str, Tensor]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = self.spec.shapes()
        if set(self.tensors) != set(shapes):
            raise ValueError(
                f"theta: missing tensors {sorted(set(shapes) - set(self.tensors))}, "
                f"unknown tensors {sorted(set(self.tensors) - set(shapes))} for this spec"
            )
        for name, shape in shapes.items():
            if tuple(self.tensors[name].shape) != shape:
                raise ValueError(f"theta[{name!r}]: expected shape {shape}, got {tuple(self.tensors[name].shape)}")
            if not self.tensors[name].is_floating_point():
                raise ValueError(f"theta[{name!r}]: expected a floating dtype, got {self.tensors[name].dtype}")
        object.__setattr__(self, "tensors", {name: self.tensors[name].detach() for name in shapes})

    @classmethod
    def init(cls, preset: str = "compact", seed: int = 0) -> "Theta":
        """Random meta-parameters as in the paper.

        Weights are normal with ``sigma = 1 / sqrt(fan_in)`` truncated at two sigma, ``initial_from_*`` likewise with
        ``sigma = sqrt(1 / length) / .87963``; biases, LSTM state, skip and step control are zero.
        """
        spec = _preset(preset)
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in spec.shapes().items():
            tensor = torch.zeros(shape, dtype=torch.float32)
            sigma = 0.0
            if name.startswith("initial_from"):
                sigma = math.sqrt(1 / shape[0]) / 0.87962566103423978
            elif len(shape) == 2:
                sigma = 1 / math.sqrt(shape[0])
            if sigma > 0.0:
                torch.nn.init.trunc_normal_(tensor, 0.0, sigma, -2 * sigma, 2 * sigma, generator=generator)
            tensors[name] = tensor
        return cls(spec, tensors, {"method": "init", "preset": preset, "seed": seed})

    @classmethod
    def init_adam(cls, preset: str = "compact", seed: int = 0, stop_early: float = 1.0) -> "Theta":
        """Meta-parameters that start as Adam; hidden units without influence on the update stay random.

        ``compact``: the skip is 1 on bias-corrected ``mom0 / sqrt(rms1)`` and the MLP's direction is 0, so within a
        tensor the update is Adam's with betas (.9, .999). A tensor's step is ``step_multiplier`` (.04) of its root mean
        square (bounded, see :func:`lopt.tensor_lstm.tensor_scale`), and shorter in its first ten updates; given
        ``total_steps`` it starts at twice that and falls linearly to 1%. Both factors were set on synthetic tasks
        (benchmarks/step_size.py, before there was a warm-up): final training loss .99 and .85 times that of constant
        Adam with the best of five learning rates for each task. Where the optimizer sees a validation loss, a rise of
        it (:func:`lopt.tensor_lstm.loss_rise`) lowers the logarithm of the step by ``stop_early`` times that input: to
        half once a hundredth of what was gained is lost, to a hundredth in the end.

        ``paper``: no column has Adam's pair of decays. Two hidden units carry ``+-x`` of the column nearest to Adam's
        direction, ``mom1 / sqrt(rms1)`` with decays .9 and .9: cosine .990 on random gradients, and a fitted
        combination of all five does no better (benchmarks/adam_fit.py). The normaliser gives that column unit mean
        square, so the step is that of Adam with a learning rate of 1e-3.
        """
        spec = _preset(preset)
        tensors = cls.init(preset, seed).tensors
        tensors["mlp.w3"][:, :2] = 0.0
        if spec.linear_skip:
            tensors["skip"][spec.features.column_index("mom0_over_slow")] = 1.0
            time = tensors["step.w"][-spec.num_time :]
            time[1] = math.log(2.0)  # when total_steps is known
            time[3] = 1.0  # ln(1 - .99 step / total_steps)
            tensors["step.w"][spec.lstm_width + spec.valid_rise] = -stop_early
        else:
            for unit, sign in ((0, 1.0), (1, -1.0)):
                for name in ("mlp.w1", "mlp.w2"):
                    tensors[name][:, unit] = 0.0
                tensors["mlp.w1"][spec.features.column_index("mom1_over_rms1"), unit] = sign
                tensors["mlp.w2"][unit, unit] = 1.0
                tensors["mlp.w3"][unit, 0] = sign
        provenance = {"method": "init_adam", "preset": preset, "seed": seed, "stop_early": stop_early}
        return cls(spec, tensors, provenance)

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "Theta":
        """Read a theta file, or the shipped theta of that name.

        Raises:
            FileNotFoundError: neither a file nor a shipped name.
            ValueError: the file is damaged, of another format version, or its tensors do not fit its spec.
        """
        path = Path(source)
        if not path.suffix and (WEIGHTS / f"{path.name}.safetensors").exists() and path.name == str(source):
            path = WEIGHTS / f"{path.name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"theta: no file {str(source)!r}; give the path of a .safetensors file, or a shipped name: {shipped()}"
            )
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"theta: {path} is not a readable safetensors file ({error}); it may be truncated"
            ) from error
        try:
            header = json.loads(metadata["lopt"])
            version, spec, provenance = header["format"], header["spec"], header["provenance"]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"theta: {path} has no lopt metadata; it was not written by Theta.save") from error
        if version != FORMAT:
            raise ValueError(f"theta: {path} has format {version}, this version of lopt reads format {FORMAT}")
        try:
            return cls(ThetaSpec.from_json(spec), tensors, provenance)
        except TypeError as error:
            raise ValueError(f"theta: {path} has a spec with a value of the wrong type ({error})") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; its metadata holds format version, spec and provenance as JSON.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        header = {"format": FORMAT, "spec": self.spec.to_json(), "provenance": self.provenance}
        tensors = {name: tensor.float().cpu().contiguous() for name, tensor in self.tensors.items()}
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"path: folder {str(path.parent)!r} does not exist; create it first")
        partial = path.with_name(path.name + ".partial")
        safetensors.torch.save_file(tensors, partial, {"lopt": json.dumps(header)})
        os.replace(partial, path)

    def with_spec(self, **changes: Any) -> "Theta":
        """The same meta-parameters under a spec with changed constants, e.g. ``theta.with_spec(step_multiplier=.01)``.

        Raises:
            ValueError: the change alters the shapes of the tensors.
        """
        return Theta(dataclasses.replace(self.spec, **changes), self.tensors, self.provenance)

    @property
    def num_floats(self) -> int:
        """Number of meta-parameters."""
        return self.spec.num_floats

    def flatten(self) -> Tensor:
        """All meta-parameters as one vector ``[P]``, in the order of ``spec.shapes()``."""
        return torch.cat([tensor.reshape(-1) for tensor in self.tensors.values()])

    def unflatten(self, flat: Tensor) -> "Theta":
        """Theta with this spec and the values of ``flat`` ``[P]``; the inverse of :meth:`flatten`."""
        if flat.shape != (self.num_floats,):
            raise ValueError(f"flat: expected shape ({self.num_floats},), got {tuple(flat.shape)}")
        return Theta(self.spec, unflatten(self.spec, flat), self.provenance)

    def toward(self, other: "Theta", share: float) -> "Theta":
        """``(1 - share) self + share other``: a step back towards where meta-training began averages out its noise.

        Args:
            other: of the same spec, best an ancestor; thetas of different beginnings have nothing in common.
            share: 0 is this theta, 1 the other.

        Raises:
            ValueError: the specs differ.

        Example:
            >>> adam = Theta.init_adam("compact")
            >>> halfway = Theta.load("train-loss").toward(adam, 0.5)

        Source: arXiv:2109.01903, for networks that were fine-tuned.
        """
        if other.spec != self.spec:
            raise ValueError(f"other: expected a theta of the same spec, got {other.spec}; this one has {self.spec}")
        tensors = {name: (1 - share) * tensor + share * other.tensors[name] for name, tensor in self.tensors.items()}
        return Theta(self.spec, tensors, self.provenance)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Theta":
        """Theta on another device or in another floating dtype."""
        tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.tensors.items()}
        return Theta(self.spec, tensors, self.provenance)

    @classmethod
    def import_jax(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> "Theta":
        """Meta-parameters of the author's JAX port (``RNNMLPLOpt``), with the port's semantics.

        Args:
            source: a flax ``theta.state`` file (msgpack), an ``.npz`` file, or a mapping; nested, or with keys such as
                ``theta|ffmod_params|mlp/~/linear_0|w`` (the prefix ``theta|`` may be missing).

        Raises:
            ValueError: an array is missing or has another shape than the ``paper`` preset.
        """
        if not isinstance(source, Mapping):
            path, source = Path(source), {}
            if path.suffix == ".npz":
                try:
                    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                        source = {name: arrays[name] for name in arrays.files}
                except (ValueError, EOFError, zipfile.BadZipFile) as error:
                    raise ValueError(f"import_jax: {path} is not a readable .npz file ({error})") from error
            else:
                source = _read_flax(path)
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
        return cls(spec, tensors, {"method": "import_jax"})


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


def unflatten(spec: ThetaSpec, flat: Tensor) -> dict[str, Tensor]:
    """Named tensors of theta as views of ``flat`` ``[..., P]``; leading dimensions (a population) are kept."""
    shapes = spec.shapes()
    parts = torch.split(flat, [math.prod(shape) for shape in shapes.values()], dim=-1)
    return {
        name: part.reshape((*flat.shape[:-1], *shape))
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def shipped() -> list[str]:
    """Names of the weights that come with the library."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


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
