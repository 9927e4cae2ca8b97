"""theta: the meta-parameters of a learned optimizer, and the spec that says what they parametrise.

A :class:`Theta` is a spec (the architecture: sizes, constants) with one named float32 tensor per entry of
``spec.shapes()``. The spec is a :class:`ThetaSpec`, of the hierarchical optimizer, or a rule that others published
(:mod:`lopt.rule.published`). A theta is created at random as in its paper (:meth:`Theta.init`), as an imitation of Adam
(:meth:`Theta.init_adam`), from a file, or from the weights of others.

One file, since it is one class; half of it are docstrings.

Source: arXiv:2009.11243, section 3.3 and appendix C; constants of the port.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from typing_extensions import TypeVar

from lopt.files import replacing
from lopt.rule import hub
from lopt.rule.imports import read_jax, read_pylo
from lopt.rule.published import RULES, Rule, rule_from_json
from lopt.rule.spec import PRESETS, ThetaSpec

FORMAT = 3  # of the safetensors file; raised when an older version of lopt cannot read what this one writes
READABLE = (2, 3)  # 2 has no direction stage
WEIGHTS = Path(__file__).parents[1] / "weights"


#: The hierarchical optimizer, or a rule of others.
AnySpec = ThetaSpec | Rule
#: What a theta is of; written without, ``Theta`` is that of the hierarchical optimizer.
Spec = TypeVar("Spec", bound=AnySpec, default=ThetaSpec)


def spec_from_json(values: Mapping[str, Any]) -> AnySpec:
    """The inverse of ``spec.to_json()``.

    Raises:
        ValueError: a field is unknown or missing, or the rule is.
    """
    return rule_from_json(values) if "rule" in values else ThetaSpec.from_json(values)


def _preset(name: str | AnySpec) -> AnySpec:
    if isinstance(name, (ThetaSpec, Rule)):
        return name
    if name in RULES:
        return RULES[name]()
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, or of the rules {sorted(RULES)}, got {name!r}")
    return PRESETS[name]


def hierarchical(theta: "Theta[Any]", what: str) -> "Theta":
    """A theta of the hierarchical optimizer.

    Args:
        what: needs one, for the error.

    Raises:
        ValueError: it is of another rule.
    """
    if isinstance(theta.spec, Rule):
        raise ValueError(
            f"theta: {what} is there for the hierarchical optimizer alone, got rule {theta.spec.name!r}; "
            f"use a theta of one of the presets {sorted(PRESETS)}"
        )
    return theta


@dataclass(frozen=True)
class Theta(Generic[Spec]):
    """Meta-parameters: a spec, one float tensor per entry of ``spec.shapes()``, and where they come from.

    Raises:
        ValueError: the tensors' names or shapes are not the spec's.

    Example:
        >>> theta = Theta.init("paper", seed=0)
        >>> theta.flatten().shape
        torch.Size([35799])
    """

    spec: Spec
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
    def init(cls, preset: str | AnySpec = "compact", seed: int = 0) -> "Theta[Any]":
        """Random meta-parameters as in the paper.

        Weights are normal with ``sigma = 1 / sqrt(fan_in)`` truncated at two sigma, ``initial_from_*`` likewise with
        ``sigma = sqrt(1 / length) / .87963``; biases, LSTM state, skip and step control are zero.

        Args:
            preset: its name, or that of a rule of others (:data:`lopt.rule.published.RULES`); or a spec.
        """
        spec = _preset(preset)
        generator = torch.Generator().manual_seed(seed)
        method = {"method": "init", "preset": preset if isinstance(preset, str) else spec.preset, "seed": seed}
        if isinstance(spec, Rule):
            return Theta(spec, spec.init(generator), method)
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
        return Theta(spec, tensors, method)

    @classmethod
    def init_adam(cls, preset: str | ThetaSpec = "compact", seed: int = 0, stop_early: float = 1.0) -> "Theta":
        """Meta-parameters that start as Adam; hidden units without influence on the update stay random.

        ``compact``: the skip is 1 on bias-corrected ``mom0 / sqrt(rms1)`` and the MLP's direction is 0, so within a
        tensor the update is Adam's with betas (.9, .999). A tensor's step is ``step_multiplier`` (.04) of its root mean
        square (bounded, see :func:`lopt.rule.tensor_lstm.tensor_scale`), and shorter in its first ten updates; given
        ``total_steps`` it starts at twice that and falls linearly to 1%. Both factors were set on synthetic tasks
        (docs/notebook, step_size.py, before the warm-up): final training loss .99 and .85 times that of constant
        Adam with the best of five learning rates for each task. Where the optimizer sees a validation loss, a rise of
        it (:func:`lopt.rule.losses.loss_rise`) lowers the log of the step by ``stop_early`` times that input: to
        half once a hundredth of what was gained is lost, to a hundredth in the end.

        ``spectral``: the same, in shares of the natural size of a tensor, and the directions of all matrices but the
        first and the last one are orthogonal: Muon with a learning rate that is built in.

        ``paper``: no column has Adam's pair of decays. Two hidden units carry ``+-x`` of the column nearest to Adam's
        direction, ``mom1 / sqrt(rms1)`` with decays .9 and .9: cosine .990 on random gradients, and a fitted
        combination of all five does no better (docs/notebook, adam_fit.py). The normaliser gives that column unit mean
        square, so the step is that of Adam with a learning rate of 1e-3.
        """
        spec = hierarchical(cls.init(preset, seed), "init_adam").spec
        tensors = cls.init(preset, seed).tensors
        tensors["mlp.w3"][:, :2] = 0.0
        if spec.linear_skip:
            tensors["skip"][spec.features.column_index("mom0_over_slow")] = 1.0
            of_inputs = tensors["step.w"][spec.lstm_width :]
            of_inputs[spec.lstm_index("told")] = math.log(2.0)
            of_inputs[spec.lstm_index("log_left")] = 1.0
            of_inputs[spec.lstm_index("valid_rise")] = -stop_early
            if spec.newton_schulz:  # open for hidden matrices
                tensors["gate.b"] += 0.5
                for name in ("is_input", "is_output"):
                    tensors["gate.w"][spec.lstm_width + spec.lstm_index(name)] = -1.0
        else:
            for unit, sign in ((0, 1.0), (1, -1.0)):
                tensors["mlp.w1"][:, unit] = 0.0
                tensors["mlp.w1"][spec.features.column_index("mom1_over_rms1"), unit] = sign
                if spec.mlp_layers == 2:
                    tensors["mlp.w2"][:, unit] = 0.0
                    tensors["mlp.w2"][unit, unit] = 1.0
                tensors["mlp.w3"][unit, 0] = sign
        name = preset if isinstance(preset, str) else spec.preset
        provenance = {"method": "init_adam", "preset": name, "seed": seed, "stop_early": stop_early}
        return Theta(spec, tensors, provenance)

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "Theta[Any]":
        """Read a theta file, or the shipped theta of that name.

        Raises:
            FileNotFoundError: neither a file nor a shipped name.
            ValueError: the file is damaged, of another format version, or its tensors are not finite or not the spec's.
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
        except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"theta: {path} is not a readable safetensors file ({error}); it may be truncated: copy it again"
            ) from error
        try:
            header = json.loads(metadata["lopt"])
            version, spec, provenance = header["format"], header["spec"], header["provenance"]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"theta: {path} has no lopt metadata; it was not written by Theta.save") from error
        if version not in READABLE:
            raise ValueError(
                f"theta: {path} has format {version}, this version of lopt reads {READABLE}; "
                "install the version of lopt that wrote it, or a newer one"
            )
        try:
            theta: Theta[Any] = Theta(spec_from_json(spec), tensors, provenance)
        except TypeError as error:
            raise ValueError(f"theta: {path} has a spec with a value of the wrong type ({error})") from error
        theta._check_finite(f"in {path}; it is damaged: copy or make it again")
        return theta

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; its metadata holds format version, spec and provenance as JSON.

        Raises:
            FileNotFoundError: the folder does not exist.
            ValueError: a value is not finite.
        """
        content, path = self.to_bytes(), Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"path: folder {str(path.parent)!r} does not exist; create it first")
        with replacing(path) as file:
            file.write(content)

    def to_bytes(self) -> bytes:
        """What :meth:`save` writes."""
        self._check_finite("and are not written")
        header = {"format": FORMAT, "spec": self.spec.to_json(), "provenance": self.provenance}
        tensors = {name: tensor.float().cpu().contiguous() for name, tensor in self.tensors.items()}
        return safetensors.torch.save(tensors, {"lopt": json.dumps(header)})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        scores: Mapping[str, float] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str = "Upload theta",
    ) -> str:
        """Share it on the Hugging Face Hub (extra ``hub``): theta.safetensors, and a model card with provenance and
        scores, in one commit.

        Args:
            repo_id: "name" or "user/name" of a model repository; made if missing.
            scores: beside those of the provenance, by what they are called, for the card.
            revision: branch; made if missing. The default one if not given.
            token: of the hub; by default that of ``hf auth login`` or ``HF_TOKEN``.
            private: whether a repository that is made is private; by default as the account has it.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            ModuleNotFoundError: huggingface_hub is missing.
            ValueError: a value is not finite.
            huggingface_hub.errors.HfHubHTTPError: what the hub refuses, as a missing right to write.
        """
        shared: dict[str, Any] = {"revision": revision, "token": token, "private": private}
        return hub.push(self, repo_id, scores=scores, commit_message=commit_message, **shared)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        filename: str = hub.FILE,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "Theta[Any]":
        """Theta from a model repository of the Hugging Face Hub (extra ``hub``); a file that is in its cache is not
        fetched again. Files of thetas hold numbers and text: nothing in them is run.

        Args:
            repo_id: "user/name".
            filename: in the repository.
            revision: branch, tag or commit.
            token: of the hub, for private repositories; by default that of ``hf auth login`` or ``HF_TOKEN``.
            local_files_only: ask nobody, take what is in the cache.

        Raises:
            ModuleNotFoundError: huggingface_hub is missing.
            huggingface_hub.errors.RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError: there is none of
                that name, or no right to read it.
            ValueError: the file is no theta, see :meth:`load`.
        """
        wanted: dict[str, Any] = {"filename": filename, "revision": revision, "token": token}
        return cls.load(hub.pull(repo_id, local_files_only=local_files_only, **wanted))

    def _check_finite(self, where: str) -> None:
        for name, tensor in self.tensors.items():
            if not bool(tensor.isfinite().all()):
                count = int((~tensor.isfinite()).sum())
                raise ValueError(f"theta[{name!r}]: {count} of {tensor.numel()} values are not finite {where}")

    def with_spec(self, **changes: Any) -> "Theta[Spec]":
        """The same meta-parameters under a spec with changed constants, e.g. ``theta.with_spec(step_multiplier=.01)``.

        Raises:
            ValueError: there is no such constant, or the change alters the shapes of the tensors.
        """
        names = [each.name for each in dataclasses.fields(cast(Any, self.spec))]
        for name in changes:
            if name not in names:
                raise ValueError(f"spec: no constant {name!r}; there are {', '.join(names)}")
        spec = cast(Spec, dataclasses.replace(cast(Any, self.spec), **changes))
        return Theta(spec, self.tensors, self.provenance)

    @property
    def num_floats(self) -> int:
        """Number of meta-parameters."""
        return self.spec.num_floats

    def flatten(self) -> Tensor:
        """All meta-parameters as one vector ``[P]``, in the order of ``spec.shapes()``."""
        return torch.cat([tensor.reshape(-1) for tensor in self.tensors.values()])

    def unflatten(self, flat: Tensor) -> "Theta[Spec]":
        """Theta with this spec and the values of ``flat`` ``[P]``; the inverse of :meth:`flatten`."""
        if flat.shape != (self.num_floats,):
            raise ValueError(f"flat: expected shape ({self.num_floats},), got {tuple(flat.shape)}")
        return Theta(self.spec, unflatten(self.spec, flat), self.provenance)

    def carried(self, spec: ThetaSpec) -> "Theta":
        """The same meta-parameters in a spec that has more inputs: what reads a new input is zero.

        Args:
            spec: of the same sizes. What this theta has and ``spec`` has not is dropped.

        Raises:
            ValueError: a tensor of both has another shape for another reason than its inputs.

        Example:
            >>> old = Theta.init_adam("compact")
            >>> new = old.carried(PRESETS["spectral"])
        """
        old, tensors = hierarchical(self, "carried").spec, {}
        for name, shape in spec.shapes().items():
            tensors[name] = torch.zeros(shape, dtype=torch.float32)
            if name not in self.tensors:
                continue
            rows_from, rows_to = _input_names(old, name), _input_names(spec, name)
            source, target = self.tensors[name].float(), tensors[name]
            fixed = 1 if rows_from else 0  # dimensions that inputs change
            if source.shape[fixed:] != target.shape[fixed:]:
                raise ValueError(f"spec: {name} has shape {shape}, in this theta {tuple(source.shape)}")
            if not rows_from:
                target.copy_(source)
                continue
            kept = [row for row in rows_to if row in rows_from]
            target[[rows_to.index(row) for row in kept]] = source[[rows_from.index(row) for row in kept]]
        return Theta(spec, tensors, self.provenance)

    def toward(self, other: "Theta[Spec]", share: float) -> "Theta[Spec]":
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

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Theta[Spec]":
        """Theta on another device or in another floating dtype."""
        tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.tensors.items()}
        return Theta(self.spec, tensors, self.provenance)

    @classmethod
    def import_jax(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> "Theta[Any]":
        """Meta-parameters of an optimizer of google/learned_optimization, or made from one of those.

        The rule is recognised by its arrays: ``RNNMLPLOpt`` (preset ``paper`` with the port's semantics), or one of
        :data:`lopt.rule.published.RULES`. Constants that are no arrays are those of the rule's defaults
        (:meth:`with_spec` changes them).

        Args:
            source: a flax file (msgpack) of theta or of ``ParameterCheckpoint``, an ``.npz`` file, or a mapping, such
                as a tree of haiku's; nested, or with keys such as ``theta|ffmod_params|mlp/~/linear_0|w`` (the prefix
                ``theta|`` may be missing).

        Raises:
            ValueError: an array is missing or has another shape than the rule.
        """
        return Theta(*read_jax(source), {"method": "import_jax"})

    @classmethod
    def import_pylo(
        cls, *sources: str | os.PathLike[str] | Mapping[str, Any], optimizer: str | None = None
    ) -> "Theta[Any]":
        """Meta-parameters of a network of PyLO (``MetaMLP``, ``VeLORNN`` with ``VeLOMLP``, ``CELO2MLP``).

        Constants that PyLO has in its constructors are those of its defaults, with ``lr`` 1 where there are others
        beside it; :meth:`with_spec` changes them.

        Args:
            sources: state dicts, or files of ``torch.save`` or safetensors with one; for VeLO both networks.
            optimizer: the name in PyLO, where several share a network: ``MetaMLP`` is that of ``"AdafacLO"`` (and
                ``"MuLO"``) by default, with the decays of its constructor, and of ``"ELO"``.

        Raises:
            ValueError: a source is none of these, or a tensor is missing.
        """
        return Theta(*read_pylo(sources, optimizer), {"method": "import_pylo"})


def _input_names(spec: ThetaSpec, tensor: str) -> list[str]:
    """Names of what the rows of a tensor of theta read; none where that is the same for all specs."""
    hidden = [f"h{i}" for i in range(spec.lstm_width)]
    shared = [f"from_lstm{i}" for i in range(spec.from_lstm)] + [f"from_mlp{i}" for i in range(spec.from_mlp)]
    of_lstm = [*shared, *spec.lstm_names]
    if tensor == "lstm.w":
        return [*of_lstm, *hidden]
    if tensor in ("step.w", "gate.w"):
        return [*hidden, *of_lstm]
    columns = [f"column {column.name}" for column in spec.features.columns]
    if tensor == "skip":
        return columns
    if tensor == "mlp.w1":
        return [*columns, *spec.constant_names, *(f"to_mlp{i}" for i in range(spec.lstm_to_mlp))]
    return []


def unflatten(spec: AnySpec, flat: Tensor) -> dict[str, Tensor]:
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
