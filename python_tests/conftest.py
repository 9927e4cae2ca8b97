"""Fixtures that all tests share: back ends, thread counts, golden numbers, seeded randomness.

A back end is one compiled way to run the two operations: the CPU kernels in every instruction set this machine has, the
CUDA kernels on the CPU in both thread orders (``sim``), and the CUDA kernels on a GPU where there is one.

golden/rnn_mlp_lopt_{default,bigstep,valid}.npz were recorded from the author's JAX port (float32, CPU): 10 steps over
the tensors ``b conv s sq w``, three ways. Their keys: ``theta|PATH`` the port's weights; ``params0|T``, ``grads|T``,
``losses``, ``is_valid`` what went in; ``params|T`` after each step; per training update ``lstm_in`` [U, 5, 52],
``mlp_in_columns|T`` [U, numel, 23] and ``mlp_in_constant|T`` [U, 31]; after each step ``step``, ``clip``,
``train_loss``, ``valid_loss``, ``from_lstm``, ``from_mlp``; after steps 0, 4 and 9 ``mom|stepN|T``, ``rms|stepN|T``,
``h|stepN`` and ``c|stepN``. Other files are described where they are used.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# Read when OpenMP is loaded, with torch. Threads that wait must not spin where processes share few cores.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch
from kernel_cases import Backend

from lopt import kernels

GOLDEN = Path(__file__).parent / "golden"

Arrays = dict[str, np.ndarray]


SIMD = [] if kernels.NOT_BUILT else kernels._C.simd_available()
#: Tests may ask for ``sim-ampere`` and ``sim-hopper``: ``sim`` with the rounding of their tensor cores.
TENSOR_CORES = ("ampere", "hopper")
VARIANTS = [*(f"cpu-{simd}" for simd in SIMD), "sim", "sim-reverse", "cuda"]


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu":
        return
    try:
        kernels.module_of("sim")
    except RuntimeError as error:
        message = f"The tests need lopt._sim, which `make test` builds ({error})"
        pytest.exit(message, returncode=pytest.ExitCode.USAGE_ERROR)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("results") and not (GOLDEN.parents[1] / "benchmarks/results").is_dir():
        pytest.skip("compares with benchmarks/results, which a source distribution leaves out")
    if "golden" in getattr(item, "fixturenames", ()) and not GOLDEN.is_dir():
        pytest.skip("compares with python_tests/golden, which a source distribution leaves out")


def _need_cuda(name: str) -> None:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if name == "cuda" and not kernels._C.has_cuda:
        pytest.skip("lopt was built without CUDA")


@pytest.fixture(params=[pytest.param(v, marks=pytest.mark.gpu if v == "cuda" else ()) for v in VARIANTS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every back end in turn; what it selects in the extension is put back."""
    name, _, variant = request.param.partition("-")
    _need_cuda(name)
    selected = kernels._C.simd_selected()
    if name == "cpu":
        assert kernels._C.simd_select(variant)
    if name == "sim":
        kernels.module_of("sim").reverse_order(variant == "reverse")
        kernels.module_of("sim").use_tensor_cores(variant if variant in TENSOR_CORES else "ideal")
    yield Backend(name, torch.device("cuda", 0) if name == "cuda" else torch.device("cpu"))
    if name == "sim":
        kernels.module_of("sim").reverse_order(False)
        kernels.module_of("sim").use_tensor_cores("ideal")
    kernels._C.simd_select(selected)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device with kernels of its own in turn."""
    _need_cuda(request.param)
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(scope="session")
def kept_kernels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """``XDG_CACHE_HOME`` for kernels that tests compile: of all processes that run the tests one compiles each."""
    folder = tmp_path_factory.getbasetemp()
    return str((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "kernels")


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@cache
def _load_golden(name: str) -> Arrays:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture
def golden() -> Callable[[str], Arrays]:
    """``golden(name)``: the arrays of golden/NAME.npz, by key; do not write to them."""
    return _load_golden


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(20240607)
