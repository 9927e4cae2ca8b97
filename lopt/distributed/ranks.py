"""Ranks: the process group of an optimizer, and losses of ranks that hold the same parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lopt.distributed.parts import is_sharded, local_of
from lopt.warnings import called_from, warn

#: What a ``process_group`` may be: "auto" is the default group, if it is initialised; None: no group, ranks are alone.
Group = Any

WORDS = 1 << 20  # that a fingerprint looks at together


def check_group(value: Any) -> None:
    """Refuse what is no process group.

    Raises:
        TypeError: neither ``"auto"``, None, nor a group.
    """
    if value is None or value == "auto" or (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        return
    raise TypeError(f"process_group: expected 'auto', None or a torch.distributed.ProcessGroup, got {value!r}")


def fingerprint(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """``[]`` int64 that tells apart lists of tensors which differ in any bit, almost surely. It needs little memory."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        values = local_of(tensor).detach().contiguous().reshape(-1).view(torch.uint8)
        whole = values.numel() // 4 * 4
        parts = [*torch.split(values[:whole].view(torch.int32), WORDS), values[whole:]]
        for part in parts:
            factors = torch.arange(1, 2 * len(part) + 1, 2, device=part.device)
            total = total * 1_000_003 + (part.to(torch.int64) * factors).sum().to(device)
        total = total * 1_000_003 + values.numel()
    return total


class Ranks:
    """The ranks that train one model together.

    Args:
        process_group: see :data:`Group`.
    """

    def __init__(self, process_group: Group) -> None:
        check_group(process_group)
        self.given = process_group
        #: Whether parameters were found to be those of no other rank, so that losses are not averaged.
        self.alone = False
        self.met = False

    def __getstate__(self) -> dict[str, Any]:
        return {"given": "auto" if self.given is not None else None, "alone": self.alone, "met": False}

    @property
    def group(self) -> Any:
        """The process group, or None where there is one rank, or ranks are alone."""
        if self.alone or self.given is None or not dist.is_available() or not dist.is_initialized():
            return None
        group = dist.group.WORLD if self.given == "auto" else self.given
        return group if group is not None and dist.get_world_size(group) > 1 else None

    def check_device(self, device: torch.device) -> None:
        """Refuse tensors that the group cannot sum.

        Raises:
            RuntimeError: no backend of the group takes tensors of this device.
        """
        if self.group is None:
            return
        backends = dist.get_backend_config(self.group)
        if device.type not in [entry.split(":")[0] for entry in backends.split(",")]:
            raise RuntimeError(
                f"process_group: its backend {backends!r} has none for tensors on {device}, where parameters and "
                "statistics are (as CPU offload keeps them). Write init_process_group('cpu:gloo,cuda:nccl'), or "
                "process_group=torch.distributed.new_group(backend='gloo')"
            )

    @property
    def index(self) -> int:
        """This rank in the group."""
        return dist.get_rank(self.group) if self.group is not None else 0

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return dist.get_world_size(self.group) if self.group is not None else 1

    def sum(self, values: Tensor) -> None:
        """Sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.SUM, group=self.group)

    def begin_sum(self, values: Tensor) -> Any:
        """:meth:`sum` while other things are done; the result has ``wait``, or is None where there is one rank."""
        if self.group is None:
            return None
        return dist.all_reduce(values, dist.ReduceOp.SUM, group=self.group, async_op=True)

    def same(self, values: Tensor) -> bool:
        """Whether all ranks have the same numbers, int64."""
        both = torch.cat([values.reshape(-1), ~values.reshape(-1)])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        return torch.equal(both[: values.numel()], ~both[values.numel() :])

    def gather(self, value: Any) -> list[Any]:
        """An object of each rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def meet(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], device: torch.device, required: bool = False
    ) -> None:
        """Before the first step: find out whether the ranks hold the same parameters and gradients.

        Raises:
            ValueError: they do not, and this is required, or the process group was given.
            RuntimeError: the group has no backend for the device.
        """
        self.check_device(device)
        self.met = True
        if self.group is None or self.same(fingerprint([*params, *grads], device)):
            return
        found = (
            "parameters or gradients differ between the ranks of the process group. DistributedDataParallel and "
            "fully_shard keep them the same; where every rank trains a model of its own, write process_group=None"
        )
        if required or self.given != "auto":
            raise ValueError(f"process_group: {found}")
        self.alone = True
        warn(f"{found}. Each rank goes on alone: losses are not averaged")

    def average_losses(self, shared: Mapping[str, Tensor]) -> None:
        """Let training losses that ranks observed be those of all ranks, and validation losses too; a second time
        changes nothing."""
        waiting = torch.cat([shared["pending_loss"], shared["pending_valid"]]).double()
        self.sum(waiting)
        put_losses(shared, waiting / self.size)


def put_losses(shared: Mapping[str, Tensor], waiting: Tensor) -> None:
    """Write sums and numbers of training and validation losses, ``[4]``, where the step finds them: the shares of one
    rank, so that ranks which have met may meet again."""
    shared["pending_loss"].copy_(waiting[:2])
    shared["pending_valid"].copy_(waiting[2:])


def check_same(ranks: Ranks, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Compare over the ranks what must be the same on all: options, the tensor level, and what is not sharded.

    Raises:
        RuntimeError: something differs; says what, and on which ranks.
    """
    params = [param for group in groups for param in group["params"]]
    device = params[0].device
    waiting = ("pending_loss", "pending_valid")  # until ranks share them
    shared = [v for group in groups for k, v in sorted(group.items()) if isinstance(v, Tensor) and k not in waiting]
    numbers = [float(value) for group in groups for _, value in sorted(group.items()) if isinstance(value, float)]
    held = {
        "options of groups, and what all tensors share": [*shared, torch.tensor(numbers, dtype=torch.float64)],
        "parameters": [param for param in params if not is_sharded(param)],
        "states of tensors": [value for param in params if param in state for value in _replicated(state[param])],
    }
    found = ranks.gather({name: int(fingerprint(tensors, device)) for name, tensors in held.items()})
    for name in held:
        others = [rank for rank, theirs in enumerate(found) if theirs[name] != found[0][name]]
        if others:
            raise RuntimeError(
                f"{name}: not the same on ranks {others} as on rank 0; ranks must see the same gradients (was backward "
                "called outside the wrapped model, or a parameter written on one rank?), options and validation losses"
            )


def _replicated(state: Mapping[str, Any]) -> list[Tensor]:
    values = [value for _, value in sorted(state["lstm"].items())] if "lstm" in state else []
    return values + [v for _, v in sorted(state.items()) if isinstance(v, Tensor) and not is_sharded(v)]


def refuse_zero() -> None:
    """Refuse to be made by ``ZeroRedundancyOptimizer``.

    Raises:
        TypeError: it is what makes the optimizer.
    """
    if called_from("zero_redundancy_optimizer.py"):
        raise TypeError(
            "ZeroRedundancyOptimizer: it gives every rank some of the tensors alone, while the optimizer sees "
            "statistics of all; shard parameters and state with torch.distributed.fsdp.fully_shard, or state alone "
            "with sharded_state=True"
        )
