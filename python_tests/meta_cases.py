"""A meta-training run of a second, which tests of runs change as they need, and tasks in float64."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lopt.meta.config import MetaTrainConfig, Phase
from lopt.rule.matrices import Role
from lopt.tasks.task import Batch, SplitName, Task, map_tensors

#: Runs begin in the first phase; in the second their states are carried over.
SMALL = MetaTrainConfig(
    inner_steps=500,
    phases=(Phase(0.4, (10, 30), "mlp"), Phase(0.6, (20, 40), "all", "pes", window=10)),
    tasks=("mixture", "teacher"),
    pairs=3,
    warmup=0,
    validation_tasks=2,
    validation_horizons=(20,),
    validate_every=250,
    seed=11,
)


@dataclass(frozen=True)
class Double(Task):
    """A task in float64."""

    task: Task

    @property
    def name(self) -> str:
        return f"{self.task.name}-float64"

    @property
    def config(self) -> dict[str, Any]:
        return self.task.config

    @property
    def transposed(self) -> frozenset[str]:
        return self.task.transposed

    @property
    def roles(self) -> Mapping[str, Role | None]:
        return self.task.roles

    @property
    def loss_floor(self) -> float | None:
        return self.task.loss_floor

    def init(self, seed: int) -> dict[str, Tensor]:
        return {name: value.double() for name, value in self.task.init(seed).items()}

    def loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return self.task.loss(params, batch)

    def batches(self, seed: int, split: SplitName, start: int = 0) -> Iterator[Batch]:
        for batch in self.task.batches(seed, split, start):
            yield map_tensors(lambda x: x.double() if x.is_floating_point() else x, batch)
