"""A step over one list of tensors, by the reference or by the kernels, as the optimizer drives them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lopt import kernels
from lopt.options import effective
from lopt.rule import Theta, ThetaSpec, reference
from lopt.rule.inputs import Shapes
from lopt.rule.tensor_lstm import Conditioning, Rows


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Arithmetic at tensor level, on the CPU by one thread: BLAS adds in another order for every number of threads."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class ReferencePlan:
    """The two operations by lopt/rule/reference.py, around ``lopt.rule.tensor_lstm.advance``."""

    def __init__(
        self,
        spec: ThetaSpec,
        weights: Mapping[str, Tensor],
        shapes: Sequence[Sequence[int]],
        mom: list[Tensor],
        rms: list[Tensor],
    ) -> None:
        self.spec, self.weights, self.mom, self.rms = spec, weights, mom, rms
        self.shapes = Shapes.of(spec, shapes, weights["initial_h"])
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.dtype = weights["mlp.b1"].dtype
        self.step = torch.zeros((), dtype=torch.int64)

    def set_tensors(self, params: list[Tensor], grads: list[Tensor], step: Tensor) -> None:
        self.params, self.grads, self.step = params, grads, step

    def _flat(self, tensor: Tensor) -> Tensor:  # contiguous, since strides change the order of sums
        return tensor.reshape(-1).to(self.dtype).contiguous()

    def accumulate(self, clip_limit: Tensor) -> Tensor:
        stats = []
        for i, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            flat = self._flat(param), self._flat(grad)
            rounding = reference.Rounding(int(self.step), i) if self.mom[i].dtype == torch.bfloat16 else None
            mom, rms = self.mom[i].to(self.dtype), self.rms[i].to(self.dtype)
            clipped, mom, rms, row = reference.accumulate(self.spec, *flat, mom, rms, clip_limit, rounding)
            self.grads[i] = clipped
            self.mom[i].copy_(mom)
            self.rms[i].copy_(rms)
            stats.append(row)
        return torch.stack(stats)

    def apply(self, conditioning: Conditioning, step_size: Tensor, keep: Tensor) -> Tensor:
        feedback = []
        for i, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            row = Conditioning(*(value[i] for value in conditioning))
            flat = self._flat(param)
            new, mean, _, _ = reference.apply(
                self.spec,
                self.weights,
                flat,
                grad,
                self.mom[i].to(self.dtype),
                self.rms[i].to(self.dtype),
                row,
                step_size[i],
                keep[i],
            )
            param.copy_(new.view_as(param))
            feedback.append(mean)
        return torch.stack(feedback)


class KernelPlan:
    """A step by the compiled kernels, on a GPU five launches: begin, accumulate, advance, apply, finish; with lagged
    statistics four: begin, advance, one sweep, finish.

    Parameters that are not contiguous pass through a staging copy. With lagged statistics, ``before`` ``[T, S]`` are
    those of the step before; ``plan.stats`` holds them from then on.
    """

    def __init__(
        self,
        backend: str,
        theta: Theta,
        weights: Mapping[str, Tensor],
        params: list[Tensor],
        groups: list[int],
        mom: list[Tensor],
        rms: list[Tensor],
        rows: Rows,
        precision: str,
        before: Tensor | None,
    ) -> None:
        spec = theta.spec
        self.plan = kernels.Plan(backend, spec.feature_set, kernels.contiguous(params), mom, rms, precision=precision)
        shapes = [tuple(param.shape) for param in params]
        self.level = level = kernels.TensorLevel(backend, theta, shapes, rows, groups, lagged=before is not None)
        self.plan.bind_accumulate(level.clip_limit, spec.mom_decays, spec.rms_decays)
        rows_ = level.clip_limit, level.scale, level.shift, level.bias, level.step_size, level.keep
        packed = kernels.pack_mlp(spec, weights)
        self.plan.bind_apply(*rows_, packed, spec.magnitude_rate, spec.feature_clip)
        level.bind(self.plan)
        self.decays = spec.mom_decays, spec.rms_decays
        self.updates, self.operands = rows.updates, (*rows_, packed, spec.magnitude_rate, spec.feature_clip)
        self.some_first = before is not None and bool((rows.updates == 0).any())
        if before is not None:
            self.plan.stats.copy_(before)

    def step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        groups: list[dict[str, Any]],
        total_steps: int | None,
        loss: Tensor | float | None,
    ) -> None:
        """One whole step; ``groups`` are the optimizer's, whose first holds the state of all tensors."""
        plan, level = self.plan, self.level
        copies = kernels.contiguous(params)
        plan.set_tensors(copies, kernels.contiguous(grads))
        level.set_options(list(map(effective, groups)), total_steps)
        level.set_losses(groups[0], loss)
        plan.set_step(groups[0]["step"])
        if self.some_first:
            self._first_step(groups[0]["step"])
        else:
            kernels.step(plan, level)
        if copies is not params:
            for param, copy in zip(params, copies, strict=True):
                if copy is not param:
                    param.copy_(copy)
        torch.autograd.graph.increment_version(params)  # a backward pass that needs the old values must fail
        plan.grads = []  # zero_grad frees their memory

    def _first_step(self, step: Tensor) -> None:
        """With lagged statistics, while some tensors have none yet: in two sweeps."""
        plan, level = self.plan, self.level
        level.start()
        before = plan.stats.clone()
        # In one sweep advance, which counts the step, comes before accumulate.
        stats = plan.accumulate(level.clip_limit, *self.decays, step + 1)
        seen, kept = reference.lag(stats, before, self.updates)
        level.advance(seen)
        level.finish(plan.apply(*self.operands))
        plan.stats.copy_(kept)
        level.bind(plan)
        self.some_first = False
