"""What ``torch.amp.GradScaler`` leaves to an optimizer: float16 gradients, which it does not unscale.

Divided in their own dtype, small ones would be lost again that the scale has saved. So the scaler only looks for NaN
and Inf in them, and hands scale and finding to the step, which divides into float32.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def holds_float16(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether there is a float16 gradient."""
    return any(
        param.grad is not None and param.grad.dtype == torch.float16 for group in groups for param in group["params"]
    )


def unscaled(grads: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """``grads / scale`` in new memory, in float32.

    Example:
        >>> unscaled([torch.tensor([1.0, 3.0]).half()], torch.tensor(2.0**20))[0] * 2**20
        tensor([1., 3.])
    """
    inverse = scale.double().reciprocal().float()  # as the scaler does
    return [grad.to(torch.promote_types(grad.dtype, torch.float32)) * inverse.to(grad.device) for grad in grads]
