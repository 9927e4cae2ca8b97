"""Shares: replicated parameters of which every rank steps some rows, and keeps the state of these alone.

This is stage 1 of ZeRO (arXiv:1910.02054): parameters and gradients are whole on every rank, the state is sharded. A
parameter is taken as if its rows were sharded, by a DTensor whose part is a view of its memory; after the step, ranks
give each other the rows that they wrote.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from lopt.distributed.layout import Box
from lopt.distributed.parts import is_sharded, local_of
from lopt.distributed.ranks import Ranks

BUCKET = 1 << 24  # elements that travel together


class Shares:
    """Which part of every parameter this rank steps.

    Args:
        ranks: that hold the same parameters.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._mesh: Any = None
        self._views: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {"ranks": self.ranks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["ranks"])  # type: ignore[misc]

    def part(self, param: Tensor) -> Tensor:
        """A parameter as sharded by rows, of the same memory; as it is, where it has no rows, or is sharded already."""
        if is_sharded(param) or param.dim() == 0 or self.ranks.group is None:
            return param
        view = self._views.get(param)
        if view is None or local_of(view).untyped_storage().data_ptr() != param.untyped_storage().data_ptr():
            view = self._views[param] = self._view(param)
        return view

    def _view(self, param: Tensor) -> Tensor:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        if self._mesh is None:
            self._mesh = DeviceMesh.from_group(self.ranks.group, param.device.type)
        size = -(-param.shape[0] // dist.get_world_size(self.ranks.group))  # as torch.chunk, and so Shard, cuts
        rows = param.detach()[self.ranks.index * size : (self.ranks.index + 1) * size]
        stride = torch.empty(param.shape, device="meta").stride()
        return DTensor.from_local(rows, self._mesh, [Shard(0)], run_check=False, shape=param.shape, stride=stride)

    def gradient(self, param: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the part."""
        part = self.part(param)
        return grad if part is param else grad[Box.of(part).slices]

    @torch.no_grad()
    def exchange(self, params: Sequence[Tensor]) -> None:
        """Give all ranks the parts of these parameters that this rank wrote, and take theirs; a collective."""
        bucket: list[Tensor] = []
        size, travelling = 0, []
        for param in params:
            if self.part(param) is not param:
                bucket.append(param)
                size += param.numel()
            if bucket and (size >= BUCKET or bucket[0].dtype != param.dtype):
                travelling.append(self._send(bucket))
                bucket, size = [], 0
        if bucket:
            travelling.append(self._send(bucket))
        for sent in travelling:
            self._take(*sent)

    def _send(self, bucket: list[Tensor]) -> tuple[list[Tensor], Tensor, Any, Tensor]:
        world = dist.get_world_size(self.ranks.group)
        mine = torch.cat([local_of(self.part(param)).reshape(-1) for param in bucket])
        rows = [-(-param.shape[0] // world) * (param.numel() // max(param.shape[0], 1)) for param in bucket]
        sent = torch.nn.functional.pad(mine, (0, sum(rows) - len(mine)))
        received = sent.new_empty(world * len(sent))
        work = dist.all_gather_into_tensor(received, sent, group=self.ranks.group, async_op=True)
        return bucket, received, work, sent

    def _take(self, bucket: list[Tensor], received: Tensor, work: Any, _: Tensor) -> None:
        work.wait()
        world = dist.get_world_size(self.ranks.group)
        for rank, values in enumerate(received.view(world, -1)):
            place = 0
            for param in bucket:
                size = -(-param.shape[0] // world)
                rows = param.detach()[rank * size : (rank + 1) * size]
                if rank != self.ranks.index:
                    rows.copy_(values[place : place + rows.numel()].view(rows.shape))
                place += rows.numel()
