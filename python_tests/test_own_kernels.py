"""Kernels that are made from a feature set's table on this machine: errors, bits, and how they are made and kept."""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_cases import BF16, F32, MIXED, SHORT, Backend, Run, outputs, problem_of, same
from test_ops import check_accumulate, check_apply
from test_own_rule import OWN, TWIN, spec_of

from lopt import LearnedOptimizer, Theta, implementations, kernels
from lopt.kernels import own
from lopt.meta.unroll import Run as UnrollRun
from lopt.meta.unroll import start, unroll
from lopt.rule import features as tables
from lopt.rule import unflatten
from lopt.tasks.synthetic import Perceptron

pytestmark = [pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"), pytest.mark.slow]
CPU = Backend("cpu", torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def kept(kept_kernels: str) -> Iterator[None]:
    """Libraries are made once, and no set stays registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", kept_kernels)
        patch.setattr(tables, "_REGISTERED", {})
        OWN.register(), TWIN.register()
        yield


def test_the_sources_are_those_that_were_compiled() -> None:
    assert own.SOURCES is not None
    assert own.sources_sha256(own.SOURCES) == kernels._C.source_sha256


def test_errors_of_a_wide_set() -> None:
    """The rule of test_ops.py, width 64."""
    check_accumulate(CPU, OWN.name, 64, MIXED)
    check_apply(CPU, OWN.name, 64, MIXED)
    check_accumulate(CPU, OWN.name, 64, SHORT, F32, BF16)
    check_apply(CPU, OWN.name, 64, SHORT, BF16, F32)


def test_errors_of_one_hidden_layer() -> None:
    """The same of a set that is compiled in, with two layers."""
    for dtypes in ((F32, F32), (BF16, F32)):
        check_apply(CPU, "compact", 8, SHORT, *dtypes, False, 1)
    check_accumulate(CPU, "compact", 8, SHORT, F32, F32, False, 1)


def test_bits_do_not_depend_on_threads() -> None:
    problem, threads = problem_of(OWN.name, 64, (*MIXED, (20_000,))), torch.get_num_threads()
    runs = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            runs.append(outputs(Run(problem, CPU)))
    finally:
        torch.set_num_threads(threads)
    assert same(*runs)


@pytest.mark.parametrize("changes", [{}, {"stats": "lagged"}, {"tensor_inputs": "natural", "newton_schulz": 3}])
def test_the_text_of_compact_is_compact(changes: dict[str, object]) -> None:
    """Bit for bit what is compiled in, over five steps of the optimizer with all its phases, and in one sweep."""
    spec = dataclasses.replace(Theta.init_adam("compact").spec, **changes)  # type: ignore[arg-type]
    theta, generator = Theta.init(spec, seed=1), torch.Generator().manual_seed(0)
    twin = Theta(dataclasses.replace(spec, feature_set=TWIN.name), theta.tensors)
    start = [torch.randn(shape, generator=generator) for shape in ((33, 20), (7,), (9000,))]
    grads = [[torch.randn(x.shape, generator=generator) for x in start] for _ in range(5)]
    found = []
    for one in (theta, twin):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = LearnedOptimizer(params, theta=one, impl="cpu")
        for step, now in enumerate(grads):
            for param, grad in zip(params, now, strict=True):
                param.grad = grad.clone()
            optimizer.step(loss=torch.tensor(2.0 - 0.1 * step))
        found.append([param.detach() for param in params])
        assert not any(torch.equal(x, y) for x, y in zip(found[-1], start, strict=True))
    assert same(*found)


def check_steps(impl: str, device: str = "cpu") -> None:
    """Three steps of all phases, width 64, beside those of the reference."""
    theta, generator = Theta.init(spec_of(64), seed=1), torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(40, 30, generator=generator).to(device) for _ in range(4))
    ends = []
    for one in (impl, "reference"):
        param = torch.nn.Parameter(start.clone())
        optimizer = LearnedOptimizer([param], theta=theta, impl=one)  # type: ignore[arg-type]
        for grad in grads:
            param.grad = grad
            optimizer.step(loss=torch.tensor(1.0))
        ends.append(param.detach())
    assert float((ends[0] - start).abs().max()) > 1e-3
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_steps_are_those_of_the_reference() -> None:
    check_steps("auto")  # takes the kernels


def test_the_torch_unroll_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs of 20 steps, each with its own theta, as the reference makes them."""
    task = Perceptron(seed=0, data="teacher", regression=True, inputs=6, hidden=(9,), outputs=3, batch_size=8)
    spec, made = spec_of(64), []
    noise = torch.randn(3, spec.num_floats, generator=torch.Generator().manual_seed(1))
    weights = unflatten(spec, Theta.init(spec, seed=2).flatten() + 0.02 * noise)
    run = UnrollRun(task, seed=5, horizon=20, total_steps=0)
    begun, own_backend = start(spec, weights, run), kernels.own_backend
    monkeypatch.setattr(kernels, "own_backend", lambda *key: made.append(key) or own_backend(*key))
    ends = [unroll(spec, weights, run, begun, 20, impl=impl)[1].outer for impl in ("auto", "reference")]
    assert made == [("cpu", OWN.name, 64, 2, torch.float32)]
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
    assert float((ends[1][:, 0] - ends[1][:, -1]).abs().max()) > 1e-3


def test_what_is_missing_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a compiler, with one that fails, on another device, for another width."""
    theta, param = Theta.init(spec_of(16)), torch.nn.Parameter(torch.ones(3))
    monkeypatch.setenv("CXX", "")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        implementations.warn_not_compiled.cache_clear()
        with pytest.warns(UserWarning, match=r"feature set 'own_of_tests' with MLP width 16 .*there is no C"):
            LearnedOptimizer([param], theta=theta)
        LearnedOptimizer([param], theta=theta)  # silent
        with pytest.raises(ValueError, match=r"impl='cpu': there is no C\+\+ compiler .* or use impl='reference'"):
            LearnedOptimizer([param], theta=theta, impl="cpu")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ValueError, match=r"impl='cpu': false -std=c\+\+17 .* failed"):
        LearnedOptimizer([param], theta=theta, impl="cpu")
    assert not list(own.cache_folder().glob("own_of_tests-16-*.so"))
    with pytest.raises(kernels.CannotCompile, match="backend: expected one of"):
        kernels.own_backend("mps", OWN.name, 8)
    with pytest.raises(kernels.CannotCompile, match=r"made for MLP widths \(8, 16, 32, 64\), theta has 24"):
        kernels.own_backend("cpu", OWN.name, 24)
    monkeypatch.setattr(own, "SOURCES", None)
    with pytest.raises(kernels.CannotCompile, match=r"the sources \(csrc\) are not there"):
        kernels.own_backend("cpu", OWN.name, 16)


ONE = """
from lopt import Column, FeatureSet
from lopt.kernels import own
features = FeatureSet("small", (Column("x", "grad"),), (0.9,), (0.9,))
print(own.compiled(features, 8))
"""


def test_of_several_processes_one_compiles(tmp_path: Path) -> None:
    """The compiler writes a line each time it compiles; a third process finds the library."""
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo compiled >> {log}\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", ONE]
    together = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate()[0] for process in together}
    paths.add(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert len(paths) == 1
    assert Path(paths.pop().strip()).is_file()
    assert log.read_text() == "compiled\n"
    assert len(list((tmp_path / "cache" / "lopt").glob("*.so"))) == 1
