"""ThetaSpec: the architecture of a learned optimizer, everything about it that is not meta-learned, and the presets.

Source: arXiv:2009.11243, section 3.3 and appendix C; constants of the author's JAX port.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lopt.rule.features import FEATURE_SETS, FeatureSet, feature_set
from lopt.rule.inputs import INPUT_SETS, InputSet


@dataclass(frozen=True)
class ThetaSpec:
    """The architecture of a learned optimizer: everything about it that is not meta-learned.

    Args:
        feature_set: name of the per-parameter inputs, a key of :data:`lopt.rule.features.FEATURE_SETS` or what
            :meth:`lopt.FeatureSet.register` returned.
        mlp_width: width of the hidden layers of the per-parameter MLP. Kernels are compiled in for 8, 16 and 32.
        lstm_width: hidden size of the per-tensor LSTM.
        from_mlp: values the MLP sends to the LSTM (averaged over the tensor).
        lstm_to_mlp: values the LSTM sends to the MLP of its tensor.
        from_lstm: values all tensors share through the next step's LSTM input.
        mom_decays, rms_decays: decays of the accumulators, as many as the feature set has; its own by default.
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
            ``"natural"``: those of ``"relative"`` and some about matrices; learned steps are shares of the natural size
            of a tensor (:mod:`lopt.rule.matrices`), in place of its scale.
        newton_schulz: iterations that orthogonalise the directions of matrices (:mod:`lopt.rule.orthogonal`), as far
            as a learned gate per tensor opens: ``clamp(1/2 + a linear map of the LSTM's state and inputs, 0, 1)``.
            0: none.
        horizon_input: adds the inputs that need ``total_steps``; not with ``tensor_inputs="paper"``.
        time_limit: steps beyond which logarithmic time stands still (the longest run seen in meta-training).
        train_loss_decay, valid_loss_decay: decays of the two loss averages.
        clip_decay, clip_multiplier: of the gradient clipper.
        feature_clip: bound of the normalised per-parameter inputs, None for none.
        valid_advances_step: whether an observed validation loss counts as a step, as in the author's port.
        stats: which statistics of the tensors the LSTM, the column maps and the gradient clipper see. ``"current"``: of
            this step, so that a step reads everything twice. ``"lagged"``: of the step before (in a tensor's first step
            its own), so that one sweep can update accumulators and parameters: 92 instead of 140 bytes per parameter
            for ``paper``. A theta is meta-trained for one of them.
        mlp_layers: hidden layers of the per-parameter MLP, 1 or 2. Kernels are compiled in for 2.

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
    mom_decays: tuple[float, ...] = ()
    rms_decays: tuple[float, ...] = ()
    step_multiplier: float = 0.04
    magnitude_rate: float = 0.1
    linear_skip: bool = True
    step_control: bool = True
    tensor_inputs: str = "relative"
    newton_schulz: int = 0
    horizon_input: bool = True
    time_limit: float = 10_000.0
    train_loss_decay: float = 0.9
    valid_loss_decay: float = 0.95
    clip_decay: float = 0.99
    clip_multiplier: float = 10.0
    feature_clip: float | None = 5.0
    valid_advances_step: bool = False
    stats: str = "current"
    mlp_layers: int = 2

    def __post_init__(self) -> None:
        features = feature_set(self.feature_set)
        for name in ("mom_decays", "rms_decays"):
            decays = tuple(float(decay) for decay in getattr(self, name) or getattr(features, name))
            object.__setattr__(self, name, decays)
            expected = len(getattr(features, name))
            if len(decays) != expected or not all(0.0 < decay < 1.0 for decay in decays):
                raise ValueError(
                    f"{name}: feature set {self.feature_set!r} needs {expected} decays in (0, 1), got {decays}"
                )
        for name in ("mlp_width", "lstm_width", "from_mlp", "lstm_to_mlp", "from_lstm"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive size, got {getattr(self, name)}")
        if self.mlp_layers not in (1, 2):
            raise ValueError(f"mlp_layers: expected 1 or 2 hidden layers, got {self.mlp_layers}")
        for name in ("train_loss_decay", "valid_loss_decay", "clip_decay"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}: expected a value in (0, 1), got {getattr(self, name)}")
        for name in ("step_multiplier", "clip_multiplier", "time_limit"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.newton_schulz <= 10:
            raise ValueError(f"newton_schulz: expected 0 to 10 iterations, got {self.newton_schulz}")
        if not math.isfinite(self.magnitude_rate):
            raise ValueError(f"magnitude_rate: expected a finite number, got {self.magnitude_rate}")
        if self.feature_clip is not None and not self.feature_clip > 0.0:
            raise ValueError(f"feature_clip: expected None or a positive bound, got {self.feature_clip}")
        if self.tensor_inputs not in INPUT_SETS:
            raise ValueError(f"tensor_inputs: expected one of {sorted(INPUT_SETS)}, got {self.tensor_inputs!r}")
        if self.stats not in ("current", "lagged"):
            raise ValueError(f"stats: expected 'current' or 'lagged', got {self.stats!r}")
        if self.inputs.needs_slow and (
            features.slow is None
            or not set(self.inputs.moments) <= set(features.moments)
            or len(features.mom_decays) != len(self.inputs.moments)
        ):
            raise ValueError(
                f"tensor_inputs: {self.tensor_inputs!r} is not available with feature set {self.feature_set!r}, it "
                f"needs the moments {self.inputs.moments} of as many momenta, and a second moment; "
                "use tensor_inputs='paper', horizon_input=False"
            )
        if self.newton_schulz and not (self.inputs.natural and self.step_control):
            raise ValueError(
                f"newton_schulz: {self.newton_schulz} iterations need tensor_inputs='natural' and step_control=True, "
                f"got {self.tensor_inputs!r} and {self.step_control}"
            )
        if self.horizon_input and len(self.inputs.time) == self.inputs.untold:
            told = [name for name, table in INPUT_SETS.items() if len(table.time) > table.untold]
            raise ValueError(f"horizon_input: only available with tensor_inputs={' or '.join(map(repr, told))}")

    @property
    def features(self) -> FeatureSet:
        """The table of per-parameter inputs."""
        return feature_set(self.feature_set)

    @property
    def inputs(self) -> InputSet:
        """The table of inputs at tensor level."""
        return INPUT_SETS[self.tensor_inputs]

    @property
    def constant_names(self) -> tuple[str, ...]:
        """MLP inputs that are constant in a tensor, before the LSTM's output."""
        return self.inputs.constant_names(self.horizon_input)

    @property
    def lstm_names(self) -> tuple[str, ...]:
        """LSTM inputs about a tensor, after the LSTM's own output and the MLP's feedback."""
        return self.inputs.lstm_names(self.horizon_input)

    @property
    def num_constant(self) -> int:
        """Number of MLP inputs that are constant in a tensor: time, facts about the tensor, LSTM output."""
        return len(self.constant_names) + self.lstm_to_mlp

    @property
    def num_lstm_input(self) -> int:
        """Number of LSTM inputs per tensor."""
        return self.from_lstm + self.from_mlp + len(self.lstm_names)

    def lstm_index(self, name: str) -> int:
        """Position among the LSTM's inputs of the one called ``name``."""
        return self.from_lstm + self.from_mlp + self.lstm_names.index(name)

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
        if self.mlp_layers == 1:
            del shapes["mlp.w2"], shapes["mlp.b2"]
        if self.linear_skip:
            shapes["skip"] = (len(self.features.columns),)
        if self.step_control:
            shapes["step.w"] = (lstm + self.num_lstm_input,)
            shapes["step.b"] = ()
        if self.newton_schulz:
            shapes["gate.w"] = (lstm + self.num_lstm_input,)
            shapes["gate.b"] = ()
            shapes["gate.step"] = ()  # what an open gate adds to the log of the step
        return shapes

    @property
    def preset(self) -> str:
        """Name of the preset of this architecture, or of the feature set where there is none."""
        alike = {name: spec for name, spec in PRESETS.items() if spec.feature_set == self.feature_set}
        same = (name for name, spec in alike.items() if spec.shapes() == self.shapes())
        return next(same, self.feature_set)

    @property
    def num_floats(self) -> int:
        """Number of meta-parameters."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values, with the table of a feature set that is not compiled in as ``features``.

        ``mlp_layers`` is left out where it is 2, as in files that were written before there was one.
        """
        table = {} if self.feature_set in FEATURE_SETS else {"features": self.features.to_json()}
        fields = dataclasses.asdict(self)
        if self.mlp_layers == 2:
            del fields["mlp_layers"]
        return fields | table

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ThetaSpec":
        """The inverse of :meth:`to_json`; unknown or missing fields are errors, but those that came later.

        A feature set that comes with it is registered.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        missing = names - set(values) - {"stats", "newton_schulz", "mlp_layers"}
        if missing or not set(values) <= names | {"features"}:
            raise ValueError(
                f"spec: unknown fields {sorted(set(values) - names - {'features'})}, missing fields {sorted(missing)}; "
                "the file was written by another version of lopt"
            )
        fields = {name: value for name, value in values.items() if name in names}
        if "features" in values:
            FeatureSet.from_json(values["features"]).register()
        return cls(**{**fields, "mom_decays": tuple(fields["mom_decays"]), "rms_decays": tuple(fields["rms_decays"])})

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process may not know the feature set."""
        return ThetaSpec.from_json, (self.to_json(),)


#: ``paper``: the optimizer of arXiv:2009.11243 as its author published it. ``compact``: elementwise, for large models.
#: ``spectral``: ``compact`` with natural sizes, and the directions of matrices orthogonalised; our default.
PRESETS: dict[str, ThetaSpec] = {
    "paper": ThetaSpec(
        feature_set="paper",
        mlp_width=32,
        lstm_width=64,
        from_mlp=16,
        lstm_to_mlp=17,
        from_lstm=18,
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
    "spectral": ThetaSpec(tensor_inputs="natural", newton_schulz=3),
}
