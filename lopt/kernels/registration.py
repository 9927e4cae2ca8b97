"""``torch.ops.lopt.accumulate`` and ``torch.ops.lopt.apply``: the two operations for torch.compile and torch.library.

The optimizer itself calls :class:`lopt.kernels.Plan`, which keeps its tables between steps; these make a plan per call.
Both write their mutable arguments in place: ``mom`` and ``rms``, and ``params``. Arguments are those of the plan's
methods; ``step``, by which a narrow state is rounded, may be left out with a float32 one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lopt.kernels.plan import Plan
from lopt.kernels.structs import APPLY_INPUTS
from lopt.rule.features import feature_set as table_of


def _accumulate(
    feature_set: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mom: Sequence[Tensor],
    rms: Sequence[Tensor],
    clip_limit: Tensor,
    step: Tensor | None = None,
) -> Tensor:
    plan = Plan("cuda" if params[0].is_cuda else "cpu", feature_set, params, mom, rms)
    plan.set_tensors(params, grads)
    return plan.accumulate(clip_limit, step=step)


def _accumulate_fake(feature_set: str, params: Sequence[Tensor], *others: Any) -> Tensor:
    clip_limit: Tensor = others[3]
    return clip_limit.new_empty(len(params), table_of(feature_set).num_stats)


def _apply(
    feature_set: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mom: Sequence[Tensor],
    rms: Sequence[Tensor],
    *others: Any,
) -> Tensor:
    inputs = dict(zip(APPLY_INPUTS, others, strict=False))
    weights, theta_index, magnitude_rate, feature_clip = others[len(inputs) :]
    plan = Plan("cuda" if params[0].is_cuda else "cpu", feature_set, params, mom, rms, theta_index)
    plan.set_tensors(params, grads)
    return plan.apply(inputs, weights, magnitude_rate, feature_clip)


def _apply_fake(*arguments: Any) -> Tensor:
    bias: Tensor = arguments[5 + list(APPLY_INPUTS).index("bias")]
    return torch.empty_like(bias)


_library: Any = torch.library.Library("lopt", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "accumulate(str feature_set, Tensor[] params, Tensor[] grads, Tensor(a!)[] mom, Tensor(b!)[] rms, "
    "Tensor clip_limit, Tensor? step=None) -> Tensor"
)
_library.define(
    "apply(str feature_set, Tensor(a!)[] params, Tensor[] grads, Tensor[] mom, Tensor[] rms, "
    f"{', '.join(f'Tensor {name}' for name in APPLY_INPUTS)}, Tensor weights, int[]? theta_index, "
    "float magnitude_rate, float? feature_clip) -> Tensor"
)
for _key in ("CPU", "CUDA"):
    _library.impl("accumulate", _accumulate, _key)
    _library.impl("apply", _apply, _key)
torch.library.register_fake("lopt::accumulate", _accumulate_fake, lib=_library)
torch.library.register_fake("lopt::apply", _apply_fake, lib=_library)
