"""A 14-layer ResNet-v2 on colour images of 32 x 32 pixels.

Source: arXiv:2009.11243, section 4.5 and appendix G; K. He et al., arXiv:1603.05027 (the blocks).
"""

from lopt.experiments.race import race
from lopt.experiments.setting import Setting
from lopt.tasks.resnet import BLOCKS, STEM, Drawings, ResNet


def tasks(setting: Setting) -> list[ResNet]:
    """Small: an eighth of the channels; full: the paper's network."""
    part = setting.pick(8, 1)
    blocks = tuple((channels // part, narrow // part, stride) for channels, narrow, stride in BLOCKS)
    return [ResNet(blocks=blocks, stem=STEM // part, data=Drawings(batch_size=setting.pick(16, 32)))]


EXPERIMENT = race(
    "resnet",
    "A 14-layer ResNet-v2 on colour images",
    "ResNet-v2, 14 layers, on colour images of 32 x 32",
    "The paper's network for CIFAR-10, on images that need no download: ten kinds of figures (disc, square, "
    "ring, cross and so on) in 32 x 32 colour pixels, drawn at random places, sizes, angles and colours, with "
    "noise. The small scale has an eighth of the channels.",
    tasks,
    300,
    1500,
)
