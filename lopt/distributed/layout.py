"""Which part of every tensor lies on which rank, whoever placed it there."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.distributed.parts import is_sharded


class Box(NamedTuple):
    """A part of a tensor: ``size`` elements from ``offset`` on in every dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def of(cls, param: Tensor) -> "Box":
        """What of a parameter lies on this rank.

        Raises:
            TypeError: ranks hold sums of it (``Partial``).
        """
        if not is_sharded(param):
            return cls((0,) * param.dim(), tuple(param.shape))
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            raise TypeError(f"parameter of shape {tuple(param.shape)}: its values are sums over ranks, {placements}")
        size, offset = compute_local_shape_and_global_offset(param.shape, mesh, placements)
        return cls(tuple(offset), tuple(size)) if math.prod(size) else cls((0,) * param.dim(), (0,) * param.dim())

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The part in the whole."""
        return tuple(slice(at, at + size) for at, size in zip(self.offset, self.size, strict=True))

    def start(self, shape: Sequence[int]) -> int:
        """Position of the first element in the whole of this shape, row by row."""
        position = 0
        for at, length in zip(self.offset, shape, strict=True):
            position = position * length + at
        return position


class Layout:
    """The boxes of R tensors on W ranks.

    Args:
        boxes: ``[W][R]``.
        shapes: of the whole tensors.
        rank: this one.

    Raises:
        ValueError: the boxes of a tensor are not all of it.
    """

    def __init__(self, boxes: Sequence[Sequence[Box]], shapes: Sequence[Sequence[int]], rank: int) -> None:
        self.boxes, self.shapes, self.rank = boxes, [tuple(shape) for shape in shapes], rank
        #: Of each tensor its distinct boxes, and the ranks that hold each.
        self.holders: list[dict[Box, list[int]]] = []
        for row, shape in enumerate(self.shapes):
            found: dict[Box, list[int]] = {}
            for other, held in enumerate(boxes):
                if held[row].numel:
                    found.setdefault(held[row], []).append(other)
            count = sum(box.numel for box in found)
            if count != math.prod(shape):
                raise ValueError(
                    f"params[{row}] of shape {shape}: the ranks of the process group hold {count} of its "
                    f"{math.prod(shape)} elements; give the group of all ranks that hold parts: process_group=..."
                )
            self.holders.append(found)

    @property
    def mine(self) -> Sequence[Box]:
        """``[R]`` parts on this rank."""
        return self.boxes[self.rank]

    def split(self, row: int) -> bool:
        """Whether several ranks hold different parts of a tensor."""
        return len(self.holders[row]) > 1

    def weights(self) -> Tensor:
        """``[R, 2]`` float64 on this rank: by which its means count in those over whole tensors, and its counts in
        sums, so that what several ranks hold counts once."""
        values = []
        for row, box in enumerate(self.mine):
            part = 1.0 / len(self.holders[row][box]) if box.numel else 0.0
            values.append([part * box.numel / max(math.prod(self.shapes[row]), 1), part])
        return torch.tensor(values, dtype=torch.float64).reshape(-1, 2)
