"""The 30 columns that the MLPs of VeLO and Celo2 see of one parameter.

Source: arXiv:2211.09760, as HyperV2 in google/learned_optimization.
"""

import torch
from torch import Tensor

from lopt.rule.published import parts
from lopt.rule.published.parts import Factored

#: Columns of each group, for three momenta and factored second moments and one second moment.
GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
SMALL_GRADIENT = 0.1


def columns_of(grad: Tensor, param: Tensor, mom: Tensor, rms: Tensor, factored: Factored, epsilon: float) -> Tensor:
    """``[30, *shape]``: gradient, small gradient, parameter, momenta, second moment, and their ratios.

    Args:
        epsilon: of the inverse root of the second moment.
    """
    inverse = torch.rsqrt(rms + epsilon)
    whole = grad.dim() < 2  # nothing to factor
    groups = [
        *(grad[None], torch.clamp(grad, -SMALL_GRADIENT, SMALL_GRADIENT)[None], param[None]),
        *(mom, rms, mom * inverse, inverse),
        *(factored.precondition(grad[None]), grad[None] * inverse),
        *factored.columns,
        mom * factored.row**-0.5 if whole else factored.precondition(mom),
    ]
    return parts.broadcast(groups, grad.shape)
