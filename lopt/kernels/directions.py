"""Directions: memory for the directions of matrices that are treated as a whole, and what is done with them.

``apply`` writes the directions of such matrices here, those of one shape side by side, so that torch's batched products
orthogonalise all of them at once; then ``write`` takes them to the parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.rule.matrices import Matrix
from lopt.rule.orthogonal import orthogonalise
from lopt.rule.tensor_lstm import next_rank

ALIGNED = 8  # elements: the kernels load 16 bytes at a time
LARGE = 256  # shorter side of a matrix from which on the dtype of the products counts
AT_ONCE = 1 << 26  # elements of one batch, which bounds the memory of the products


def quick_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are quicker than in float32."""
    if device.type != "cpu":
        return True
    supported: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return supported()


def _aligned(numel: int) -> int:
    return -(-numel // ALIGNED) * ALIGNED


class Batch(NamedTuple):
    """Matrices of one shape, stored alike."""

    rows: Tensor  # [B] their rows in the tables over tensors
    values: Tensor  # [B, m, n] their directions
    places: Tensor | None  # [B] in ``values``; None: all of it
    turned: bool  # see Matrix


class Directions:
    """Directions of those of R tensors that may be orthogonalised.

    Args:
        matrices: of the R tensors.
        iterations: of Newton-Schulz.
        dtype: of the memory, float32 or bfloat16.
        exact: products are computed in float32. Otherwise those of large matrices are in bfloat16, where the device is
            quicker at that: singular values are brought near to 1 all the same.
        native: shorter side up to which the kernels orthogonalise matrices themselves.
        parts: of matrices of which only a part is here, by row its number of elements. They have memory, ``parts``;
            somebody else orthogonalises them.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        iterations: int,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool,
        native: int = 0,
        parts: Mapping[int, int] | None = None,
    ) -> None:
        self.iterations, self.device, self.native = iterations, device, native
        self.large = torch.float32 if exact or not quick_bfloat16(device) else torch.bfloat16
        shapes: dict[tuple[int, int, bool], list[int]] = {}
        for row, matrix in enumerate(matrices):
            if matrix.whole and row not in (parts or {}):
                shapes.setdefault((matrix.rows, matrix.columns, matrix.turned), []).append(row)
        self.shapes = shapes
        strides = {shape: _aligned(shape[0] * shape[1]) for shape in shapes}
        self.memory = torch.zeros(
            sum(strides[shape] * len(rows) for shape, rows in shapes.items())
            + sum(map(_aligned, (parts or {}).values())),
            dtype=dtype,
            device=device,
        )
        #: Address of each tensor's directions, 0 for what is not treated as a whole.
        self.addresses = [0] * len(matrices)
        self._all: list[Tensor] = []
        offset = 0
        for (m, n, turned), rows in shapes.items():
            stride = strides[m, n, turned]
            values = self.memory.as_strided((len(rows), m, n), (stride, n, 1), offset)
            for place, row in enumerate(rows):
                self.addresses[row] = values[place].data_ptr()
            self._all.append(values)
            offset += stride * len(rows)
        self.parts: dict[int, Tensor] = {}
        for row, numel in (parts or {}).items():
            self.parts[row] = self.memory[offset : offset + numel]
            self.addresses[row] = self.parts[row].data_ptr() if numel else 0
            offset += _aligned(numel)
        self.select(range(len(matrices)))

    def select(self, selected: Sequence[int]) -> None:
        """Take those of these rows."""
        self.batches = self.batches_of(selected)

    def batches_of(self, selected: Sequence[int]) -> list[Batch]:
        """Those of these rows that torch orthogonalises, by shape."""
        chosen = set(selected)
        batches: list[Batch] = []
        for ((*shape, turned), rows), values in zip(self.shapes.items(), self._all, strict=True):
            if min(shape) <= self.native:
                continue
            places = [place for place, row in enumerate(rows) if row in chosen]
            size = max(AT_ONCE // (shape[0] * shape[1]), 1)
            for first in range(0, len(places), size):
                part = places[first : first + size]
                together = part == list(range(part[0], part[0] + len(part)))
                batches.append(
                    Batch(
                        torch.tensor([rows[place] for place in part], device=self.device),
                        values[part[0] : part[0] + len(part)] if together else values,
                        None if together else torch.tensor(part, device=self.device),
                        turned,
                    )
                )
        return batches

    def orthogonalise(self, gate: Tensor, rank: Tensor, step_size: Tensor) -> None:
        """New directions in place of the old ones.

        Args:
            gate, step_size: ``[R]``.
            rank: ``[R]``, written.
        """
        with torch.autocast(self.device.type, enabled=False), torch.no_grad():
            for rows, values, places, turned in self.batches:
                old = values if places is None else values[places]
                product_dtype = self.large if min(values.shape[1:]) >= LARGE else torch.float32
                new, ranks = orthogonalise(old.float(), gate[rows], self.iterations, product_dtype, turned)
                if places is None:
                    values.copy_(new)
                else:
                    values[places] = new.to(values.dtype)
                rank[rows] = next_rank(rank[rows], ranks, step_size[rows], gate[rows])
