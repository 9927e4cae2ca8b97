"""LearnedOptimizer: a refusal names the operand, what was expected, what came and the remedy, and changes nothing."""

import json
import math
import pickle
import re
import socket
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import (
    IMPLS,
    assert_same_bits,
    make_optimizer,
    make_params,
    make_theta,
    run,
    set_grads,
    snapshot,
)
from torch import Tensor
from torch.nn import Parameter

import lopt
from lopt import kernels
from lopt.optimizer import LearnedOptimizer
from lopt.rule import Theta, ThetaSpec

every_impl = pytest.mark.parametrize("impl", IMPLS)


@pytest.fixture(autouse=True)
def _one_thread(set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(1)  # the tensors are tiny


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Parameter:
    return Parameter(torch.ones(shape or (3,), dtype=dtype, device=device))


def of_width(width: int) -> Theta:
    spec = ThetaSpec(mlp_width=width)
    generator = torch.Generator().manual_seed(0)
    return Theta(spec, {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in spec.shapes().items()})


# ---- Construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "cpu", "sim", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64])
def test_dtype_of_parameters(impl: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and impl == "reference":
        make_optimizer([ones(dtype=dtype)], impl)
        return
    if dtype == torch.int64:  # can have no gradient
        make_optimizer([ones(), Parameter(torch.ones(2, 5, dtype=dtype), requires_grad=False)], impl)
        return
    params = [ones(), Parameter(torch.ones(2, 5, dtype=dtype))]
    remedy = "impl='reference'" if dtype == torch.float64 else "convert it"
    message = rf"params\[1\] of shape \(2, 5\): expected float32, bfloat16 or float16, got {dtype}; .*{remedy}"
    with pytest.raises(TypeError, match=message):
        make_optimizer(params, impl)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "negative lr": ({"lr": -1.0}, "lr: expected a finite number >= 0 .*got -1.0"),
    "NaN lr": ({"lr": math.nan}, "lr: expected a finite number >= 0 .*got nan"),
    "infinite lr": ({"lr": math.inf}, "lr: expected a finite number >= 0 .*got inf"),
    "text lr": ({"lr": "1e-3"}, "lr: expected a finite number >= 0 .*got '1e-3'"),
    "no lr": ({"lr": None}, "lr: expected a finite number >= 0 .*got None"),
    "two lrs": ({"lr": torch.ones(2)}, "lr: .* or a tensor of one element, got tensor"),
    "negative decay": ({"weight_decay": -0.1}, "weight_decay: expected .* got -0.1"),
    "unknown impl": ({"impl": "gpu"}, r"impl: expected one of \('auto', .*got 'gpu'"),
    "unknown precision": ({"precision": "exact"}, r"precision: expected one of \('high', 'fast'\), got 'exact'"),
    "unknown on_nonfinite": ({"on_nonfinite": "stop"}, r"on_nonfinite: expected one of \('ignore', .*got 'stop'"),
    "no total_steps": ({"total_steps": 0}, "total_steps: expected a number from 1 on or None, got 0"),
    "text total_steps": ({"total_steps": "9"}, "total_steps: expected a number from 1 on or None, got '9'"),
    "NaN total_steps": ({"total_steps": math.nan}, "total_steps: expected a number from 1 on or None, got nan"),
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_options(kind: str) -> None:
    options, message = BAD_OPTIONS[kind]
    with pytest.raises(ValueError, match=message):
        make_optimizer([ones()], **options)


BAD_PARAMS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "none": (list, ValueError, "empty parameter list"),
    "empty group": (lambda: [{"params": []}], ValueError, "expected at least one parameter, got none"),
    "a tensor": (lambda: ones(), TypeError, "iterable of Tensors or dicts"),
    "a module without any": (torch.nn.ReLU, ValueError, "expected at least one parameter, got none"),
    "not a leaf": (lambda: [ones() * 2], ValueError, "non-leaf"),
    "no memory": (
        lambda: [ones(), ones(device="meta")],
        TypeError,
        r"params\[1\].*on the meta device, which holds no values",
    ),
    "two precisions": (lambda: [ones(), ones(dtype=torch.float64)], TypeError, "float64 cannot be mixed"),
}


@pytest.mark.parametrize("kind", BAD_PARAMS)
def test_params(kind: str) -> None:
    make, error, message = BAD_PARAMS[kind]
    with pytest.raises(error, match=message):
        make_optimizer(make(), "reference")


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": -1.0}, "lr: expected"),
        ({"weight_decay": math.nan}, "weight_decay: expected"),
        ({"params": [ones(dtype=torch.complex64)]}, r"params\[6\].*complex64"),
        ({"params": [ones(device="meta")]}, r"params\[6\].*on the meta device"),
    ],
)
def test_a_refused_group_is_not_added(group: dict[str, Any], message: str) -> None:
    params = make_params()
    opt = make_optimizer(params)
    run(opt, params, 1)
    before = snapshot(opt)
    with pytest.raises((TypeError, ValueError), match=message):
        opt.add_param_group({"params": [ones()], **group})
    assert_same_bits(snapshot(opt), before)
    run(opt, params, 1, first=1)


def test_cuda_is_never_replaced_by_something_else() -> None:
    expected = (
        (ValueError, "parameters are on cpu, expected cuda") if kernels._C.has_cuda else (RuntimeError, "LOPT_CUDA=ON")
    )
    with pytest.raises(expected[0], match=expected[1]):
        make_optimizer([ones()], "cuda")


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_parameters_without_values(impl: str) -> None:
    with pytest.raises(TypeError, match=r"params\[0\] .*on the meta device, which holds no values; make the optimizer"):
        make_optimizer([ones(device="meta")], impl)


def test_a_width_without_kernels() -> None:
    theta = of_width(5)
    for impl in ("cpu", "sim"):
        with pytest.raises(ValueError, match=r"widths \(8, 16, 32, 64\), theta has 5; or use impl='reference'"):
            LearnedOptimizer([ones()], theta, impl=impl)
    params, others = make_params(), make_params()
    with pytest.warns(UserWarning, match=r"width 5 .*using the slow impl='reference'") as record:
        opt = LearnedOptimizer(params, theta)
    assert record[0].filename == __file__
    assert opt.implementation == "reference"
    other = LearnedOptimizer(others, theta, impl="reference")  # asked for, so no warning
    run(opt, params, 2)
    run(other, others, 2)
    assert_same_bits(params, others)


@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize("impl", ["cpu", "sim"])
def test_widths_with_kernels(width: int, impl: str) -> None:
    params, others = make_params(), make_params()
    run(LearnedOptimizer(params, of_width(width), impl=impl), params, 3)
    run(LearnedOptimizer(others, of_width(width), impl="reference"), others, 3)
    torch.testing.assert_close(params, others, rtol=0, atol=2e-6)


def test_auto_says_what_it_picked() -> None:
    assert make_optimizer([ones()], "auto").implementation == "cpu"


# ---- theta -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [3, None, {}, torch.ones(3)], ids=str)
def test_theta_of_a_wrong_type(theta: Any) -> None:
    with pytest.raises(TypeError, match="theta: expected a Theta, a path or a name, got"):
        LearnedOptimizer([ones()], theta)


@pytest.mark.parametrize("theta", ["nothing", "folder/nothing.safetensors", ".", Path("nothing")], ids=str)
def test_theta_that_is_not_there(theta: Any) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"theta: no file {str(theta)!r}")):
        LearnedOptimizer([ones()], theta)


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _written(metadata: dict[str, str]) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        header, rest = _header(data)
        new = json.dumps({**header, "__metadata__": metadata}).encode()
        return struct.pack("<Q", len(new)) + new + rest

    return change


def _described(**changes: Any) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        content = json.loads(_header(data)[0]["__metadata__"]["lopt"])
        for name, value in changes.items():
            (content if name in content else content["spec"])[name] = value
        return _written({"lopt": json.dumps(content)})(data)

    return change


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"not a theta",
    "pickle": lambda _: pickle.dumps({"theta": [1.0]}),
    "7 bytes": lambda data: data[:7],
    "half a header": lambda data: data[:500],
    "header only": lambda data: data[: len(data) - len(_header(data)[1])],
    "half": lambda data: data[: len(data) // 2],
    "one byte less": lambda data: data[:-1],
    "one byte more": lambda data: data + b"x",
    "wrong length": lambda data: b"\xff" + data[1:],
    "no metadata": _written({}),
    "broken metadata": _written({"lopt": "{"}),
    "other version": _described(format=99),
    "no spec": _described(spec={}),
    "unknown field": _described(more=1),
    "other sizes": _described(lstm_width=9),
    "impossible sizes": _described(lstm_width=0),
    "unknown features": _described(feature_set="other"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_theta_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "theta.safetensors"
    make_theta().save(path)
    LearnedOptimizer([ones()], path)
    path.write_bytes(DAMAGES[kind](path.read_bytes()))
    with pytest.raises(ValueError, match=r"^(theta|spec|lstm_width|feature_set)\b"):
        LearnedOptimizer([ones()], path)


def test_no_network_and_no_shared_tensors(monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a constructor opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    params = make_params()
    opt = LearnedOptimizer(params)  # the shipped weights
    before = {name: tensor.clone() for name, tensor in opt.theta.tensors.items()}
    run(opt, params, 2)
    assert_same_bits(opt.theta.tensors, before)


# ---- Gradients -------------------------------------------------------------------------------------------------------


def _sparse(param: Tensor) -> Tensor:
    return torch.ones_like(param).to_sparse()


_EXPECTED = "expected float32, bfloat16 or float16"
BAD_GRADS: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "sparse": (_sparse, RuntimeError, "expected a dense tensor, got layout torch.sparse_coo; use sparse=False"),
    "float64": (
        Tensor.double,
        TypeError,
        f"{_EXPECTED}, got torch.float64; use impl='reference'",
    ),
    "complex": (
        lambda p: p.to(torch.complex64),
        TypeError,
        f"{_EXPECTED}, got torch.complex64",
    ),
}


@every_impl
@pytest.mark.parametrize("kind", BAD_GRADS)
@pytest.mark.parametrize("started", [False, True])
def test_gradients(impl: str, kind: str, started: bool) -> None:
    make, error, message = BAD_GRADS[kind]
    if (impl, kind) == ("reference", "float64"):
        return
    params, others = make_params(), [ones(4, 2)]
    opt = make_optimizer([{"params": params}, {"params": others}], impl)
    if started:
        run(opt, [*params, *others], 2)
    opt.observe(train_loss=1.0)
    before = snapshot(opt)
    set_grads(params, 3)
    others[0].grad_dtype = None
    others[0].grad = None
    others[0].grad = make(torch.ones(4, 2))
    with pytest.raises(error, match=re.escape("gradient of param_groups[1]['params'][0] of shape (4, 2): " + message)):
        opt.step(loss=2.0)
    assert_same_bits(snapshot(opt), before)


def test_sparse_embedding() -> None:
    layer = torch.nn.Embedding(5, 3, sparse=True)
    opt = make_optimizer(layer.parameters())
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"of shape \(5, 3\): expected a dense tensor"):
        opt.step()


def test_parameters_converted_to_something_unsupported() -> None:
    model = torch.nn.Linear(3, 2)
    opt = make_optimizer(model.parameters())
    run(opt, list(model.parameters()), 1)
    before = snapshot(opt)["state"]
    model.double()
    set_grads(list(model.parameters()), 1)
    with pytest.raises(TypeError, match=r"\['params'\]\[0\].*expected float32, bfloat16 or float16, got torch.float64"):
        opt.step()
    assert_same_bits(opt.state_dict()["state"], before)


# ---- Losses and closures ---------------------------------------------------------------------------------------------

BAD_LOSSES: dict[str, Any] = {
    "vector": torch.ones(2),
    "empty": torch.ones(0),
    "complex tensor": torch.tensor(1j),
    "complex": 1j,
    "text": "1.0",
    "list": [1.0],
    "mapping": {"loss": 1.0},
    "pair": (torch.tensor(1.0), torch.tensor(2.0)),
    "array": np.ones(2),
    "sparse": torch.ones(1).to_sparse(),
}


@pytest.mark.parametrize("kind", BAD_LOSSES)
@pytest.mark.parametrize("way", ["loss", "train_loss", "valid_loss", "closure"])
def test_losses(kind: str, way: str) -> None:
    params = make_params()
    opt = make_optimizer(params)
    run(opt, params, 2)
    set_grads(params, 2)
    before = snapshot(opt)
    loss = BAD_LOSSES[kind]
    calls = {"loss": lambda: opt.step(loss=loss), "closure": lambda: opt.step(lambda: loss)}
    call = calls.get(way, lambda: opt.observe(**{way: loss}))
    with pytest.raises(ValueError, match=f"{'loss' if way == 'closure' else way}: expected (a|one real) number.* got "):
        call()
    assert_same_bits(snapshot(opt), before)


def test_calls_that_mean_something_else() -> None:
    params = make_params()
    opt = make_optimizer(params)
    set_grads(params, 0)
    before = snapshot(opt)
    with pytest.raises(
        TypeError, match=r"closure: expected a function or None, got Tensor; give a loss as step\(loss="
    ):
        opt.step(torch.tensor(1.0))
    with pytest.raises(ValueError, match="loss: given beside a closure"):
        opt.step(lambda: 1.0, loss=1.0)
    assert_same_bits(snapshot(opt), before)


def test_a_failing_closure_changes_nothing() -> None:
    params = make_params()
    opt = make_optimizer(params)
    run(opt, params, 1)
    before = snapshot(opt)

    def closure() -> Tensor:
        raise KeyError("data")

    with pytest.raises(KeyError):
        opt.step(closure)
    assert_same_bits(snapshot(opt), before)


def test_no_warning_in_ordinary_use() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = make_params()
        opt = lopt.LearnedOptimizer(params, total_steps=10)
        run(opt, params, 2)
        opt.load_state_dict(opt.state_dict())
        run(opt, params, 1)
