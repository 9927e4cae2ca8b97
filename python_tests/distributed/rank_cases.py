"""What ranks do in the tests of several ranks beside the numbers of sharded steps."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from shard_cases import block, drive, gradients, laid_out, mesh, own_loss, sharded, state_of, whole, with_theta
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lopt import LearnedOptimizer, Theta
from lopt.distributed import local_of
from lopt.rule.published import VeLO

STEPS = 12


def rank() -> int:
    return dist.get_rank()


def message(action: Callable[[], Any]) -> str:
    """Of the error that an action ends with."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# ---- DistributedDataParallel ----------------------------------------------------------------------------------------


def perceptron() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double().float()


def data(step: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(rows, 6, generator=random), torch.randint(3, (rows,), generator=random)


def train(
    micro: int = 1,
    uneven: bool = False,
    validate: Callable[[], bool] = lambda: True,
    tell: Callable[[int], bool] = lambda step: True,
    theta: Theta[Any] | str = "default",
) -> dict[str, Tensor]:
    """Each rank trains on its rows and tells its own losses; some of the last batches are smaller on rank 1."""
    model = DistributedDataParallel(perceptron())
    opt = LearnedOptimizer(model, theta, total_steps=STEPS, check_ranks=3)
    for step in range(STEPS):
        inputs, targets = (x.chunk(dist.get_world_size())[rank()] for x in data(step))
        if uneven and rank() == 1 and step % 4 == 3:
            inputs, targets = inputs[:3], targets[:3]
        parts = list(zip(inputs.chunk(micro), targets.chunk(micro), strict=True))
        for number, (some, wanted) in enumerate(parts):
            with model.no_sync() if number + 1 < len(parts) else nullcontext():
                loss = nn.functional.cross_entropy(model(some), wanted)
                (loss / len(parts)).backward()
            if micro > 1:
                opt.observe(loss, weight=len(wanted))
        opt.step(loss=loss if micro == 1 and tell(step) else None)
        opt.zero_grad()
        if step % 5 == 4 and validate():
            with torch.no_grad():
                opt.observe(valid_loss=nn.functional.cross_entropy(model(inputs), targets))
    return state_of(model, opt)


def plain() -> Any:
    return train()


def micro_batches() -> Any:
    return train(micro=4)


def uneven() -> Any:
    return train(uneven=True)


def one_validates() -> Any:
    return train(validate=lambda: rank() == 0)


def sometimes_told() -> Any:
    """Steps without a training loss come after validation losses that ranks have not shared."""
    return train(tell=lambda step: step % 5 != 0)


def small_velo() -> Theta[Any]:
    """A rule of others, which looks at the loss."""
    return Theta.init(VeLO(lstm_width=8, bank_size=6), seed=1)


def published() -> Any:
    return train(theta=small_velo())


def published_by_hand() -> Any:
    return by_hand(small_velo())


def by_hand(theta: Theta[Any] | str = "default") -> Any:
    """What ``plain`` should have seen, in one process with all rows."""
    model = perceptron()
    opt = LearnedOptimizer(model, theta, total_steps=STEPS, process_group=None)
    world = dist.get_world_size()
    for step in range(STEPS):
        inputs, targets = data(step)
        rows = zip(inputs.chunk(world), targets.chunk(world), strict=True)
        losses = [nn.functional.cross_entropy(model(some), wanted) for some, wanted in rows]
        torch.stack(losses).mean().backward()
        opt.step(loss=float(torch.stack(losses).mean()))
        opt.zero_grad()
        if step % 5 == 4:
            with torch.no_grad():
                rows = zip(inputs.chunk(world), targets.chunk(world), strict=True)
                valid = [nn.functional.cross_entropy(model(some), wanted) for some, wanted in rows]
            opt.observe(valid_loss=float(torch.stack(valid).mean()))
    return state_of(model, opt)


# ---- Who belongs together -------------------------------------------------------------------------------------------


def apart() -> Any:
    """Every rank trains a model of its own: the same start, other data."""

    def trained(**options: Any) -> nn.Module:
        model = perceptron()
        opt = LearnedOptimizer(model, **options)
        for step in range(3):
            inputs, targets = data(100 * rank() + step)
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            opt.step(loss=loss)
            opt.zero_grad()
        return model

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = trained()
    other = trained(process_group=None)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    return same, [str(warning.message) for warning in said]


def errors() -> Any:
    found = {}
    model = perceptron()

    def different() -> None:
        opt = LearnedOptimizer(model, process_group=dist.group.WORLD)
        for param in model.parameters():
            param.grad = torch.full_like(param, float(rank()))
        opt.step(loss=1.0)

    found["different"] = message(different)
    found["group"] = message(lambda: LearnedOptimizer(model, process_group="gloo"))
    found["published"] = message(lambda: LearnedOptimizer(sharded(block()), small_velo(), impl="cpu"))
    found["reference"] = message(lambda: LearnedOptimizer(sharded(block()), impl="reference"))

    def other_tensors() -> None:
        params = list(sharded(block()).parameters())
        params = params[: len(params) - rank()]
        opt = LearnedOptimizer(params)
        for param in params:
            param.grad = torch.zeros_like(param)
        opt.step()

    found["other tensors"] = message(other_tensors)

    def drift() -> None:
        drifting = perceptron()
        opt = LearnedOptimizer(drifting, check_ranks=2)
        for step in range(4):
            gradients(list(drifting.parameters()), step)
            if step == 3 and rank() == 1:
                drifting[0].weight.data[0, 0] += 1e-6
            opt.step(loss=1.0)

    found["drift"] = message(drift)

    def zero() -> None:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=LearnedOptimizer)

    found["zero"] = message(zero)

    def other_shared_state() -> None:
        own = perceptron()
        with torch.no_grad():
            own[0].weight += rank()
        opt = LearnedOptimizer(own, sharded_state=True)
        gradients(list(own.parameters()), 0)
        opt.step()

    found["shared state"] = message(other_shared_state)
    return found


# ---- What a step costs, and what gradients look like ----------------------------------------------------------------


def counted() -> Any:
    """Collectives of ten steps and the bytes of each, with current and lagged statistics; and number of tensors."""
    return [_counted(theta) for theta in ("compact", "lagged")]


def _counted(theta: str) -> Any:
    model = sharded(block())
    opt = LearnedOptimizer(model, **with_theta({"theta": theta}))
    drive(model, opt, range(2), own_loss)
    exchange = opt._stepper.exchange  # type: ignore[union-attr]
    assert exchange is not None
    before, sizes = exchange.collectives, []
    original = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append((tensor.numel() * tensor.element_size(), options.get("async_op", False)))
        return original(tensor, *args, **options)

    dist.all_reduce = counting
    try:
        for step in range(10):
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
            opt.step(loss=own_loss(step))
    finally:
        dist.all_reduce = original
    return exchange.collectives - before, sizes, len(list(model.parameters()))


def partial_gradients() -> Any:
    """Sums over ranks, as some ways of tensor parallelism leave them."""

    def partial(value: Tensor, param: Tensor) -> Tensor:
        where = param.device_mesh  # type: ignore[attr-defined]
        mine = value * (0.25 if rank() else 0.75)
        return DTensor.from_local(mine, where, [Partial()], run_check=False)

    runs = []
    for lay in (laid_out, partial):
        model, where = block(), mesh(dist.get_world_size())
        for module in model.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, nn.Parameter(distribute_tensor(param.detach(), where, [Shard(0)])))
        opt = LearnedOptimizer(model)
        for step in range(5):
            gradients(list(model.parameters()), step, lay)
            opt.step(loss=1.0)
        runs.append({name: whole(param) for name, param in model.named_parameters()})
    return max(float((runs[0][name] - runs[1][name]).abs().max()) for name in runs[0])


def changing_gradients() -> Any:
    """Other tensors have a gradient in every step."""
    runs = []
    for make in (lambda: sharded(block()), block):
        model = make()
        opt = LearnedOptimizer(model, process_group=None if runs else "auto")
        params = list(model.parameters())
        for step in range(6):
            gradients(params, step)
            for number, param in enumerate(params):
                if (number + step) % 3 == 0:
                    param.grad = None
            opt.step(loss=1.0)
        runs.append(state_of(model, opt))
    return max(float((runs[0][name].double() - runs[1][name].double()).abs().max()) for name in runs[0])


def nonfinite() -> Any:
    """A gradient that is not finite on one rank: all leave out the step."""
    model = sharded(block())
    opt = LearnedOptimizer(model, on_nonfinite="skip")
    gradients(list(model.parameters()), 0)
    opt.step(loss=1.0)
    before = state_of(model, opt)
    gradients(list(model.parameters()), 1)
    if rank() == 1:
        model.table.weight.grad.to_local()[0, 0] = float("nan")
    opt.step(loss=1.0)
    after = state_of(model, opt)
    return all(torch.equal(before[name], after[name]) for name in before), int(opt.nonfinite_gradients)


def memory() -> Any:
    """Bytes of state on this rank, for each element of the model."""
    found = {}
    for name, make, options in (
        ("replicated", block, {}),
        ("fully_shard", lambda: sharded(block()), {}),
        ("sharded_state", block, {"sharded_state": True}),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            for average in (False, True):
                model = make()
                opt = LearnedOptimizer(model, state_dtype=dtype, average=average, **options)
                gradients(list(model.parameters()), 0)
                opt.step(loss=1.0)
                held = [
                    local_of(value)
                    for state in opt.state.values()
                    for key, value in state.items()
                    if key in ("mom", "rms", "average")
                ]
                count = sum(value.numel() * value.element_size() for value in held)
                elements = sum(param.numel() for param in model.parameters())
                found[name, dtype == torch.bfloat16, average] = count / elements
    return found


def travelled() -> Any:
    """Bytes that ranks send in a step for matrices that are treated as wholes, and elements of these matrices."""
    model = sharded(block())
    opt = LearnedOptimizer(model)
    drive(model, opt, range(2), own_loss)
    sizes = []
    original = dist.all_to_all_single

    def counting(received: Tensor, sent: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(sent.numel() * sent.element_size())
        return original(received, sent, *args, **options)

    gradients(list(model.parameters()), 2)
    dist.all_to_all_single = counting
    try:
        opt.step(loss=1.0)
    finally:
        dist.all_to_all_single = original
    directions = opt._stepper.directions  # type: ignore[union-attr]
    assert directions is not None
    return sizes, sum(matrix.rows * matrix.columns for matrix in directions.matrices.values())
