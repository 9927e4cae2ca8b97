"""The two operations over one list of tensors, by the reference or by the kernels, as the optimizer drives them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lopt import ops, reference
from lopt.tensor_lstm import Conditioning
from lopt.theta import ThetaSpec


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
    """The two operations by lopt/reference.py, with the interface of :class:`lopt.ops.Plan`."""

    def __init__(self, spec: ThetaSpec, weights: Mapping[str, Tensor], mom: list[Tensor], rms: list[Tensor]) -> None:
        self.spec, self.weights, self.mom, self.rms = spec, weights, mom, rms
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.dtype = weights["mlp.b1"].dtype

    def set_tensors(self, params: list[Tensor], grads: list[Tensor]) -> None:
        self.params, self.grads = params, grads

    def _flat(self, tensor: Tensor) -> Tensor:  # contiguous, since strides change the order of sums
        return tensor.reshape(-1).to(self.dtype).contiguous()

    def accumulate(self, clip_limit: Tensor) -> Tensor:
        stats = []
        for i, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            flat = self._flat(param), self._flat(grad)
            clipped, mom, rms, row = reference.accumulate(self.spec, *flat, self.mom[i], self.rms[i], clip_limit)
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
                self.spec, self.weights, flat, grad, self.mom[i], self.rms[i], row, step_size[i], keep[i]
            )
            param.copy_(new.view_as(param))
            feedback.append(mean)
        return torch.stack(feedback)


class KernelPlan:
    """The two operations by the compiled kernels; parameters that are not contiguous pass through a staging copy."""

    def __init__(
        self,
        backend: str,
        spec: ThetaSpec,
        weights: Mapping[str, Tensor],
        params: list[Tensor],
        mom: list[Tensor],
        rms: list[Tensor],
    ) -> None:
        self.spec, self.weights = spec, weights
        self.packed = ops.pack_mlp(spec, weights)
        self.plan = ops.Plan(backend, spec.feature_set, [param.contiguous() for param in params], mom, rms)
        self.clip_limit = torch.empty(0)
        self.params: list[Tensor] = []
        self.contiguous: list[Tensor] = []

    def set_tensors(self, params: list[Tensor], grads: list[Tensor]) -> None:
        self.params, self.contiguous = params, [param.contiguous() for param in params]
        self.plan.set_tensors(self.contiguous, [grad.contiguous().resolve_neg() for grad in grads])

    def accumulate(self, clip_limit: Tensor) -> Tensor:
        self.clip_limit = clip_limit.expand(self.plan.num_tensors).contiguous()
        return self.plan.accumulate(self.clip_limit, self.spec.mom_decays, self.spec.rms_decays)

    def apply(self, conditioning: Conditioning, step_size: Tensor, keep: Tensor) -> Tensor:
        with one_thread(step_size.device):
            bias = ops.fold_bias(self.spec, self.weights, conditioning.constant)
        hidden = self.write_params(conditioning.scale, conditioning.shift, bias, step_size, keep)
        with one_thread(hidden.device):
            return ops.feedback(self.weights, hidden)

    def write_params(self, scale: Tensor, shift: Tensor, bias: Tensor, step_size: Tensor, keep: Tensor) -> Tensor:
        """The kernel, and what surrounds it; returns the mean hidden vectors."""
        rate, clip = self.spec.magnitude_rate, self.spec.feature_clip
        hidden = self.plan.apply(self.clip_limit, scale, shift, bias, step_size, keep, self.packed, rate, clip)
        for param, contiguous in zip(self.params, self.contiguous, strict=True):
            if contiguous is not param:
                param.copy_(contiguous)
        torch.autograd.graph.increment_version(self.params)  # a backward pass that needs the old values must fail
        self.contiguous, self.plan.grads = [], []  # zero_grad frees their memory
        return hidden
