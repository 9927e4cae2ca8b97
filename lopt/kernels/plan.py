"""Plan: the two device operations over one list of tensors.

``accumulate`` updates the accumulators of every parameter of every tensor and reduces per-tensor statistics;
``apply`` computes features and the small MLP, writes the parameters and reduces the mean of the last hidden layer. Each
is one call, and on a GPU one launch, for any number of tensors. A :class:`Plan` keeps the tables of addresses between
steps.

Equivalent to ``lopt.rule.reference.accumulate`` and ``apply`` for each tensor, with two exact rewrites: MLP inputs that
are constant in a tensor are folded into a bias per tensor, and the MLP outputs that only feed the LSTM are computed
once per tensor from the mean hidden vector.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopt.kernels import devices
from lopt.kernels.devices import stream_of, upload
from lopt.kernels.extension import WIDTHS, module_of, packed_weights
from lopt.kernels.structs import ACCUMULATE, APPLY, FEATURE_SET_INDEX
from lopt.kernels.tensor_level import TensorLevel
from lopt.rule.features import FEATURE_SETS
from lopt.rule.spec import ThetaSpec

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
PRECISIONS = ("exact", "high", "fast")


def pack_mlp(spec: ThetaSpec, weights: Mapping[str, Tensor]) -> Tensor:
    """MLP weights as the kernels read them, ``[..., size]`` float32 (MlpLayout in csrc/rule/mlp.h).

    ``weights`` may have leading dimensions: a population of thetas.
    """
    columns = len(spec.features.columns)
    lead = weights["mlp.b1"].shape[:-1]
    skip = weights["skip"] if spec.linear_skip else weights["mlp.b1"].new_zeros(*lead, columns)
    parts = [
        weights["mlp.w1"][..., :columns, :],
        weights["mlp.w2"],
        weights["mlp.b2"],
        weights["mlp.w3"][..., :2].transpose(-1, -2),
        weights["mlp.b3"][..., :2],
        skip,
    ]
    flat = torch.cat([part.reshape(*lead, -1) for part in parts], dim=-1).float()
    size = packed_weights(spec.feature_set, spec.mlp_width)
    return torch.nn.functional.pad(flat, (0, size - flat.shape[-1])).contiguous()


def fold_bias(spec: ThetaSpec, weights: Mapping[str, Tensor], constant: Tensor) -> Tensor:
    """First-layer bias ``[T, width]`` with the inputs ``constant`` ``[T, num_constant]`` folded in."""
    return constant @ weights["mlp.w1"][len(spec.features.columns) :] + weights["mlp.b1"]


def feedback(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Mean MLP outputs for the LSTM ``[T, from_mlp]`` from the mean hidden vector ``[T, width]``."""
    return hidden @ weights["mlp.w3"][:, 2:] + weights["mlp.b3"][2:]


def _check(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], numel: int, device: torch.device) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}; convert it or use impl='reference'")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}; all tensors must share one device")
    if tensor.numel() != numel:
        raise ValueError(f"{name}: expected {numel} elements, got {tensor.numel()}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}; pass x.contiguous()")


# What is checked of every tensor; `map` over these reads an attribute of a thousand tensors in 40 microseconds.
_FACTS: tuple[Callable[[Tensor], Any], ...] = (
    attrgetter("dtype"),
    attrgetter("device"),
    Tensor.numel,
    Tensor.is_contiguous,
)


def contiguous(tensors: list[Tensor]) -> list[Tensor]:
    """The same list where values lie in order and as they are, otherwise copies of those that do not."""
    if all(map(Tensor.is_contiguous, tensors)) and not any(map(Tensor.is_neg, tensors)):
        return tensors
    return [tensor.contiguous().resolve_neg() for tensor in tensors]


def _check_length(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{name}: expected {expected} entries, one for each tensor, got {found}")


class Plan:
    """Addresses, sizes and scratch memory for the kernels over one list of tensors.

    Args:
        backend: ``"cpu"``, ``"cuda"``, or ``"sim"`` (the CUDA kernels on the CPU, for tests).
        feature_set: a key of ``FEATURE_SETS``.
        params: contiguous, non-empty float32 or bfloat16 tensors on one device, written by :meth:`apply`.
        mom, rms: contiguous ``[num_mom, numel]`` and ``[num_rms, numel]`` for each, all float32 or all bfloat16;
            :meth:`accumulate` writes, and rounds bfloat16 stochastically (csrc/rule/rounding.h).
        theta_index: for each tensor the row of the MLP weights that drives it; zeros by default.
        precision: of the small MLP in the CUDA kernels. ``"exact"`` is plain float32; ``"high"`` splits a float32 into
            two halves for tensor cores and keeps its accuracy; ``"fast"`` rounds to 11 bits.
        seed: chooses, with the step and the position of an element, how a bfloat16 state is rounded.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, device, size or layout, named with its position.
    """

    def __init__(
        self,
        backend: str,
        feature_set: str,
        params: Sequence[Tensor],
        mom: Sequence[Tensor],
        rms: Sequence[Tensor],
        theta_index: Sequence[int] | None = None,
        precision: str = "high",
        seed: int = 0,
    ) -> None:
        self.module = module_of(backend)
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
        if not params:
            raise ValueError("params: expected at least one tensor, got none")
        if feature_set not in FEATURE_SETS:
            raise ValueError(f"feature_set: expected one of {sorted(FEATURE_SETS)}, got {feature_set!r}")
        theta_index = [0] * len(params) if theta_index is None else list(theta_index)
        for name, values in (("mom", mom), ("rms", rms), ("theta_index", theta_index)):
            _check_length(name, len(values), len(params))
        self.backend, self.features = backend, FEATURE_SETS[feature_set]
        self.index, self.precision = FEATURE_SET_INDEX[feature_set], PRECISIONS.index(precision)
        self.device = params[0].device
        if self.device.type != ("cuda" if backend == "cuda" else "cpu"):
            raise ValueError(f"params[0]: on {self.device}, which back end {backend!r} cannot reach; use impl='auto'")
        sizes = [param.numel() for param in params]
        decays = len(self.features.mom_decays), len(self.features.rms_decays)
        self.state_dtype = mom[0].dtype
        state_dtypes = (self.state_dtype,) if self.state_dtype in DTYPES else tuple(DTYPES)
        for i, (param, m, r) in enumerate(zip(params, mom, rms, strict=True)):
            if sizes[i] == 0:
                raise ValueError(f"params[{i}]: empty; leave empty tensors out")
            _check(f"params[{i}]", param, tuple(DTYPES), sizes[i], self.device)
            _check(f"mom[{i}]", m, state_dtypes, decays[0] * sizes[i], self.device)
            _check(f"rms[{i}]", r, state_dtypes, decays[1] * sizes[i], self.device)
        self.sizes = sizes
        self.param_addresses = [param.data_ptr() for param in params]
        self.keep_alive = (list(mom), list(rms))

        chunk = self.module.chunk
        chunks_of = [-(-size // chunk) for size in sizes]
        first = np.concatenate([[0], np.cumsum(chunks_of)]).astype(np.int64)
        owner = np.repeat(np.arange(len(sizes), dtype=np.int64), chunks_of)
        begin = (np.arange(first[-1], dtype=np.int64) - first[owner]) * chunk
        self.table = np.stack(
            [
                np.array(self.param_addresses, dtype=np.int64),
                np.array([m.data_ptr() for m in mom], dtype=np.int64),
                np.array([r.data_ptr() for r in rms], dtype=np.int64),
                np.array(sizes, dtype=np.int64),
                np.array(sizes, dtype=np.int64),  # stride between accumulator planes
                first[:-1],
                np.array(theta_index, dtype=np.int64),
                np.array([DTYPES[param.dtype] for param in params], dtype=np.int64),  # high half: that of the gradient
            ],
            axis=1,
        )
        self.num_tensors, self.num_chunks = len(sizes), int(first[-1])
        self.chunks = upload(np.stack([owner, begin], axis=1), self.device)
        self.tensors = upload(self.table, self.device)
        self.finished = torch.zeros(self.num_tensors, dtype=torch.int32, device=self.device)
        self.stats = torch.empty(self.num_tensors, self.features.num_stats, device=self.device, dtype=torch.float32)
        self.hidden = self.stats.new_empty(0)
        self.partials, self.hidden_partials = (
            torch.empty(self.num_chunks, columns, device=self.device, dtype=torch.float64)
            for columns in (self.features.num_stats, max(WIDTHS))
        )
        self.grads: Sequence[Tensor] = []
        self.grad_addresses: list[int] = []
        self.grad_table = torch.empty(0)
        self.captured: list[tuple[Tensor, Tensor]] = []  # tables that CUDA graphs read
        self._checked: list[list[Any]] = []
        self._operands: dict[str, list[Tensor]] = {}
        self._accumulate, self._apply = np.zeros((), ACCUMULATE), np.zeros((), APPLY)
        for record in (self._accumulate, self._apply):
            record["num_tensors"], record["num_chunks"] = self.num_tensors, self.num_chunks
            record["state_dtype"] = DTYPES[self.state_dtype]
            for name in ("tensors", "chunks", "partials", "finished"):
                record[name] = getattr(self, name).data_ptr()
        self._apply["partials"] = self.hidden_partials.data_ptr()
        self._accumulate["stats"], self._apply["precision"] = self.stats.data_ptr(), self.precision
        self._accumulate["seed"] = seed
        #: Addresses of AccumulateParams and ApplyParams.
        self.addresses = self._accumulate.ctypes.data, self._apply.ctypes.data

    def set_tensors(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Point the plan to this step's gradients, and to the parameters in case they moved."""
        _check_length("params", len(params), self.num_tensors)
        _check_length("grads", len(grads), self.num_tensors)
        capturing = devices.is_capturing(self.device)  # what is captured has not run: later steps must not count on it
        addresses = list(map(Tensor.data_ptr, params))
        facts = [list(map(fact, tensors)) for tensors in (params, grads) for fact in _FACTS]
        if facts != self._checked or addresses != self.param_addresses:
            for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
                _check(f"params[{i}]", param, tuple(DTYPES), self.sizes[i], self.device)
                _check(f"grads[{i}]", grad, tuple(DTYPES), self.sizes[i], self.device)
            dtypes = [DTYPES[param.dtype] | DTYPES[grad.dtype] << 32 for param, grad in zip(params, grads, strict=True)]
            self.param_addresses, self._checked = addresses, [] if capturing else facts
            self.table[:, 0], self.table[:, 7] = addresses, dtypes
            self.tensors = upload(self.table, self.device)
            self._accumulate["tensors"] = self._apply["tensors"] = self.tensors.data_ptr()
        grad_addresses = list(map(Tensor.data_ptr, grads))
        if grad_addresses != self.grad_addresses:
            self.grad_addresses = [] if capturing else grad_addresses
            self.grad_table = upload(np.array(grad_addresses, dtype=np.int64), self.device)
            self._accumulate["grads"] = self._apply["grads"] = self.grad_table.data_ptr()
        if capturing:
            self.captured.append((self.tensors, self.grad_table))
        self.grads = grads  # alive until the next step

    def _check_grads(self) -> None:
        if not self.grads:
            raise RuntimeError("grads: not known yet; call Plan.set_tensors before accumulate and apply")

    def _rows(self, name: str, value: Tensor, columns: int | None) -> Tensor:
        shape = (self.num_tensors,) if columns is None else (self.num_tensors, columns)
        if value.dtype != torch.float32 or value.device != self.device or tuple(value.shape) != shape:
            raise ValueError(
                f"{name}: expected float32 of shape {shape} on {self.device}, "
                f"got {value.dtype} of shape {tuple(value.shape)} on {value.device}"
            )
        return value.contiguous()

    def _place(self) -> dict[str, int]:
        return {"num_threads": torch.get_num_threads(), **stream_of(self.device)}

    def accumulate(
        self,
        clip_limit: Tensor,
        mom_decays: Sequence[float] = (),
        rms_decays: Sequence[float] = (),
        step: Tensor | None = None,
    ) -> Tensor:
        """Clip gradients, update ``mom`` and ``rms`` in place, and return the statistics ``[T, S]``.

        The next call writes into the same memory.

        Args:
            clip_limit: ``[T]`` float32, bound of the gradient elements.
            mom_decays, rms_decays: the feature set's own when not given.
            step: ``[]`` int64, steps so far; needed for a bfloat16 state.
        """
        self._check_grads()
        self.bind_accumulate(clip_limit, mom_decays, rms_decays)
        self.set_step(step)
        self.module.accumulate(self.backend, self.index, self.addresses[0], **self._place())
        return self.stats

    def set_step(self, step: Tensor | None) -> None:
        """The number of steps so far, ``[]`` int64 on the device, by which a bfloat16 state is rounded."""
        if self.state_dtype == torch.float32:
            return
        if step is None or step.dtype != torch.int64 or step.numel() != 1 or step.device != self.device:
            came = "nothing" if step is None else f"{step.dtype} of shape {tuple(step.shape)} on {step.device}"
            raise ValueError(f"step: a bfloat16 state needs one int64 on {self.device} to be rounded by, got {came}")
        self._accumulate["step"] = step.data_ptr()
        self._operands["step"] = [step]

    def bind_accumulate(
        self, clip_limit: Tensor, mom_decays: Sequence[float] = (), rms_decays: Sequence[float] = ()
    ) -> None:
        """Check the operands of :meth:`accumulate` and keep them for :func:`step`."""
        mom_decays, rms_decays = mom_decays or self.features.mom_decays, rms_decays or self.features.rms_decays
        for name, decays in (("mom_decays", mom_decays), ("rms_decays", rms_decays)):
            if len(decays) != len(getattr(self.features, name)):
                raise ValueError(f"{name}: expected {len(getattr(self.features, name))} decays, got {len(decays)}")
            self._accumulate[name.removesuffix("s")][: len(decays)] = decays
        rows = [self._rows("clip_limit", clip_limit, None)]
        self._accumulate["clip_limit"] = rows[0].data_ptr()
        self._operands["accumulate"] = rows

    def apply(
        self,
        clip_limit: Tensor,
        scale: Tensor,
        shift: Tensor,
        bias: Tensor,
        step_size: Tensor,
        keep: Tensor,
        weights: Tensor,
        magnitude_rate: float,
        feature_clip: float | None,
    ) -> Tensor:
        """Write the parameters and return the mean of the last hidden layer ``[T, width]``.

        The next call writes into the same memory.

        Args:
            clip_limit: ``[T]``, as given to :meth:`accumulate`.
            scale, shift: ``[T, columns]`` column maps.
            bias: ``[T, width]`` folded first-layer bias.
            step_size: ``[T]``, ``lr * step_multiplier * multiplier``.
            keep: ``[T]``, ``1 - lr * weight_decay``.
            weights: ``[num_theta, size]`` from :func:`pack_mlp`.
        """
        self._check_grads()
        self.bind_apply(clip_limit, scale, shift, bias, step_size, keep, weights, magnitude_rate, feature_clip)
        self.module.apply(self.backend, self.index, bias.shape[-1], self.addresses[1], **self._place())
        return self.hidden

    def bind_apply(
        self,
        clip_limit: Tensor,
        scale: Tensor,
        shift: Tensor,
        bias: Tensor,
        step_size: Tensor,
        keep: Tensor,
        weights: Tensor,
        magnitude_rate: float,
        feature_clip: float | None,
    ) -> None:
        """Check the operands of :meth:`apply` and keep them for :func:`step`."""
        columns, width = len(self.features.columns), bias.shape[-1]
        size = packed_weights(self.features.name, width)
        if size == 0:
            raise ValueError(f"bias: kernels exist for MLP widths {WIDTHS}, got {width}; use impl='reference'")
        if weights.dtype != torch.float32 or weights.device != self.device or weights.shape[-1] != size:
            raise ValueError(
                f"weights: expected float32 [num_theta, {size}] on {self.device}, "
                f"got {weights.dtype} {tuple(weights.shape)} on {weights.device}"
            )
        if int(self.table[:, 6].max()) >= weights.reshape(-1, size).shape[0] or int(self.table[:, 6].min()) < 0:
            raise ValueError(f"theta_index: out of range for {weights.reshape(-1, size).shape[0]} rows of weights")
        rows = {
            "clip_limit": self._rows("clip_limit", clip_limit, None),
            "scale": self._rows("scale", scale, columns),
            "shift": self._rows("shift", shift, columns),
            "bias": self._rows("bias", bias, width),
            "step_size": self._rows("step_size", step_size, None),
            "keep": self._rows("keep", keep, None),
            "weights": weights.contiguous(),
        }
        if self.hidden.shape != (self.num_tensors, width):
            self.hidden = self.stats.new_empty(self.num_tensors, width)
        for name, value in rows.items():
            self._apply[name] = value.data_ptr()
        self._apply["hidden"], self._apply["magnitude_rate"] = self.hidden.data_ptr(), magnitude_rate
        self._apply["feature_clip"] = np.inf if feature_clip is None else feature_clip
        self._operands["apply"] = list(rows.values())

    def sweep(self) -> tuple[Tensor, Tensor]:
        """:meth:`accumulate` and :meth:`apply` in one sweep, with the operands bound before; what both return.

        The operands of ``apply`` cannot depend on the statistics of the same sweep.
        """
        self._check_grads()
        for name in ("accumulate", "apply"):
            if name not in self._operands:
                raise RuntimeError(f"operands of {name}: not known yet; call Plan.bind_{name} before sweep")
        self.module.sweep(self.backend, self.index, self.hidden.shape[-1], *self.addresses, **self._place())
        return self.stats, self.hidden


def step(plan: Plan, level: TensorLevel) -> None:
    """begin, accumulate, advance, apply and finish in one call, of operands that were bound before.

    With lagged statistics advance comes before accumulate and sees what ``plan.stats`` holds; accumulate and apply are
    then one sweep.
    """
    plan.module.step(plan.backend, level.address, *plan.addresses, level.lagged, **plan._place())
