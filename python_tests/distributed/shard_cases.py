"""What ranks do in the tests of sharded parameters: each function runs on every rank and returns what is compared.

Gradients are made by hand from the whole parameters, so that ranks differ from one process in the optimizer alone:
noise that is the same everywhere, and a pull towards zero, so that errors would come back.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lopt import LearnedOptimizer, Theta

STEPS = 100


class Block(nn.Module):
    """Layers of all kinds: tables, matrices that are wide, tall and uneven, gains, biases, kernels, a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(31, 12)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 40)
        self.down = nn.Linear(40, 12)
        self.odd = nn.Linear(12, 7)
        self.conv = nn.Conv2d(3, 5, 3)
        self.few = nn.Linear(7, 3)
        self.one = nn.Linear(3, 1)
        self.head = nn.Linear(12, 31, bias=False)


def block(dtype: torch.dtype = torch.float32) -> Block:
    """The same on all ranks."""
    torch.manual_seed(3)
    return Block().to(dtype)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def laid_out(value: Tensor, param: Tensor) -> Tensor:
    """``value`` in parts, as ``param`` lies."""
    if not isinstance(param, DTensor):
        return value
    mesh = param.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        mesh, param.placements
    )


def gradients(params: Sequence[Tensor], step: int, lay: Callable[[Tensor, Tensor], Tensor] = laid_out) -> None:
    """Write the gradients of this step."""
    random = torch.Generator().manual_seed(step)
    for param in params:
        value = whole(param)
        noise = torch.randn(value.shape, generator=random)
        param.grad = lay((0.02 * noise + 0.05 * value.float()).to(value.dtype), param)


def loss_at(step: int) -> float:
    """The mean loss over ranks."""
    return 3.0 * math.exp(-step / 40)


def drive(
    model: nn.Module, opt: LearnedOptimizer, steps: Sequence[int] = range(STEPS), own: Callable[[int], float] = loss_at
) -> None:
    """Steps with a training loss each, and now and then a validation loss."""
    for step in steps:
        gradients(list(model.parameters()), step)
        if step % 10 == 5:
            opt.observe(valid_loss=1.1 * own(step))
        opt.step(loss=own(step))


def own_loss(step: int) -> float:
    """Of this rank, so that the mean over ranks is ``loss_at``."""
    world, rank = dist.get_world_size(), dist.get_rank()
    return loss_at(step) * (1.0 + 0.5 * (rank - (world - 1) / 2))


def state_of(model: nn.Module, opt: LearnedOptimizer) -> dict[str, Tensor]:
    """Everything that a run leaves, whole: parameters, accumulators, tensor level."""
    opt.state_dict()  # completes the state
    found = {}
    for name, param in model.named_parameters():
        found[name] = whole(param).clone()
        state = opt.state[param]
        for key in ("mom", "rms"):
            found[f"{name}.{key}"] = whole(state[key]).clone()
        for key, value in state["lstm"].items():
            found[f"{name}.{key}"] = value.clone()
    for key in ("train_loss", "valid_loss", "clip", "from_lstm", "step"):
        found[key] = opt.param_groups[0][key].clone()
    return found


@cache
def alone(dtype: torch.dtype = torch.float32, steps: int = STEPS, **options: Any) -> dict[str, Tensor]:
    """The run of one process."""
    model = block(dtype)
    opt = LearnedOptimizer(model, total_steps=200, process_group=None, **with_theta(options))
    drive(model, opt, range(steps))
    return state_of(model, opt)


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of each parameter, relative to the largest element that it has or began with."""
    result = {}
    for name, param in block().named_parameters():
        largest = max(float(x.detach().abs().max()) for x in (param, expected[name]))
        result[name] = float((found[name].double() - expected[name].double()).abs().max()) / largest
    return result


def run(model: nn.Module, steps: int = STEPS, **options: Any) -> tuple[dict[str, float], dict[str, Tensor], Any]:
    """A sharded run: its differences from one process, what it left, and the optimizer."""
    dtype = next(model.parameters()).dtype
    opt = LearnedOptimizer(model, total_steps=200, **with_theta(options))
    drive(model, opt, range(steps), own_loss)
    found = state_of(model, opt)
    return differences(found, alone(dtype, steps, **options)), found, opt


def with_theta(options: dict[str, Any]) -> dict[str, Any]:
    """The options with ``default`` for lagged statistics in place of the name "lagged"."""
    if options.get("theta") != "lagged":
        return options
    theta = Theta.load("default")
    return {**options, "theta": dataclasses.replace(theta, spec=dataclasses.replace(theta.spec, stats="lagged"))}


def mesh(*sizes: int) -> DeviceMesh:
    names = ("dp", "tp")[: len(sizes)] if len(sizes) < 3 else ("replicate", "shard", "tp")
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def sharded(model: nn.Module, where: DeviceMesh | None = None, leave: Sequence[str] = ()) -> nn.Module:
    """FSDP2, a group for each module; parameters called ``leave`` stay as they are."""
    left = {param for name, param in model.named_parameters() if name in leave}
    for child in model.children():
        fully_shard(child, mesh=where, ignored_params=left & set(child.parameters()) or None)
    return fully_shard(model, mesh=where, ignored_params=left or None)


def tensor_parallel(model: nn.Module, where: DeviceMesh) -> nn.Module:
    return parallelize_module(
        model, where, {"up": ColwiseParallel(), "down": RowwiseParallel(), "head": ColwiseParallel()}
    )


# ---- Scenarios ------------------------------------------------------------------------------------------------------


def replicated() -> Any:
    """Losses of ranks, the same gradients."""
    return run(block())[:2]


def fsdp() -> Any:
    found = run(sharded(block()))
    return (*found[:2], found[2]._stepper.exchange.collectives, found[2]._stepper.exchange.buffer.numel() * 8)


def without_matrices() -> Any:
    return run(sharded(block()), theta="compact")[:2]


def some_plain() -> Any:
    return run(sharded(block(), leave=("norm.weight", "up.weight", "one.bias")))[:2]


def by_columns() -> Any:
    """Shards of another dimension than the first."""
    model, where = block(), mesh(dist.get_world_size())
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            placements = [Shard(param.dim() - 1)]
            module.register_parameter(name, nn.Parameter(distribute_tensor(param.detach(), where, placements)))
    return run(model)[:2]


def hybrid() -> Any:
    return run(sharded(block(), mesh(2, 2)))[:2]


def parallel() -> Any:
    return run(tensor_parallel(block(), mesh(dist.get_world_size())))[:2]


def both() -> Any:
    where = mesh(2, 2)
    return run(sharded(tensor_parallel(block(), where["tp"]), where["dp"]))[:2]


def lagged() -> Any:
    return run(sharded(block()), theta="lagged")[:2]


def shared() -> Any:
    """Replicated parameters, sharded state."""
    differences, found, opt = run(block(), sharded_state=True)
    local = sum(state[name].to_local().numel() for state in opt.state.values() for name in ("mom", "rms"))
    return differences, found, local


def shared_and_averaged() -> Any:
    return run(block(), steps=20, sharded_state=True, average=True)[:2]


def half_state() -> Any:
    return run(sharded(block()), state_dtype=torch.bfloat16)[:2]


def half_bits() -> Any:
    """Accumulators after the first step, rounded: how many differ from one process."""
    expected = alone(steps=1, state_dtype=torch.bfloat16)
    counts = {}
    for impl in ("cpu", "sim"):
        found = run(sharded(block()), steps=1, state_dtype=torch.bfloat16, impl=impl)[1]
        for name in expected:
            if name.endswith(("mom", "rms")):
                counts[f"{impl} {name}"] = int((found[name] != expected[name]).sum())
    return counts


def sim() -> Any:
    return run(sharded(block()), steps=5, impl="sim")[:2]


def averaged() -> Any:
    model = sharded(block())
    opt = LearnedOptimizer(model, average=True)
    drive(model, opt, range(20), own_loss)
    twin = block()
    other = LearnedOptimizer(twin, average=True, process_group=None)
    drive(twin, other, range(20))
    with opt.averaged(), other.averaged():
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        return max(float((whole(a) - b.detach()).abs().max()) for a, b in pairs)
