"""What a tensor is beside its numbers: the matrix that it holds, its natural size, and its place in the model.

A tensor of rank 2 or more is a matrix ``[out, in]``; kernels of convolutions are ``[out, in * kernel]``, as torch
stores them. The natural size of a matrix is ``1 / sqrt(in)``, the root mean square of weights that keep the size of
what passes through them; that of other tensors is the geometric mean over all matrices. Steps that are shares of it
mean the same in models of any width, whatever the parameters started with.

A matrix whose direction is treated as a whole must be no vector, and not too long: the embedding of a large vocabulary
would cost as much as all the rest.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from lopt.rule.constants import EMPTY_SCALE, MAX_ASPECT

Role = Literal["input", "hidden", "output"]
ROLES: tuple[str, ...] = get_args(Role)


class Kind(NamedTuple):
    """What is known about a tensor beside its shape."""

    role: Role | None = None  # None: by its place in the list
    fan_in: int | None = None  # None: of a matrix stored as [out, in]


class Matrix(NamedTuple):
    """A tensor as the matrix ``[rows, columns]`` that it holds, as it is stored; without any for what is no matrix."""

    rows: int
    columns: int
    fan_in: int
    is_input: bool
    is_output: bool
    is_table: bool  # known to be input: an embedding
    whole: bool  # whether its direction may be orthogonalised

    @property
    def turned(self) -> bool:
        """Whether its columns, as it is stored, are what belongs to one output each, not its rows."""
        return self.fan_in == self.rows != self.columns

    @property
    def aspect(self) -> float:
        """Longer over shorter side, 1 for what is no matrix."""
        return max(self.rows, self.columns) / min(self.rows, self.columns) if self.rows else 1.0

    @property
    def natural(self) -> float:
        """``1 / sqrt(in)``."""
        return 1.0 / math.sqrt(self.fan_in)


def matrices_of(shapes: Sequence[Sequence[int]], kinds: Sequence[Kind] | None = None) -> list[Matrix]:
    """The tensors of a model, in the order in which they are used.

    The first matrix counts as the model's input and the last one as its output, unless some tensor is known to be. One
    that is known to be either is never orthogonalised; of those that only seem so the learned gate decides.

    Args:
        shapes: of the tensors.
        kinds: what is known of each; by default nothing.

    Example:
        >>> [matrix.natural for matrix in matrices_of([(64, 16), (10, 64)])]
        [0.25, 0.125]
    """
    kinds = [Kind()] * len(shapes) if kinds is None else kinds
    unknown = [i for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=True)) if len(shape) >= 2]
    seemingly: dict[int, Role] = {}
    places: tuple[tuple[int, Role], ...] = ((0, "input"), (-1, "output"))
    for place, role in places:
        if unknown and all(kind.role != role for kind in kinds) and kinds[unknown[place]].role is None:
            seemingly.setdefault(unknown[place], role)
    matrices = []
    for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=True)):
        if len(shape) < 2:
            matrices.append(Matrix(0, 0, 0, False, False, False, False))
            continue
        rows, columns = max(shape[0], 1), max(math.prod(shape[1:]), 1)
        taken = kind.role or seemingly.get(i)
        whole = min(rows, columns) > 1 and max(rows, columns) <= MAX_ASPECT * min(rows, columns)
        known, table = kind.role in ("input", "output"), kind.role == "input"
        fan_in = kind.fan_in or columns
        edges = taken == "input", taken == "output"
        matrices.append(Matrix(rows, columns, fan_in, *edges, table, whole and not known))
    return matrices


def natural_sizes(matrices: Sequence[Matrix]) -> list[float]:
    """Natural sizes of the tensors of a model; .1 where there is no matrix."""
    logs = [math.log(matrix.natural) for matrix in matrices if matrix.rows]
    mean = math.exp(math.fsum(logs) / len(logs)) if logs else EMPTY_SCALE
    return [matrix.natural if matrix.rows else mean for matrix in matrices]
