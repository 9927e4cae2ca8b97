"""The table of families, and the two ways to a task: sampled by a seed, or rebuilt from its config.

Three groups: small synthetic tasks (:mod:`lopt.tasks.synthetic`), most of which the fused engine runs; small networks
of layers (:mod:`lopt.tasks.network_tasks`), which it runs too; and TaskSet's twelve families with two of transformers,
which PyTorch runs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

from lopt.tasks import (
    attention,
    convolutions,
    flows,
    language_models,
    losg,
    network_tasks,
    perceptrons,
    quadratics,
    recurrent,
    scripts,
    synthetic,
    vision_models,
)
from lopt.tasks.augmented import AugmentedTask
from lopt.tasks.data import catalogue
from lopt.tasks.pieces import Random
from lopt.tasks.sampled import SampledTask, from_config
from lopt.tasks.seeds import generator
from lopt.tasks.task import Task

SampledFamily = Literal[
    "mlp",
    "mlp_ae",
    "mlp_vae",
    "conv_pooling",
    "conv_fc",
    "nvp",
    "maf",
    "char_rnn_language_model",
    "word_rnn_language_model",
    "rnn_text_classification",
    "quadratic",
    "losg_tasks",
    "transformer_language_model",
    "vit",
]
NetworkFamily = Literal["token_perceptron", "token_transformer", "text_transformer", "small_convolution"]
Family = synthetic.Family | SampledFamily | NetworkFamily

#: ``sampler(random, names of data sets) -> task``; those without data ignore the names.
SAMPLERS: dict[SampledFamily | NetworkFamily, Callable[[Random, tuple[str, ...]], SampledTask]] = {
    "mlp": perceptrons.sample_mlp,
    "mlp_ae": perceptrons.sample_mlp_ae,
    "mlp_vae": perceptrons.sample_mlp_vae,
    "conv_pooling": convolutions.sample_conv_pooling,
    "conv_fc": convolutions.sample_conv_fc,
    "nvp": flows.sample_nvp,
    "maf": flows.sample_maf,
    "char_rnn_language_model": recurrent.sample_char_rnn,
    "word_rnn_language_model": recurrent.sample_word_rnn,
    "rnn_text_classification": recurrent.sample_rnn_text_classification,
    "quadratic": quadratics.sample_quadratic,
    "losg_tasks": losg.sample_losg,
    "transformer_language_model": attention.sample_transformer_language_model,
    "vit": attention.sample_vit,
    "token_perceptron": network_tasks.sample_token_perceptron,
    "token_transformer": network_tasks.sample_token_transformer,
    "text_transformer": network_tasks.sample_text_transformer,
    "small_convolution": network_tasks.sample_small_convolution,
}

#: Families of TaskSet and of transformers, on any data, which PyTorch runs.
SAMPLED_FAMILIES: tuple[SampledFamily, ...] = get_args(SampledFamily)

#: Families of small networks, which the unroll engine can run as it runs those of :mod:`lopt.tasks.synthetic`.
NETWORK_FAMILIES: tuple[NetworkFamily, ...] = get_args(NetworkFamily)

_TYPES: tuple[type[SampledTask], ...] = (
    perceptrons.MLP,
    perceptrons.Autoencoder,
    perceptrons.VAE,
    convolutions.ConvPooling,
    convolutions.ConvFC,
    flows.RealNVP,
    flows.MAF,
    recurrent.RecurrentLanguageModel,
    recurrent.RecurrentClassifier,
    quadratics.QuadraticForm,
    losg.LosgTask,
    attention.TransformerLanguageModel,
    attention.VisionTransformer,
    language_models.Decoder,
    vision_models.ViT,
    vision_models.ResidualNet,
    *scripts.SCRIPTS,
    network_tasks.TokenPerceptron,
    network_tasks.TokenTransformer,
    network_tasks.TextTransformer,
    network_tasks.SmallConvolution,
)
TYPES: dict[str, type[SampledTask]] = {kind.__name__: kind for kind in _TYPES}
assert len(TYPES) == len(_TYPES), "two types of tasks have one name, by which a config finds its type"


def sample_task(
    seed: int, families: Sequence[Family] = synthetic.FAMILIES, data: Sequence[str] = catalogue.CORE
) -> Task:
    """The task called ``seed``: one of ``families`` (one given twice counts twice), then everything else about it.

    Args:
        data: names of the data sets to choose from: :data:`~lopt.tasks.data.catalogue.CORE`, which needs nothing and is
            the same everywhere; :data:`~lopt.tasks.data.catalogue.META_TRAIN`, for which packages are needed; or any.

    Raises:
        ValueError: an unknown family or data set, or none.

    Example:
        >>> sample_task(3, ["conv_fc"]) == sample_task(3, ["conv_fc"])
        True
    """
    unknown = sorted(set(families) - set(synthetic.FAMILIES) - set(SAMPLERS))
    if unknown or not families:
        known = [*synthetic.FAMILIES, *SAMPLERS]
        raise ValueError(f"families: expected some of {known}, got {list(families)}")
    family = families[int(generator(seed, "family").integers(len(families)))]
    if family in SAMPLERS:
        return SAMPLERS[family](generator(seed, "task", family), tuple(data))
    return synthetic.sample_task(seed, (cast(synthetic.Family, family),))


def task_from_config(config: Mapping[str, Any]) -> Task:
    """The task whose :attr:`~lopt.tasks.Task.config` this is.

    Raises:
        ValueError: another type of task, or fields that do not belong to it.
    """
    name = config.get("type")
    if name == AugmentedTask.__name__:
        fields = {key: value for key, value in config.items() if key != "type"}
        return from_config(AugmentedTask, {**fields, "task": task_from_config(fields.get("task", {}))})
    if name in TYPES:
        return from_config(TYPES[name], {key: value for key, value in config.items() if key != "type"})
    if name not in synthetic.TYPES:
        known = sorted([*TYPES, *synthetic.TYPES])
        raise ValueError(f"config: expected the type to be one of {known}, got {name!r}")
    return synthetic.task_from_config(config)


def with_batch_size(task: Task, batch_size: int, length: int | None = None) -> Task:
    """The same task with minibatches of at most this many rows, and texts of at most this many symbols."""
    if isinstance(task, AugmentedTask):
        return dataclasses.replace(task, task=with_batch_size(task.task, batch_size, length))
    data = getattr(task, "data", None)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        changes: dict[str, Any] = {"batch_size": min(batch_size, data.batch_size)}  # type: ignore[attr-defined]
        if length is not None and hasattr(data, "length"):
            changes["length"] = min(length, data.length)
        return dataclasses.replace(task, data=dataclasses.replace(data, **changes))  # type: ignore[type-var]
    if hasattr(task, "batch_size"):
        return dataclasses.replace(task, batch_size=min(batch_size, task.batch_size))  # type: ignore[type-var]
    return task


def with_batch_share(task: Task, share: float) -> Task:
    """The same task with this share of the rows in a minibatch, at least one."""
    rows = getattr(getattr(task, "data", None), "batch_size", getattr(task, "batch_size", 1))
    return with_batch_size(task, max(1, int(share * rows)))
