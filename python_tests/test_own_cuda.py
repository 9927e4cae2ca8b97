"""CUDA kernels that are made from a feature set's table: the same text under ``sim`` by the rule of test_ops.py, with
MLPs of width 64 and of one hidden layer; compiled by nvcc where there is one. No GPU runs them here.
"""

import ctypes
import dataclasses
import shutil
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    ALIGNED,
    BF16,
    F32,
    MIXED,
    SHORT,
    WINDOWS,
    Backend,
    Run,
    applied_of,
    outputs,
    problem_of,
    same,
    solve_apply,
)
from test_lagged import sweep
from test_ops import ULP, check_accumulate, check_apply, error
from test_own_kernels import check_steps
from test_own_rule import OWN, TWIN

from lopt import LearnedOptimizer, Theta, kernels
from lopt.kernels import nvrtc, own
from lopt.rule import features as tables
from lopt.rule.features import FEATURE_SETS, FeatureSet

pytestmark = [pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"), pytest.mark.slow]
SIM = Backend("sim", torch.device("cpu"))
ROUNDINGS = {"ideal": 0, "ampere": 1, "hopper": 2}


@pytest.fixture(scope="module", autouse=True)
def kept(kept_kernels: str) -> Iterator[None]:
    """Libraries are made once, and no set stays registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", kept_kernels)
        patch.setattr(tables, "_REGISTERED", {})
        OWN.register(), TWIN.register()
        yield


def library(features: FeatureSet, width: int, layers: int = 2) -> ctypes.CDLL:
    """The one that the tests of this set use; it has the simulator's options of its own."""
    return own.load(own.compiled(features, width, layers, "sim"))


def test_the_text_of_compact_is_compact() -> None:
    """Bit for bit what is compiled in: both operations, one sweep and three steps of the optimizer."""
    shapes = (*WINDOWS, (7,))
    for precision in kernels.PRECISIONS:
        problem = problem_of("compact", 8, shapes)
        twin = dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, feature_set=TWIN.name))
        runs = [outputs(Run(one, SIM, guard=ALIGNED, precision=precision)) for one in (problem, twin)]
        assert same(*runs), precision
        swept = [sweep(one, SIM, precision) for one in (problem, twin)]
        assert all(same(swept[0][name], swept[1][name]) for name in swept[0]), precision
    theta, ends = Theta.init("compact", seed=1), []
    for spec in (theta.spec, dataclasses.replace(theta.spec, feature_set=TWIN.name)):
        param = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 700).reshape(70, 10))
        optimizer = LearnedOptimizer([param], theta=Theta(spec, theta.tensors), impl="sim")
        for step in range(3):
            param.grad = torch.linspace(2.0 - step, -1.0, 700).reshape(70, 10)
            optimizer.step(loss=torch.tensor(1.0 - 0.1 * step))
        ends.append(param.detach())
    assert same(ends[:1], ends[1:])


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_errors_of_a_wide_set(reverse: bool) -> None:
    """Width 64: its weights for tensor cores lie in dynamic shared memory."""
    loaded = library(OWN, 64)
    loaded.lopt_sim_options(int(reverse), 0)
    check_accumulate(SIM, OWN.name, 64, SHORT)
    check_apply(SIM, OWN.name, 64, MIXED)
    for precision in ("exact", "high"):
        check_apply(SIM, OWN.name, 64, WINDOWS, guard=ALIGNED, precision=precision)
    check_apply(SIM, OWN.name, 64, SHORT, BF16, F32)
    loaded.lopt_sim_options(0, 0)


@pytest.mark.parametrize("rounding", ["ampere", "hopper"])
def test_high_keeps_the_rule_on_real_tensor_cores(rounding: str) -> None:
    loaded = library(OWN, 64)
    loaded.lopt_sim_options(0, ROUNDINGS[rounding])
    check_apply(SIM, OWN.name, 64, WINDOWS, guard=ALIGNED, precision="high")
    loaded.lopt_sim_options(0, 0)


def test_fast_keeps_eleven_bits() -> None:
    for key in ((OWN.name, 64, WINDOWS), ("compact", 16, WINDOWS, F32, F32, False, 1)):
        exact = applied_of(torch.float64, *key)
        run = Run(problem_of(*key), SIM, guard=ALIGNED, precision="fast")
        assert 2.0**-16 < error([*run.apply()], [*exact.hidden]) < 2.0**-9
        assert error(run.params, exact.params) < 2.0**-6


def test_a_sweep_of_a_wide_set() -> None:
    """The bits of the two operations; parameters from its own accumulators by the rule."""
    problem, count = problem_of(OWN.name, 64, SHORT), len(SHORT)
    for precision in ("exact", "high"):
        found, apart = (sweep(problem, SIM, precision, apart) for apart in (False, True))
        for name in ("state", "stats", "params"):
            assert same(found[name], apart[name]), (precision, name)
        torch.testing.assert_close(found["hidden"], apart["hidden"], rtol=2e-6, atol=1e-6)
        after = dataclasses.replace(problem, mom=found["state"][:count], rms=found["state"][count:])
        exact, single = solve_apply(after, torch.float64), solve_apply(after, F32)
        assert error(found["params"], exact.params) <= 2 * max(error(single.params, exact.params), ULP / 2) + ULP


def test_one_hidden_layer() -> None:
    """Of a set that is compiled in with two."""
    key = "compact", 16, WINDOWS, F32, F32, False, 1
    for precision in ("exact", "high"):
        check_apply(SIM, *key, guard=ALIGNED, precision=precision)
    for rounding in ("ampere", "hopper"):
        library(FEATURE_SETS["compact"], 16, 1).lopt_sim_options(0, ROUNDINGS[rounding])
        check_apply(SIM, *key, guard=ALIGNED, precision="high")
    library(FEATURE_SETS["compact"], 16, 1).lopt_sim_options(0, 0)
    check_apply(SIM, *key[:2], SHORT, *key[3:])


def test_steps_are_those_of_the_reference() -> None:
    check_steps("sim")


def test_a_narrow_state_has_a_library_of_its_own() -> None:
    """The bits of the set that is compiled in."""
    spec, tensors = Theta.init("compact", seed=1).spec, Theta.init("compact", seed=1).tensors
    ends = []
    for name in ("compact", TWIN.name):
        param = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 700).reshape(70, 10))
        theta = Theta(dataclasses.replace(spec, feature_set=name), tensors)
        optimizer = LearnedOptimizer([param], theta, impl="sim", state_dtype=torch.int8)
        for step in range(3):
            param.grad = torch.linspace(2.0 - step, -1.0, 700).reshape(70, 10)
            optimizer.step(loss=torch.tensor(1.0 - 0.1 * step))
        ends.append([param.detach(), optimizer.state[param]["scales"]])
    assert same(*ends)


def test_what_is_missing_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(kernels.CannotCompile, match="there is no GPU"):
        own.compiled(OWN, 8, 1, "cuda")
    monkeypatch.setattr(own, "_nvcc", lambda: None)
    monkeypatch.setattr(nvrtc, "find", lambda: None)
    with pytest.raises(kernels.CannotCompile, match=r"no nvcc .* and no NVRTC, .*: pip install nvidia-cuda-nvrtc, or"):
        own.compiled(OWN, 8, 1, "cuda", ("90",))


def test_nvcc_compiles_it() -> None:
    """Nothing is launched: the library loads without a GPU and knows its sizes."""
    if own._nvcc() is None:
        pytest.skip("needs nvcc")
    loaded = own.load(own.compiled(OWN, 8, 1, "cuda", ("90",)))
    assert loaded.lopt_packed_weights() == own.size_of_weights(OWN.name, 8, 1) == 92
    assert loaded.lopt_backend()
