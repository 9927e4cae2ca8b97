"""Training scripts that many people start from, as small tasks: model, loss, minibatches and optimizer line of each.

Models and settings are those of pytorch/examples (mnist, vae, gcn, super_resolution, word_language_model, dcgan), of
nanoGPT and of makemore, scaled down to a few minutes on one core, on other data; all code is new. Dropout draws its
masks with the minibatch, so that a loss is a function of parameters and minibatch; minibatches of other splits than
train have none. Batch normalisation uses the statistics of the minibatch.
"""

from lopt.tasks.scripts.game import Dcgan
from lopt.tasks.scripts.graph import GraphNetwork
from lopt.tasks.scripts.images import Mnist, SuperResolution, VariationalAutoencoder
from lopt.tasks.scripts.script import Script
from lopt.tasks.scripts.texts import Makemore, NanoGPT, WordLanguageModel

__all__ = [
    "SCRIPTS",
    "Dcgan",
    "GraphNetwork",
    "Makemore",
    "Mnist",
    "NanoGPT",
    "Script",
    "SuperResolution",
    "VariationalAutoencoder",
    "WordLanguageModel",
]

SCRIPTS: tuple[type[Script], ...] = (
    NanoGPT,
    Makemore,
    Mnist,
    VariationalAutoencoder,
    GraphNetwork,
    SuperResolution,
    WordLanguageModel,
    Dcgan,
)
