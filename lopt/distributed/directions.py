"""Directions of matrices of which ranks hold parts: each goes to one rank, is treated there, and comes back.

All ranks share the work: the most costly matrix goes first, always to the rank with the least to do, so that everybody
finds the same owners. Parts travel in buckets, two of them at a time: while one is treated, the next one travels. Of
parts that several ranks hold the first rank sends; all get the result.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from lopt.distributed.exchange import Exchange
from lopt.distributed.layout import Layout
from lopt.distributed.ranks import Ranks
from lopt.kernels.directions import LARGE
from lopt.rule.matrices import Matrix
from lopt.rule.orthogonal import orthogonalise
from lopt.rule.tensor_lstm import next_rank

BUCKET = 1 << 24  # elements of the matrices that travel together


def owners_of(matrices: dict[int, Matrix], num_ranks: int) -> dict[int, int]:
    """The rank that treats each matrix.

    Example:
        >>> from lopt.rule.matrices import matrices_of
        >>> owners_of(dict(enumerate(matrices_of([(4, 4), (8, 8), (4, 4)]))), 2)
        {0: 1, 1: 0, 2: 1}
    """
    cost = {row: m.rows * m.columns * min(m.rows, m.columns) for row, m in matrices.items()}
    load, owners = [0] * num_ranks, {}
    for row in sorted(cost, key=lambda row: (-cost[row], row)):
        owner = load.index(min(load))
        owners[row] = owner
        load[owner] += cost[row]
    return dict(sorted(owners.items()))


def _arrived(travelling: tuple[Tensor, Any, Tensor]) -> Tensor:
    received, work, _ = travelling
    if work is not None:
        work.wait()
    return received


class Piece(NamedTuple):
    """A part of a matrix."""

    row: int
    part: Any  # Box
    ranks: list[int]  # that hold it

    @property
    def source(self) -> int:
        return self.ranks[0]


class ShardedDirections:
    """Directions of sharded matrices on W ranks.

    Args:
        ranks, layout: who holds what.
        matrices: by row, those that are treated as wholes and of which ranks hold parts.
        iterations: of Newton-Schulz.
        memory: by row, the directions of the part on this rank, flat; empty where there is none.
        large: dtype of the products of large matrices.
    """

    def __init__(
        self,
        ranks: Ranks,
        layout: Layout,
        matrices: dict[int, Matrix],
        iterations: int,
        memory: dict[int, Tensor],
        large: torch.dtype,
    ) -> None:
        self.ranks, self.layout, self.matrices, self.memory = ranks, layout, matrices, memory
        self.iterations, self.large = iterations, large
        self.owners = owners_of(matrices, len(layout.boxes))
        self.pieces = {row: [Piece(row, box, held) for box, held in layout.holders[row].items()] for row in matrices}
        self.select(list(matrices))

    def select(self, rows: list[int]) -> None:
        """Take those of these rows."""
        self.buckets: list[list[int]] = []
        size = BUCKET
        for row in (row for row in rows if row in self.matrices):
            count = self.matrices[row].rows * self.matrices[row].columns
            if size + count > BUCKET:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(row)
            size += count

    def orthogonalise(self, exchange: Exchange, gate: Tensor, step_size: Tensor) -> None:
        """New directions in place of the old ones, and their ranks on their owners.

        Args:
            exchange: takes the ranks to everybody.
            gate, step_size: ``[R]``.
        """
        exchange.asked.zero_()
        exchange.owned.zero_()
        sent = [self._gather(bucket) for bucket in self.buckets[:1]]
        back = []
        for number, bucket in enumerate(self.buckets):
            if number + 1 < len(self.buckets):
                sent.append(self._gather(self.buckets[number + 1]))
            wholes = self._received(bucket, sent[number])
            self._treat(wholes, exchange.rank, gate, step_size)
            back.append(self._scatter(bucket, wholes))
            exchange.asked[bucket] = True
            exchange.owned[list(wholes)] = True
        for bucket, travelling in zip(self.buckets, back, strict=True):
            self._take(bucket, travelling)

    @property
    def _me(self) -> int:
        return self.layout.rank

    def _send(self, outgoing: list[list[Tensor]], incoming: list[int], like: Tensor) -> tuple[Tensor, Any, Tensor]:
        parts = [part for parts in outgoing for part in parts]
        data = torch.cat(parts) if parts else like.new_empty(0)
        received = like.new_empty(sum(incoming))
        sizes = [sum(part.numel() for part in parts) for parts in outgoing]
        if self.ranks.group is None:
            return data, None, data
        work = dist.all_to_all_single(received, data, incoming, sizes, group=self.ranks.group, async_op=True)
        return received, work, data

    def _gather(self, bucket: list[int]) -> tuple[Tensor, Any, Tensor]:
        """Parts on their way to the owners."""
        count = len(self.layout.boxes)
        outgoing: list[list[Tensor]] = [[] for _ in range(count)]
        incoming = [0] * count
        for piece in (piece for row in bucket for piece in self.pieces[row]):
            if piece.source == self._me:
                outgoing[self.owners[piece.row]].append(self.memory[piece.row])
            if self.owners[piece.row] == self._me:
                incoming[piece.source] += piece.part.numel
        return self._send(outgoing, incoming, self._like)

    @property
    def _like(self) -> Tensor:
        return next(iter(self.memory.values()))

    def _received(self, bucket: list[int], travelling: tuple[Tensor, Any, Tensor]) -> dict[int, Tensor]:
        """The matrices that are this rank's to treat."""
        received = _arrived(travelling)
        mine = [piece for row in bucket if self.owners[row] == self._me for piece in self.pieces[row]]
        wholes = {piece.row: received.new_empty(self.layout.shapes[piece.row]) for piece in mine}
        place = 0
        for piece in sorted(mine, key=lambda piece: piece.source):
            values = received[place : place + piece.part.numel]
            wholes[piece.row][piece.part.slices] = values.view(piece.part.size)
            place += piece.part.numel
        return wholes

    def _treat(self, wholes: dict[int, Tensor], rank: Tensor, gate: Tensor, step_size: Tensor) -> None:
        shapes: dict[tuple[int, int, bool], list[int]] = {}
        for row in wholes:
            matrix = self.matrices[row]
            shapes.setdefault((matrix.rows, matrix.columns, matrix.turned), []).append(row)
        with torch.autocast(rank.device.type, enabled=False), torch.no_grad():
            for (*shape, turned), rows in shapes.items():
                index = torch.tensor(rows, device=rank.device)
                old = torch.stack([wholes[row].reshape(shape) for row in rows]).float()
                product_dtype = self.large if min(shape) >= LARGE else torch.float32
                new, ranks = orthogonalise(old, gate[index], self.iterations, product_dtype, turned)
                for row, value in zip(rows, new, strict=True):
                    wholes[row].copy_(value.view(wholes[row].shape))
                rank[index] = next_rank(rank[index], ranks, step_size[index], gate[index])

    def _scatter(self, bucket: list[int], wholes: dict[int, Tensor]) -> tuple[Tensor, Any, Tensor]:
        """Parts on their way back to whoever holds them."""
        count = len(self.layout.boxes)
        outgoing: list[list[Tensor]] = [[] for _ in range(count)]
        incoming = [0] * count
        for piece in (piece for row in bucket for piece in self.pieces[row]):
            for rank in piece.ranks:
                if self.owners[piece.row] == self._me:
                    outgoing[rank].append(wholes[piece.row][piece.part.slices].reshape(-1))
                if rank == self._me:
                    incoming[self.owners[piece.row]] += piece.part.numel
        return self._send(outgoing, incoming, self._like)

    def _take(self, bucket: list[int], travelling: tuple[Tensor, Any, Tensor]) -> None:
        received = _arrived(travelling)
        mine = [piece for row in bucket for piece in self.pieces[row] if self._me in piece.ranks]
        place = 0
        for piece in sorted(mine, key=lambda piece: self.owners[piece.row]):
            self.memory[piece.row].copy_(received[place : place + piece.part.numel])
            place += piece.part.numel
