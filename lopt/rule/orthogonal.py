"""The direction of a matrix, treated as a whole: its singular values brought towards 1, then the rows of its outputs
to one size, at the size that it had.

::

    X = D / |D|                                                      |.| Frobenius norm
    repeat: A = X X',  X = a X + (b A + c A A) X                     Newton-Schulz, odd in the singular values of X
    X = X, but 0 where D is                                          what rests, stays
    Y = X with every row divided by max(its norm, .2 typical)        typical = |X| / sqrt(outputs)
    D <- (1 - gate) D + gate (|D| / |Y|) Y                           between elementwise and orthogonal, of one size

A matrix that is longer than wide has orthogonal columns after the iterations, but some of its rows are much longer than
others: some outputs would move, and others hardly.

A weight without gradient, of a mask or of an input that is never used, has the direction 0, and the products would give
it another one: up to half of the step would go where it does nothing but let the matrix grow.

Where the gate is 0, nothing changes. A direction that is zero stays so. ``rank``, ``|X|^2 / min(out, in)``, is what the
iterations say of the direction's rank: about 1 where all singular values are of one size, ``1 / min(out, in)`` for a
direction of rank 1.

Source: the iteration with these coefficients is Muon's (K. Jordan et al., 2024); that outputs should move alike is a
finding of NorMuon (Z. Li et al., 2025, arXiv:2510.05491), which divides by a running mean of the rows' squares.
"""

import math

import torch
from torch import Tensor

from lopt.rule.constants import LEAST_ROW, NEWTON_SCHULZ_1, NEWTON_SCHULZ_3, NEWTON_SCHULZ_5


def newton_schulz(x: Tensor, iterations: int) -> Tensor:
    """``x`` ``[..., m, n]`` with singular values, at most 1 before, brought towards 1."""
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    a, b, c = NEWTON_SCHULZ_1, NEWTON_SCHULZ_3, NEWTON_SCHULZ_5
    for _ in range(iterations):
        product = x @ x.mT
        x = a * x + (b * product + c * product @ product) @ x
    return x if wide else x.mT


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """``above / below``, 0 where below is."""
    return torch.where(below > 0, above / torch.where(below > 0, below, torch.ones_like(below)), 0.0)


def even_rows(x: Tensor, size: Tensor, turned: bool) -> Tensor:
    """``x`` ``[..., m, n]`` of norm ``size`` ``[..., 1, 1]``, with rows (``turned``: columns) of one norm, about 1."""
    rows = torch.linalg.vector_norm(x, dim=-2 if turned else -1, keepdim=True)
    typical = size / math.sqrt(x.shape[-1 if turned else -2])
    return _ratio(x, torch.maximum(rows, LEAST_ROW * typical).expand_as(x))


def orthogonalise(
    direction: Tensor,
    gate: Tensor,
    iterations: int,
    product_dtype: torch.dtype | None = None,
    turned: bool = False,
) -> tuple[Tensor, Tensor]:
    """Directions of matrices of one shape, and their ranks.

    Args:
        direction: ``[..., m, n]``, finite.
        gate: ``[...]`` in [0, 1].
        iterations: of Newton-Schulz.
        product_dtype: in which they are computed; by default that of ``direction``.
        turned: whether the columns belong to one output each, not the rows.

    Returns:
        New directions ``[..., m, n]`` and ``rank`` ``[...]``, 0 for a direction that is zero.

    Example:
        >>> direction = torch.diag(torch.tensor([3.0, 1.0]))
        >>> new, rank = orthogonalise(direction, torch.tensor(1.0), 3)
        >>> bool(new[0, 0] < 1.5 * new[1, 1])
        True
    """
    largest = direction.abs().amax(dim=(-2, -1), keepdim=True)
    x = _ratio(direction, largest.expand_as(direction))  # squares of very small numbers would be 0
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    x = _ratio(x, norm.expand_as(x))
    x = newton_schulz(x.to(product_dtype or x.dtype), iterations).to(x.dtype)
    size = torch.linalg.matrix_norm(x, keepdim=True)
    rank = torch.square(size[..., 0, 0]) / min(direction.shape[-2:])
    x = torch.where(direction == 0, 0.0, x)
    x = even_rows(x, torch.linalg.matrix_norm(x, keepdim=True), turned)
    share = gate[..., None, None]
    size = torch.linalg.matrix_norm(x, keepdim=True)
    return (1.0 - share) * direction + (share * largest * _ratio(norm, size)) * x, rank
