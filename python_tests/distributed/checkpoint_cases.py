"""What ranks do in the tests of checkpoints: they save after ``SAVED`` steps of a run of ``STEPS``, in every way
that torch has, take up what was saved, here or by other numbers of ranks, and go on.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from shard_cases import block, differences, gradients, loss_at, mesh, sharded, tensor_parallel, whole, with_theta
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from lopt import LearnedOptimizer
from lopt.roles import roles_of_model

SAVED, STEPS = 10, 30
#: Without a gradient until after the checkpoint.
LATE, LATE_UNTIL = ("odd.weight", "few.bias"), 15
RICH: dict[str, Any] = {"average": True, "theta": "lagged", "lr": 1e-3}
HALF: dict[str, Any] = {**RICH, "state_dtype": torch.bfloat16}


def folder(name: str) -> Path:
    return Path(os.environ["LOPT_TEST_CHECKPOINTS"]) / name


def make(
    shape: Callable[[nn.Module], nn.Module] = lambda model: model, other: bool = False, **options: Any
) -> tuple[nn.Module, LearnedOptimizer]:
    """A model in its shape, and its optimizer; ``other``: as before a checkpoint is read."""
    model = block()
    if other:
        with torch.no_grad():
            for param in model.parameters():
                param.add_(1.0)
    model = shape(model)
    return model, LearnedOptimizer(model, **{"total_steps": None if other else 200, **with_theta(options)})


def go(model: nn.Module, opt: LearnedOptimizer, first: int, last: int, late: bool = False) -> None:
    """Steps of this rank; ``late`` ones have no gradient at first."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    own = 1.0 + 0.5 * (rank - (world - 1) / 2)
    for step in range(first, last):
        gradients(list(model.parameters()), step)
        for name, param in model.named_parameters():
            if late and name.removeprefix("module.") in LATE and step < LATE_UNTIL:
                param.grad = None
        for group in opt.param_groups:
            if group["lr"] != 1.0:
                group["lr"] = 1e-3 / (1 + step)
        if step % 10 == 5:
            opt.observe(valid_loss=1.1 * own * loss_at(step))
        opt.step(loss=own * loss_at(step))
        if step == SAVED - 1:  # still on its way when the checkpoint is written; replicated, one copy of it is saved
            split = any(
                isinstance(opt.state[param]["mom"], DTensor) for param in model.parameters() if opt.state[param]
            )
            opt.observe(valid_loss=(own if split else 1.0) * loss_at(step))


def left(model: nn.Module, opt: LearnedOptimizer) -> dict[str, Tensor]:
    """All numbers that a run leaves."""
    saved = opt.state_dict()
    numbers = {param: number for number, param in enumerate(p for group in opt.param_groups for p in group["params"])}
    found: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = whole(param).clone()
        for key, value in saved["state"].get(numbers[param], {}).items():
            for part, tensor in (value if isinstance(value, dict) else {"": value}).items():
                found[f"{name}.{key}.{part}"] = whole(tensor).clone()
    for key, value in saved["param_groups"][0].items():
        if isinstance(value, (Tensor, float)):
            found[key] = torch.as_tensor(value).clone()
    return found


def unequal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of what is not the same, bit for bit."""
    return sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    )


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: value for name, value in differences(found, expected).items() if value > 1e-6}


# ---- Ways to save and to load ---------------------------------------------------------------------------------------


class App(Stateful):
    """As in torch's tutorial."""

    def __init__(self, model: nn.Module, opt: LearnedOptimizer) -> None:
        self.model, self.opt = model, opt

    def state_dict(self) -> dict[str, Any]:
        model, opt = get_state_dict(self.model, self.opt)
        return {"model": model, "optimizer": opt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model, self.opt, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optimizer"]
        )


class Flat(App):
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def state_dict(self) -> dict[str, Any]:
        model, opt = get_state_dict(self.model, self.opt, options=self.options)
        return {"model": model, "optimizer": opt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        both = {"model_state_dict": state_dict["model"], "optim_state_dict": state_dict["optimizer"]}
        set_state_dict(self.model, self.opt, **both, options=self.options)


class Offloaded(Flat):
    options = StateDictOptions(cpu_offload=True)


def save_app(kind: type[App], name: str, model: nn.Module, opt: LearnedOptimizer) -> None:
    dcp.save({"app": kind(model, opt)}, checkpoint_id=folder(name))


def load_app(kind: type[App], name: str, model: nn.Module, opt: LearnedOptimizer) -> None:
    dcp.load({"app": kind(model, opt)}, checkpoint_id=folder(name))


def save_full(name: str, model: nn.Module, opt: LearnedOptimizer) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    both = get_state_dict(model, opt, options=options)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(both, folder(name))
    if dist.is_initialized():
        dist.barrier()


def load_full(name: str, model: nn.Module, opt: LearnedOptimizer, broadcast: bool = False) -> None:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    both: Any = ({}, {})
    if not broadcast or dist.get_rank() == 0:
        both = torch.load(folder(name), weights_only=True)
    set_model_state_dict(model, both[0], options=options)  # set_state_dict leaves out what is empty on a rank
    set_optimizer_state_dict(model, opt, both[1], options=options)


def save_own(name: str, model: nn.Module, opt: LearnedOptimizer) -> None:
    """A file of each rank, by the plain functions."""
    torch.save((model.state_dict(), opt.state_dict()), folder(f"{name}.{dist.get_rank()}"))


def load_own(name: str, model: nn.Module, opt: LearnedOptimizer) -> None:
    both = torch.load(folder(f"{name}.{dist.get_rank()}"), weights_only=True)
    model.load_state_dict(both[0])
    opt.load_state_dict(both[1])


WAYS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "app": (lambda *a: save_app(App, *a), lambda *a: load_app(App, *a)),
    "flat": (lambda *a: save_app(Flat, *a), lambda *a: load_app(Flat, *a)),
    "offloaded": (lambda *a: save_app(Offloaded, *a), lambda *a: load_app(Offloaded, *a)),
    "full": (save_full, load_full),
    "broadcast": (save_full, lambda *a: load_full(*a, broadcast=True)),
    "own": (save_own, load_own),
}


def resumed(shape: Callable[[nn.Module], nn.Module], ways: Sequence[str], keep: str, late: bool, **options: Any) -> Any:
    """Save in every way, go on; take up each in new objects, go on: what differs then."""
    model, opt = make(shape, **options)
    go(model, opt, 0, SAVED, late)
    for way in ways:
        WAYS[way][0](f"{keep}.{way}", model, opt)
    pending = None
    if "app" in ways and dist.is_initialized():
        apart = dist.new_group(backend="gloo")  # it goes on beside steps, whose collectives must not meet its own
        pending = dcp.async_save({"app": App(model, opt)}, checkpoint_id=folder(f"{keep}.async"), process_group=apart)
    saved = left(model, opt)
    go(model, opt, SAVED, STEPS, late)
    expected = left(model, opt)
    if pending is not None:
        pending.result()
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save((saved, expected), folder(f"{keep}.expected"))
    result = {}
    for way in [*ways, *(["async"] if pending is not None else [])]:
        model, opt = make(shape, other=True, **options)
        WAYS["app" if way == "async" else way][1](f"{keep}.{way}", model, opt)
        at_once = unequal(left(model, opt), saved)
        go(model, opt, SAVED, STEPS, late)
        result[way] = (at_once, unequal(left(model, opt), expected), opt.total_steps)
    return result


def taken_up(
    shape: Callable[[nn.Module], nn.Module], keep: str, way: str, late: bool, **options: Any
) -> tuple[list[str], dict[str, float], int | None]:
    """Take up what other ranks saved, and go on: what is not the same at once, what is far off at the end."""
    saved, expected = torch.load(folder(f"{keep}.expected"))
    model, opt = make(shape, other=True, **options)
    WAYS[way][1](f"{keep}.{way}", model, opt)
    at_once = unequal(left(model, opt), saved)
    go(model, opt, SAVED, STEPS, late)
    return at_once, far(left(model, opt), expected), opt.total_steps


# ---- Scenarios ------------------------------------------------------------------------------------------------------

ALL = ["app", "flat", "offloaded", "full", "broadcast", "own"]


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp_plain() -> Any:
    return resumed(sharded, ALL, "fsdp_plain", False)


def fsdp_rich() -> Any:
    return resumed(sharded, ["app", "flat", "full"], "fsdp_rich", True, **RICH)


def shares_rich() -> Any:
    """Replicated parameters with a sharded state."""
    return resumed(ddp, ["app", "full"], "shares_rich", True, **RICH, sharded_state=True)


def shares_to_fsdp() -> Any:
    return [taken_up(sharded, "shares_rich", "app", True, **RICH)]


def fsdp_half() -> Any:
    return resumed(sharded, ["app"], "fsdp_half", True, **HALF)


def ddp_rich() -> Any:
    return resumed(ddp, ["app", "flat", "full"], "ddp_rich", True, **RICH)


def ddp_to_fsdp() -> Any:
    return [taken_up(sharded, "ddp_rich", way, True, **RICH) for way in ("app", "full")]


def fsdp_to_ddp() -> Any:
    return [taken_up(ddp, "fsdp_rich", way, True, **RICH) for way in ("app", "full")]


def one_to_two() -> Any:
    return [taken_up(sharded, "one", way, True, **RICH) for way in ("app", "full", "flat")]


def two_to_four() -> Any:
    return [
        taken_up(sharded, "fsdp_plain", "app", False),
        taken_up(sharded, "fsdp_rich", "app", True, **RICH),
        taken_up(sharded, "fsdp_rich", "full", True, **RICH),
        taken_up(ddp, "fsdp_rich", "flat", True, **RICH),
    ]


def two_to_hybrid() -> Any:
    return [taken_up(lambda model: sharded(model, mesh(2, 2)), "fsdp_plain", "app", False)]


def two_to_four_shares() -> Any:
    return [
        taken_up(ddp, "fsdp_rich", "app", True, **RICH, sharded_state=True),
        taken_up(ddp, "shares_rich", "app", True, **RICH, sharded_state=True),
    ]


def two_to_both() -> Any:
    where = mesh(2, 2)

    def both(model: nn.Module) -> nn.Module:
        return sharded(tensor_parallel(model, where["tp"]), where["dp"])

    return [taken_up(both, "fsdp_rich", "app", True, **RICH)]


def two_to_four_half() -> Any:
    """Of accumulators that are rounded to bfloat16 only what is loaded is the same; later roundings fall otherwise."""
    return [(taken_up(sharded, "fsdp_half", "app", True, **HALF)[0], {}, 200)]


def in_groups(model: nn.Module, turned: bool) -> LearnedOptimizer:
    """Matrices and the rest in groups; in another order, and each in another order."""
    roles = roles_of_model(model)
    groups = []
    for matrices in (True, False):
        names = [name for name, param in model.named_parameters() if (param.dim() > 1) == matrices]
        names = names[::-1] if turned else names
        params = [model.get_parameter(name) for name in names]
        decay = 0.01 if matrices else 0.0
        groups.append({"params": params, "role": [roles[name] for name in names], "weight_decay": decay})
    return LearnedOptimizer(groups[::-1] if turned else groups)


def other_order() -> Any:
    model = sharded(block())
    opt = in_groups(model, turned=False)
    go(model, opt, 0, SAVED)
    for way in ("app", "flat", "full"):
        WAYS[way][0](f"order.{way}", model, opt)
    saved = left(model, opt)
    go(model, opt, SAVED, STEPS)
    expected = left(model, opt)
    result = []
    for way in ("app", "flat", "full"):
        model = sharded(block())
        opt = in_groups(model, turned=True)
        WAYS[way][1](f"order.{way}", model, opt)
        decays = [group["weight_decay"] for group in opt.param_groups]
        at_once = unequal(left(model, opt), {**saved, "weight_decay": torch.tensor(decays[0])})
        go(model, opt, SAVED, STEPS)
        result.append((at_once, far(left(model, opt), expected), 200 if decays == [0.0, 0.01] else None))
    return result


def before_the_first_step() -> Any:
    """Looking at the state, and saving it, before there is any, changes nothing; what was saved then can be loaded."""
    model, opt = make(sharded, **RICH)
    go(model, opt, 0, SAVED, late=True)
    expected = left(model, opt)
    model, opt = make(sharded, **RICH)
    opt.observe(train_loss=loss_at(0))
    save_app(App, "first", model, opt)
    first = get_optimizer_state_dict(model, opt)
    other, twin = make(sharded, other=True, **RICH)
    load_app(App, "first", other, twin)
    result = [sorted(first["state"]) == sorted(name for name, _ in model.named_parameters())]
    for each, optimizer in ((model, opt), (other, twin)):
        go(each, optimizer, 0, SAVED, late=True)
        result.append(unequal(left(each, optimizer), expected))
    return result


def errors() -> Any:
    """Messages about states that belong elsewhere."""
    model, opt = make(sharded)
    go(model, opt, 0, 2)
    found = []

    def refused(state_dict: dict[str, Any]) -> None:
        before = left(model, opt)
        try:
            opt.load_state_dict(state_dict)
        except ValueError as error:
            found.append(str(error))
        else:
            found.append("taken")
        found.append(str(unequal(left(model, opt), before)))

    def changed(change: Callable[[DTensor], Tensor]) -> dict[str, Any]:
        saved = opt.state_dict()
        saved["state"] = {index: {**state, "mom": change(state["mom"])} for index, state in saved["state"].items()}
        return saved

    refused(changed(lambda mom: mom.to_local()))
    others = [DeviceMesh("cpu", [rank]) for rank in range(dist.get_world_size())]
    refused(changed(lambda mom: DTensor.from_local(mom.full_tensor(), others[dist.get_rank()], [Replicate()])))

    def of_another(mom: DTensor) -> Tensor:
        parts = [part.clone() for part in mom.full_tensor().tensor_split([1], dim=1)]
        mine = parts[dist.get_rank()]
        return DTensor.from_local(
            mine, mom.device_mesh, mom.placements, run_check=False, shape=mom.shape, stride=mom.stride()
        )

    refused(changed(of_another))
    return found


def one() -> Any:
    return resumed(lambda model: model, ["app", "full", "flat"], "one", True, **RICH)


def two_to_one() -> Any:
    return [taken_up(lambda model: model, "fsdp_rich", way, True, **RICH) for way in ("app", "full")]


def two_to_one_plain() -> Any:
    return [taken_up(lambda model: model, "fsdp_plain", way, False) for way in ("app", "full", "flat")]


# ---- All of them ----------------------------------------------------------------------------------------------------

#: Scenarios by number of ranks, in the order in which they need each other; 0 and 1: this process, without a group.
Plan = dict[int, list[str]]


def collect(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[Any]]:
    """What every rank found."""
    results: dict[tuple[int, str], list[Any]] = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lr=0.001 in param_groups")  # the schedule is part of the test
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        patch.setenv("LOPT_TEST_CHECKPOINTS", str(tmp_path_factory.mktemp("checkpoints")))
        for world, names in plan.items():
            if world < 2:
                results.update({(world, name): [globals()[name]()] for name in names})
                continue
            found = on_ranks(world, "checkpoint_cases", names, tmp_path_factory.mktemp(f"ranks{world}"))
            results.update({(world, name): values for name, values in found.items()})
    return results
