"""The two device operations: the door to the compiled kernels (lopt/meta/engine.py is that to the unroll engine).

``accumulate`` updates the accumulators of every parameter of every tensor and reduces per-tensor statistics;
``apply`` computes features and the small MLP, writes the parameters and reduces the mean of the last hidden layer. Each
is one call, and on a GPU one launch, for any number of tensors. A :class:`Plan` keeps the tables of addresses between
steps.

Equivalent to ``lopt.reference.accumulate`` and ``lopt.reference.apply`` for each tensor, with two exact rewrites:
MLP inputs that are constant in a tensor are folded into a bias per tensor, and the MLP outputs that only feed the LSTM
are computed once per tensor from the mean hidden vector.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lopt.features import FEATURE_SETS
from lopt.records import ADVANCE, FEATURE_SET_INDEX, SHAPE, SPEC, check_sizes, shape_records, spec_record
from lopt.tensor_lstm import Rows
from lopt.theta import Theta, ThetaSpec

try:
    from lopt import _C
except ImportError as error:  # pragma: no cover
    raise ImportError(
        f"lopt was not built ({error}). In its source folder run: pip install --no-build-isolation --no-deps -e ."
    ) from error

BACKENDS = ("cpu", "cuda", "sim")
WIDTHS = (8, 16, 32)
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

for _facts, _features in zip(_C.feature_sets(), FEATURE_SETS.values(), strict=True):
    _expected = {
        "name": _features.name,
        "columns": len(_features.columns),
        "moments": len(_features.moments),
        "stats": _features.num_stats,
        "num_mom": len(_features.mom_decays),
        "num_rms": len(_features.rms_decays),
    }
    if _facts != _expected:
        raise ImportError(f"lopt._C has feature set {_facts}, lopt/features.py {_expected}: rebuild the extension")


check_sizes(_C.struct_sizes(), {"Spec": SPEC, "TensorShape": SHAPE, "AdvanceParams": ADVANCE})


def has_cuda() -> bool:
    """Whether the library was built with nvcc; says nothing about a device."""
    return _C.has_cuda


def simd_selected() -> str:
    """Instruction set the CPU kernels use."""
    return _C.simd_selected()


def is_compiled(spec: ThetaSpec) -> bool:
    """Whether kernels exist for this feature set and MLP width."""
    return _C.packed_weights(FEATURE_SET_INDEX[spec.feature_set], spec.mlp_width) > 0


def pack_mlp(spec: ThetaSpec, weights: Mapping[str, Tensor]) -> Tensor:
    """MLP weights as the kernels read them, ``[..., size]`` float32 (MlpLayout in csrc/mlp.h).

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
    size = _C.packed_weights(FEATURE_SET_INDEX[spec.feature_set], spec.mlp_width)
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


def _check_length(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{name}: expected {expected} entries, one for each tensor, got {found}")


class Plan:
    """Addresses, sizes and scratch memory for the kernels over one list of tensors.

    Args:
        backend: ``"cpu"``, ``"cuda"``, or ``"sim"`` (the CUDA kernels on the CPU, for tests).
        feature_set: a key of ``FEATURE_SETS``.
        params: contiguous, non-empty float32 or bfloat16 tensors on one device, written by :meth:`apply`.
        mom, rms: contiguous float32 ``[num_mom, numel]`` and ``[num_rms, numel]`` for each; :meth:`accumulate` writes.
        theta_index: for each tensor the row of the MLP weights that drives it; zeros by default.

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
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
        if not params:
            raise ValueError("params: expected at least one tensor, got none")
        if feature_set not in FEATURE_SETS:
            raise ValueError(f"feature_set: expected one of {sorted(FEATURE_SETS)}, got {feature_set!r}")
        if backend == "cuda" and not _C.has_cuda:
            raise RuntimeError("backend 'cuda': lopt was built without CUDA; rebuild with LOPT_CUDA=ON")
        theta_index = [0] * len(params) if theta_index is None else list(theta_index)
        for name, values in (("mom", mom), ("rms", rms), ("theta_index", theta_index)):
            _check_length(name, len(values), len(params))
        self.backend, self.features = backend, FEATURE_SETS[feature_set]
        self.index = FEATURE_SET_INDEX[feature_set]
        self.device = params[0].device
        if self.device.type != ("cuda" if backend == "cuda" else "cpu"):
            raise ValueError(f"params[0]: on {self.device}, which back end {backend!r} cannot reach; use impl='auto'")
        sizes = [param.numel() for param in params]
        decays = len(self.features.mom_decays), len(self.features.rms_decays)
        for i, (param, m, r) in enumerate(zip(params, mom, rms, strict=True)):
            if sizes[i] == 0:
                raise ValueError(f"params[{i}]: empty; leave empty tensors out")
            _check(f"params[{i}]", param, tuple(DTYPES), sizes[i], self.device)
            _check(f"mom[{i}]", m, (torch.float32,), decays[0] * sizes[i], self.device)
            _check(f"rms[{i}]", r, (torch.float32,), decays[1] * sizes[i], self.device)
        self.sizes = sizes
        self.param_dtypes = [DTYPES[param.dtype] for param in params]
        self.param_addresses = [param.data_ptr() for param in params]
        self.keep_alive = (list(mom), list(rms))

        chunks_of = [-(-size // _C.chunk) for size in sizes]
        first = np.concatenate([[0], np.cumsum(chunks_of)]).astype(np.int64)
        owner = np.repeat(np.arange(len(sizes), dtype=np.int64), chunks_of)
        begin = (np.arange(first[-1], dtype=np.int64) - first[owner]) * _C.chunk
        self.table = np.stack(
            [
                np.array(self.param_addresses, dtype=np.int64),
                np.array([m.data_ptr() for m in mom], dtype=np.int64),
                np.array([r.data_ptr() for r in rms], dtype=np.int64),
                np.array(sizes, dtype=np.int64),
                np.array(sizes, dtype=np.int64),  # stride between accumulator planes
                first[:-1],
                np.array(theta_index, dtype=np.int64),
                np.array(self.param_dtypes, dtype=np.int64),  # low half: param_dtype, high half: grad_dtype
            ],
            axis=1,
        )
        self.num_tensors, self.num_chunks = len(sizes), int(first[-1])
        self.chunks = self._upload(np.stack([owner, begin], axis=1))
        self.tensors = self._upload(self.table)
        self.finished = torch.zeros(self.num_tensors, dtype=torch.int32, device=self.device)
        self.grads: list[Tensor] = []
        self.grad_addresses: list[int] = []
        self.grad_table = torch.empty(0)

    def _upload(self, table: np.ndarray) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(table))
        return host.clone() if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)

    def set_tensors(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Point the plan to this step's gradients, and to the parameters in case they moved."""
        _check_length("params", len(params), self.num_tensors)
        _check_length("grads", len(grads), self.num_tensors)
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            _check(f"params[{i}]", param, tuple(DTYPES), self.sizes[i], self.device)
            _check(f"grads[{i}]", grad, tuple(DTYPES), self.sizes[i], self.device)
        addresses = [param.data_ptr() for param in params]
        dtypes = [DTYPES[p.dtype] | DTYPES[g.dtype] << 32 for p, g in zip(params, grads, strict=True)]
        if addresses != self.param_addresses or dtypes != self.param_dtypes:
            self.param_addresses, self.param_dtypes = addresses, dtypes
            self.table[:, 0], self.table[:, 7] = addresses, dtypes
            self.tensors = self._upload(self.table)
        grad_addresses = [grad.data_ptr() for grad in grads]
        if grad_addresses != self.grad_addresses:
            self.grad_addresses = grad_addresses
            self.grad_table = self._upload(np.array(grad_addresses, dtype=np.int64))
        self.grads = list(grads)  # alive until the next step

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
        on_gpu = self.device.type == "cuda"
        return {
            "num_threads": torch.get_num_threads(),
            "device": (self.device.index or 0) if on_gpu else 0,
            "stream": torch.cuda.current_stream(self.device).cuda_stream if on_gpu else 0,
        }

    def accumulate(
        self, clip_limit: Tensor, mom_decays: Sequence[float] = (), rms_decays: Sequence[float] = ()
    ) -> Tensor:
        """Clip gradients, update ``mom`` and ``rms`` in place, and return the statistics ``[T, S]``.

        Args:
            clip_limit: ``[T]`` float32, bound of the gradient elements.
            mom_decays, rms_decays: the feature set's own when not given.
        """
        self._check_grads()
        mom_decays, rms_decays = mom_decays or self.features.mom_decays, rms_decays or self.features.rms_decays
        for name, decays in (("mom_decays", mom_decays), ("rms_decays", rms_decays)):
            if len(decays) != len(getattr(self.features, name)):
                raise ValueError(f"{name}: expected {len(getattr(self.features, name))} decays, got {len(decays)}")
        clip_limit = self._rows("clip_limit", clip_limit, None)
        stats = torch.empty(self.num_tensors, self.features.num_stats, dtype=torch.float32, device=self.device)
        partials = torch.empty(self.num_chunks, self.features.num_stats, dtype=torch.float64, device=self.device)
        _C.accumulate(
            backend=self.backend,
            feature_set=self.index,
            tensors=self.tensors.data_ptr(),
            grads=self.grad_table.data_ptr(),
            chunks=self.chunks.data_ptr(),
            num_tensors=self.num_tensors,
            num_chunks=self.num_chunks,
            clip_limit=clip_limit.data_ptr(),
            mom_decays=mom_decays,
            rms_decays=rms_decays,
            partials=partials.data_ptr(),
            finished=self.finished.data_ptr(),
            stats=stats.data_ptr(),
            **self._place(),
        )
        return stats

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

        Args:
            clip_limit: ``[T]``, as given to :meth:`accumulate`.
            scale, shift: ``[T, columns]`` column maps.
            bias: ``[T, width]`` folded first-layer bias.
            step_size: ``[T]``, ``lr * step_multiplier * multiplier``.
            keep: ``[T]``, ``1 - lr * weight_decay``.
            weights: ``[num_theta, size]`` from :func:`pack_mlp`.
        """
        self._check_grads()
        columns, width = len(self.features.columns), bias.shape[-1]
        size = _C.packed_weights(self.index, width)
        if size == 0:
            raise ValueError(f"bias: kernels exist for MLP widths {WIDTHS}, got {width}; use impl='reference'")
        if weights.dtype != torch.float32 or weights.device != self.device or weights.shape[-1] != size:
            raise ValueError(
                f"weights: expected float32 [num_theta, {size}] on {self.device}, "
                f"got {weights.dtype} {tuple(weights.shape)} on {weights.device}"
            )
        if int(self.table[:, 6].max()) >= weights.reshape(-1, size).shape[0] or int(self.table[:, 6].min()) < 0:
            raise ValueError(f"theta_index: out of range for {weights.reshape(-1, size).shape[0]} rows of weights")
        rows = [
            self._rows("clip_limit", clip_limit, None),
            self._rows("scale", scale, columns),
            self._rows("shift", shift, columns),
            self._rows("bias", bias, width),
            self._rows("step_size", step_size, None),
            self._rows("keep", keep, None),
            weights.contiguous(),
        ]
        hidden = torch.empty(self.num_tensors, width, dtype=torch.float32, device=self.device)
        partials = torch.empty(self.num_chunks, width, dtype=torch.float64, device=self.device)
        _C.apply(
            backend=self.backend,
            feature_set=self.index,
            width=width,
            tensors=self.tensors.data_ptr(),
            grads=self.grad_table.data_ptr(),
            chunks=self.chunks.data_ptr(),
            num_tensors=self.num_tensors,
            num_chunks=self.num_chunks,
            clip_limit=rows[0].data_ptr(),
            scale=rows[1].data_ptr(),
            shift=rows[2].data_ptr(),
            bias=rows[3].data_ptr(),
            step_size=rows[4].data_ptr(),
            keep=rows[5].data_ptr(),
            weights=rows[6].data_ptr(),
            magnitude_rate=magnitude_rate,
            feature_clip=float("inf") if feature_clip is None else feature_clip,
            partials=partials.data_ptr(),
            finished=self.finished.data_ptr(),
            hidden=hidden.data_ptr(),
            **self._place(),
        )
        return hidden


class TensorLevel:
    """Everything at tensor level on the CPU, compiled: ``lopt.tensor_lstm.advance`` but for rounding.

    Args:
        theta: its spec must have compiled kernels.
        shapes: of the parameter tensors.
        rows: stacked state of the tensors, float32; written in place.
    """

    def __init__(self, theta: Theta, shapes: Sequence[Sequence[int]], rows: Rows) -> None:
        spec, num_tensors = theta.spec, len(shapes)
        columns = len(spec.features.columns)
        self.lr, self.decay = torch.empty(num_tensors), torch.empty(num_tensors)
        self.clip_limit, self.step_size, self.keep = (torch.empty(num_tensors) for _ in range(3))
        self.scale, self.shift = torch.empty(num_tensors, columns), torch.empty(num_tensors, columns)
        self.bias = torch.empty(num_tensors, spec.mlp_width)
        self._inputs = theta.flatten().float().contiguous(), spec_record(spec), shape_records(shapes), rows
        flat, spec_, shapes_, _ = self._inputs
        self._record = record = np.zeros((), ADVANCE)
        record["spec"], record["theta"], record["shapes"] = spec_.ctypes.data, flat.data_ptr(), shapes_.ctypes.data
        record["num_tensors"] = num_tensors
        for name in ("lr", "decay", "clip_limit", "scale", "shift", "bias", "step_size", "keep"):
            record[name] = getattr(self, name).data_ptr()
        for name, value in zip(("h", "c", "feedback", "initial_scale", "updates"), rows, strict=True):
            record[name] = value.data_ptr()

    def begin(self, shared: Mapping[str, Tensor]) -> None:
        """Before accumulate: ``clip_limit``. ``shared`` holds the state of all tensors, which is written in place."""
        for name in ("step", "train_loss", "valid_loss", "clip", "from_lstm", "pending_loss", "nonfinite"):
            self._record[name] = shared[name].data_ptr()
        _C.begin(self._record.ctypes.data)

    def advance(self, stats: Tensor, total_steps: float) -> None:
        """Between accumulate and apply: from ``stats``, ``lr`` and ``decay`` the inputs of apply."""
        self._record["stats"], self._record["total_steps"] = stats.data_ptr(), total_steps
        _C.advance(self._record.ctypes.data)

    def finish(self, hidden: Tensor) -> None:
        """After apply: what the next LSTM step sees of ``hidden`` ``[T, width]``."""
        self._record["hidden"] = hidden.data_ptr()
        _C.finish(self._record.ctypes.data)
