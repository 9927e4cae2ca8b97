"""Runs functions on several ranks, and one after the other in the same processes, as starting them takes seconds."""

import faulthandler
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing

Scenario = Callable[[], Any]


def _run(rank: int, world: int, module: str, names: list[str], folder: str) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    __import__(module)
    for name in names:
        try:
            found = getattr(sys.modules[module], name)()
        except Exception:
            found = traceback.format_exc()
        torch.save(found, Path(folder) / f"{name}.{rank}")
    dist.barrier()  # a rank that leaves while another still talks to it may end that one
    dist.destroy_process_group()
    # At once: C++ terminates when threads that want Python's lock are unwound while the interpreter goes down.
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


def on_ranks(world: int, module: str, names: list[str], folder: Path) -> dict[str, list[Any]]:
    """What the functions called ``names`` of a module return on every rank; the text of an error where one fails.

    Twice so far a rank ended with SIGABRT, "terminate called without an active exception", and not when tried again.
    The cause is not known: faulthandler then says where its threads were, and all begins once more.
    """
    try:
        return _started(world, module, names, folder)
    except multiprocessing.ProcessExitedException as error:
        if error.exit_code != -signal.SIGABRT:
            raise
        print("a rank ended with SIGABRT; once more", file=sys.stderr)
        return _started(world, module, names, Path(tempfile.mkdtemp(dir=folder)))


def _started(world: int, module: str, names: list[str], folder: Path) -> dict[str, list[Any]]:
    multiprocessing.start_processes(_run, (world, module, names, str(folder)), world, start_method="spawn")
    return {
        name: [torch.load(folder / f"{name}.{rank}", weights_only=False) for rank in range(world)] for name in names
    }
