"""The compiled tensor level against lopt/rule/tensor_lstm.py, step by step, and what a step asks of the device."""

import dataclasses
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from kernel_cases import Backend, feedback_of, fold_bias
from optimizer_cases import (
    PRESETS,
    Float64,
    assert_same_bits,
    copies,
    make_grads,
    make_loss,
    make_optimizer,
    make_params,
    make_theta,
    run,
    set_grads,
    snapshot,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lopt import LearnedOptimizer, Theta, kernels
from lopt.kernels import devices
from lopt.rule import PRESETS as SPECS
from lopt.rule import ThetaSpec, tensor_lstm
from lopt.rule.features import STATS
from lopt.rule.inputs import Shapes
from lopt.rule.matrices import Kind
from lopt.rule.tensor_lstm import Globals

ULP = 2.0**-23
MIXED = ((), (4,), (3, 5), (2, 3, 2, 2), (1, 2, 2, 1, 3), (64,))
COMPACT, SPECTRAL, PAPER = SPECS["compact"], SPECS["spectral"], SPECS["paper"]
MATRICES = ((6, 5), (5,), (16, 4), (2, 3, 2, 2), (), (4, 90), (7, 7), (4, 16), (9, 3))

#: Name -> spec, shapes of the tensors.
CASES: dict[str, tuple[ThetaSpec, tuple[tuple[int, ...], ...]]] = {
    "compact": (COMPACT, MIXED),
    "paper": (PAPER, MIXED),
    "spectral": (SPECTRAL, MATRICES),
    "natural": (dataclasses.replace(SPECTRAL, newton_schulz=0, horizon_input=False), MATRICES),
    "spectral-16": (dataclasses.replace(SPECTRAL, mlp_width=16, lstm_width=32, newton_schulz=5), MATRICES * 9),
    "no matrix to treat": (SPECTRAL, ((5,), (), (1, 7))),
    "compact-16": (dataclasses.replace(COMPACT, mlp_width=16, lstm_width=32), MIXED),
    "compact-32": (dataclasses.replace(COMPACT, mlp_width=32, horizon_input=False, linear_skip=False), MIXED),
    "paper-8": (dataclasses.replace(PAPER, mlp_width=8, lstm_width=3, from_mlp=1, from_lstm=1), MIXED),
    "wide": (dataclasses.replace(COMPACT, lstm_width=100, from_lstm=40, step_control=False), MIXED),
    "one scalar": (COMPACT, ((),)),
    "one matrix": (PAPER, ((300, 200),)),
    "no matrix": (COMPACT, ((5,), ())),
    "300 tensors": (COMPACT, MIXED * 50),
    "more tensors than blocks": (COMPACT, MIXED * 90),
}


@pytest.fixture(autouse=True)
def _one_thread(set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(1)


def random_theta(spec: ThetaSpec) -> Theta:
    """None of its values is zero, so that every input matters."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[0] if shape else 1)
        for name, shape in spec.shapes().items()
    }
    return Theta(spec, tensors)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What one step is given."""

    stats: Tensor
    hidden: Tensor
    rank: Tensor  # as if the direction stage had written it
    train_losses: list[float | None]
    valid_loss: float | None


def random_inputs(spec: ThetaSpec, count: int) -> list[Inputs]:
    """Five steps. Losses: one, none, not a number, two, infinite. From the second on, some tensors have to rest."""
    generator = torch.Generator().manual_seed(2)
    losses: list[list[float | None]] = [[2.0], [None], [math.nan], [1.5, 1.0], [-math.inf]]
    valid = [None, 2.5, math.nan, 1.75, math.inf]
    inputs = []
    for train_losses, valid_loss in zip(losses, valid, strict=True):
        stats = 10 ** (2 * torch.randn(count, spec.features.num_stats, generator=generator))
        for name in ("param_mean", "mom_mean"):
            stats[:, STATS.index(name)] *= torch.randn(count, generator=generator)
        stats[:, STATS.index("nonfinite")] = torch.randint(3, (count,), generator=generator).float()
        hidden = torch.rand(count, spec.mlp_width, generator=generator)
        stats[torch.rand(count, generator=generator) < 0.2, STATS.index("grad_square")] = 0.0
        if inputs and count > 1:
            stats[torch.rand(count, generator=generator) < 0.2, STATS.index("param_square")] = math.nan
        rank = 10 ** (2 * torch.rand(count, generator=generator) - 1.5)
        rank[torch.rand(count, generator=generator) < 0.2] = 0.0
        inputs.append(Inputs(stats, hidden, rank, train_losses, valid_loss))
    return inputs


def kinds_of(count: int) -> list[Kind]:
    """Of some tensors something is known; of most their places tell."""
    known = {2: Kind("hidden", 16), 6: Kind("input"), 7: Kind(None, 4)}
    return [known.get(i, Kind()) for i in range(count)]


def options(count: int) -> tuple[Tensor, Tensor]:
    """Learning rate and weight decay of each tensor."""
    generator = torch.Generator().manual_seed(3)
    lr = torch.rand(count, generator=generator)
    lr[1::3] = 0.0
    return lr, torch.rand(count, generator=generator)


Numbers = dict[str, Tensor]


def solve(theta: Theta, shapes: tuple[tuple[int, ...], ...], inputs: list[Inputs], dtype: torch.dtype) -> list[Numbers]:
    """By lopt/rule/tensor_lstm.py."""
    spec, weights, count = theta.spec, theta.to(dtype=dtype).tensors, len(shapes)
    globals_, rows = tensor_lstm.init_globals(spec, weights), tensor_lstm.init_rows(spec, weights, count)
    facts = Shapes.of(spec, shapes, weights["initial_h"], kinds_of(count))
    lr, decay = (x.to(dtype) for x in options(count))
    results = []
    for given in inputs:
        if given.valid_loss is not None:
            globals_ = tensor_lstm.observe_valid(spec, globals_, torch.tensor(given.valid_loss, dtype=dtype))
        limit = tensor_lstm.clip_limit(spec, globals_).expand(count)
        rows = rows._replace(rank=given.rank.to(dtype))
        usable = [loss for loss in given.train_losses if loss is not None and math.isfinite(loss)]
        loss = torch.tensor(sum(usable) / len(usable), dtype=dtype) if usable else None
        stats = given.stats.to(dtype)
        globals_, rows, conditioning, _ = tensor_lstm.advance(
            spec, weights, globals_, rows, stats, facts, loss, torch.tensor(7.0, dtype=dtype)
        )
        step_size, keep = tensor_lstm.step_sizes(spec, conditioning.multiplier, lr, decay)
        feedback = feedback_of(weights, given.hidden.to(dtype))
        rows = rows._replace(feedback=tensor_lstm.next_feedback(rows.feedback, feedback, step_size))
        results.append(
            {
                **{name: value.clone() for name, value in globals_._asdict().items()},
                **{name: value.clone() for name, value in rows._asdict().items() if name != "scale"},
                "initial_scale": rows.scale,
                "clip_limit": limit,
                "column_scale": conditioning.scale,
                "column_shift": conditioning.shift,
                "bias": fold_bias(spec, weights, conditioning.constant),
                "step_size": step_size,
                "keep": keep,
                "gate": torch.where(tensor_lstm.rests(stats), 0.0, conditioning.gate),
            }
        )
    return results


def drive(backend: Backend, theta: Theta, shapes: tuple[tuple[int, ...], ...], inputs: list[Inputs]) -> list[Numbers]:
    """By the compiled code, with losses as numbers and as tensors in turn."""
    spec, device = theta.spec, backend.device
    weights = theta.to(device, torch.float32).tensors
    rows = tensor_lstm.init_rows(spec, weights, len(shapes))
    globals_ = tensor_lstm.init_globals(spec, weights)
    shared = {**globals_._asdict(), "pending_loss": torch.zeros(2, device=device)}
    shared["nonfinite"] = torch.zeros(2, dtype=torch.int64, device=device)
    groups_of = list(range(len(shapes)))
    level = kernels.TensorLevel(backend.name, theta, shapes, rows, groups_of, kinds=kinds_of(len(shapes)))
    lr, decay = options(len(shapes))
    groups = [{"lr": float(lr[i]), "weight_decay": decay[i].to(device)} for i in range(len(shapes))]
    level.set_options(groups, 7)
    results = []
    for step, given in enumerate(inputs):
        as_tensor = step % 2 == 1
        losses = [torch.tensor(x, device=device) if as_tensor and x is not None else x for x in given.train_losses]
        valid = given.valid_loss
        rows.rank.copy_(given.rank)
        if len(losses) > 1:
            level.begin(shared, losses[0])
        level.begin(shared, losses[-1], torch.tensor(valid, device=device) if as_tensor and valid else valid)
        level.advance(given.stats.to(device))
        level.finish(given.hidden.to(device))
        numbers = {
            **{name: shared[name] for name in Globals._fields},
            **{name: value for name, value in rows._asdict().items() if name != "scale"},
            "initial_scale": rows.scale,
            "column_scale": level.inputs["scale"],
            "column_shift": level.inputs["shift"],
            **{name: level.inputs[name] for name in ("clip_limit", "bias", "step_size", "keep", "gate")},
        }
        results.append({name: value.cpu().clone() for name, value in numbers.items()})
        assert shared["pending_loss"].tolist() == [0.0, 0.0]
    nonfinite = sum(int(x.stats[:, STATS.index("nonfinite")].sum()) for x in inputs)
    assert shared["nonfinite"].tolist() == [nonfinite, sum(int(tensor_lstm.rests(x.stats).sum()) for x in inputs)]
    assert level.finished.tolist() == [0]
    return results


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_tensor_lstm(backend: Backend, case: str) -> None:
    """Errors against float64 at most twice those of torch in float32, and some ulps of the largest element."""
    spec, shapes = CASES[case]
    theta, inputs = random_theta(spec), random_inputs(spec, len(shapes))
    exact, rounded = (solve(theta, shapes, inputs, dtype) for dtype in (torch.float64, torch.float32))
    for step, found in enumerate(drive(backend, theta, shapes, inputs)):
        for name, expected in exact[step].items():
            compared = torch.isfinite(expected)
            if name in ("column_scale", "column_shift", "bias"):  # of a tensor that rests they mean nothing
                compared = compared & torch.logical_not(tensor_lstm.rests(inputs[step].stats))[:, None]
            else:
                assert torch.equal(found[name].isnan(), expected.isnan()), name
            found_values, expected, nearly = (
                x.double()[compared] for x in (found[name], expected, rounded[step][name])
            )
            error = (found_values - expected).abs().max().item()
            allowed = 2 * (nearly - expected).abs().max().item() + 8 * ULP * expected.abs().max().item()
            assert error <= allowed, f"step {step}, {name}: error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("case", ["compact", "spectral-16", "paper", "more tensors than blocks"])
def test_same_bits_in_both_thread_orders(case: str) -> None:
    spec, shapes = CASES[case]
    theta, inputs = random_theta(spec), random_inputs(spec, len(shapes))
    results = []
    for reverse in (False, True):
        kernels.module_of("sim").reverse_order(reverse)
        results.append(drive(Backend("sim", torch.device("cpu")), theta, shapes, inputs))
    kernels.module_of("sim").reverse_order(False)
    assert_same_bits(results[0], results[1])


# ---- Whole steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stats", "each"), [("current", 5), ("lagged", 4)])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("number", [1, 300])
def test_launches_of_a_step_whatever_the_number_of_tensors(preset: str, number: int, stats: str, each: int) -> None:
    """begin, accumulate, advance, apply, finish; lagged: begin, advance, one sweep, finish, but for the first step.

    A loss beside step() is one more.
    """
    params = make_params([(2,)] * number)
    opt = LearnedOptimizer(params, make_theta(preset).with_spec(stats=stats), impl="sim")
    for step, launches in enumerate((5, each, each)):
        before = kernels.module_of("sim").launches()
        run(opt, params, 1, step)
        assert kernels.module_of("sim").launches() - before == launches
    opt.observe(valid_loss=1.0, train_loss=2.0)
    assert kernels.module_of("sim").launches() - before == each + 1


@pytest.mark.parametrize("stats", ["current", "lagged"])
def test_launches_with_directions(stats: Literal["current", "lagged"]) -> None:
    """One more, that writes, where there is a matrix to treat as a whole."""
    for shapes, more in (([(3, 4)] * 30, 1), ([(3, 4), (2, 60), (5,)], 1), ([(2, 60), (5,), (1, 9)], 0)):
        params = make_params(shapes)
        opt = LearnedOptimizer(params, make_theta("spectral").with_spec(stats=stats), impl="sim")
        run(opt, params, 1)
        before = kernels.module_of("sim").launches()
        run(opt, params, 1, 1)
        assert kernels.module_of("sim").launches() - before == (5 if stats == "current" else 4) + more


class Recorder(TorchDispatchMode):
    """Names of the torch operations that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# Views: on a GPU no launch.
FREE = {"aten.detach.default", "aten.view.default", "aten.alias.default", "aten._reshape_alias.default"}


@pytest.mark.parametrize("impl", ["cpu", "sim"])
def test_a_step_runs_no_operation_of_torch(impl: str) -> None:
    """Neither a kernel nor an allocation; a learning rate that changed is one fill, one that is a tensor one copy."""
    params = make_params()
    opt = make_optimizer(params, impl)
    run(opt, params, 2)
    loss = torch.tensor(1.0)

    def operations() -> list[str]:
        with Recorder() as recorder:
            opt.step(loss=loss)
        return [name for name in recorder.names if name not in FREE and not name.startswith("profiler.")]

    assert operations() == []
    opt.param_groups[0]["lr"] = 0.5
    assert operations() == ["aten.fill_.Scalar"]
    assert operations() == []
    opt.param_groups[0]["lr"] = torch.tensor(0.5)
    assert operations() == ["aten.copy_.default"]
    opt.total_steps = 10
    assert operations() == ["aten.copy_.default", "aten.fill_.Scalar"]


@pytest.mark.parametrize("impl", ["cpu", "sim"])
def test_operations_of_torch_do_not_depend_on_the_number_of_matrices(impl: str) -> None:
    """Those of one shape are orthogonalised together, small ones on the CPU by the kernels; where none is treated as a
    whole there are none."""

    def operations(shapes: Any) -> int:
        params = make_params(shapes)
        opt = LearnedOptimizer(params, make_theta("spectral"), impl=impl)
        run(opt, params, 2)
        loss = torch.tensor(1.0)
        with Recorder() as recorder:
            opt.step(loss=loss)
        return len([name for name in recorder.names if name not in FREE and not name.startswith("profiler.")])

    one = operations([(3, 4), (5,)])
    assert (one > 0) == (impl == "sim")
    assert operations([(3, 4)] * 20 + [(5,)]) == one
    assert operations([(3, 4), (5,), (3, 5), (3, 4)]) == 2 * one
    assert operations([(2, 60), (5,), (1, 9), ()]) == 0


@pytest.mark.parametrize("impl", ["cpu", "sim"])
def test_options_may_change_in_every_way(impl: str) -> None:
    params = make_params()
    opt = make_optimizer([{"params": params[:2]}, {"params": params[2:]}], impl)
    expected = Float64("compact", params)
    rates: list[Any] = [0.5, torch.tensor(0.25), 0.5, torch.tensor([0.75], dtype=torch.float64), 0, 0.5]
    for step, lr in enumerate(rates):
        opt.param_groups[1]["lr"] = lr
        set_grads(params, step)
        opt.step()
        expected.step(make_grads(params, step), None, [1.0] * 2 + [float(lr)] * (len(params) - 2))
    expected.assert_close(params)


# ---- CUDA graphs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 447, 448, 449, 2000])
def test_words_as_kernel_arguments(count: int) -> None:
    words = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(0))
    to = torch.full((count + 1,), 7)
    kernels.module_of("sim").write_words("sim", to.data_ptr(), words.tolist(), 0, 0)
    assert torch.equal(to[:-1], words)
    assert int(to[-1]) == 7


def test_losses_are_taken_when_the_plan_is_gone() -> None:
    """Between the end of one stepper and the next step, the level reads tables of the plan that it was bound to."""
    params = make_params()
    opt = make_optimizer(params)
    run(opt, params, 1)
    table = weakref.ref(opt._stepper.plan.rows)  # type: ignore[union-attr]
    opt.add_param_group({"params": make_params(((3,),))})
    gc.collect()
    assert opt._stepper is None
    assert table() is not None
    opt.observe(valid_loss=1.0)


def test_capture_needs_a_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params()
    opt = make_optimizer(params, "sim")
    set_grads(params, 0)
    monkeypatch.setattr(devices, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="CUDA graph: these tensors had no step yet"):
        opt.step()


def test_what_was_captured_is_kept_and_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of addresses that a graph reads stay alive; what a graph would write, a later step writes again."""
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, "sim"), make_optimizer(others, "sim")
    for optimizer, tensors in ((opt, params), (other, others)):
        run(optimizer, tensors, 1)
    monkeypatch.setattr(devices, "is_capturing", lambda device: True)
    opt.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.5
    set_grads(params, 1)
    opt.step(loss=make_loss(1))
    monkeypatch.undo()
    plan = opt._stepper.plan
    assert len(plan.captured) == 1
    plan.grad_table.host[:] = 0  # as if the graph never ran
    opt._stepper.level.lr.zero_()
    run(other, others, 1, 1)
    opt.step(loss=make_loss(2))
    other.step(loss=make_loss(2))
    assert_same_bits(snapshot(opt), snapshot(other))


def cuda_pair(preset: str) -> tuple[Any, Any, list[Any], list[Any]]:
    """Two optimizers on the same parameters, one step done."""
    if not (torch.cuda.is_available() and kernels.has_cuda()):
        pytest.skip("needs a CUDA device, and lopt built with CUDA")
    first = [torch.nn.Parameter(param.detach().cuda()) for param in make_params()]
    second = copies(first)
    pair = make_optimizer(first, "cuda", preset), make_optimizer(second, "cuda", preset)
    for opt, params in zip(pair, (first, second), strict=True):
        for param, grad in zip(params, make_grads(make_params(), 0), strict=True):
            param.grad = grad.cuda()
        opt.step(loss=torch.tensor(make_loss(0), device="cuda"))
    return *pair, first, second


def new_grads(params: list[Any], step: int) -> None:
    """In place: the memory of a gradient stays."""
    for param, grad in zip(params, make_grads(make_params(), step), strict=True):
        param.grad.copy_(grad)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_cuda_step_waits_for_nothing(preset: str) -> None:
    opt, _, params, _ = cuda_pair(preset)
    loss = torch.tensor(1.0, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            opt.param_groups[0]["lr"] = 1.0 - 0.1 * step
            opt.observe(valid_loss=loss)
            opt.step(loss=loss)
            opt.zero_grad()
            for param in params:
                param.grad = torch.ones_like(param)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["compact", "paper"])  # of spectral the number depends on the shapes
def test_cuda_step_is_at_most_six_launches(preset: str) -> None:
    opt, *_ = cuda_pair(preset)
    loss = torch.tensor(1.0, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        opt.step(loss=loss)
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    names = [event.name for event in profile.events() if event.device_type == device]
    kernels = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
    assert 5 <= len(kernels) <= 6, kernels


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_cuda_graph_of_a_step_is_the_step(preset: str) -> None:
    opt, other, params, others = cuda_pair(preset)
    loss = torch.tensor(0.0, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step(loss=loss)
    for step in range(1, 5):
        new_grads(params, step)
        new_grads(others, step)
        loss.fill_(make_loss(step))
        graph.replay()
        other.step(loss=loss)
    assert_same_bits(snapshot(opt), snapshot(other))


@pytest.mark.gpu
def test_cuda_graph_of_a_whole_iteration() -> None:
    """Gradients live in the graph's own memory; an eager step in between does not disturb it."""
    opt, other, params, others = cuda_pair("compact")
    factor = torch.tensor(0.0, device="cuda")

    def iterate(optimizer: Any, tensors: list[Any]) -> None:
        loss = sum((factor * param).square().mean() for param in tensors)
        loss.backward()
        optimizer.step(loss=loss)

    opt.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iterate(opt, params)
    inside = [param.grad for param in params]
    for step in range(1, 6):
        factor.fill_(0.5 * step)
        other.zero_grad()
        iterate(other, others)
        if step == 3:
            opt.zero_grad()
            iterate(opt, params)
            for param, grad in zip(params, inside, strict=True):
                param.grad = grad
        else:
            graph.replay()
    assert_same_bits(snapshot(opt), snapshot(other))
