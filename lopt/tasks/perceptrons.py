"""Perceptrons on images: classifiers, autoencoders and variational autoencoders.

Source: TaskSet (arXiv:2002.11887), families mlp, mlp_ae and mlp_vae.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lopt.tasks.image_tasks import ImageTask, centred, sample_images
from lopt.tasks.pieces import (
    Initialiser,
    Layout,
    Params,
    Random,
    activation,
    dense,
    dense_layout,
    flip,
    log_int,
    pick,
    sample_activation,
    sample_initialiser,
)
from lopt.tasks.sampled import cross_entropy
from lopt.tasks.task import Batch, NoisyBatch

PIXELS = ("images", "tables")


@dataclass(frozen=True, kw_only=True)
class MLP(ImageTask):
    """A classifier of images or table rows: hidden layers of these widths with one activation, softmax cross-entropy.

    Args:
        center: images from -1 to 1 instead of from 0 to 1.
    """

    family: ClassVar[str] = "mlp"

    hidden: tuple[int, ...]
    activation: str
    initialiser: Initialiser
    center: bool = False

    @property
    def name(self) -> str:
        return f"mlp-{self.data.label}-{'-'.join(map(str, self.sizes))}"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths of all layers, inputs and outputs included."""
        return (self.data.size, *self.hidden, self.data.num_classes)

    @cached_property
    def layout(self) -> Layout:
        return dense_layout("", self.sizes, self.initialiser)

    @property
    def loss_floor(self) -> float:
        return 0.0

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x = centred(self.center, batch.inputs.flatten(1))
        return cross_entropy(dense(params, "", x, activation(self.activation)), batch.targets)


def sample_mlp(random: Random, names: tuple[str, ...]) -> MLP:
    """One to six hidden layers of 16 to 128."""
    return MLP(
        hidden=tuple(log_int(random, 16, 128) for _ in range(random.integers(1, 7))),
        activation=sample_activation(random),
        initialiser=sample_initialiser(random),
        data=sample_images(random, names, PIXELS),
        center=flip(random),
    )


@dataclass(frozen=True, kw_only=True)
class Autoencoder(ImageTask):
    """An autoencoder of images or table rows: a perceptron whose targets are its inputs.

    Args:
        output: what is done to the last layer; tanh and linear_center work on images from -1 to 1.
        error: of a pixel, squared or absolute.
        total: the loss of an image is the sum over its pixels, not the mean.
    """

    family: ClassVar[str] = "mlp_ae"

    hidden: tuple[int, ...]
    activation: str
    initialiser: Initialiser
    output: Literal["tanh", "sigmoid", "linear_center", "linear"] = "sigmoid"
    error: Literal["l2", "l1"] = "l2"
    total: bool = False

    @property
    def name(self) -> str:
        return f"mlp_ae-{self.data.label}-{'-'.join(map(str, self.hidden))}-{self.output}-{self.error}"

    @cached_property
    def layout(self) -> Layout:
        return dense_layout("", (self.data.size, *self.hidden, self.data.size), self.initialiser)

    @property
    def loss_floor(self) -> float:
        return 0.0

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x = centred(self.output in ("tanh", "linear_center"), batch.inputs.flatten(1))
        y = dense(params, "", x, activation(self.activation))
        y = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}.get(self.output, lambda z: z)(y)
        errors = torch.square(y - x) if self.error == "l2" else torch.abs(y - x)
        return (errors.sum(dim=1) if self.total else errors.mean(dim=1)).mean()


def sample_mlp_ae(random: Random, names: tuple[str, ...]) -> Autoencoder:
    """One to six hidden layers of 32 to 128."""
    return Autoencoder(
        hidden=tuple(log_int(random, 32, 128) for _ in range(random.integers(1, 7))),
        activation=sample_activation(random),
        initialiser=sample_initialiser(random),
        data=sample_images(random, names, PIXELS),
        output=pick(random, ["tanh", "tanh", "sigmoid", "sigmoid", "linear_center", "linear"]),
        error=pick(random, ["l2", "l2", "l1"]),
        total=flip(random),
    )


@dataclass(frozen=True, kw_only=True)
class VAE(ImageTask):
    """A variational autoencoder with Gaussian codes; the loss is the negative evidence bound, in nats per image::

        mu, s = encoder(x)        z = mu + e^s eps           m, t = decoder(z), clipped to [-10, 10]
        loss  = -log N(x + u; m, e^2t) - log(1/255) + KL(N(mu, e^2s) || N(0, 1))

    summed over pixels and codes, with one standard normal ``eps`` per image and code, and ``u`` uniform within one of
    255 grey levels. ``s`` is clipped to [-10, 10] as well, which TaskSet does not do: the loss stays finite.

    Args:
        encoder, decoder: widths of hidden layers; the encoder's last one is the number of codes.
    """

    family: ClassVar[str] = "mlp_vae"

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    activation: str
    initialiser: Initialiser

    @property
    def name(self) -> str:
        widths = "-".join(map(str, (*self.encoder, *self.decoder)))
        return f"mlp_vae-{self.data.label}-{widths}"

    @property
    def codes(self) -> int:
        """Number of codes of an image."""
        return self.encoder[-1]

    @cached_property
    def layout(self) -> Layout:
        encoder = (self.data.size, *self.encoder[:-1], 2 * self.codes)
        decoder = (self.codes, *self.decoder, 2 * self.data.size)
        return {
            **dense_layout("encoder.", encoder, self.initialiser),
            **dense_layout("decoder.", decoder, self.initialiser),
        }

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (self.data.batch_size, self.codes + self.data.size)

    def loss(self, params: Params, batch: NoisyBatch) -> Tensor:
        function, x = activation(self.activation), batch.inputs.flatten(1)
        mu, s = dense(params, "encoder.", x, function).chunk(2, dim=1)
        s = s.clamp(-10.0, 10.0)
        eps, u = batch.noise[:, : self.codes], torch.special.ndtr(batch.noise[:, self.codes :]) - 0.5
        m, t = dense(params, "decoder.", mu + torch.exp(s) * eps, function).clamp(-10.0, 10.0).chunk(2, dim=1)
        log_p = -torch.square((x + u / 255 - m) * torch.exp(-t)) / 2 - t - math.log(math.sqrt(2 * math.pi) * 255)
        kl = (torch.square(mu) + torch.exp(2 * s) - 1) / 2 - s
        return (kl.sum(dim=1) - log_p.sum(dim=1)).mean()


def sample_mlp_vae(random: Random, names: tuple[str, ...]) -> VAE:
    """One to four encoder layers and one to three decoder layers, of 32 to 128."""
    return VAE(
        encoder=tuple(log_int(random, 32, 128) for _ in range(random.integers(1, 5))),
        decoder=tuple(log_int(random, 32, 128) for _ in range(random.integers(1, 4))),
        activation=sample_activation(random),
        initialiser=sample_initialiser(random),
        data=sample_images(random, names, PIXELS),
    )
