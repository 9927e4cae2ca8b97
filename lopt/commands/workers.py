"""The options of commands that spread their work: how many workers, and where."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal

from lopt.commands.common import Command
from lopt.meta.executors import Executor, usable_cores
from lopt.meta.ray_workers import RayWorkers


@dataclass(frozen=True, kw_only=True)
class Spread(Command):
    """A command whose work can be done by several workers."""

    workers: int | None = None
    """Processes; one per processor if not given. Results do not depend on it."""

    executor: Literal["local", "ray"] = "local"
    """local: processes of this machine. ray: workers of a Ray cluster, the one at --address or one on this machine."""

    address: str | None = None
    """Of a running Ray cluster, or auto to find it. Then --workers may be more than it has processors: the others come
    when nodes join."""

    allow_different: bool = False
    """Take workers of the cluster with other code or another instruction set; results are then not the same bits."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers: expected at least 1, got {self.workers}")
        if self.executor != "ray" and (self.address is not None or self.allow_different):
            raise ValueError("address, allow_different: expected --executor ray with them, got local")

    @contextmanager
    def spread(self) -> Iterator[int | Executor]:
        """The number of processes, or what else runs the work; what it holds is given back in the end."""
        if self.executor == "local":
            yield self.workers or usable_cores()
            return
        with closing(RayWorkers(self.workers, self.address, allow_different=self.allow_different)) as executor:
            yield executor
