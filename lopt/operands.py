"""Checks of what a training script hands over: parameters, gradients, losses."""

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lopt import kernels
from lopt.distributed import is_sharded, local_of

_SHARDED = "shard with torch.distributed.fsdp.fully_shard, or train whole tensors with DistributedDataParallel"


def allowed_dtypes(implementation: str) -> tuple[torch.dtype, ...]:
    """Dtypes of parameters and gradients."""
    return (*kernels.DTYPES, *((torch.float64,) if implementation == "reference" else ()))


def remedy(dtype: torch.dtype) -> str:
    """What to do about a dtype that kernels do not have."""
    return "use impl='reference'" if dtype == torch.float64 else "convert it"


def _wraps(tensor: Any) -> bool:
    return bool(is_traceable_wrapper_subclass(tensor))


def has_no_address(tensor: Tensor) -> bool:
    """Whether there is no memory that a kernel could read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a FakeTensor warns about being asked
        return tensor.numel() > 0 and tensor.data_ptr() == 0


def _why_no_address(tensor: Tensor) -> str:
    """What a tensor without memory is, and what to do."""
    kind = type(tensor).__name__
    if _wraps(tensor):
        return f"a {kind}, which wraps other tensors; train those, or plain tensors"
    if tensor.is_meta:
        return "on the meta device, which holds no values; make the optimizer after to_empty() and initialisation"
    return f"a {kind} without memory (fake, or its storage was freed); allocate it first"


def check_param(name: str, param: Tensor) -> None:
    """Refuse parameters whose elements are elsewhere or not those of one tensor.

    Raises:
        TypeError: sharded, wrapped, fake, meta or freed tensors.
    """
    if getattr(param, "_fsdp_flattened", False):
        raise TypeError(
            f"{name}: a flattened parameter of FullyShardedDataParallel, which holds pieces of several tensors, "
            f"while every tensor has statistics and a step of its own; {_SHARDED}"
        )
    local = local_of(param)
    if _wraps(local) or has_no_address(local):
        raise TypeError(f"{name}: expected a dense tensor in memory, got {_why_no_address(local)}")


def check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    """Refuse a gradient that is not one number for each element of its parameter, in memory.

    Raises:
        TypeError: sharded, wrapped, fake, meta or freed tensors.
        ValueError: another shape or device than the parameter's.
    """
    if is_sharded(grad) != is_sharded(param):
        raise TypeError(f"{name}: a {type(grad).__name__} of a {type(param).__name__}; give it as backward() leaves it")
    for what, tensor in ((name, local_of(grad)), (name.removeprefix("gradient of "), local_of(param))):
        if _wraps(tensor) or has_no_address(tensor):
            raise TypeError(f"{what}: expected a dense tensor in memory, got {_why_no_address(tensor)}")
    if grad.shape != param.shape:
        raise ValueError(
            f"{name}: got a gradient of shape {tuple(grad.shape)}; the parameter or its gradient was given another "
            "shape after backward, so call zero_grad and backward again"
        )
    if grad.device != param.device:
        raise ValueError(f"{name}: on {grad.device}, but the parameter is on {param.device}; move one to the other")


def check_params(params: Iterable[Tensor], first: Tensor, allowed: Sequence[torch.dtype], position: int) -> None:
    """Check those of the parameters that are trained; what is frozen is checked by the step in which it has a gradient.

    Args:
        params: of a new group.
        first: with whose precision they must agree.
        allowed: dtypes.
        position: of the first of ``params`` among those of all groups.

    Raises:
        TypeError, ValueError: a parameter cannot be used, named with its position.
    """
    for i, param in enumerate(params, position):
        if not param.requires_grad:
            continue
        name = f"params[{i}] of shape {tuple(param.shape)}"
        check_param(name, param)
        _check_dtype(name, param, allowed)
        if (param.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(f"{name}: {param.dtype} beside {first.dtype}; float64 cannot be mixed")


def _check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}; {remedy(tensor.dtype)}")


def check_gradients(
    groups: Sequence[dict[str, Any]], device_of: Callable[[Tensor], torch.device], allowed: Sequence[torch.dtype]
) -> None:
    """Check the gradients of all parameters, and the parameters that have one.

    Args:
        groups: the optimizer's.
        device_of: where a parameter must be, as its state is there.
        allowed: dtypes of parameters and gradients.

    Raises:
        TypeError, ValueError, RuntimeError: one cannot be used, named with its position.
    """
    for index, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            grad = param.grad
            if grad is not None and (param.numel() or grad.numel()):
                check_operands(f"param_groups[{index}]['params'][{i}]", param, grad, device_of(param), allowed)


def check_operands(
    place: str, param: Tensor, grad: Tensor, device: torch.device, allowed: Sequence[torch.dtype]
) -> None:
    """Check a parameter with its gradient, as :func:`check_gradients`.

    Args:
        place: of the parameter in the groups.
    """
    name = f"{place} of shape {tuple(param.shape)}"
    if grad.is_sparse or grad.layout != torch.strided:
        raise RuntimeError(f"gradient of {name}: expected a dense tensor, got layout {grad.layout}; use sparse=False")
    _check_dtype(f"gradient of {name}", grad, allowed)
    check_gradient(f"gradient of {name}", param, grad)
    _check_dtype(name, param, allowed)
    if param.device != device:
        raise ValueError(f"{name}: on {param.device}, but the optimizer's state is on {device}; move it")


def as_loss(name: str, loss: object, like: Tensor) -> float | Tensor | None:
    """A number where the host knows it, otherwise a tensor on the device; its value is not looked at.

    Raises:
        ValueError: it is no real number.
        TypeError: a tensor that wraps others, or has no memory.
    """
    if loss is None:
        return None
    if not isinstance(loss, Tensor):
        if not isinstance(loss, numbers.Real):
            raise ValueError(f"{name}: expected a number or a tensor of one element, got {type(loss).__name__}")
        return float(loss) if abs(float(loss)) <= torch.finfo(like.dtype).max else math.nan
    if kernels.is_number(loss, like):
        return loss
    if hasattr(loss, "full_tensor"):  # a DTensor: reduce it over the ranks
        full: Tensor = loss.full_tensor()
        loss = full
    if loss.numel() != 1 or loss.is_complex() or loss.layout != torch.strided:
        raise ValueError(
            f"{name}: expected one real number, got {loss.dtype} of shape {tuple(loss.shape)}; reduce it first"
        )
    if _wraps(loss) or loss.data_ptr() == 0:
        raise TypeError(f"{name}: expected a number or a plain tensor, got {_why_no_address(loss)}")
    if loss.dtype == like.dtype and loss.device == like.device and not loss.is_neg():
        return loss
    loss = loss.detach().reshape(()).resolve_neg().to(like.dtype)
    return float(loss) if loss.device.type == "cpu" and like.is_cuda else loss.to(like.device)


def as_weight(weight: Any, like: Tensor) -> float | Tensor | None:
    """A weight of a loss, as :func:`as_loss` reads it.

    Raises:
        ValueError: it is no real number, or negative.
    """
    if isinstance(weight, numbers.Real) and not 0.0 <= float(weight) < math.inf:
        raise ValueError(f"weight: expected a finite number >= 0, got {weight!r}")
    return as_loss("weight", weight, like)
