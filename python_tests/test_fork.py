"""Training in a process that was forked from one that has trained on several threads."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lopt

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

#: Defines train(), which gives the bytes of what it computed on two threads: every tensor is so small that torch works
#: on one thread, and together they are work for several.
OPTIMIZER = """
import torch, lopt

def train():
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn({size}, generator=generator).requires_grad_() for _ in range({tensors})]
    optimizer = lopt.LearnedOptimizer(params, impl={impl!r})
    for _ in range(3):
        for param in params:
            param.grad = param.detach().clone()
        optimizer.step(loss=1.0)
    return b"".join(param.detach().numpy().tobytes() for param in params)
"""
ENGINE = """
import torch
from lopt import Theta
from lopt.meta import engine
from lopt.tasks.network import perceptron

def train():
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(50, 4, generator=generator), torch.randint(3, (50,), generator=generator))
    problem = engine.Problem(perceptron((4, 8, 3), "relu"), 16, (rows,) * 3)
    theta = Theta.load("default")
    init = torch.randn(problem.num_params, generator=generator)
    state = lambda: engine.start(theta.spec, problem, theta.flatten(), init)
    runs = [engine.EngineRun(0, 0, state(), keys=(n, 1, 2)) for n in range(4)]
    losses = engine.unroll(theta.spec, theta.flatten()[None], [problem], runs, 10, num_threads=2)
    return b"".join(loss.numpy().tobytes() for loss in losses)
"""
#: Trains, then in two generations of children, of which the first trains itself or not; says where bits differ.
GENERATIONS = """
import os, sys

def child(work):
    if (pid := os.fork()) == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

torch.set_num_threads(2)
expected = train()
same = lambda: 0 if train() == expected else 3
print(child(same), child(lambda: same() or child(same)), same())
"""


@pytest.mark.parametrize(
    "program",
    [
        OPTIMIZER.format(size=10_000, tensors=16, impl="cpu"),
        OPTIMIZER.format(size=100_000, tensors=1, impl="cpu"),
        OPTIMIZER.format(size=1000, tensors=16, impl="sim"),
        ENGINE,
    ],
    ids=["cpu", "cpu-large", "sim", "engine"],
)
def test_a_forked_process_trains_to_the_same_bits(program: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(lopt.__file__).parents[1])}  # the lopt that is tested here
    process = subprocess.Popen(
        [sys.executable, "-c", program + GENERATIONS],
        env={name: value for name, value in environment.items() if name != "OMP_NUM_THREADS"},
        cwd=Path(__file__).parent,  # where no other lopt lies
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.communicate(timeout=120)[0] == "0 0 0\n"  # a child that waits for lost threads waits for ever
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
