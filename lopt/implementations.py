"""Which code computes the steps of an optimizer, and what its constructor takes."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lopt import kernels
from lopt.distributed import is_sharded
from lopt.options import check_total_steps, check_unknown
from lopt.rule import Rule, ThetaSpec
from lopt.warnings import warn

IMPLEMENTATIONS = ("auto", "cuda", "cpu", "reference", "sim")
CHOICES: dict[str, tuple[object, ...]] = {
    "impl": IMPLEMENTATIONS,
    "on_nonfinite": ("ignore", "raise", "skip"),
    "precision": ("high", "fast"),
    "state_dtype": (torch.float32, torch.bfloat16, torch.int8),
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


def has_kernels(spec: ThetaSpec, device: str, state: torch.dtype = torch.float32) -> bool:
    """Whether kernels for the spec, and accumulators of dtype ``state``, are compiled in or can be made; says once why
    not."""
    mlp = spec.feature_set, spec.mlp_width, spec.mlp_layers
    try:
        if not kernels.is_compiled(spec):
            kernels.own_backend(device, *mlp, state)
    except kernels.CannotCompile as error:
        warn_not_compiled(kernels.described(*mlp), str(error))
        return False
    return True


def implementation_of_rule(impl: str, rule: Rule, params: Iterable[Tensor]) -> str:
    """What ``impl`` means for a rule of others: ``"auto"`` takes the kernels where there are some for these parameters.

    Raises:
        ValueError, RuntimeError: an explicit choice cannot be had.
    """
    if impl == "reference" or (impl == "auto" and kernels.NOT_BUILT):
        if impl == "auto":
            warn_not_built()
        return "reference"
    params = list(params)
    trained = [param for param in params if param.requires_grad] or params
    devices = sorted({str(param.device) for param in trained})
    wanted = "cuda" if impl == "cuda" else "cpu" if impl != "auto" else trained[0].device.type
    backend = wanted if impl == "auto" else impl
    if len(devices) != 1:
        why = f"parameters are on {' and '.join(devices)}, and a rule of others steps those of one device"
    elif trained[0].device.type != wanted or wanted not in ("cpu", "cuda"):
        why = f"parameters are on {devices[0]}, expected {wanted}"
    elif any(map(is_sharded, trained)):
        why = "kernels of a rule of others step whole tensors, got DTensors"
    elif any(param.dtype == torch.float64 for param in trained):
        why = "kernels have no float64"
    elif any(param.numel() >= 2**31 for param in trained):
        why = "a parameter has 2^31 elements or more"
    else:
        try:
            why = kernels.why_no_kernels(rule, backend)
        except RuntimeError as error:  # not built
            if impl != "auto":
                raise
            why = str(error)
    if why and impl != "auto":
        raise ValueError(f"impl={impl!r}: {why}; use impl='auto' or 'reference'")
    if not why and backend == "cuda":
        kernels.check_gpu(trained[0].device)
    return "reference" if why else backend


def choose_implementation(impl: str, device: torch.device, spec: ThetaSpec, state: torch.dtype = torch.float32) -> str:
    """What ``impl`` means for parameters on ``device``; an explicit choice is never replaced by another.

    Args:
        state: dtype of the accumulators.

    Raises:
        ValueError, RuntimeError: there are no such kernels for the device or for the spec.
    """
    if impl == "auto" and kernels.NOT_BUILT:
        warn_not_built()
        return "reference"
    mlp = spec.feature_set, spec.mlp_width, spec.mlp_layers
    if impl == "auto" and not has_kernels(spec, device.type, state):
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
                kernels.own_backend(impl, *mlp, state)
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
