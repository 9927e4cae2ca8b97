"""CPU offload with a GPU: parameters, gradients and state on the CPU, forward and backward passes on the GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lopt import LearnedOptimizer

pytestmark = pytest.mark.gpu


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_offload_from_a_gpu() -> None:
    results = []
    for offload in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 12))
        if offload:
            mesh = init_device_mesh("cuda", (1,))
            for module in (model[0], model[2], model):
                fully_shard(module, mesh=mesh, offload_policy=CPUOffloadPolicy())
        opt = LearnedOptimizer(model, average=True)
        for step in range(6):
            x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
            x = x.cuda() if offload else x
            loss = (model(x) - x).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step(loss=loss)
        assert opt.implementation == "cpu"
        for param in model.parameters():
            for value in (param, param.grad, opt.state[param]["mom"], opt.state[param]["average"]):
                assert isinstance(value, DTensor) == offload
                assert (value.to_local() if isinstance(value, DTensor) else value).device.type == "cpu"
        local = [param.to_local() if isinstance(param, DTensor) else param for param in model.parameters()]
        results.append([value.detach().clone() for value in local])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
