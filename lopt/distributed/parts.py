"""Tensors of which a part lies on this rank (DTensors), and plain ones, of which all does."""

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor, as ``fully_shard`` and tensor parallelism make of parameters."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has a DTensor who has not imported it
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank; the same memory."""
    if not is_sharded(tensor):
        return tensor
    local: Any = cast(Any, tensor)._local_tensor
    return cast(Tensor, local.wait() if hasattr(local, "wait") else local)


def local_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient of what of ``param`` lies on this rank: redistributed, where it lies in another way, a collective.

    Raises:
        TypeError: one of the two is sharded and the other is not.
    """
    if not is_sharded(param) and not is_sharded(grad):
        return grad
    if not (is_sharded(param) and is_sharded(grad)):
        raise TypeError(
            f"gradient of a parameter of shape {tuple(param.shape)}: the parameter is a {type(param).__name__}, the "
            f"gradient a {type(grad).__name__}; give the gradient as backward() leaves it"
        )
    ours, theirs = cast(Any, param), cast(Any, grad)
    if theirs.placements != ours.placements:
        theirs = theirs.redistribute(ours.device_mesh, ours.placements)
    return local_of(theirs)


def _stacked(tensor: Any, planes: int) -> dict[str, Any]:
    """Where ``planes`` tensors like this DTensor lie, stacked: arguments of ``DTensor.from_local``."""
    placements = [_shifted(placement) for placement in tensor.placements]
    shape = torch.Size((planes, *tensor.shape))
    stride = torch.empty(shape, device="meta").stride()
    return {"placements": placements, "device_mesh": tensor.device_mesh, "shape": shape, "stride": stride}


def _shifted(placement: Any) -> Any:
    """The placement, of a tensor with one more dimension in front."""
    if not hasattr(placement, "dim"):
        return placement
    kept = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(placement.dim + 1, **kept)


def place_like(param: Tensor, local: Tensor) -> Tensor:
    """``local`` ``[K, *shape of the part]`` as a tensor ``[K, *shape]`` that lies as ``param`` does; or without K."""
    if not is_sharded(param):
        return local
    from torch.distributed import tensor

    if local.dim() > param.dim():
        target = _stacked(param, len(local))
    else:
        mesh, placements = cast(Any, param).device_mesh, cast(Any, param).placements
        target = {"device_mesh": mesh, "placements": placements, "shape": param.shape, "stride": param.stride()}
    dtensor: Any = tensor.DTensor
    if target["device_mesh"].device_type == local.device.type:
        return cast(Tensor, dtensor.from_local(local, **target, run_check=False))
    # With CPU offload parts are on the CPU and the mesh is of GPUs, to which from_local would take them.
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(target["shape"], target["stride"], local.dtype)
    spec = DTensorSpec(target["device_mesh"], tuple(target["placements"]), tensor_meta=meta)
    return cast(Tensor, dtensor(local, spec, requires_grad=False))


def whole_of(tensor: Tensor) -> Tensor:
    """A plain tensor with all elements, on every rank; of a DTensor a collective."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def part_like(param: Tensor, value: Tensor) -> Tensor:
    """What of ``value`` ``[K, *shape]`` belongs to this rank's part of ``param``.

    ``value`` may lie as the parameter does, in another way, or be whole on every rank.
    """
    planes = value.shape[0]
    if is_sharded(value):
        if not is_sharded(param):
            return whole_of(value)
        target, theirs = _stacked(param, planes), cast(Any, value)
        if tuple(theirs.placements) != tuple(target["placements"]) or theirs.device_mesh != target["device_mesh"]:
            return _cut(param, whole_of(value))
        return local_of(value)
    return _cut(param, value) if is_sharded(param) else value


def _cut(param: Tensor, value: Tensor) -> Tensor:
    from lopt.distributed.layout import Box

    box = Box.of(param)
    return value[(slice(None), *box.slices)]


def increment_versions(params: Sequence[Tensor]) -> None:
    """A backward pass that needs the old values of these must fail."""
    torch.autograd.graph.increment_version(params)
    inside = [local_of(param) for param in params if is_sharded(param)]
    if inside:
        torch.autograd.graph.increment_version(inside)
