"""Exchange: the one sum over ranks in a step of sharded parameters.

Ranks hold the state of all R tensors at tensor level, the same everywhere, and of every tensor their part of parameter
and accumulators. In one buffer of float64 they sum up

- statistics of their parts, as weighted means and squares, from which those of whole tensors follow exactly;
- losses that were observed on any rank;
- what the step before left: means of hidden units, and ranks of directions, which each owner of a matrix knows alone.

The last is why the tensor level of a step is only complete with the next one, or with :meth:`Exchange.settle`.

With lagged statistics nothing of this is needed before the next step: the buffer leaves after a step (``depart``) and
travels while the model computes the next gradients (``arrive``). Then losses are summed by themselves, 32 bytes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lopt.distributed.layout import Layout
from lopt.distributed.ranks import Ranks, put_losses
from lopt.rule.features import STATS
from lopt.rule.step import Seams

#: Statistics that are variances, with their means.
VARIANCES = tuple((STATS.index(f"{name}_var"), STATS.index(f"{name}_mean")) for name in ("param", "mom", "rms"))


class Exchange(Seams):
    """The seams of a step between the parts of sharded tensors.

    Args:
        ranks: that hold the parts.
        layout: which.
        num_stats, width: numbers of statistics and of hidden units of a tensor.
        rank: ``[R]``, the ranks of directions; written.
        complete: what is to be done with means of hidden units ``[R, width]`` over whole tensors.

    Attributes:
        shared: the state of all tensors, for the losses in it.
        deliver: lets the tensor level know validation losses, once those of all ranks wait in ``shared``.
        collectives: number of sums over ranks so far.
    """

    shared: Mapping[str, Tensor]
    deliver: Callable[[], None]

    def __init__(
        self,
        ranks: Ranks,
        layout: Layout,
        num_stats: int,
        width: int,
        rank: Tensor,
        complete: Callable[[Tensor], None],
    ) -> None:
        self.ranks, self.layout, self.complete = ranks, layout, complete
        self.rank, device = rank, rank.device
        count = len(layout.shapes)
        sizes = [count * num_stats, count * width, count, 4]
        self.buffer = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        stats, hidden, directions, self._losses = torch.split(self.buffer, sizes)
        self._stats, self._hidden = stats.view(count, num_stats), hidden.view(count, width)
        self._directions = directions
        weights = layout.weights().to(device)
        self.share = weights[:, :1]
        self._weights = self.share.repeat(1, num_stats)
        self._weights[:, STATS.index("nonfinite")] = weights[:, 1]
        self._none = torch.zeros((), dtype=torch.float64, device=device)
        self.merged = torch.zeros(count, num_stats, device=device)
        self.here = torch.zeros(count, 1, dtype=torch.bool, device=device)
        #: ``[R]`` whether the next sum brings the rank of a tensor's direction, and those that this rank knows.
        self.asked = torch.zeros(count, dtype=torch.bool, device=device)
        self.owned = torch.zeros(count, dtype=torch.bool, device=device)
        self.selected = torch.zeros_like(self.here)
        self._waiting: Tensor | None = None
        self._travelling: tuple[Any, Tensor] | None = None
        self.collectives = 0

    def select(self, rows: list[int]) -> list[int]:
        """Take these tensors; returns those of which there is a part on this rank. Nothing may wait."""
        some = [row for row in rows if self.layout.mine[row].numel]
        self.here.zero_()
        self.here[some] = True
        self.selected.zero_()
        self.selected[rows] = True
        return some

    def merge_stats(self, stats: Tensor) -> Tensor:
        self._pack(stats)
        self._losses[:2], self._losses[2:] = self.shared["pending_loss"], self.shared["pending_valid"]
        self._sum()
        put_losses(self.shared, self._losses / self.ranks.size)
        self.deliver()
        return self._unpack()

    def _pack(self, stats: Tensor) -> None:
        values = stats.double()
        for var, mean in VARIANCES:
            values[:, var] += values[:, mean].square()
        self._stats.copy_(torch.where(self.here, values * self._weights, self._none))

    def _unpack(self) -> Tensor:
        for var, mean in VARIANCES:
            self._stats[:, var] = (self._stats[:, var] - self._stats[:, mean].square()).clamp_min(0.0)
        return self.merged.copy_(self._stats)

    def merge_means(self, means: Tensor) -> Tensor:
        self._waiting = means
        return means

    def settle(self) -> None:
        """Complete the last step at tensor level: what travels arrives, what waits is summed by itself."""
        if self._travelling is not None:
            self.arrive()
        elif self._waiting is not None:
            self._stats.zero_()
            self._losses.zero_()
            self._sum()

    def sum_losses(self) -> None:
        """Of all ranks, by themselves."""
        self.ranks.average_losses(self.shared)
        self.collectives += 1
        self.deliver()

    def depart(self, stats: Tensor, means: Tensor) -> None:
        """Begin to sum up what a step left, of which the next one sees statistics of whole tensors in ``stats``."""
        self._pack(stats)
        self._losses.zero_()
        self._pack_means(means)
        self._travelling = self.ranks.begin_sum(self.buffer), stats
        self.collectives += 1

    def arrive(self) -> None:
        """Wait for what :meth:`depart` began."""
        assert self._travelling is not None
        (work, stats), self._travelling = self._travelling, None
        if work is not None:
            work.wait()
        stats.copy_(torch.where(self.selected, self._unpack(), stats))
        self._unpack_means()

    def _sum(self) -> None:
        means = self._waiting
        if means is not None:
            self._pack_means(means)
        self.ranks.sum(self.buffer)
        self.collectives += 1
        if means is not None:
            self._waiting = None
            self._unpack_means()

    def _pack_means(self, means: Tensor) -> None:
        self._hidden.copy_(torch.where(self.here, means.double() * self.share, self._none))
        self._directions.copy_(torch.where(self.owned, self.rank.double(), self._none))

    def _unpack_means(self) -> None:
        self.rank.copy_(torch.where(self.asked, self._directions.float(), self.rank))
        self.complete(self._hidden.float())
