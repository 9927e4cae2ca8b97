"""Units of work for test_ray.py, in a module that workers find by its name."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lopt.meta.pairs import unroll_group


def square_plus(shared: int, item: int) -> tuple[int, int]:
    return shared + item * item, os.getpid()


def node_of(shared: None, item: int) -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def environment(shared: str, item: int) -> str | None:
    return os.environ.get(shared)


def die_once(shared: Path, item: int) -> int:
    """Kills its own process at the first attempt at items 2 and 5."""
    if item in (2, 5):
        marker = shared / str(item)
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return 10 * item


def die_after(shared: tuple[Path, Any, Any], item: Any) -> Any:
    """Computes a unit of an iteration and, at the first attempt at the one of group 2, dies before it can say so."""
    folder, function, its_shared = shared
    result = function(its_shared, item)
    marker = folder / f"died-{its_shared.iteration}"
    if function is unroll_group and item[0] == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def die_always(shared: None, item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def divide(shared: float, item: float) -> float:
    return shared / item


class Local(Exception):
    """Does not survive pickling."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail(shared: None, item: int) -> None:
    raise Local(item, item)


def meet(shared: Path, item: int) -> str:
    """The node that it runs on; ends only when all three items have begun."""
    (shared / str(item)).touch()
    while not all((shared / str(other)).exists() for other in range(3)):
        time.sleep(0.01)
    return node_of(None, item)


def slowly(shared: tuple[float, Any, Any], item: Any) -> Any:
    """A unit that takes so many seconds longer."""
    seconds, function, its_shared = shared
    time.sleep(seconds)
    return function(its_shared, item)


def rows() -> tuple[Tensor, Tensor]:
    """Data of a task."""
    inputs = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    return inputs, inputs.sin()


def model() -> nn.Module:
    """Of a task."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
