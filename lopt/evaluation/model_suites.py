"""Suites of models as people write them, in torch's layout and with torch's modules.

Two suites of language models: one on held-out texts, on which results are reported, and one on other texts and of other
shapes, by which recipes, thetas and settings may be chosen. What is chosen by the first is worth nothing.
"""

from lopt.tasks.image_tasks import ImageData
from lopt.tasks.language_models import Decoder
from lopt.tasks.scripts import (
    Dcgan,
    GraphNetwork,
    Makemore,
    Mnist,
    NanoGPT,
    Script,
    SuperResolution,
    VariationalAutoencoder,
    WordLanguageModel,
)
from lopt.tasks.task import Task
from lopt.tasks.text_tasks import TextData
from lopt.tasks.vision_models import ResidualNet, ViT

#: Texts of each suite: prose and code, and again prose and code.
HELD_OUT_TEXTS = ("topics", "torch-headers")
VALIDATION_TEXTS = ("torch-docs", "stdlib-modules")


def language() -> tuple[Task, ...]:
    """Two texts; width 64 with both starts, and width 128; on one text width 256 as well."""
    tasks: list[Task] = []
    for name in HELD_OUT_TEXTS:
        data = TextData(name, vocabulary=128, length=49, batch_size=16)
        tasks += [
            Decoder(data=data, kind="gpt", start="small"),
            Decoder(data=data, kind="gpt", start="torch"),
            Decoder(data=data, kind="llama", start="small"),
            Decoder(data=data, kind="llama", start="torch"),
            Decoder(data=data, kind="gpt", start="small", width=128),
        ]
    data = TextData(HELD_OUT_TEXTS[0], vocabulary=128, length=49, batch_size=16)
    return (*tasks, Decoder(data=data, kind="gpt", start="small", width=256))


def language_validation() -> tuple[Task, ...]:
    """Two other texts, three other shapes, other lengths of text, both starts: half as long a step."""
    tasks: list[Task] = []
    for name in VALIDATION_TEXTS:
        data = TextData(name, vocabulary=128, length=33, batch_size=16)
        tasks += [
            Decoder(data=data, kind="gpt", start="small", width=56),
            Decoder(data=data, kind="gpt", start="torch", width=56),
            Decoder(data=data, kind="llama", start="small", layers=3, width=40),
            Decoder(data=data, kind="llama", start="torch", layers=1, width=88),
        ]
    return tuple(tasks)


def vision() -> tuple[Task, ...]:
    """A vision transformer and a residual network on images of 8 x 8 and of 28 x 28 pixels, all held out."""
    patches = {"digits": 2, "letters": 7, "fashion-mnist": 7}
    tasks: list[Task] = []
    for name, patch in patches.items():
        data = ImageData(name, batch_size=64)
        tasks += [ViT(data=data, patch=patch), ResidualNet(data=data)]
    return tuple(tasks)


def scripts() -> tuple[Script, ...]:
    """Training scripts that many people start from, on held-out data; each knows its own optimizer line and length."""
    return (
        NanoGPT(data=TextData("torch-headers", vocabulary=128, length=65, batch_size=12)),
        Makemore(data=TextData("topics", batch_size=32)),
        Mnist(data=ImageData("letters", batch_size=64)),
        VariationalAutoencoder(data=ImageData("letters", batch_size=128)),
        GraphNetwork(data=ImageData("digits")),
        SuperResolution(data=ImageData("portrait", batch_size=16)),
        WordLanguageModel(data=TextData("topics", words=True, vocabulary=2000, length=25, batch_size=20)),
        Dcgan(data=ImageData("letters", batch_size=64)),
    )
