"""Where kernels run, how tables get there, and what users do on a GPU; the same on the CPU, where that means something.

A test with ``place`` runs on the CPU kernels, under ``sim`` and, where there is a GPU, there.
"""

import contextlib
import copy
import io
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import BF16, F32, Backend, Run, problem_of, same
from optimizer_cases import (
    Float64,
    assert_same_bits,
    make_grads,
    make_loss,
    make_optimizer,
    make_params,
    make_theta,
    run,
    set_grads,
    snapshot,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import Parameter

from lopt import LearnedOptimizer, kernels
from lopt.kernels import devices
from lopt.kernels.structs import ENTRY

CPU = torch.device("cpu")
PRESET = pytest.mark.parametrize("preset", ["compact", "paper", "spectral"])


@pytest.fixture(params=["cpu", "sim", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Backend:
    if request.param == "cuda" and not (torch.cuda.is_available() and kernels.has_cuda()):
        pytest.skip("needs a CUDA device, and lopt built with CUDA")
    return Backend(request.param, torch.device("cuda", 0) if request.param == "cuda" else CPU)


def needs(count: int) -> None:
    if torch.cuda.device_count() < count or not kernels.has_cuda():
        pytest.skip(f"needs {count} CUDA devices, and lopt built with CUDA")


def moved(params: list[Parameter], device: torch.device) -> list[Parameter]:
    return [Parameter(param.detach().to(device, copy=True)) for param in params]


def on_cpu(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: on_cpu(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [on_cpu(value) for value in tree]
    return tree.detach().cpu() if isinstance(tree, Tensor) else tree


# ---- Tables ----------------------------------------------------------------------------------------------------------

TABLES = {
    "structs": np.frombuffer(np.random.default_rng(0).bytes(7 * ENTRY.itemsize), ENTRY).copy(),
    "int64": np.array([[0, -1], [2**63 - 1, -(2**63)]]),
    "uint64": np.array([2**64 - 1, 2**63], np.uint64),
    "int32": np.array([-1, 2**31 - 1], np.int32),
    "bytes": np.arange(240, 256).astype(np.uint8),
}


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_tables_arrive_bit_for_bit(name: str, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as arguments of a kernel, as in a CUDA graph; and not as the numbers that they are."""
    sim = kernels.module_of("sim")

    class Module:
        @staticmethod
        def write_words(_: str, *arguments: Any) -> None:
            sim.write_words("sim", *arguments)

    monkeypatch.setattr(devices, "module_of", lambda _: Module)
    monkeypatch.setattr(devices, "is_capturing", lambda _: captured)
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    sent = devices._upload(TABLES[name], CPU)
    assert sent.numpy().tobytes() == TABLES[name].tobytes()


def test_a_table_that_is_no_whole_number_of_words_is_refused() -> None:
    with pytest.raises(TypeError, match="table: expected whole words of 8 bytes, got 12 bytes of uint8; pad it"):
        devices._upload(np.zeros(12, np.uint8), CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TABLES)
def test_tables_arrive_in_a_graph(name: str) -> None:
    needs(1)
    device = torch.device("cuda", 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sent = devices._upload(TABLES[name], device)
    graph.replay()
    assert sent.cpu().numpy().tobytes() == TABLES[name].tobytes()
    assert devices._upload(TABLES[name], device).cpu().numpy().tobytes() == TABLES[name].tobytes()


# ---- The current device ----------------------------------------------------------------------------------------------


def test_kernels_run_on_the_device_they_are_told_and_leave_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all operations; ``sim`` has as many devices as one likes."""
    sim = kernels.module_of("sim")
    place, params = 3, make_params(((7,), (3, 2)))
    opt = make_optimizer(params, "sim")
    monkeypatch.setattr("lopt.kernels.plan.stream_of", lambda _: (place, 0))
    monkeypatch.setattr("lopt.kernels.tensor_level.stream_of", lambda _: (place, 0), raising=False)
    run(opt, params, 1)
    assert sim.devices() == (0, place)
    one = Run(problem_of("compact", 8, ((31,),)), Backend("sim", CPU))
    for operation in (one.accumulate, one.apply):
        operation()
        assert sim.devices() == (0, place)
    to = torch.zeros(2, dtype=torch.int64)
    sim.write_words("sim", to.data_ptr(), [1, 2], 5, 0)
    assert (sim.devices(), to.tolist()) == ((0, 5), [1, 2])
    one.plan._apply["num_chunks"] = 2**31
    with pytest.raises(RuntimeError, match=r"expected at most 2\^31 - 1 chunks"):
        one.apply()
    assert sim.devices()[0] == 0


class Cuda:
    """Current devices as CUDA and torch know them: torch goes back to a device only if that is in use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, used: set[int]) -> None:
        self.current = self.remembered = 0  # CUDA's, torch's
        self.used = used
        cuda = self

        class Guard:
            def __init__(self, index: int) -> None:
                self.index = index

            def __enter__(self) -> None:
                self.before, cuda.current, cuda.remembered = cuda.remembered, self.index, self.index

            def __exit__(self, *_: object) -> None:
                cuda.remembered = self.before
                if self.before in cuda.used:
                    cuda.current = self.before

        class Stream:
            cuda_stream = 77

        monkeypatch.setattr(torch.cuda, "device", Guard)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.remembered)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream)

    def kernel(self, index: int) -> None:
        """What DeviceGuard of cuda/launch.cuh does."""
        before = self.current
        for device in (index, before):
            if device != self.current:
                self.current = device
                self.used.add(device)


@pytest.mark.parametrize("used", [{0, 1}, {1}])
def test_a_device_that_is_not_in_use_stays_so(used: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on a second one make no context on the first, and torch's current device stays."""
    cuda = Cuda(monkeypatch, set(used))
    for _ in range(3):
        assert devices.stream_of(torch.device("cuda", 1)) == (1, 77)
        cuda.kernel(1)
        assert cuda.used == used
        assert cuda.remembered == 0
    assert devices.stream_of(torch.device("cuda", 0)) == (0, 77)
    assert devices.stream_of(CPU) == (0, 0)


@pytest.mark.gpu
def test_a_second_device_alone() -> None:
    """Its parameters are stepped there to the bits of the first, whatever the current device, and that stays."""
    needs(2)
    results = []
    for index in (0, 1):
        device = torch.device("cuda", index)
        params = moved(make_params(), device)
        opt = make_optimizer(params, "cuda")
        run(opt, params, 3)
        assert torch.cuda.current_device() == 0
        assert {value.device for param in params for value in (param, opt.state[param]["mom"])} == {device}
        results.append(on_cpu(snapshot(opt)))
    assert_same_bits(*results)


NO_CONTEXT = """
import threading
import torch
from lopt import LearnedOptimizer
param = torch.nn.Parameter(torch.ones(300, device="cuda:1"))
param.grad = torch.ones_like(param)
opt = LearnedOptimizer([param], impl="cuda")
opt.step()
thread = threading.Thread(target=opt.step)  # which has not used a device before
thread.start()
thread.join()
torch.cuda.synchronize(1)
assert torch.cuda.current_device() == 0
print(torch._C._cuda_hasPrimaryContext(0), torch._C._cuda_hasPrimaryContext(1))
"""


@pytest.mark.gpu
def test_a_second_device_makes_no_context_on_the_first() -> None:
    needs(2)
    done = subprocess.run([sys.executable, "-c", NO_CONTEXT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


# ---- Streams ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def side_stream(device: torch.device, busy: bool = True) -> Iterator[None]:
    """Another stream, after what was started before; what follows waits for it. Busy for a while at its beginning."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        if busy:
            torch.cuda._sleep(20_000_000)  # ten milliseconds: a kernel on any other stream would be earlier
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


@PRESET
def test_steps_on_other_streams(place: Backend, preset: str) -> None:
    """Gradients that are written late on a stream are those of its step; streams alternate, losses are told there."""
    results = []
    for other in (False, True):
        params = moved(make_params(), place.device)
        opt = make_optimizer(params, place.name, preset)
        for param in params:
            param.grad = torch.zeros_like(param)
        for step in range(5):
            grads = [grad.to(place.device) for grad in make_grads(params, step)]
            with side_stream(place.device) if other and step != 2 else contextlib.nullcontext():
                for param, grad in zip(params, grads, strict=True):
                    assert param.grad is not None
                    param.grad.copy_(grad)
                opt.step(loss=torch.tensor(make_loss(step)).to(place.device))
        results.append(on_cpu(snapshot(opt)))
    assert_same_bits(*results)


# ---- What users do ---------------------------------------------------------------------------------------------------


@PRESET
@pytest.mark.parametrize("through_cpu", [False, True])
def test_resume(place: Backend, preset: str, through_cpu: bool) -> None:
    """From a file, read to the device or to the CPU, is never having stopped."""
    params = moved(make_params(), place.device)
    opt = make_optimizer(params, place.name, preset)
    run(opt, params, 3)
    file = io.BytesIO()
    torch.save({"params": [param.detach() for param in params], "opt": opt.state_dict()}, file)
    run(opt, params, 3, first=3)
    file.seek(0)
    saved = torch.load(file, map_location=CPU if through_cpu else place.device)
    others = moved(saved["params"], place.device)
    other = make_optimizer(others, place.name, preset)
    other.load_state_dict(saved["opt"])
    run(other, others, 3, first=3)
    assert {other.state[param]["mom"].device for param in others} == {place.device}
    assert_same_bits(snapshot(other), snapshot(opt))


@PRESET
def test_a_state_of_the_cpu_goes_on(place: Backend, preset: str) -> None:
    """Kernels of another kind take over where the CPU stopped, near the steps it would have made."""
    params = make_params()
    opt = make_optimizer(params, "cpu", preset)
    run(opt, params, 3)
    saved = copy.deepcopy(opt.state_dict())
    others = moved(params, place.device)
    other = make_optimizer(others, place.name, preset)
    other.load_state_dict(saved)
    run(opt, params, 3, first=3)
    run(other, others, 3, first=3)
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(b.detach().cpu(), a.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_grad_scaler(place: Backend, dtype: torch.dtype) -> None:
    """Scaled by a power of two it is the plain loop, to the bit; a step that overflowed is left out."""
    results = []
    for scale in (None, 1024.0):
        params = [Parameter(param.detach().to(place.device, dtype)) for param in make_params(((6, 5), (5,)))]
        opt = make_optimizer(params, place.name)
        scaler = torch.amp.GradScaler(place.device.type, init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(4):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(place.device, dtype)
            overflow = scale is not None and step == 2
            for bad in (True, False) if overflow else (False,):
                opt.zero_grad()
                loss = (x @ params[0] + params[1]).float().square().mean()
                scaler.scale(loss).backward()
                if bad:
                    assert params[1].grad is not None
                    params[1].grad[0] = math.inf
                before = on_cpu(snapshot(opt))
                scaler.step(opt, loss=loss)
                scaler.update()
                if bad:
                    assert_same_bits(on_cpu(snapshot(opt)), before)
                    assert scaler.get_scale() == 512.0
        results.append(torch.cat([param.detach().cpu().float().reshape(-1) for param in params]))
    if dtype == F32:
        assert torch.equal(*results)
    else:  # scaled, gradients keep bits that float16 has not for them otherwise
        torch.testing.assert_close(*results, rtol=2e-3, atol=1e-3)


@PRESET
@pytest.mark.parametrize("stats", ["current", "lagged"])
def test_a_bfloat16_state(place: Backend, preset: str, stats: Any) -> None:
    """As that of the reference: where float32 differs in its last bit, some roundings go the other way."""
    results = []
    for impl, device in ((place.name, place.device), ("reference", CPU)):
        params = moved(make_params(((129, 33), (7,))), device)
        opt = LearnedOptimizer(params, make_theta(preset).with_spec(stats=stats), impl=impl, state_dtype=BF16)
        run(opt, params, 3)
        planes = [opt.state[p][name] for p in params for name in ("mom", "rms")]
        assert {plane.dtype for plane in planes} == {BF16}
        results.append(torch.cat([plane.cpu().float().reshape(-1) for plane in planes]))
    found, expected = results
    assert float((found != expected).double().mean()) < 1e-3
    assert float((found - expected).abs().max()) <= 2.0**-7 * float(expected.abs().max())


def test_channels_last(place: Backend) -> None:
    """A layout in memory, for parameters, gradients or both, changes no bit."""
    shapes = ((8, 3, 3, 3), (8,), (16, 8, 3, 3))
    results = []
    for params_last, grads_last in ((False, False), (True, True), (True, False), (False, True)):
        params = [
            Parameter(p.detach().to(memory_format=torch.channels_last) if params_last and p.dim() == 4 else p.detach())
            for p in moved(make_params(shapes), place.device)
        ]
        opt = make_optimizer(params, place.name)
        for step in range(3):
            for param, grad in zip(params, make_grads(params, step), strict=True):
                grad = grad.to(place.device)
                last = grads_last and grad.dim() == 4
                param.grad = grad.contiguous(memory_format=torch.channels_last) if last else grad
            opt.step(loss=make_loss(step))
        assert params[2].is_contiguous() != params_last
        results.append([param.detach().contiguous().cpu() for param in params])
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.fixture
def one_rank(place: Backend, tmp_path: Path) -> Iterator[None]:
    on_gpu = place.device.type == "cuda"
    options: dict[str, Any] = {"backend": "nccl", "device_id": place.device} if on_gpu else {"backend": "gloo"}
    dist.init_process_group(init_method=f"file://{tmp_path}/meet", rank=0, world_size=1, **options)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_gradients_in_the_buckets_of_distributed_data_parallel(place: Backend) -> None:
    """Views at any offset of a flat buffer: the steps of gradients of their own."""
    results = []
    for bucket in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 129), nn.Tanh(), nn.Linear(129, 3))
        model.to(place.device)
        ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if bucket else model
        opt = make_optimizer(model.parameters(), place.name)
        for step in range(4):
            x = torch.randn(16, 7, generator=torch.Generator().manual_seed(step)).to(place.device)
            opt.zero_grad(set_to_none=not bucket)
            loss = ddp(x).square().mean()
            loss.backward()
            opt.step(loss=loss.detach())
        grads = [param.grad for param in model.parameters()]
        assert all(grad is not None for grad in grads)
        if bucket:
            assert len({grad.untyped_storage().data_ptr() for grad in grads if grad is not None}) < len(grads)
            assert any(grad.data_ptr() % 16 for grad in grads if grad is not None)
        results.append([param.detach().cpu() for param in model.parameters()])
    if place.name == "cpu":
        assert_same_bits(*results)
    for a, b in zip(*results, strict=True):  # where no wide access is possible others round otherwise
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@PRESET
@pytest.mark.parametrize("grad_offset", [0, 1, 3])
def test_flat_buffers(place: Backend, preset: str, grad_offset: int) -> None:
    """Parameters and gradients as parts of one tensor each, at addresses of their own: near the float64 reference."""
    start = make_params(((9, 5), (7,), (3,), (4, 40)))
    sizes = [param.numel() for param in start]
    flat = torch.cat([param.detach().reshape(-1) for param in start]).to(place.device)
    buffer = torch.zeros(grad_offset + sum(sizes), device=place.device)
    params = [Parameter(x.view(p.shape)) for x, p in zip(flat.split(sizes), start, strict=True)]
    for param, x in zip(params, buffer[grad_offset:].split(sizes), strict=True):
        param.grad = x.view(param.shape)
    opt, exact = make_optimizer(params, place.name, preset), Float64(preset, start)
    for step in range(4):
        for param, grad in zip(params, make_grads(params, step), strict=True):
            assert param.grad is not None
            param.grad.copy_(grad)
        opt.step(loss=make_loss(step))
        exact.step(make_grads(start, step), make_loss(step))
    assert params[0].data_ptr() == flat.data_ptr()
    exact.assert_close([param.cpu() for param in params], 5e-5 if preset == "spectral" else 5e-6)


@pytest.mark.parametrize("precision", ["high", "fast"])
def test_directions_of_matrices(place: Backend, precision: Any) -> None:
    """Small and large ones and such that are turned: near the CPU kernels, as the products of the device allow."""
    shapes = ((12, 40), (130, 129), (7,), (257, 264), (129, 130), (40, 12))
    results = []
    for impl, device in ((place.name, place.device), ("cpu", CPU)):
        params = moved(make_params(shapes), device)
        start = [param.detach().cpu().clone() for param in params]
        opt = LearnedOptimizer(params, impl=impl, precision=precision)
        for step in range(2):
            set_grads(params, step)
            opt.step(loss=make_loss(step))
        results.append([param.detach().cpu() - x for param, x in zip(params, start, strict=True)])
        ranks = [float(opt.state[param]["lstm"]["rank"]) for param in params]
        assert sum(rank != 1.0 for rank in ranks) >= 3, ranks
    for a, b in zip(*results, strict=True):
        assert float((a - b).norm()) <= (0.03 if precision == "high" else 0.06) * float(b.norm())


def test_a_stepped_model_is_that_of_the_reference(place: Backend) -> None:
    """A whole loop on the device: convolutions, losses as tensors, clipping by norm, groups with a schedule."""
    results = []
    for impl, device in ((place.name, place.device), ("reference", CPU)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 8)).to(device)
        groups = [{"params": list(model[0].parameters()), "lr": 0.5}, {"params": list(model[3].parameters())}]
        opt = make_optimizer(groups, impl)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (1 + step))
        for step in range(5):
            x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step)).to(device)
            loss = model(x).square().mean()
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step(loss=loss)
            schedule.step()
        results.append([param.detach().cpu() for param in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_copies_share_nothing(place: Backend) -> None:
    params = moved(make_params(((5, 4), (3,))), place.device)
    opt = make_optimizer(params, place.name)
    run(opt, params, 2)
    both = copy.deepcopy((params, opt))
    before = on_cpu(snapshot(opt))
    run(both[1], both[0], 1, first=2)
    assert same([*on_cpu(params)], before["params"])
    run(opt, params, 1, first=2)
    assert_same_bits(snapshot(both[1]), snapshot(opt))
