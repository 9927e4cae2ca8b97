"""LearnedOptimizer and PyTorch's contract: tensors it cannot train, groups that come and go, foreign states."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from optimizer_cases import (
    IMPLS,
    assert_same_bits,
    clone_tree,
    copies,
    make_loss,
    make_optimizer,
    make_params,
    make_theta,
    run,
    set_grads,
    snapshot,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import state_dict as distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from lopt.optimizer import LearnedOptimizer
from lopt.rule import Theta
from lopt.rule.tensor_lstm import Globals
from lopt.state import WAITING, checksum

every_impl = pytest.mark.parametrize("impl", IMPLS)

#: What all tensors of the hierarchical optimizer share.
SHARED = (*Globals._fields, *WAITING)
warning = pytest.mark.filterwarnings


@pytest.fixture(autouse=True)
def _one_thread(set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(1)  # the tensors are tiny


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def replicated(tensor: Tensor) -> DTensor:
    return distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Replicate()])


def in_groups(params: Sequence[Tensor], *sizes: int) -> list[dict[str, Any]]:
    """Groups of so many parameters, each with a multiplier of its own."""
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [{"params": params[a:b], "lr": 1.0 / (1 + i)} for i, (a, b) in enumerate(itertools.pairwise(bounds))]


# ---- Parameters without memory of their own --------------------------------------------------------------------------


def _freed() -> Parameter:
    param = Parameter(torch.ones(2, 3))
    param.untyped_storage().resize_(0)
    return param


def _fake() -> Parameter:
    with FakeTensorMode():
        return Parameter(torch.ones(2, 3))


STRANGE: dict[str, tuple[Callable[[], Any], str]] = {
    "two tensors": (lambda: Parameter(TwoTensor(torch.ones(2, 3), torch.ones(2, 3))), "a TwoTensor, which wraps other"),
    "fake": (_fake, r"a FakeTensor without memory \(fake, or its storage was freed\); allocate it first"),
    "freed": (_freed, "a Parameter without memory"),
    "meta": (lambda: Parameter(torch.ones(2, 3, device="meta")), "on the meta device, which holds no values"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_parameters_without_memory(kind: str, impl: str) -> None:
    make, message = STRANGE[kind]
    with pytest.raises(
        TypeError, match=rf"params\[0\] of shape \(2, 3\): expected a dense tensor in memory, got {message}"
    ):
        make_optimizer([make()], impl)
    opt = make_optimizer(make_params(), impl)
    before = snapshot(opt)
    with pytest.raises((TypeError, ValueError), match=r"params\[6\] of shape \(2, 3\): "):
        opt.add_param_group({"params": [make()]})
    assert_same_bits(snapshot(opt), before)


@every_impl
def test_memory_that_is_freed_between_steps(impl: str) -> None:
    params = make_params([(4, 3), (5,)])
    opt = make_optimizer(params, impl)
    run(opt, params, 2)
    for name in ("param_groups", "gradient of param_groups"):
        set_grads(params, 2)
        tensor = params[1] if name == "param_groups" else params[1].grad
        storage, before = tensor.untyped_storage(), clone_tree(opt.state_dict())
        storage.resize_(0)
        with pytest.raises(TypeError, match=rf"^{name}\[0\]\['params'\]\[1\] of shape \(5,\): .* without memory"):
            opt.step(loss=1.0)
        assert_same_bits(opt.state_dict(), before)
        storage.resize_(5 * 4)


@pytest.mark.usefixtures("_one_rank")
@every_impl
def test_sharded_parameters_gradients_and_losses(impl: str) -> None:
    if impl == "reference":
        with pytest.raises(
            TypeError, match=r"params: impl='reference' steps whole tensors, got DTensors; use impl='auto'"
        ):
            make_optimizer([Parameter(replicated(torch.ones(3)))], impl)
    with pytest.raises(ValueError, match=r"params: got DTensors; state_dtype=torch.int8 has a scale for each 128 "):
        make_optimizer([Parameter(replicated(torch.ones(3)))], impl, state_dtype=torch.int8)
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params, impl), make_optimizer(others, impl)
    run(opt, params, 1)
    run(other, others, 1)
    set_grads(params, 1)
    opt.observe(replicated(torch.tensor(0.5)))  # a loss is what it says in full
    opt.step(loss=7.0)
    set_grads(others, 1)
    other.step(loss=0.5)
    assert_same_bits(snapshot(opt), snapshot(other))
    before = snapshot(opt)
    params[2].grad = replicated(torch.ones(129, 3))
    with pytest.raises(
        TypeError, match=r"gradient of param_groups\[0\]\['params'\]\[2\] of shape \(129, 3\): .*DTensor"
    ):
        opt.step()
    assert_same_bits(snapshot(opt), before)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("use_orig_params", [False, True])
@warning("ignore")
def test_flattened_parameters(use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(nn.Linear(4, 3), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pytest.raises(
        TypeError, match=r"params\[0\].*a flattened parameter of FullyShardedDataParallel, .*fully_shard"
    ):
        LearnedOptimizer(model.parameters())


@every_impl
def test_a_gradient_of_another_shape(impl: str) -> None:
    params = make_params([(4, 3), (5,)])
    opt = make_optimizer(params, impl)
    run(opt, params, 1)
    set_grads(params, 1)
    params[0].data = params[0].detach().mT.contiguous()
    before = snapshot(opt)
    message = (
        r"\['params'\]\[0\] of shape \(3, 4\): got a gradient of shape \(4, 3\); .*call zero_grad and backward again"
    )
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert_same_bits(snapshot(opt), before)


# ---- What is frozen --------------------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint8, torch.float64])
def test_frozen_parameters_may_be_anything(impl: str, dtype: torch.dtype) -> None:
    """As the base of a model that is tuned by LoRA."""
    params, others = make_params(), make_params()
    base = [Parameter(torch.ones(3, 2).to(dtype), requires_grad=False), Parameter(torch.ones(2, device="meta"), False)]
    opt, other = make_optimizer([*base, *params], impl), make_optimizer(others, impl)
    run(opt, params, 2)
    run(other, others, 2)
    assert_same_bits(params, others)
    assert set(opt.state) == set(params)


@every_impl
def test_thawed_parameters_are_checked_by_the_step(impl: str) -> None:
    params, base = make_params(), Parameter(torch.ones(3, 2).to(torch.complex64), requires_grad=False)
    opt = make_optimizer([base, *params], impl)
    run(opt, params, 2)
    base.requires_grad_(True)
    base.grad_dtype = None
    base.grad = torch.ones(3, 2)
    set_grads(params, 2)
    before = snapshot(opt)
    with pytest.raises(
        TypeError, match=r"^param_groups\[0\]\['params'\]\[0\] of shape \(3, 2\): .* got torch.complex64; conv"
    ):
        opt.step()
    assert_same_bits(snapshot(opt), before)
    base.data = base.data.real.clone()
    run(opt, [base, *params], 1, 2)
    assert base in opt.state


# ---- Groups ----------------------------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize(
    "way", ["remove the first", "remove the last", "reverse", "exchange", "take out and add again"]
)
def test_groups_come_and_go_and_nothing_is_lost(impl: str, way: str) -> None:
    """A group without gradients is as good as one that is not there; the order of groups is not even that."""
    params, others = make_params(), make_params()
    opt, other = (make_optimizer(in_groups(each, 2, 1, 3), impl) for each in (params, others))
    run(opt, params, 3)
    run(other, others, 3)
    opt.observe(0.5)
    other.observe(0.5)
    gone: Sequence[int] = ()
    if way == "remove the first":
        gone = (0, 1)
        del opt.param_groups[0]
    elif way == "remove the last":
        gone = (3, 4, 5)
        opt.param_groups.pop()
    elif way == "reverse":
        opt.param_groups.reverse()
    elif way == "exchange":
        opt.param_groups[0], opt.param_groups[2] = opt.param_groups[2], opt.param_groups[0]
    else:
        opt.add_param_group(opt.param_groups.pop(0))
    for step in range(3, 5):
        for each, tensors in ((opt, params), (other, others)):
            set_grads(tensors, step)
            for i in gone:
                tensors[i].grad = None
            each.step(loss=make_loss(step))
    for param, twin in zip(params, others, strict=True):
        torch.testing.assert_close(param, twin, rtol=0, atol=1e-6)  # sums over tensors are in another order
    for name in SHARED:
        torch.testing.assert_close(opt.param_groups[0][name], other.param_groups[0][name], rtol=1e-5, atol=1e-6)
    assert int(opt.param_groups[0]["step"]) == 5
    assert float(opt.param_groups[0]["train_loss"][2]) == 5
    assert all(group[name] is opt.param_groups[0][name] for group in opt.param_groups for name in SHARED)


def test_a_group_of_another_optimizer_brings_only_its_parameters() -> None:
    old = LearnedOptimizer(make_params([(2,)]), Theta.init("paper"))
    run(old, old.param_groups[0]["params"], 2)
    params, others = make_params(), make_params()
    opt, other = make_optimizer(params), make_optimizer(others)
    run(opt, params, 2)
    run(other, others, 2)
    more = Parameter(torch.ones(3))
    moved = {**old.param_groups[0], "params": [more]}
    opt.add_param_group(moved)
    other.add_param_group({"params": [Parameter(torch.ones(3))]})
    assert moved["theta_checksum"] == checksum(opt.theta)
    run(opt, [*params, more], 2, 2)
    run(other, [*others, other.param_groups[1]["params"][0]], 2, 2)
    moved["peak_lr"] = 0.0
    assert_same_bits(snapshot(opt), snapshot(other))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "load_state_dict"])
def test_copies_share_among_their_groups(way: str) -> None:
    params = make_params()
    opt = make_optimizer(in_groups(params, 2, 1, 3))
    run(opt, params, 2)
    opt.observe(0.5, weight=2)
    if way == "deepcopy":
        others, other = copy.deepcopy((params, opt))
    elif way == "pickle":
        others, other = pickle.loads(pickle.dumps((params, opt)))
    else:
        others = copies(params)
        other = make_optimizer(in_groups(others, 2, 1, 3))
        saved = opt.state_dict()
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            assert all(group["step"] is saved["param_groups"][0]["step"] for group in saved["param_groups"])
        other.load_state_dict(saved)
    for group in other.param_groups:
        for name in SHARED:
            assert group[name] is other.param_groups[0][name]
            assert group[name].data_ptr() != opt.param_groups[0][name].data_ptr()
    for each, tensors in ((opt, params), (other, others)):
        del each.param_groups[0]
        set_grads(tensors, 2)
        each.step(loss=9.0)  # what was observed wins, in the copy too
        run(each, tensors, 1, 3)
    assert_same_bits(others, params)
    assert_same_bits(*([group[name] for group in each.param_groups for name in SHARED] for each in (other, opt)))


def test_groups_that_disagree_are_refused() -> None:
    params = make_params()
    opt = make_optimizer(in_groups(params, 2, 1, 3))
    run(opt, params, 2)
    state_dict = opt.state_dict()
    state_dict["param_groups"][2] = {**state_dict["param_groups"][2], "step": torch.tensor(7)}
    before = snapshot(opt)
    with pytest.raises(
        ValueError, match=r"param_groups\[0\] and param_groups\[2\] hold different 'step', which all groups share"
    ):
        opt.load_state_dict(state_dict)
    assert_same_bits(snapshot(opt), before)


def test_one_group_that_has_the_shared_state_is_enough() -> None:
    params, others = make_params(), make_params()
    opt, other = make_optimizer(in_groups(params, 2, 4)), make_optimizer(in_groups(others, 2, 4))
    run(opt, params, 2)
    state_dict = opt.state_dict()
    first = {name: value for name, value in state_dict["param_groups"][0].items() if name not in SHARED}
    state_dict["param_groups"][0] = first
    for param, value in zip(others, params, strict=True):
        param.data.copy_(value.data)
    other.load_state_dict(state_dict)
    assert_same_bits(snapshot(other), snapshot(opt))


@pytest.mark.parametrize("flat", [False, True])
@warning("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_do_not_care_for_the_order_of_groups(flat: bool) -> None:
    def make(order: Sequence[int]) -> tuple[nn.Module, LearnedOptimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        groups = [{"params": list(model[i].parameters()), "lr": 1.0 / (1 + i)} for i in order]
        return model, make_optimizer(groups)

    def train(model: nn.Module, opt: LearnedOptimizer, first: int) -> None:
        run(opt, list(model.parameters()), 2, first)
        opt.zero_grad()

    options = distributed.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, opt = make((0, 1))
    train(model, opt, 0)
    saved = clone_tree(distributed.get_optimizer_state_dict(model, opt, options=options))
    other_model, other = make((1, 0))
    other_model.load_state_dict(model.state_dict())
    distributed.set_optimizer_state_dict(other_model, other, saved, options=options)
    assert [group["lr"] for group in other.param_groups] == [0.5, 1.0]
    train(model, opt, 2)
    train(other_model, other, 2)
    assert int(other.param_groups[0]["step"]) == 4
    torch.testing.assert_close(dict(other_model.state_dict()), dict(model.state_dict()), rtol=0, atol=1e-6)


# ---- Which theta, how many steps -------------------------------------------------------------------------------------


def test_a_state_says_which_theta_and_how_many_steps() -> None:
    params = make_params()
    opt = LearnedOptimizer(in_groups(params, 2, 4), "train-loss", total_steps=50)
    for group in opt.state_dict()["param_groups"]:
        assert {name: group[name] for name in ("theta", "theta_checksum", "total_steps")} == {
            "theta": "train-loss",
            "theta_checksum": checksum(Theta.load("train-loss")),
            "total_steps": 50,
        }
    theta = make_theta()
    changed = theta.unflatten(theta.flatten() + torch.eye(theta.num_floats)[7] * 1e-3)
    sums = [
        checksum(each) for each in (theta, changed, theta.with_spec(step_multiplier=0.5), theta.to(dtype=torch.float64))
    ]
    assert sums[0] == sums[3]
    assert len(set(sums)) == 3
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in sums)


@pytest.mark.parametrize("stepped", [False, True])
def test_a_state_of_another_theta_is_refused(stepped: bool) -> None:
    params, others = make_params(), make_params()
    opt, other = LearnedOptimizer(params, "default"), LearnedOptimizer(others, "train-loss")
    for each, tensors in ((opt, params), (other, others)):
        if stepped:
            run(each, tensors, 2)
    before = snapshot(other)
    message = rf"'default' \({checksum(opt.theta)}\), this optimizer has 'train-loss' \({checksum(other.theta)}\)"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(opt.state_dict())
    assert_same_bits(snapshot(other), before)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_state_of_another_optimizer_is_refused(kind: str, stepped: bool) -> None:
    params = make_params()
    foreign = getattr(torch.optim, kind)(copies(params), lr=1e-3)
    if stepped:
        set_grads(foreign.param_groups[0]["params"], 0)
        foreign.step()
    opt = make_optimizer(params)
    run(opt, params, 2)
    before = snapshot(opt)
    with pytest.raises(
        ValueError, match=r"param_groups\[0\] names no theta; it was written by another optimizer \(its options are"
    ):
        opt.load_state_dict(foreign.state_dict())
    assert_same_bits(snapshot(opt), before)


@every_impl
@pytest.mark.parametrize("told", [None, 10, 9])
def test_total_steps_is_restored(impl: str, told: int | None) -> None:
    params = make_params()
    opt = make_optimizer(in_groups(params, 2, 4), impl, total_steps=9)
    run(opt, params, 3)
    saved = opt.state_dict()
    others = copies(params)
    other = make_optimizer(in_groups(others, 2, 4), impl, total_steps=told)
    if told == 10:
        with pytest.warns(
            UserWarning, match="total_steps: the state dict was written with 9, .* made with 10, which it keeps"
        ):
            other.load_state_dict(saved)
        opt.total_steps = 10
    else:
        other.load_state_dict(saved)
    assert other.total_steps == opt.total_steps == (told or 9)
    run(opt, params, 2, 3)
    run(other, others, 2, 3)
    assert_same_bits(snapshot(other), snapshot(opt))
    assert copy.deepcopy(other).total_steps == pickle.loads(pickle.dumps(other)).total_steps == (told or 9)


def test_total_steps_of_a_group() -> None:
    with pytest.raises(ValueError, match="total_steps: got 5 in a group, but it belongs to all"):
        make_optimizer([{"params": make_params(), "total_steps": 5}])
    opt = make_optimizer(make_params())
    with pytest.raises(ValueError, match="total_steps: expected a number from 1 on or None, got 0"):
        opt.total_steps = 0
    opt.total_steps = 7
    assert opt.state_dict()["param_groups"][0]["total_steps"] == 7


def test_states_are_not_cast_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch casts each tensor of a state to its parameter's dtype: thousands of calls for nothing."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("cast")

    monkeypatch.setattr(torch.optim.Optimizer, "_process_value_according_to_param_policy", staticmethod(refuse))
    params = make_params()
    opt = make_optimizer(params)
    run(opt, params, 2)
    before = snapshot(opt)
    opt.load_state_dict(opt.state_dict())
    assert_same_bits(snapshot(opt), before)


# ---- print -----------------------------------------------------------------------------------------------------------

SHOWN = """\
LearnedOptimizer (theta='default', total_steps=20
Parameter Group 0: 1 tensors
    averaged_steps: 0
    lr: 0.25
    maximize: False
    peak_lr: {peak}
    role: None
    transposed: False
    weight_decay: 0.0
Parameter Group 1: 5 tensors
    averaged_steps: 0
    lr: 1.0
    maximize: False
    name: others
    peak_lr: {peak}
    role: None
    transposed: False
    weight_decay: 0.01
)"""


def test_print_shows_groups_and_options() -> None:
    params = make_params()
    groups = [{"params": params[:1], "lr": 0.25}, {"params": params[1:], "weight_decay": 0.01, "name": "others"}]
    opt = LearnedOptimizer(groups, total_steps=20)
    assert str(opt) == repr(opt) == SHOWN.format(peak=None)
    run(opt, params, 1)
    assert str(opt) == SHOWN.format(peak=0.0)
