"""Tasks whose models are torch modules, as people write them: matrices ``[out, in]``, torch's initial values."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lopt.roles import roles_of_model
from lopt.rule.matrices import Role
from lopt.tasks.sampled import SampledTask
from lopt.tasks.seeds import derive


@dataclass(frozen=True, kw_only=True)
class ModuleTask(SampledTask):
    """A task with the parameters of a module, by their names there; its fields are plain values and make the module.

    Initial values are torch's numbers, from a generator of their own: the same wherever torch draws the same.
    """

    def __post_init__(self) -> None:
        self.module  # noqa: B018  # now: under vmap torch draws no numbers, not even of tensors without values

    def build(self) -> nn.Module:
        """The module, which draws from torch's global generator and keeps no state but its parameters."""
        raise NotImplementedError

    @cached_property
    def module(self) -> nn.Module:
        """The module with parameters that have no values."""
        with torch.device("meta"):
            return self.build()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(param.shape) for name, param in self.module.named_parameters()}

    @property
    def transposed(self) -> frozenset[str]:
        return frozenset()

    @property
    def roles(self) -> Mapping[str, Role | None]:
        return roles_of_model(self.module)

    def init(self, seed: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "init"))
            return {name: param.detach() for name, param in self.build().named_parameters()}

    def run(self, params: Mapping[str, Tensor], *inputs: Any) -> Any:
        """What the module makes of its inputs with these parameters."""
        return torch.func.functional_call(self.module, dict(params), inputs)
