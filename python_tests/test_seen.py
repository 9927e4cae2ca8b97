"""lopt/kernels/seen.py: what counts as changed, in compiled code as in Python."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import assert_same_bits, copies, make_optimizer, make_params, run, set_grads, snapshot
from torch import Tensor
from torch.nn import Parameter

from lopt import kernels
from lopt.kernels import seen
from lopt.kernels.structs import ENTRY
from lopt.operands import as_loss

SEEN = [pytest.param(seen._Seen, id="python"), pytest.param(kernels._C.Seen, id="compiled")]


@pytest.mark.parametrize("make", SEEN)
def test_lists_and_dicts_are_compared_by_identity(make: Any) -> None:
    """Item by item, in order; equal is not the same."""
    first, second = [1.5], [1.5]
    changes: list[tuple[list[Any] | dict[str, Any], Callable[[Any], Any]]] = [
        ([first, second], lambda x: x.append(first)),
        ([first, second], lambda x: x.pop()),
        ([first, second], lambda x: x.reverse()),
        ([first, second], lambda x: x.__setitem__(1, [1.5])),
        ([], lambda x: x.append(None)),
        ({"a": first, "b": second}, lambda x: x.pop("b")),
        ({"a": first, "b": second}, lambda x: x.update(c=first)),
        ({"a": first, "b": second}, lambda x: x.update(a=second)),
        ({"a": first, "b": second}, lambda x: x.update(a=x.pop("a"))),
    ]
    for container, change in changes:
        watch = make()
        watch.all([first])
        watch.all(container)
        assert watch.same()
        first.append(0.0)  # what is in an item is no matter
        assert watch.same()
        change(container)
        assert not watch.same()


@pytest.mark.parametrize("make", SEEN)
def test_some_items_of_a_dict(make: Any) -> None:
    rate, found = 0.5, {"lr": 0.5, "params": []}
    found["lr"] = rate
    watch = make()
    watch.items(found, "lr", "absent")
    found["params"] = [1]
    found["other"] = 2
    assert watch.same()
    for name, value in (("lr", float("0.5")), ("absent", 0)):
        kept = dict(found)
        found[name] = value
        assert not watch.same()
        found.clear()
        found.update(kept)
        assert watch.same()
    del found["lr"]
    assert not watch.same()


def test_only_lists_and_dicts() -> None:
    with pytest.raises(TypeError, match="expected a list or a dict, got tuple"):
        kernels._C.Seen().all((1, 2))


class Kind(Tensor):
    """As dense and plain as any."""


def params_and_grads() -> list[Parameter]:
    params = make_params(((4, 3), (5,), ()))
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def accepted(params: list[Parameter]) -> Any:
    operands = kernels._C.Operands(Tensor, params)
    grads, others, unchecked = operands.look()
    assert [x is param.grad for x, param in zip(grads, params, strict=True)] == [True] * len(params)
    assert (others, unchecked, operands.plain) == (True, True, False)
    operands.accept()
    assert operands.select() == [0, 1, 2]
    return operands


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


#: Gradients in the place of the first, [4, 3].
CHANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "shape": lambda x: x.clone().reshape(3, 4),
    "rank": lambda x: x.clone()[None],
    "dtype": lambda x: x.bfloat16(),
    "strides": lambda x: x.t().contiguous().t(),
    "negated": lambda x: torch._neg_view(x),
    "class": lambda x: x.clone().as_subclass(Kind),
    "sparse": lambda x: x.to_sparse(),
    "freed": freed,
}


def give(param: Parameter, grad: Tensor) -> None:
    """Past torch's own checks, as a hook of a library may."""
    try:
        param.grad = grad
    except (RuntimeError, TypeError):
        param.grad = None
        param.data, kept = torch.empty_like(grad), param.data
        try:
            param.grad = grad
        finally:
            param.data = kept


@pytest.mark.parametrize("kind", CHANGED)
def test_a_gradient_of_another_kind_has_to_be_checked(kind: str) -> None:
    params = params_and_grads()
    operands = accepted(params)
    kept = params[0].grad
    assert isinstance(kept, Tensor)
    give(params[0], CHANGED[kind](kept))
    others, unchecked = operands.look()[1:]
    assert (others, unchecked, operands.plain) == (False, True, False)
    params[0].grad = kept
    assert operands.look()[1:] == (False, False)
    assert operands.plain


def test_a_parameter_of_another_kind_has_to_be_checked() -> None:
    for change in (lambda x: x.t().contiguous().t(), lambda x: x.double(), torch._neg_view, freed):
        params = params_and_grads()
        operands = accepted(params)
        kept = params[0].data
        params[0].data = change(kept.clone())
        assert operands.look()[2]
        assert not operands.plain
        params[0].data = kept
        assert not operands.look()[2]


def test_what_is_not_plain_may_be_accepted() -> None:
    """Then it need not be checked again, but passes through a copy."""
    params = params_and_grads()
    params[0].grad = torch.randn(3, 4).t()
    operands = accepted(params)
    params[0].grad = torch.randn(3, 4).t()
    assert operands.look()[1:] == (False, False)
    assert not operands.plain


def test_others_have_gradients() -> None:
    params = params_and_grads()
    operands = accepted(params)
    params[1].grad = None
    grads, others, unchecked = operands.look()
    assert len(grads) == 2
    assert (others, unchecked) == (True, True)
    operands.accept()
    assert operands.look()[1:] == (True, True)  # they are not selected yet
    assert operands.select() == [0, 2]
    operands.accept()
    assert operands.look()[1:] == (False, False)


def test_addresses_are_written_where_they_changed() -> None:
    params = params_and_grads()
    params[2].grad = None
    operands = kernels._C.Operands(Tensor, params)
    operands.look()
    entries, table = np.zeros(2, ENTRY), np.zeros(2, np.int64)
    places = entries.ctypes.data, table.ctypes.data
    assert operands.write(*places) == (True, True)
    assert operands.write(*places) == (False, False)
    params[1].grad = torch.randn(5)
    operands.look()
    assert operands.write(*places) == (False, True)
    params[0].data = params[0].data.clone()
    operands.look()
    assert operands.write(*places) == (True, False)
    assert entries["param"].tolist() == [param.data_ptr() for param in params[:2]]
    assert table.tolist() == [param.grad.data_ptr() for param in params[:2] if param.grad is not None]
    assert not any(entries[name].any() for name in ENTRY.names if name != "param")
    negated = [-param.grad for param in params[:2] if param.grad is not None]
    operands.replace(negated)
    operands.write(*places)
    assert table.tolist() == [grad.data_ptr() for grad in negated]


@pytest.mark.parametrize("way", ["attribute", "hook", "group"])
def test_an_optimizer_is_collected(way: str) -> None:
    """Although what it holds leads back to it."""
    params = make_params()
    opt = make_optimizer(params)
    if way == "attribute":
        params[0].owner = opt  # type: ignore[attr-defined]
    elif way == "hook":
        params[0].register_hook(lambda _, opt=opt: None)
    else:
        opt.param_groups[0]["owner"] = opt
    set_grads(params, 0)
    opt.step()
    gone = weakref.ref(opt)
    del opt, params
    gc.collect()
    assert gone() is None


def test_numbers() -> None:
    """Only what the general path returns as it is; everything else goes there."""
    like = torch.zeros(3, 2)
    for number in (torch.tensor(1.0), torch.ones(1, 1), torch.ones(2)[1], torch.tensor(1.0, requires_grad=True) * 2):
        assert kernels.is_number(number, like)
        assert as_loss("loss", number, like) is number
    others = (1.0, None, "1", torch.ones(2), torch.ones(0), torch.tensor(1), torch.tensor(1.0).double())
    special = (Parameter(torch.tensor(1.0)), torch.tensor(1.0).as_subclass(Kind), torch._neg_view(torch.tensor(1.0)))
    elsewhere = (torch.tensor(1.0).bfloat16(), torch.tensor(1.0).to("meta"), torch.ones(1).to_sparse())
    for other in (*others, *special, *elsewhere, freed(torch.tensor(1.0))):
        assert not kernels.is_number(other, like)
    assert kernels.is_number(torch.tensor(1.0).double(), like.double())


class Bare:
    """A torch without DLPack's C exchange interface."""

    is_neg = Tensor.is_neg


def without_exchange(_: Any, params: list[Tensor]) -> Any:
    return kernels._C.Operands(Bare, params)


@pytest.mark.parametrize("make", [seen._Operands, without_exchange])
def test_steps_are_the_same_where_all_is_checked_each_time(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiled code, or without the interface through which it reads tensors."""
    params = make_params()
    others = copies(params)
    opt, other = make_optimizer(params, maximize=True), make_optimizer(others, maximize=True)
    run(opt, params, 3)
    monkeypatch.setattr(kernels, "Operands", make)
    run(other, others, 2)
    set_grads(others, 2)
    assert other._stepper is not None
    assert other._stepper.tensors.operands.look()[2]
    run(other, others, 1, first=2)
    assert_same_bits(snapshot(opt), snapshot(other))
