"""A 14-layer ResNet-v2 on colour images of 32 x 32 pixels.

Source: arXiv:2009.11243, section 4.5 and appendix G; K. He et al., arXiv:1603.05027 (the blocks).
"""

from collections.abc import Sequence
from functools import partial

from lopt.experiments.experiment import Experiment
from lopt.experiments.race import figure, race, text
from lopt.experiments.runs import Run, Setting
from lopt.tasks.resnet import BLOCKS, STEM, Drawings, ResNet


def runs(setting: Setting) -> Sequence[Run]:
    """Small: an eighth of the channels; full: the paper's network."""
    part = setting.pick(8, 1)
    blocks = tuple((channels // part, narrow // part, stride) for channels, narrow, stride in BLOCKS)
    task = ResNet(blocks=blocks, stem=STEM // part, data=Drawings(batch_size=setting.pick(16, 32)))
    return race(setting, [task], setting.pick(300, 1500))


EXPERIMENT = Experiment(
    name="resnet",
    title="A 14-layer ResNet-v2 on colour images",
    about=(
        "The paper's network for CIFAR-10, on images that need no download: ten kinds of figures (disc, square, "
        "ring, cross and so on) in 32 x 32 colour pixels, drawn at random places, sizes, angles and colours, with "
        "noise. The small scale has an eighth of the channels. Theta has seen perceptrons only, unless its "
        "provenance says more."
    ),
    runs=runs,
    figure=partial(figure, "ResNet-v2, 14 layers, on colour images of 32 x 32"),
    text=text,
)
