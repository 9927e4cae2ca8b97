"""Which code computes the steps of an optimizer, and what its constructor takes."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from lopt import kernels
from lopt.options import check_total_steps, check_unknown
from lopt.rule import AnySpec, Rule, ThetaSpec
from lopt.warnings import warn

IMPLEMENTATIONS = ("auto", "cuda", "cpu", "reference", "sim")
CHOICES: dict[str, tuple[object, ...]] = {
    "impl": IMPLEMENTATIONS,
    "on_nonfinite": ("ignore", "raise", "skip"),
    "precision": ("high", "fast"),
    "state_dtype": (torch.float32, torch.bfloat16),
}


def check_arguments(choices: Mapping[str, object], total_steps: object, options: Mapping[str, Any]) -> None:
    """Refuse arguments of an optimizer that mean nothing.

    Args:
        choices: those of which there are a few values.
        options: those that LearnedOptimizer does not have.

    Raises:
        ValueError: a value that there is not, or an option of another optimizer.
        TypeError: any other option.
    """
    check_unknown(options)
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}: expected one of {CHOICES[name]}, got {value!r}")
    check_total_steps(total_steps)


@cache
def warn_not_built() -> None:
    """Say once that everything is computed by the reference."""
    warn(f"{kernels.NOT_BUILT}. Until then impl='auto' is the slow impl='reference'")


@cache
def warn_not_compiled(what: str, why: str) -> None:
    """Say once that steps are computed by the reference."""
    warn(f"no kernel is compiled in for {what} and none can be made ({why}); using the slow impl='reference'")


def has_kernels(spec: ThetaSpec, device: str) -> bool:
    """Whether kernels for the spec are compiled in or can be made; says once why not."""
    mlp = spec.feature_set, spec.mlp_width, spec.mlp_layers
    try:
        if not kernels.is_compiled(spec):
            kernels.own_backend(device, *mlp)
    except kernels.CannotCompile as error:
        warn_not_compiled(kernels.described(*mlp), str(error))
        return False
    return True


def check_implementation(impl: str, rule: Rule) -> str:
    """What ``impl`` means for a rule of others, which is computed in plain PyTorch.

    Raises:
        ValueError: it asks for kernels.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl={impl!r}: rule {rule.name!r} has no kernels yet; use impl='auto' or 'reference'")
    return "reference"


def choose_implementation(impl: str, device: torch.device, spec: AnySpec) -> str:
    """What ``impl`` means for parameters on ``device``; an explicit choice is never replaced by another.

    Raises:
        ValueError, RuntimeError: there are no such kernels for the device or for the spec.
    """
    if isinstance(spec, Rule):
        return check_implementation(impl, spec)
    if impl == "auto" and kernels.NOT_BUILT:
        warn_not_built()
        return "reference"
    mlp = spec.feature_set, spec.mlp_width, spec.mlp_layers
    if impl == "auto" and not has_kernels(spec, device.type):
        return "reference"
    if impl == "auto":
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"params: on {device}; kernels exist for cpu and cuda, elsewhere use impl='reference'")
        impl = device.type
    if impl != "reference":
        kernels.module_of(impl)  # raises what is missing
        wanted = "cuda" if impl == "cuda" else "cpu"
        if device.type != wanted:
            raise ValueError(f"impl={impl!r}: parameters are on {device}, expected {wanted}; use impl='auto'")
        if not kernels.is_compiled(spec):
            try:
                kernels.own_backend(impl, *mlp)
            except kernels.CannotCompile as error:
                raise ValueError(f"impl={impl!r}: {error}; or use impl='reference'") from error
    if impl == "cuda":
        kernels.check_gpu(device)
    return impl


def run_eagerly(optimizer: type) -> None:
    """Make torch.compile leave a class's steps as they are, for they hand addresses to the kernels.

    Done for the first object and not where the methods are defined: ``torch.compiler.disable`` imports for a second,
    which the constructor of ``torch.optim.Optimizer`` has spent by then.
    """
    for name in ("step", "observe"):
        method = getattr(optimizer, name)
        if not hasattr(method, "eager"):
            method.eager = True  # the function that is made has it too
            setattr(optimizer, name, torch.compiler.disable(method))  # type: ignore[no-untyped-call]
