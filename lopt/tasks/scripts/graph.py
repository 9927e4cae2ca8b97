"""gcn, on a graph of digits."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lopt.tasks import datasets
from lopt.tasks.image_tasks import ImageData
from lopt.tasks.pieces import Params
from lopt.tasks.sampled import with_noise
from lopt.tasks.scripts.script import Script, dropped, noise_of
from lopt.tasks.task import SPLITS, Batch, NoisyBatch, SplitName


class Graph(NamedTuple):
    """``features`` [nodes, F], ``neighbours`` [nodes, nodes] normalised, and the nodes and classes of every split."""

    features: Tensor
    neighbours: Tensor
    splits: dict[SplitName, Batch]


@lru_cache(maxsize=1)
def graph_of_digits(nearest: int = 7, labelled: int = 10) -> Graph:
    """Every digit is joined to those nearest to it, and to itself: A, symmetric, normalised by ``D^-1/2 A D^-1/2``.

    ``labelled`` nodes of every class are in train; the other splits are those of the digits.
    """
    data = datasets.digits()
    rows = {split: getattr(data, split) for split in SPLITS}
    features = torch.cat([rows[split].inputs.flatten(1) for split in SPLITS])
    targets = torch.cat([rows[split].targets for split in SPLITS])
    near = torch.cdist(features, features).topk(nearest + 1, largest=False).indices
    joined = torch.zeros(len(features), len(features)).scatter_(1, near, 1.0)
    joined = torch.maximum(joined, joined.T)
    scale = joined.sum(dim=1).rsqrt()
    splits: dict[SplitName, Batch] = {}
    begin = 0
    for split in SPLITS:
        nodes = torch.arange(begin, begin + len(rows[split].targets))
        begin += len(nodes)
        if split == "train":
            nodes = torch.cat([nodes[targets[nodes] == digit][:labelled] for digit in range(10)])
        splits[split] = Batch(nodes, targets[nodes])
    return Graph(features, scale[:, None] * joined * scale, splits)


@dataclass(frozen=True, kw_only=True)
class GraphNetwork(Script):
    """gcn: two layers of graph convolution, 16 wide, dropout .5 between them, classify nodes; all nodes at once.

    Adam of rate .01 with an L2 penalty of 5e-4.
    """

    family: ClassVar[str] = "gcn"
    steps: ClassVar[tuple[int, ...]] = (200,)
    lr: ClassVar[float] = 0.01

    data: ImageData

    def build(self) -> nn.Module:
        return _GraphNetwork(self.data.size, self.data.num_classes)

    @property
    def graph(self) -> tuple[Tensor, Tensor]:
        """Features and neighbours of all nodes."""
        return graph_of_digits()[:2]

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch | NoisyBatch]:
        features, _, splits = graph_of_digits()
        shape = (len(features), 16) if split == "train" else None
        for step in itertools.count(start):
            yield with_noise(splits[split], shape, seed, split, step)

    def loss(self, params: Params, batch: Batch | NoisyBatch) -> Tensor:
        features, neighbours = self.on(batch.inputs.device, "graph")
        logits = self.run(params, features, neighbours, noise_of(batch))
        return functional.cross_entropy(logits[batch.inputs], batch.targets)

    def own_line(self, params: Mapping[str, Tensor], steps: int) -> Optimizer:
        return torch.optim.Adam(params.values(), lr=self.lr, weight_decay=5e-4)


class _GraphNetwork(nn.Module):
    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.dense0, self.dense1 = nn.Linear(inputs, 16), nn.Linear(16, classes)
        for dense in (self.dense0, self.dense1):
            nn.init.kaiming_normal_(dense.weight)
            nn.init.zeros_(dense.bias)

    def forward(self, features: Tensor, neighbours: Tensor, noise: Tensor | None) -> Tensor:
        x = dropped(torch.relu(neighbours @ self.dense0(features)), noise, 0.5)
        logits: Tensor = neighbours @ self.dense1(x)
        return logits
