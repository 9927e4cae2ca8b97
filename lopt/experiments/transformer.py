"""A language model of characters: a small transformer on held-out text."""

from collections.abc import Sequence
from functools import partial

from lopt.experiments.experiment import Experiment
from lopt.experiments.race import figure, race, text
from lopt.experiments.runs import Run, Setting
from lopt.tasks.attention import SMALL, Transformer, TransformerLanguageModel
from lopt.tasks.data import catalogue
from lopt.tasks.text_tasks import TextData


def runs(setting: Setting) -> Sequence[Run]:
    """Small: one block of width 32; full: two of width 64, on every held-out text that is here."""
    names = [name for name in ("topics", "shakespeare") if catalogue.missing(name) is None]
    layers, head_width, length, rows = setting.pick((1, 16, 24, 16), (2, 16, 48, 16))
    model = Transformer(
        layers=layers,
        heads=setting.pick(2, 4),
        head_width=head_width,
        ratio=4,
        activation="gelu",
        initialiser=SMALL,
    )
    tasks = [
        TransformerLanguageModel(transformer=model, data=TextData(name, vocabulary=128, length=length, batch_size=rows))
        for name in setting.pick(names[:1], names)
    ]
    return race(setting, tasks, setting.pick(400, 2000))


EXPERIMENT = Experiment(
    name="transformer",
    title="A transformer on text",
    about=(
        "A language model of characters on text that meta-training never sees (Python's help topics; Shakespeare "
        "where it is installed). Losses are in nats per character. Theta has seen perceptrons only, unless its "
        "provenance says more."
    ),
    runs=runs,
    figure=partial(figure, "Transformer language model of characters"),
    text=text,
)
