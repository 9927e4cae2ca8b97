"""LearnedOptimizer: layout of the state; save, load, copy and continue without a trace."""

import copy
import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_cases import (
    IMPLS,
    PRESETS,
    assert_same_bits,
    clone_tree,
    copies,
    make_optimizer,
    make_params,
    make_theta,
    run,
    same_bits,
    set_grads,
    snapshot,
)
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as distributed
from torch.nn import Parameter

from lopt.optimizer import LearnedOptimizer
from lopt.rule import Theta, ThetaSpec

every_impl = pytest.mark.parametrize("impl", IMPLS)
every_preset = pytest.mark.parametrize("preset", PRESETS)
SHARED = {"step", "train_loss", "valid_loss", "clip", "from_lstm", "pending_loss", "pending_valid", "nonfinite"}

OPTIONS = {"params", "lr", "weight_decay", "maximize", "peak_lr", "theta", "theta_checksum", "total_steps"}
OPTIONS |= {"role", "transposed", "averaged_steps"}


@pytest.fixture(autouse=True)
def _one_thread(set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(1)  # the tensors are tiny


def through_a_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def two_groups(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "weight_decay": 0.1}]


def busy(params: Sequence[Tensor], impl: str = "cpu", preset: str = "compact") -> LearnedOptimizer:
    """An optimizer in the middle of everything: a pause, NaN, validation losses, losses that wait."""
    opt = make_optimizer(two_groups(params), impl, preset)
    run(opt, params, 2)
    opt.observe(valid_loss=1.2)
    set_grads(params, 2)
    params[1].grad = None
    params[2].grad[0] = float("nan")
    opt.step(loss=0.7)
    opt.observe(train_loss=0.3, valid_loss=1.4)
    opt.observe(train_loss=0.4)
    return opt


# ---- Layout ----------------------------------------------------------------------------------------------------------


@every_impl
@every_preset
def test_layout(impl: str, preset: str) -> None:
    params = make_params()
    opt, spec = make_optimizer(two_groups(params), impl, preset), make_theta(preset).spec
    first = opt.state_dict()
    assert first["state"] == {}
    assert all(set(group) == OPTIONS for group in first["param_groups"])
    run(opt, params, 2)
    state_dict = opt.state_dict()
    assert set(state_dict) == {"state", "param_groups"}
    assert set(state_dict["state"]) == set(range(len(params)))
    for index, param in enumerate(params):
        state = state_dict["state"][index]
        shapes = {
            "mom": (len(spec.mom_decays), *param.shape),
            "rms": (len(spec.rms_decays), *param.shape),
            "lstm": {
                "h": (spec.lstm_width,),
                "c": (spec.lstm_width,),
                "feedback": (spec.from_mlp,),
                "scale": (),
                "updates": (),
                "rank": (),
            },
        }
        found = {name: value.shape for name, value in state.items() if name != "lstm"}
        assert {**found, "lstm": {name: value.shape for name, value in state["lstm"].items()}} == shapes
        assert all(value.dtype == torch.float32 for value in (state["mom"], state["rms"], *state["lstm"].values()))
    first_group, second_group = state_dict["param_groups"]
    assert set(first_group) == set(second_group) == SHARED | OPTIONS
    assert all(first_group[name] is second_group[name] for name in SHARED)
    assert {name: tuple(first_group[name].shape) for name in SHARED} == {
        "step": (),
        "train_loss": (8,),
        "valid_loss": (8,),
        "clip": (2,),
        "from_lstm": (spec.from_lstm,),
        "pending_loss": (2,),
        "pending_valid": (2,),
        "nonfinite": (2,),
    }
    assert int(first_group["step"]) == 2
    assert str(opt)


def test_state_is_that_of_the_parameter_in_row_major_order() -> None:
    """What the layout of the memory is does not show in a state dict."""
    params = make_params([(3, 2, 3, 3)])
    others = [Parameter(params[0].detach().contiguous(memory_format=torch.channels_last))]
    opt, other = make_optimizer(params), make_optimizer(others)
    run(opt, params, 2)
    run(other, others, 2)
    assert_same_bits(opt.state_dict(), other.state_dict())
    one = opt.theta.spec.mom_decays[0]
    grads = [torch.randn(params[0].shape, generator=torch.Generator().manual_seed(100 + step)) for step in range(2)]
    expected = (1 - one) * (one * grads[0] + grads[1])
    torch.testing.assert_close(opt.state[params[0]]["mom"][0], expected)


@every_impl
def test_state_dicts_of_before_sharding(impl: str) -> None:
    """They had flat accumulators, and no validation losses that wait for other ranks."""
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl), make_optimizer(others, impl)
    run(opt, params, 2)
    old = copy.deepcopy(opt.state_dict())
    for state in old["state"].values():
        state["mom"], state["rms"] = (state[name].reshape(len(state[name]), -1) for name in ("mom", "rms"))
    for group in old["param_groups"]:
        del group["pending_valid"]
    with torch.no_grad():
        for param, value in zip(others, params, strict=True):
            param.copy_(value)
    other.load_state_dict(old)
    assert_same_bits(other.state_dict(), opt.state_dict())
    run(opt, params, 2, first=2)
    run(other, others, 2, first=2)
    assert_same_bits(snapshot(opt), snapshot(other))


# ---- Resume ----------------------------------------------------------------------------------------------------------


@every_impl
@every_preset
@pytest.mark.parametrize("into", ["fresh", "used"])
def test_resume_is_never_having_stopped(impl: str, preset: str, into: str) -> None:
    params = make_params()
    opt = busy(params, impl, preset)
    saved = through_a_file({"params": [param.detach() for param in params], "opt": opt.state_dict()})
    others = make_params(seed=3)
    other = make_optimizer(two_groups(others), impl, preset, lr=0.9)
    if into == "used":
        run(other, others, 4)
        other.observe(train_loss=9.0, valid_loss=9.0)
    with torch.no_grad():
        for param, value in zip(others, saved["params"], strict=True):
            param.copy_(value)
    other.load_state_dict(state_dict=saved["opt"])
    assert_same_bits(snapshot(other), snapshot(opt))
    for each, tensors in ((opt, params), (other, others)):
        set_grads(tensors, 3)
        each.step()  # with the losses observed before
        run(each, tensors, 3, first=4)
    assert_same_bits(snapshot(other), snapshot(opt))


CONTINUE = """
import sys, torch
from optimizer_cases import make_optimizer, make_params, run, snapshot
torch.set_num_threads(1)
params = make_params()
opt = make_optimizer(params, sys.argv[2], sys.argv[3])
saved = torch.load(sys.argv[1], weights_only=True)
for param, value in zip(params, saved["params"]):
    param.data.copy_(value)
opt.load_state_dict(saved["opt"])
run(opt, params, 3, first=3)
torch.save(snapshot(opt), sys.argv[1])
"""


@pytest.mark.parametrize(("impl", "preset"), [("cpu", "spectral"), ("cpu", "compact"), ("sim", "paper")])
def test_resume_in_a_fresh_process(impl: str, preset: str, tmp_path: Path) -> None:
    params = make_params()
    opt = make_optimizer(params, impl, preset)
    run(opt, params, 3)
    opt.observe(train_loss=0.25, valid_loss=0.5)
    torch.save({"params": [param.detach() for param in params], "opt": opt.state_dict()}, tmp_path / "file.pt")
    command = [sys.executable, "-c", CONTINUE, str(tmp_path / "file.pt"), impl, preset]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)
    run(opt, params, 3, first=3)
    assert_same_bits(torch.load(tmp_path / "file.pt", weights_only=True), snapshot(opt))


def test_loading_ones_own_state_changes_nothing() -> None:
    """Accelerate does this to every optimizer it is given."""
    params, others = make_params(), make_params()
    opt, other = make_optimizer(two_groups(params)), make_optimizer(two_groups(others))
    for step in range(4):
        opt.load_state_dict(opt.state_dict())
        run(opt, params, 1, step)
        run(other, others, 1, step)
    assert_same_bits(snapshot(opt), snapshot(other))


def test_state_saved_before_the_first_step() -> None:
    saved = through_a_file(make_optimizer(two_groups(make_params())).state_dict())
    for used in (False, True):
        params, others = make_params(), make_params()
        opt = make_optimizer(two_groups(params))
        if used:
            run(opt, params, 2)
            for param, value in zip(params, others, strict=True):
                param.data.copy_(value.data)
        opt.load_state_dict(saved)
        run(opt, params, 3)
        other = make_optimizer(two_groups(others))
        run(other, others, 3)
        assert_same_bits(snapshot(opt), snapshot(other))


def test_state_with_an_observed_loss_but_no_step() -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params), make_optimizer(others)
    opt.observe(train_loss=1.0, valid_loss=2.0)
    other.load_state_dict(through_a_file(opt.state_dict()))
    for each, tensors in ((opt, params), (other, others)):
        set_grads(tensors, 0)
        each.step()
    assert_same_bits(snapshot(opt), snapshot(other))
    assert int(opt.param_groups[0]["valid_loss"][2]) == 1


def test_empty_states_count_as_none() -> None:
    """As some tools leave them for parameters that never had a gradient."""
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params), make_optimizer(others)
    state_dict = opt.state_dict()
    opt.load_state_dict({**state_dict, "state": {index: {} for index in range(len(params))}})
    run(opt, params, 2)
    run(other, others, 2)
    assert_same_bits(snapshot(opt), snapshot(other))


def test_resume_after_add_param_group_and_without_gradients_for_some() -> None:
    params = make_params()
    opt = make_optimizer(params[:3])
    run(opt, params[:3], 2)
    opt.add_param_group({"params": params[3:], "lr": 0.3})
    params[4].requires_grad_(False)
    active = [*params[:4], params[5]]
    run(opt, active, 1, first=2)
    others = copies(params)
    other = make_optimizer([{"params": others[:3]}, {"params": others[3:]}])
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert set(other.state) == {param for i, param in enumerate(others) if i != 4}
    run(opt, params, 2, first=3)
    run(other, others, 2, first=3)
    assert_same_bits(snapshot(opt), snapshot(other))


@every_impl
def test_memory_format_may_change_between_save_and_load(impl: str) -> None:
    params = make_params()
    opt = busy(params, impl)
    others = [
        Parameter(p.detach().to(memory_format=torch.channels_last) if p.dim() == 4 else p.detach().clone())
        for p in params
    ]
    others[2] = Parameter(params[2].detach().mT.contiguous().mT)
    other = make_optimizer(two_groups(others), impl)
    other.load_state_dict(through_a_file(opt.state_dict()))
    run(opt, params, 2, first=3)
    run(other, others, 2, first=3)
    assert_same_bits(snapshot(opt), snapshot(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_state_is_kept_with_parameters_in_16_bits(dtype: torch.dtype) -> None:
    params = [Parameter(param.detach().to(dtype)) for param in make_params()]
    opt = busy(params)
    others = copies(params)
    other = make_optimizer(two_groups(others))
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert_same_bits(other.state_dict(), opt.state_dict())
    single = [Parameter(param.detach().float()) for param in params]  # and into another dtype
    third = make_optimizer(two_groups(single))
    third.load_state_dict(opt.state_dict())
    assert_same_bits(third.state_dict(), opt.state_dict())
    run(opt, params, 2, first=3)
    run(other, others, 2, first=3)
    assert_same_bits(snapshot(other), snapshot(opt))


def test_state_that_some_tool_cast_is_brought_back_to_float32() -> None:
    params = make_params()
    opt = busy(params)
    state_dict = opt.state_dict()
    state_dict["state"] = {
        index: {"mom": state["mom"].bfloat16(), "rms": state["rms"].double(), "lstm": state["lstm"]}
        for index, state in state_dict["state"].items()
    }
    for group in state_dict["param_groups"]:
        group["from_lstm"] = group["from_lstm"].bfloat16()
    opt.load_state_dict(state_dict)
    assert opt.param_groups[0]["from_lstm"].dtype == torch.float32
    for param in params:
        assert {opt.state[param][name].dtype for name in ("mom", "rms")} == {torch.float32}
    run(opt, params, 1)


def test_loaded_state_is_a_copy() -> None:
    params, others = make_params(), make_params()
    opt, other = busy(params), make_optimizer(two_groups(others))
    state_dict = opt.state_dict()
    before = clone_tree(state_dict)
    other.load_state_dict(state_dict)
    run(other, others, 2)
    assert_same_bits(state_dict, before)
    assert_same_bits(opt.state_dict(), before)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_state_moves_between_implementations(preset: str) -> None:
    params = make_params()
    opt = busy(params, "cpu", preset)
    for impl in ("sim", "reference"):
        others = copies(params)
        other = make_optimizer(two_groups(others), impl, preset)
        other.load_state_dict(opt.state_dict())
        assert_same_bits(snapshot(other), snapshot(opt))


# ---- What does not fit -----------------------------------------------------------------------------------------------


def _resized(**sizes: int) -> Theta:
    spec = ThetaSpec(**sizes)
    return Theta(spec, {name: torch.zeros(shape) for name, shape in spec.shapes().items()})


def _foreign_states() -> dict[str, tuple[Callable[[], Any], str]]:
    def of(opt: torch.optim.Optimizer, params: Sequence[Tensor]) -> Any:
        set_grads(params, 0)
        opt.step()
        return opt.state_dict()

    def learned(theta: Theta, shapes: Sequence[Sequence[int]] = ((4, 3), (3,))) -> Any:
        params = make_params(shapes)
        return of(LearnedOptimizer(params, theta), params)

    def adam() -> Any:
        params = make_params([(4, 3), (3,)])
        return of(torch.optim.Adam(params), params)

    def without(*path: str) -> Callable[[], Any]:
        def make() -> Any:
            state_dict = clone_tree(learned(make_theta()))
            place = state_dict["param_groups"][0] if len(path) == 1 else state_dict["state"][1][path[0]]
            del place[path[-1]]
            return state_dict

        return make

    def only_observed() -> Any:
        opt = LearnedOptimizer(make_params([(4, 3), (3,)]), _resized(from_lstm=5))
        opt.observe(train_loss=1.0)
        return opt.state_dict()

    theta = r"was written with theta '\w+' \(\w{16}\), this optimizer has 'init' \(\w{16}\)"
    shape = "expected shape .* found .* architecture"
    return {
        "paper": (lambda: learned(make_theta("paper")), theta),
        "lstm_width": (lambda: learned(_resized(lstm_width=9)), theta),
        "from_mlp": (lambda: learned(_resized(from_mlp=5)), theta),
        "from_lstm": (lambda: learned(_resized(from_lstm=5)), theta),
        "observed only": (only_observed, theta),
        "parameter of another size": (lambda: learned(make_theta(), [(4, 3), (5,)]), shape),
        "fewer parameters": (lambda: learned(make_theta(), [(4, 3)]), "doesn't match"),
        "Adam": (adam, r"names no theta; it was written by another optimizer \(its options are amsgrad, betas"),
        "no step": (without("step"), shape),
        "no from_lstm": (without("from_lstm"), shape),
        "no h": (without("lstm", "h"), shape),
        "no updates": (without("lstm", "updates"), shape),
    }


FOREIGN = _foreign_states()


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_state_that_does_not_fit_changes_nothing(kind: str) -> None:
    params = make_params([(4, 3), (3,)])
    opt = make_optimizer(params)
    run(opt, params, 2)
    opt.observe(train_loss=1.0)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=FOREIGN[kind][1]):
        opt.load_state_dict(FOREIGN[kind][0]())
    assert_same_bits(snapshot(opt), before)
    others = make_params([(4, 3), (3,)])
    other = make_optimizer(others)
    run(other, others, 2)
    other.observe(train_loss=1.0)
    run(opt, params, 2)
    run(other, others, 2)
    assert_same_bits(snapshot(opt), snapshot(other))


# ---- Copies ----------------------------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_continues_alike_and_on_its_own(impl: str, way: str) -> None:
    params = make_params()
    opt = busy(params, impl)
    pair = (params, opt)
    others, other = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = snapshot(opt)
    assert_same_bits(snapshot(other), before)
    run(other, others, 3, first=3)
    assert_same_bits(snapshot(opt), before)
    run(opt, params, 3, first=3)
    assert_same_bits(snapshot(other), snapshot(opt))
    assert other.implementation == impl
    assert other.on_nonfinite == "ignore"
    assert repr(other.theta.spec) == repr(opt.theta.spec)


def test_a_copy_before_the_first_step() -> None:
    params = make_params()
    others, other = copy.deepcopy((params, make_optimizer(params)))
    opt = make_optimizer(params)
    run(opt, params, 2)
    run(other, others, 2)
    assert_same_bits(snapshot(other), snapshot(opt))


# ---- State changed from outside --------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("way", ["clear", "replace"])
def test_cleared_state_starts_anew(impl: str, way: str) -> None:
    params = make_params()
    opt = make_optimizer(params, impl)
    run(opt, params, 2)
    if way == "clear":
        opt.state.clear()
    else:
        opt.state = type(opt.state)(dict)
    others = copies(params)
    other = make_optimizer(others, impl)
    for name in SHARED:
        other.param_groups[0].setdefault(name, opt.param_groups[0][name].clone())
    run(opt, params, 2, first=2)
    run(other, others, 2, first=2)
    assert_same_bits(snapshot(opt), snapshot(other))
    assert int(opt.state[params[0]]["lstm"]["updates"]) == 2


@every_impl
def test_state_tensors_may_be_replaced_or_written_in_place(impl: str) -> None:
    """Lightning rebuilds every state to move it to a device."""
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl), make_optimizer(others, impl)
    run(opt, params, 2)
    run(other, others, 2)
    for param, twin in zip(params, others, strict=True):
        opt.state[param] = clone_tree(opt.state[param])
        opt.state[param]["mom"].mul_(0.5)
        other.state[twin]["mom"].mul_(0.5)
        opt.state[param]["lstm"]["h"].zero_()
        other.state[twin]["lstm"]["h"].zero_()
    run(opt, params, 2, first=2)
    run(other, others, 2, first=2)
    assert_same_bits(snapshot(opt), snapshot(other))


# ---- Hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_are_called() -> None:
    params = make_params()
    opt = make_optimizer(params)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append(f"before step {int(opt.param_groups[0].get('step', 0))}"))
    opt.register_step_post_hook(lambda *_: calls.append(f"after step {int(opt.param_groups[0]['step'])}"))
    opt.register_state_dict_pre_hook(lambda *_: calls.append("before state_dict"))
    opt.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "extra": 1})
    opt.register_load_state_dict_pre_hook(lambda _, state_dict: calls.append("before load"))
    opt.register_load_state_dict_post_hook(lambda _: calls.append("after load"))
    run(opt, params, 2)
    state_dict = opt.state_dict()
    assert state_dict["extra"] == 1
    opt.load_state_dict(state_dict)
    expected = ["before step 0", "after step 1", "before step 1", "after step 2"]
    assert calls == [*expected, "before state_dict", "before load", "after load"]


def test_load_hooks_may_change_what_is_loaded() -> None:
    """A pre-hook's result is what is loaded; a post-hook sees the final float32 state, and what it does to it stays."""
    params = [Parameter(param.detach().bfloat16()) for param in make_params()]
    opt, source = make_optimizer(params), make_optimizer(copies(params))
    run(source, source.param_groups[0]["params"], 2)

    def double(_: Any, state_dict: Any) -> Any:
        state_dict = clone_tree(state_dict)
        for state in state_dict["state"].values():
            state["mom"] *= 2
        return state_dict

    def halve(opt: Any) -> None:
        for param in params:
            assert opt.state[param]["mom"].dtype == torch.float32
            opt.state[param]["rms"] *= 0.5

    opt.register_load_state_dict_pre_hook(double)
    opt.register_load_state_dict_post_hook(halve)
    opt.load_state_dict(source.state_dict())
    for mine, theirs in zip(opt.state.values(), source.state.values(), strict=True):
        assert same_bits(mine["mom"], 2 * theirs["mom"])
        assert same_bits(mine["rms"], 0.5 * theirs["rms"])
    handlers = (opt._optimizer_load_state_dict_pre_hooks, opt._optimizer_load_state_dict_post_hooks)
    assert [len(hooks) for hooks in handlers] == [1, 1]  # load_state_dict leaves none of its own behind


# ---- torch.distributed.checkpoint ------------------------------------------------------------------------------------


def _model() -> tuple[nn.Module, LearnedOptimizer]:
    """Two groups; a parameter is empty and one is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(body=nn.Linear(3, 4), head=nn.Linear(4, 2)))
    model.empty = Parameter(torch.empty(0, 3))
    model.body.bias.requires_grad_(False)
    groups = [{"params": list(model.body.parameters()), "lr": 0.5}, {"params": [*model.head.parameters(), model.empty]}]
    return model, make_optimizer(groups)


def _train(model: nn.Module, opt: LearnedOptimizer, steps: int, first: int) -> None:
    run(opt, [param for param in model.parameters() if param.requires_grad], steps, first)
    opt.zero_grad()


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_the_probe_of_distributed_checkpoints_moves_no_weight(tensor_lr: bool) -> None:
    params = make_params()
    opt = make_optimizer(params, lr=torch.tensor(1.0) if tensor_lr else 1.0, weight_decay=0.5)
    distributed._init_optim_state(opt)
    assert_same_bits(params, make_params())
    assert set(opt.state) == set(params)
    assert float(opt.param_groups[0]["lr"]) == 1.0


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_round_trip(flat: bool, tmp_path: Path) -> None:
    model, opt = _model()
    _train(model, opt, 3, 0)
    opt.observe(train_loss=1.5, valid_loss=2.5)
    options = distributed.StateDictOptions(flatten_optimizer_state_dict=flat)
    dcp.save({"opt": distributed.get_optimizer_state_dict(model, opt, options=options)}, checkpoint_id=tmp_path)
    other_model, other = _model()
    other_model.load_state_dict(model.state_dict())
    saved = {"opt": distributed.get_optimizer_state_dict(other_model, other, options=options)}  # probes it
    assert_same_bits(list(other_model.parameters()), list(model.parameters()))
    dcp.load(saved, checkpoint_id=tmp_path)
    distributed.set_optimizer_state_dict(other_model, other, saved["opt"], options=options)
    assert_same_bits(snapshot(other), snapshot(opt))
    _train(model, opt, 2, 3)
    _train(other_model, other, 2, 3)
    assert_same_bits(snapshot(other), snapshot(opt))
