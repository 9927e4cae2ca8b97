"""What ranks do in the tests of sharded parameters: each function runs on every rank and returns what is compared.

Gradients are made by hand from the whole parameters, so that ranks differ from one process in the optimizer alone:
noise that is the same everywhere, and a pull towards zero, so that errors would come back.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lopt import LearnedOptimizer, Theta
from lopt.distributed import Box, local_of
from lopt.rule.published import RULES, VeLO
from lopt.state import shared_names

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
        for key, value in state.get("lstm", state).items():  # of a rule of others all is beside them
            found[f"{name}.{key}"] = value.clone()
    shared = shared_names(opt.theta.spec)
    found |= {key: opt.param_groups[0][key].clone() for key in shared if not key.startswith(("pending", "nonfinite"))}
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


def sharded(model: nn.Module, where: DeviceMesh | None = None, leave: Sequence[str] = (), **options: Any) -> nn.Module:
    """FSDP2, a group for each module; parameters called ``leave`` stay as they are."""
    left = {param for name, param in model.named_parameters() if name in leave}
    for child in model.children():
        fully_shard(child, mesh=where, ignored_params=left & set(child.parameters()) or None, **options)
    return fully_shard(model, mesh=where, ignored_params=left or None, **options)


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


def rules() -> Any:
    """Learned optimizers of others, each with a state that is saved and loaded on the way: the largest difference from
    one process of parameters and of everything in the state, and how far a parameter moved."""
    found = {}
    for name, rule in RULES.items():
        theta = Theta.init(VeLO(lstm_width=8, bank_size=6) if rule is VeLO else rule(), seed=1)
        generator = torch.Generator().manual_seed(2)
        moved = {key: x + 0.05 * torch.randn(x.shape, generator=generator) for key, x in theta.tensors.items()}
        theta, left = dataclasses.replace(theta, tensors=moved), []
        for own in (loss_at, own_loss):
            torch.manual_seed(3)
            model: nn.Module = nn.Sequential(nn.Linear(5, 3), nn.Conv2d(3, 2, 2, bias=False))
            start = [param.detach().clone() for param in model.parameters()]
            single: dict[str, Any] = {"process_group": None, "impl": "reference"} if own is loss_at else {}
            model = model if single else fully_shard(model)
            state = None
            for steps in (range(2), range(2, 3)):
                opt = LearnedOptimizer(model, theta, total_steps=20, **single)
                if state is not None:
                    opt.load_state_dict(state)
                drive(model, opt, steps, own)
                state = copy.deepcopy(opt.state_dict())
            assert opt.implementation == "reference"
            states = [opt.state[param] for param in model.parameters()]
            for param, held in zip(model.parameters(), states, strict=True):
                assert local_of(held["mom"]).shape[1:] == local_of(param).shape
                assert single or local_of(param).numel() < param.numel()
            left.append(
                [
                    {"param": whole(param).clone(), **{key: whole(x) for key, x in held.items()}}
                    for param, held in zip(model.parameters(), states, strict=True)
                ]
            )
        off = [
            float((x[key] - y[key]).abs().max()) / max(float(y[key].abs().max()), 1e-30)
            for x, y in zip(*left, strict=True)
            for key in y
        ]
        moves = [float((x["param"] - old).abs().max()) for x, old in zip(left[0], start, strict=True)]
        found[name] = max(off), min(moves)
    return found


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


def offloaded() -> Any:
    """Parameters and gradients kept on the CPU between forward and backward passes; here all is there."""
    return run(sharded(block(), offload_policy=CPUOffloadPolicy(pin_memory=False)), steps=20)[:2]


def offload_loop() -> Any:
    """Forward and backward passes with and without offload: the largest difference."""
    results = []
    for options in ({}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
        torch.manual_seed(dist.get_rank() + 5)
        data = [torch.randn(6, 12) for _ in range(8)]
        torch.manual_seed(3)
        model = sharded(nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 12)), **options)
        opt = LearnedOptimizer(model)
        for x in data:
            loss = (model(x) - x).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step(loss=loss)
        results.append(torch.cat([whole(param).reshape(-1) for param in model.parameters()]))
    return float((results[0] - results[1]).abs().max())


def away_from_the_mesh() -> Any:
    """As CPU offload leaves it: parts on the CPU, of a mesh of GPUs. Steps, averages, a state that is loaded."""
    twins = []
    for device_type in ("cpu", "cuda"):
        model, where = block(), mesh(dist.get_world_size())
        for module in model.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, nn.Parameter(distribute_tensor(param.detach(), where, [Shard(0)])))
        where._device_type = device_type
        opt = LearnedOptimizer(model, average=True)
        for step in range(6):
            random = torch.Generator().manual_seed(step)
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
                value, here = torch.randn(param.shape, generator=random), param.grad.to_local()
                if here.numel():
                    here.copy_(value[Box.of(param).slices])
            opt.step(loss=own_loss(step))
            if step == 3:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        devices = {state[name].to_local().device.type for state in opt.state.values() for name in ("mom", "average")}
        twins.append((state_of(model, opt), devices))
        where._device_type = "cpu"
    (expected, _), (found, devices) = twins
    return all(torch.equal(found[name], value) for name, value in expected.items()), devices


def without_a_backend() -> Any:
    """A group that cannot sum tensors of the CPU is refused, one that can is taken."""
    model = sharded(block())
    kept, dist.get_backend_config = dist.get_backend_config, lambda group: "cuda:nccl"
    try:
        drive(model, LearnedOptimizer(model), range(1))
    except RuntimeError as error:
        return str(error)
    finally:
        dist.get_backend_config = kept
    return ""


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
