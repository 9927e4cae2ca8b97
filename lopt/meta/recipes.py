"""Recipes: the settings that made, or would make, a theta worth having.

The phases follow what small experiments showed: start from Adam; train what acts directly on the update first, then the
MLP, as the noise of the meta-gradient grows with the number of trained components; small tasks, as there is time for
more of them; horizons log-uniform from the start, since fixed ones do not extrapolate; the LSTM once the MLP stands;
long horizons and large tasks last, in windows with one perturbation per run (NRES).
"""

import dataclasses
from typing import Any

from lopt.meta.config import MetaTrainConfig, Phase
from lopt.tasks import ENGINE_FAMILIES, FAMILIES, SAMPLED_FAMILIES
from lopt.tasks.distribution import TaskDistribution

CURRICULUM = (
    Phase(0.10, (100, 1000), "linear", lr=3.0, max_params=1000),
    Phase(0.30, (100, 1000), "mlp", max_params=1000),
    Phase(0.15, (100, 2000), "lstm", max_params=2000),
    Phase(0.15, (100, 2000), "all", max_params=2000),
    Phase(0.30, (500, 10_000), "all", "nres", window=500, lr=0.5),
)

#: With short runs of small tasks and a tight bound of the differences, the training loss of 1000 steps got worse.
TRAIN_LOSS: dict[str, Any] = {
    "objective": "train",
    "phases": (
        Phase(0.20, (100, 2000), "linear", lr=3.0, max_params=4000),
        Phase(0.80, (100, 2000), "all", max_params=4000),
    ),
    "delta_clip": 0.3,
    "validate_every": 5_000_000,
}

#: From a theta made mostly of tasks of at most 2,000 parameters: those of all sizes, since such a theta takes too long
#: steps in larger and deeper perceptrons when it knows the length of the run. Again the group with least noise first.
#: Classes that can be told apart come more often, as in natural data: few rows of them are soon learned by heart.
CONTINUE: dict[str, Any] = {
    "init": "default",
    "tasks": (*ENGINE_FAMILIES, "sheets", "words", "spectrum"),
    "phases": (
        Phase(0.20, (200, 2000), "linear", lr=1.5, max_params=16_000),
        Phase(0.80, (200, 4000), "all", lr=0.6, max_params=16_000),
    ),
    "delta_clip": 0.15,
    "average": 0.95,
    "warmup_from_file": 8,
    "validation_horizons": (200, 1000, 5000),
    "validate_every": 30_000_000,
}

#: ``paper`` has neither skip nor step control, and 35,799 floats are too many to perturb at once for long.
PAPER = (
    Phase(0.70, (100, 1000), "mlp", lr=3.0, max_params=1000),
    Phase(0.30, (100, 2000), "all", max_params=1000),
)

#: The small run of the guide: seconds, and a gain that can be seen.
TINY: dict[str, Any] = {
    "inner_steps": 150_000,
    "phases": (Phase(1.0, (20, 100), "mlp"),),
    "pairs": 16,
    "average": 0.8,
    "warmup": 2,
    "validation_tasks": 16,
    "validation_horizons": (100,),
    "validate_every": 30_000,
}

#: Families that take about ten times as long as the others, mixed in less often.
SLOW = (
    "char_rnn_language_model",
    "word_rnn_language_model",
    "rnn_text_classification",
    "transformer_language_model",
    "vit",
)

#: All families, for a theta that begins as ``default``. Tasks of TaskSet's families take .1 to 10 ms per step, so there
#: are few iterations: only the group with least noise learns from them. Its noise is that of the directions, not of the
#: tasks, and 32 runs of one task side by side cost little more than 8, so many pairs share a task.
MIXTURE: dict[str, Any] = {
    "init": "default",
    "tasks": TaskDistribution(
        tuple((name, 0.25 if name in SLOW else 1.0) for name in SAMPLED_FAMILIES)
        + tuple((name, 0.5) for name in FAMILIES),
        max_seconds=0.01,
        max_params=150_000,
        reparametrise=0.5,
        reduce_batch=0.2,
        gradient_noise=0.2,
    ),
    "phases": (Phase(1.0, (50, 1000), "linear", lr=0.6),),
    "pairs": 256,
    "pairs_per_task": 16,
    "delta_clip": 0.15,
    "warmup_from_file": 4,
    "average": 0.95,
    "validation_tasks": 60,
    "validation_horizons": (100, 400),
    "validate_every": 2_000_000,
    "checkpoint_every": 5,
}

#: What people train, as far as the fused engine runs it: language models and convolutions, beside the perceptrons of
#: before; none of them dominates in the gradient, or in time, of which the last two take ten times as much per step.
#: Chaos of training makes differences that do not shrink with the perturbation: with a wide one they are less noise.
NETWORKS: dict[str, Any] = {
    "init": "default",
    "tasks": TaskDistribution(
        (
            *((name, 3.0 / len(ENGINE_FAMILIES)) for name in ENGINE_FAMILIES),
            ("token_perceptron", 3.0),
            ("token_transformer", 0.4),
            ("small_convolution", 0.3),
        ),
        max_seconds=None,
        max_params=6000,
    ),
    "phases": (
        Phase(0.10, (100, 2000), "linear", lr=0.5),
        Phase(0.90, (100, 4000), "all", lr=0.12),
    ),
    "sigma": 0.15,
    "equalise": True,
    "delta_clip": 1.0,
    "averaged": 0.5,
    "average": 0.98,
    "warmup_from_file": 8,
    "validation_tasks": 64,
    "validation_horizons": (300, 1500),
    "validate_every": 8_000_000,
}

#: The direction of the step alone, from transformers, by backpropagation. Sizes and their course are left as they are,
#: since what is best for them on a short run is not on a long one; a direction that is better on 100 steps is better on
#: 600, too. Few gradients, of which much is signal: steps along their mean.
BACKPROP: dict[str, Any] = {
    "init": "default",
    "tasks": TaskDistribution((("text_transformer", 1.0),), data=("stdlib-source",), max_seconds=None),
    "phases": (Phase(1.0, (60, 160), "direction", "backprop"),),
    "pairs": 24,
    "outer": "sgd",
    "lr": 0.2,
    "betas": (0.9, 0.99),
    "warmup_from_file": 0,
    "average": 0.8,
    "weighting": "last",
    "tell_horizon": 0.85,
    "averaged": 0.5,
    "valid_rows": 32,
    "validation_tasks": 24,
    "validation_horizons": (100, 600),
    "validate_every": 30_000,
    "checkpoint_every": 5,
}

#: Tasks of one's own, which PyTorch runs: a theta that begins as ``default`` learns from a few kinds of them. Runs of
#: one task side by side cost little more than one, so some pairs share a task.
OWN: dict[str, Any] = {
    "init": "default",
    "phases": (Phase(1.0, (50, 500), "linear", lr=0.6),),
    "pairs": 32,
    "pairs_per_task": 8,
    "delta_clip": 0.15,
    "warmup_from_file": 4,
    "average": 0.9,
    "validation_tasks": 8,
    "validation_horizons": (100, 500),
    "validate_every": 500_000,
    "checkpoint_every": 5,
}

#: Settings that differ from the defaults of :class:`MetaTrainConfig`, and what each recipe is for.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"phases": CURRICULUM},  # held-out loss: generalisation
    "continue": CONTINUE,  # larger tasks and longer runs, from ``default``
    "train-loss": TRAIN_LOSS,  # the training loss alone
    "paper": {"phases": PAPER, "preset": "paper"},  # the architecture of arXiv:2009.11243, 35,799 floats
    "networks": NETWORKS,  # perceptrons, small language models and convolutions, from ``default``
    "backprop": BACKPROP,  # the direction of the step, on transformers, from ``default``
    "mixture": MIXTURE,  # all families, from ``default``
    "own": OWN,  # tasks of one's own, from ``default``
    "tiny": TINY,
}


def recipe(name: str, **changes: Any) -> MetaTrainConfig:
    """The configuration called ``name``, with changed fields.

    Raises:
        ValueError: no such recipe, a change that is no field, or no ``inner_steps`` where the recipe has none.

    Example:
        >>> recipe("default", inner_steps=10**9).phases[0].groups
        'linear'
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {list(RECIPES)}, got {name!r}")
    check_fields(changes)
    settings = {"recipe": name, **RECIPES[name], **changes}
    if "inner_steps" not in settings:
        raise ValueError(f"inner_steps: recipe {name!r} needs a budget")
    return MetaTrainConfig(**settings)


def changed(config: MetaTrainConfig, **changes: Any) -> MetaTrainConfig:
    """The configuration with changed fields.

    Raises:
        ValueError: a change that is no field, or out of range.
    """
    check_fields(changes)
    return dataclasses.replace(config, **changes)


def check_fields(changes: dict[str, Any]) -> None:
    """Raises ValueError where a change is no field of a configuration."""
    fields = {field.name for field in dataclasses.fields(MetaTrainConfig)}
    if not set(changes) <= fields:
        raise ValueError(f"recipe: unknown fields {sorted(set(changes) - fields)}, expected some of {sorted(fields)}")
