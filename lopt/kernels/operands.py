"""What kernels are given: which dtypes, checks of operands with what to do, weights as kernels read them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lopt.kernels.own import size_of_weights
from lopt.rule.spec import ThetaSpec

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of parameters and gradients, enum Dtype
STATE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3}  # of accumulators, by that of momenta


def pack_mlp(spec: ThetaSpec, weights: Mapping[str, Tensor]) -> Tensor:
    """MLP weights as the kernels read them, ``[..., size]`` float32 (MlpLayout in csrc/rule/mlp.h).

    ``weights`` may have leading dimensions: a population of thetas.
    """
    columns = len(spec.features.columns)
    lead = weights["mlp.b1"].shape[:-1]
    skip = weights["skip"] if spec.linear_skip else weights["mlp.b1"].new_zeros(*lead, columns)
    parts = [
        weights["mlp.w1"][..., :columns, :],
        *(weights[name] for name in ("mlp.w2", "mlp.b2") if name in weights),
        weights["mlp.w3"][..., :2].transpose(-1, -2),
        weights["mlp.b3"][..., :2],
        skip,
    ]
    flat = torch.cat([part.reshape(*lead, -1) for part in parts], dim=-1).float()
    size = size_of_weights(spec.feature_set, spec.mlp_width, spec.mlp_layers)
    return torch.nn.functional.pad(flat, (0, size - flat.shape[-1])).contiguous()


def check_operand(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], numel: int, device: torch.device) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}; convert it or use impl='reference'")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}; all tensors must share one device")
    if tensor.numel() != numel:
        raise ValueError(f"{name}: expected {numel} elements, got {tensor.numel()}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}; pass x.contiguous()")


def contiguous(tensors: list[Tensor]) -> list[Tensor]:
    """The same list where values lie in order and as they are, otherwise copies of those that do not."""
    if all(map(Tensor.is_contiguous, tensors)) and not any(map(Tensor.is_neg, tensors)):
        return tensors
    return [tensor.contiguous().resolve_neg() for tensor in tensors]


def check_length(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{name}: expected {expected} entries, one for each tensor, got {found}")
