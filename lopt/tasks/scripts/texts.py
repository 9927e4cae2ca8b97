"""nanoGPT, makemore and word_language_model."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lopt.tasks.data import catalogue
from lopt.tasks.language_models import SMALL, Block
from lopt.tasks.pieces import Params
from lopt.tasks.sampled import with_noise
from lopt.tasks.scripts.script import Script, dropped, noise_of, scheduled
from lopt.tasks.seeds import generator, minibatch_key, minibatch_rows
from lopt.tasks.task import SPLITS, Batch, NoisyBatch, SplitName
from lopt.tasks.text_tasks import TextData


@dataclass(frozen=True, kw_only=True)
class NanoGPT(Script):
    """nanoGPT's language model of characters: four blocks of width 96, its embedding also its head.

    AdamW of rate 1e-3 with betas .9 and .99, decay .1 of matrices alone, 2% of warm-up, cosine down to a tenth,
    gradients clipped to norm 1.
    """

    family: ClassVar[str] = "nanogpt"
    steps: ClassVar[tuple[int, ...]] = (360, 1080)
    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)
    clip: ClassVar[float | None] = 1.0

    data: TextData

    @property
    def hidden_weights(self) -> frozenset[str]:
        return frozenset(name for name, shape in self.shapes.items() if name.startswith("blocks.") and len(shape) == 2)

    def build(self) -> nn.Module:
        return _TiedGPT(self.data.vocabulary, self.data.length - 1, layers=4, width=96, heads=4)

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        return self.data.windows(seed, split, start)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return functional.cross_entropy(self.run(params, batch.inputs).flatten(0, 1), batch.targets.flatten())

    def own_line(self, params: Mapping[str, Tensor], steps: int) -> Optimizer:
        groups = [
            {"params": [param for param in params.values() if (param.ndim >= 2) == matrices], "weight_decay": decay}
            for matrices, decay in ((True, 0.1), (False, 0.0))
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)
        warmup = max(1, steps // 50)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        return scheduled(self._clipped(optimizer), torch.optim.lr_scheduler.LambdaLR(optimizer, factor))


class _TiedGPT(nn.Module):
    def __init__(self, vocabulary: int, length: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, param in self.named_parameters():
            if param.ndim == 2:
                added = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(param, std=SMALL / math.sqrt(2 * layers) if added else SMALL)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.embedding(symbols) + self.positions.weight[: symbols.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.embedding.weight)


#: Words of makemore are at most this long.
LONGEST = 15


@dataclass(frozen=True, kw_only=True)
class Makemore(Script):
    """makemore's transformer, which spells words: four blocks of width 64. The words of a text, each once.

    AdamW of rate 5e-4 with betas .9 and .99 and decay .01, constant.
    """

    family: ClassVar[str] = "makemore"
    steps: ClassVar[tuple[int, ...]] = (360,)
    lr: ClassVar[float] = 5e-4
    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)

    data: TextData

    def build(self) -> nn.Module:
        return _Speller(27, LONGEST + 1, layers=4, width=64, heads=4)

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        words, key = spelled(self.data.name, self.data.variant)[split], minibatch_key(seed, split)
        for step in itertools.count(start):
            rows = words[torch.from_numpy(minibatch_rows(key, step, self.data.batch_size, len(words)))]
            inputs, targets = rows[:, :-1], rows[:, 1:]
            yield Batch(inputs, targets.where((inputs > 0) | (torch.arange(inputs.shape[1]) == 0), -1))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        losses = functional.cross_entropy(
            self.run(params, batch.inputs).flatten(0, 1), batch.targets.clamp(0).flatten(), reduction="none"
        )
        counts = batch.targets.flatten() >= 0
        return (losses * counts).sum() / counts.sum()

    def own_line(self, params: Mapping[str, Tensor], steps: int) -> Optimizer:
        return torch.optim.AdamW(params.values(), lr=self.lr, betas=self.betas, weight_decay=0.01, eps=1e-8)


class _Speller(nn.Module):
    def __init__(self, vocabulary: int, length: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.embedding(symbols) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


@lru_cache(maxsize=2)
def spelled(name: str, variant: int = 0) -> dict[SplitName, Tensor]:
    """The different words of a text, of 3 to :data:`LONGEST` letters, as rows ``[words, LONGEST + 2]``: 0, letters 1 to
    26, zeros. No word is in two splits, which have 70, 10, 10 and 10% of them."""
    corpus = catalogue.corpus(name, variant)
    text = b" ".join(part.symbols.numpy().tobytes() for part in corpus.splits.values()).decode("latin-1").lower()
    plain = "".join(letter if "a" <= letter <= "z" else " " for letter in text)
    words = sorted({word for word in plain.split() if 3 <= len(word) <= LONGEST})
    rows = torch.zeros(len(words), LONGEST + 2, dtype=torch.int64)
    for row, place in enumerate(generator(0, "spelled").permutation(len(words))):
        letters = [ord(letter) - 96 for letter in words[place]]
        rows[row, 1 : 1 + len(letters)] = torch.tensor(letters)
    ends = [len(words) * tenths // 10 for tenths in (7, 8, 9)]
    return dict(zip(SPLITS, torch.tensor_split(rows, ends), strict=True))


@dataclass(frozen=True, kw_only=True)
class WordLanguageModel(Script):
    """word_language_model: two LSTMs of width 96, embedding and decoder uniform within .1, dropout .2 around each LSTM.

    SGD of rate 20, gradients clipped to norm .25.
    """

    family: ClassVar[str] = "word_lm"
    steps: ClassVar[tuple[int, ...]] = (306,)
    clip: ClassVar[float | None] = 0.25

    data: TextData
    width: int = 96

    def build(self) -> nn.Module:
        return _WordModel(self.data.vocabulary, self.width)

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch | NoisyBatch]:
        shape = (self.data.batch_size, self.data.length - 1, 3 * self.width) if split == "train" else None
        for step, batch in enumerate(self.data.windows(seed, split, start), start):
            yield with_noise(batch, shape, seed, split, step)

    def loss(self, params: Params, batch: Batch | NoisyBatch) -> Tensor:
        logits = self.run(params, batch.inputs, noise_of(batch))
        return functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    def own_line(self, params: Mapping[str, Tensor], steps: int) -> Optimizer:
        return self._clipped(torch.optim.SGD(params.values(), lr=20.0))


class _WordModel(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm0, self.lstm1 = LSTM(width), LSTM(width)
        self.decoder = nn.Linear(width, vocabulary)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, symbols: Tensor, noise: Tensor | None) -> Tensor:
        first, second, third = (None, None, None) if noise is None else noise.chunk(3, dim=-1)
        x = self.lstm0(dropped(self.embedding(symbols), first, 0.2))
        x = self.lstm1(dropped(x, second, 0.2))
        logits: Tensor = self.decoder(dropped(x, third, 0.2))
        return logits


class LSTM(nn.Module):
    """torch's LSTM of one layer, its inputs as wide as its states, from state 0: operations that vmap can batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_ih, self.weight_hh = (nn.Parameter(torch.empty(4 * width, width)) for _ in range(2))
        self.bias_ih, self.bias_hh = (nn.Parameter(torch.empty(4 * width)) for _ in range(2))
        for param in self.parameters():
            nn.init.uniform_(param, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        """States ``[rows, length, width]`` of inputs ``[rows, length, width]``."""
        projected = functional.linear(x, self.weight_ih, self.bias_ih + self.bias_hh)
        h = c = torch.zeros_like(x[:, 0])
        states = []
        for at in range(x.shape[1]):
            i, f, g, o = (projected[:, at] + functional.linear(h, self.weight_hh)).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        return torch.stack(states, dim=1)
