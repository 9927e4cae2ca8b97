"""A language model of characters: a small transformer on held-out text."""

from lopt.experiments.race import race
from lopt.experiments.setting import Setting
from lopt.tasks.attention import SMALL, Transformer, TransformerLanguageModel
from lopt.tasks.data import catalogue
from lopt.tasks.text_tasks import TextData


def tasks(setting: Setting) -> list[TransformerLanguageModel]:
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
    return [
        TransformerLanguageModel(transformer=model, data=TextData(name, vocabulary=128, length=length, batch_size=rows))
        for name in setting.pick(names[:1], names)
    ]


EXPERIMENT = race(
    "transformer",
    "A transformer on text",
    "Transformer language model of characters",
    "A language model of characters on text that meta-training never sees (Python's help topics; Shakespeare "
    "where it is installed). Losses are in nats per character.",
    tasks,
    400,
    2000,
)
