"""Held-out suites over families of tasks: architectures by TaskSet's samplers, on data that meta-training never sees.

A row of the table is a family, a data set that :mod:`lopt.tasks.data.catalogue` holds out, and seeds of the sampler. A
seed stands there if its task has an ordinary loss at the start (some of TaskSet's initial values explode) and a step
that takes some milliseconds; no optimizer's result decided. Minibatches are cut to 64 rows and texts to windows of
16 symbols; all tasks use all training rows as they are, so that test and training loss mean the same everywhere.
"""

import dataclasses
from typing import Any

from lopt.tasks import sample_task
from lopt.tasks.attention import Transformer, TransformerLanguageModel, VisionTransformer
from lopt.tasks.convolutions import ConvFC
from lopt.tasks.families import SampledFamily, with_batch_size
from lopt.tasks.image_tasks import ImageData
from lopt.tasks.perceptrons import MLP
from lopt.tasks.pieces import Initialiser
from lopt.tasks.task import Task
from lopt.tasks.text_tasks import TextData

BATCH, TEXT_BATCH, LENGTH = 64, 16, 16

Row = tuple[SampledFamily, str, tuple[int, ...]]

IMAGES: tuple[Row, ...] = (
    ("mlp", "fashion-mnist", (1, 3)),
    ("mlp", "digits", (2, 3)),
    ("mlp_ae", "fashion-mnist", (1, 2, 4)),
    ("mlp_ae", "digits", (1, 2, 4)),
    ("mlp_vae", "fashion-mnist", (2, 3)),
    ("mlp_vae", "digits", (2, 5)),
    ("conv_pooling", "fashion-mnist", (1, 2)),
    ("conv_pooling", "digits", (1, 2)),
    ("conv_fc", "fashion-mnist", (1, 5)),
    ("conv_fc", "digits", (1, 4)),
    ("nvp", "fashion-mnist", (5,)),
    ("nvp", "digits", (3, 5)),
    ("maf", "fashion-mnist", (2,)),
    ("maf", "digits", (2, 3)),
    ("vit", "fashion-mnist", (0, 5)),
    ("vit", "digits", (0, 5)),
)

TABLES: tuple[Row, ...] = (
    ("mlp", "breast-cancer", (0, 3)),
    ("mlp", "wine", (1, 3)),
    ("mlp", "letter", (1, 3)),
    ("mlp", "satellite", (2, 3)),
    ("nvp", "breast-cancer", (1,)),
    ("maf", "wine", (5,)),
)

TEXTS: tuple[Row, ...] = (
    ("char_rnn_language_model", "topics", (2, 5)),
    ("char_rnn_language_model", "shakespeare", (2, 5)),
    ("word_rnn_language_model", "topics", (2,)),
    ("word_rnn_language_model", "shakespeare", (2,)),
    ("transformer_language_model", "topics", (0, 1)),
    ("transformer_language_model", "shakespeare", (0, 5)),
    ("rnn_text_classification", "wordnet", (0, 1)),
)


def held_out(family: SampledFamily, data: str, seed: int) -> Task:
    """One task of the table.

    Example:
        >>> held_out("mlp", "digits", 3).name
        'mlp-digits-64-29-75-10'
    """
    task = sample_task(seed, [family], [data])
    text = any(row[1] == data for row in TEXTS)
    task = with_batch_size(task, TEXT_BATCH if text else BATCH, LENGTH)
    rows: Any = task.data  # type: ignore[attr-defined]
    changes: dict[str, Any] = {"train_share": 1.0, "just_train": False}
    changes |= {} if text else {"augmentation": None}
    return dataclasses.replace(task, data=dataclasses.replace(rows, **changes))  # type: ignore[type-var]


def families() -> tuple[Task, ...]:
    """Tasks of twelve families, some milliseconds per step: the headline suite."""
    return _tasks((*IMAGES, *TABLES, *TEXTS))


def images() -> tuple[Task, ...]:
    """The image tasks of :func:`families`, the one of :data:`ENVELOPE`, and larger models."""
    fashion = ImageData("fashion-mnist", batch_size=BATCH)
    glorot = Initialiser("glorot_uniform")
    return (
        *_tasks(IMAGES),
        envelope_task(),
        ConvFC(
            data=fashion,
            channels=(32, 64, 64),
            strides=(2, 2, 2),
            same=(True, True, True),
            dense=(128,),
            activation="relu",
            initialiser=Initialiser("he_normal"),
        ),
        VisionTransformer(data=fashion, transformer=_transformer(glorot), grid=4),
    )


def texts() -> tuple[Task, ...]:
    """The text tasks of :func:`families`, and a larger transformer on each text."""
    large = _transformer(Initialiser("glorot_uniform"))
    return (
        *_tasks(TEXTS),
        *(
            TransformerLanguageModel(data=TextData(name, length=64, batch_size=16), transformer=large)
            for name in ("topics", "shakespeare")
        ),
    )


def envelope_task() -> MLP:
    """A task for which others published how far tuned optimizers come: ImageMLP_FashionMnist_Relu128x128."""
    return MLP(
        data=ImageData("fashion-mnist", batch_size=128),
        hidden=(128, 128),
        activation="relu",
        initialiser=Initialiser("variance_scaling", 1.0),
    )


#: Training loss on :func:`envelope_task` by step: the least so far of smoothed training losses (weight .95), over
#: learning rates of Adam (constant, square-root and exponential decay) and RAdam, means of five runs. The smoothing
#: lags: it is a yardstick from about 5000 steps on.
#: Source: google/learned_optimization, baselines/data/speedup_over_multiple_baselines.json (Apache-2.0).
ENVELOPE = {1000: 0.3697, 2000: 0.2994, 5000: 0.2103, 10_000: 0.1225, 20_000: 0.04122, 50_000: 0.001021}


def _tasks(rows: tuple[Row, ...]) -> tuple[Task, ...]:
    return tuple(held_out(family, data, seed) for family, data, seeds in rows for seed in seeds)


def _transformer(initialiser: Initialiser) -> Transformer:
    """Two blocks of width 64."""
    return Transformer(layers=2, heads=4, head_width=16, ratio=4, activation="gelu", initialiser=initialiser)
