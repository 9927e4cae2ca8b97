"""Language models as they are trained today, small: GPT-like and Llama-like decoders of characters.

::

    gpt     embedding + positions; blocks x + attention(layer norm(x)), x + mlp(layer norm(x)) with GELU; biases
    llama   embedding; blocks x + attention(rms norm(x)) with rotated positions, x + swiglu(rms norm(x)); no biases

then the norm and a head of its own. They start in one of two ways::

    small   all matrices and embeddings normal with deviation .02, what is added to x 1 / sqrt(2 layers) of it, biases 0
    torch   as torch's modules start: embeddings normal with deviation 1, matrices uniform within 1 / sqrt(fan-in)

Source: A. Radford et al., Language models are unsupervised multitask learners, 2019 (gpt); H. Touvron et al.,
arXiv:2302.13971 (llama).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lopt.tasks.module_tasks import ModuleTask
from lopt.tasks.network import attention
from lopt.tasks.pieces import Params
from lopt.tasks.task import Batch, SplitName
from lopt.tasks.text_tasks import TextData

Kind = Literal["gpt", "llama"]
Start = Literal["small", "torch"]

SMALL = 0.02


@dataclass(frozen=True, kw_only=True)
class Decoder(ModuleTask):
    """A language model of characters; the loss is cross-entropy in nats per character.

    Args:
        data: the text; the model sees ``data.length - 1`` characters at once.
        width: a multiple of twice the number of heads.
        kind, start: as above.

    Example:
        >>> Decoder(data=TextData("markov", vocabulary=128), kind="llama", width=32, start="torch").name
        'llama-2x32-torch-markov-0'
    """

    data: TextData
    kind: Kind = "gpt"
    start: Start = "small"
    layers: int = 2
    width: int = 64
    heads: int = 4

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.layers}x{self.width}-{self.start}-{self.data.label}"

    @property
    def family(self) -> str:  # type: ignore[override]
        """Kind and start, so that reports tell them apart."""
        return f"{self.kind}-{self.start}"

    @property
    def loss_floor(self) -> float:
        return 0.0

    def build(self) -> nn.Module:
        return _Decoder(self)

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        return self.data.windows(seed, split, start)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        logits = self.run(params, batch.inputs)
        return functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


class _Decoder(nn.Module):
    def __init__(self, task: Decoder) -> None:
        super().__init__()
        gpt, width = task.kind == "gpt", task.width
        self.embedding = nn.Embedding(task.data.vocabulary, width)
        self.positions = nn.Embedding(task.data.length - 1, width) if gpt else None
        self.blocks = nn.ModuleList(Block(width, task.heads, llama=not gpt) for _ in range(task.layers))
        self.norm = nn.LayerNorm(width) if gpt else nn.RMSNorm(width)
        self.head = nn.Linear(width, task.data.vocabulary, bias=gpt)
        if task.start == "small":
            for name, param in self.named_parameters():
                if param.ndim == 2:
                    added = name.endswith(("out.weight", "down.weight"))
                    nn.init.normal_(param, std=SMALL / math.sqrt(2 * task.layers) if added else SMALL)
                elif name.endswith("bias"):
                    nn.init.zeros_(param)

    def forward(self, symbols: Tensor) -> Tensor:
        """Logits ``[rows, length, vocabulary]`` for the characters after each of ``[rows, length]``."""
        x = self.embedding(symbols)
        if self.positions is not None:
            x = x + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """A block of width ``width`` with four times as much inside, of the kinds above; not causal, all see all."""

    def __init__(self, width: int, heads: int, *, llama: bool = False, causal: bool = True) -> None:
        super().__init__()
        self.gpt, self.heads, self.causal = not llama, heads, causal
        # A gated perceptron has three matrices: of two thirds of the width it has as many parameters.
        hidden = 4 * width if self.gpt else 8 * -(-width // 3)
        self.norm0, self.norm1 = ((nn.LayerNorm if self.gpt else nn.RMSNorm)(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=self.gpt)
        self.out = nn.Linear(width, width, bias=self.gpt)
        self.up = nn.Linear(width, hidden, bias=self.gpt)
        self.gate = None if self.gpt else nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=self.gpt)

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, length, width]`` to the same."""
        q, k, v = (_split(part, self.heads) for part in self.qkv(self.norm0(x)).chunk(3, dim=-1))
        if not self.gpt:
            q, k = rotated(q), rotated(k)
        mixed = attention(q, k, v, self.causal)
        x = x + self.out(mixed.transpose(-3, -2).flatten(-2))
        y = self.norm1(x)
        inside = functional.gelu(self.up(y)) if self.gate is None else functional.silu(self.gate(y)) * self.up(y)
        added: Tensor = self.down(inside)
        return x + added


def _split(x: Tensor, heads: int) -> Tensor:
    """``[rows, length, width]`` to ``[rows, heads, length, width / heads]``."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(-3, -2)


def rotated(x: Tensor) -> Tensor:
    """Queries or keys ``[..., length, size]``, their pairs (i, i + size / 2) turned by ``place / 10000^(2 i / size)``.

    The product of two of them depends on their places by the difference alone.

    Source: J. Su et al., arXiv:2104.09864.
    """
    length, half = x.shape[-2], x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(length, device=x.device)[:, None] * rates
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)
