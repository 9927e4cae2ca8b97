"""Plan: the two device operations over one list of tensors.

``accumulate`` updates the accumulators of every parameter of every tensor and reduces per-tensor statistics;
``apply`` computes features and the small MLP, writes the parameters and reduces the mean of the last hidden layer. Each
is one call, and on a GPU one launch, for any number of tensors. Of matrices that are treated as a whole ``apply``
writes the directions; they are orthogonalised, batched by shape, and a third call, ``write``, takes them to the
parameters. A :class:`Plan` keeps the tables of addresses between steps.

Equivalent to ``lopt.rule.reference.accumulate`` and ``apply`` for each tensor, with two exact rewrites: MLP inputs that
are constant in a tensor are folded into a bias per tensor, and the MLP outputs that only feed the LSTM are computed
once per tensor from the mean hidden vector.

One file, since it is one class.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lopt.kernels import devices
from lopt.kernels.devices import Table, stream_of
from lopt.kernels.directions import Batch, Directions
from lopt.kernels.extension import WIDTHS, index_of, module_of
from lopt.kernels.operands import DTYPES, STATE_DTYPES, check_length, check_operand
from lopt.kernels.own import resolved, size_of_weights
from lopt.kernels.seen import Operands
from lopt.kernels.structs import ACCUMULATE, APPLY, APPLY_INPUTS, CHUNK, ENTRY
from lopt.rule.codes import CODES, blocks_of
from lopt.rule.features import feature_set as table_of
from lopt.rule.matrices import Matrix

PRECISIONS = ("exact", "high", "fast")


class Selection:
    """Some of a plan's tensors, in ascending order, with the tables over them that kernels read.

    Args:
        rows: positions of the tensors.
        entries, chunks: structs of them and of their chunks.
        batches: those of their directions that torch orthogonalises.
        device: of the plan.
    """

    def __init__(
        self, rows: np.ndarray, entries: np.ndarray, chunks: np.ndarray, batches: list[Batch], device: torch.device
    ) -> None:
        self.num_tensors, self.num_chunks, self.batches = len(rows), len(chunks), batches
        self.rows, self.chunks, self.tensors = (Table(table, device) for table in (rows, chunks, entries))
        self.grad_table = Table(np.zeros(len(rows), dtype=np.int64), device)


class Plan:
    """Addresses, sizes and scratch memory for the kernels over one list of tensors.

    Args:
        backend: ``"cpu"``, ``"cuda"``, or ``"sim"`` (the CUDA kernels on the CPU, for tests).
        feature_set: its name.
        params: contiguous tensors on one device, each of one of :data:`DTYPES`, written by :meth:`apply`.
        mom, rms: contiguous ``[num_mom, numel]`` and ``[num_rms, numel]`` for each, all float32, all bfloat16, or
            int8 and uint8 with ``scales``; :meth:`accumulate` writes, and rounds what is narrow stochastically
            (csrc/rule/rounding.h). None for a tensor that has no state yet: :meth:`hold` gives it one, before it is
            selected. Without state it may be empty.
        theta_index: for each tensor the row of the MLP weights that drives it; zeros by default.
        precision: of the small MLP in the CUDA kernels. ``"exact"`` is plain float32; ``"high"`` splits a float32 into
            two halves for tensor cores and keeps its accuracy; ``"fast"`` rounds to 11 bits.
        seed: chooses, with the step and the position of an element, how a narrow state is rounded.
        state_dtype, device: of ``mom`` and ``rms``, and of everything; needed where all tensors have no state yet, so
            that it is not known which parameters will be trained.
        width, layers: of the MLP, needed where its kernels are not compiled in (:mod:`lopt.kernels.own`).
        scales: of accumulators in 8 bits, for each tensor contiguous uint8 ``[num_mom + num_rms, blocks]``
            (:mod:`lopt.rule.codes`).

    Tables over tensors (``stats``, ``hidden``, the operands of :meth:`apply`) have a row for each of the R tensors; the
    operations read and write those of the selected ones.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, device, size or layout, named with its position.
    """

    def __init__(
        self,
        backend: str,
        feature_set: str,
        params: Sequence[Tensor],
        mom: Sequence[Tensor | None],
        rms: Sequence[Tensor | None],
        theta_index: Sequence[int] | None = None,
        precision: str = "high",
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        width: int | None = None,
        layers: int = 2,
        scales: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.module = module_of(backend)
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
        if not params:
            raise ValueError("params: expected at least one tensor, got none")
        features = table_of(feature_set)
        theta_index = [0] * len(params) if theta_index is None else list(theta_index)
        scales = [None] * len(params) if scales is None else scales
        for name, values in (("mom", mom), ("rms", rms), ("theta_index", theta_index), ("scales", scales)):
            check_length(name, len(values), len(params))
        given = [m.dtype for m in mom if m is not None]
        self.state_dtype = state_dtype or (given[0] if given else torch.float32)
        self.backend = resolved(backend, feature_set, width, layers, self.state_dtype)
        self.features, self.layers = features, layers
        self.index, self.precision = index_of(feature_set), PRECISIONS.index(precision)
        self.device = device or params[0].device
        if self.device.type != ("cuda" if backend == "cuda" else "cpu"):
            raise ValueError(f"params[0]: on {self.device}, which back end {backend!r} cannot reach; use impl='auto'")
        self.sizes = [param.numel() for param in params]
        self.num_rows = len(self.sizes)
        self.all_entries = np.zeros(self.num_rows, ENTRY)
        self.all_entries["numel"] = self.all_entries["stride"] = self.sizes
        self.all_entries["theta"], self.all_entries["row"] = theta_index, np.arange(self.num_rows)
        self.chunks_of = -(-np.array(self.sizes, dtype=np.int64) // self.module.chunk)
        self.keep_alive: dict[int, tuple[Tensor, ...]] = {}
        for i, (param, m, r) in enumerate(zip(params, mom, rms, strict=True)):
            if m is not None and r is not None:
                if self.sizes[i] == 0:
                    raise ValueError(f"params[{i}]: empty; leave empty tensors out")
                check_operand(f"params[{i}]", param, tuple(DTYPES), self.sizes[i], self.device)
                self.hold(i, m, r, scales[i])

        num_chunks = int(self.chunks_of.sum())
        self.finished = torch.zeros(self.num_rows, dtype=torch.int32, device=self.device)
        self.stats = torch.zeros(self.num_rows, self.features.num_stats, device=self.device, dtype=torch.float32)
        self.hidden = self.stats.new_empty(0)
        self.partials, self.hidden_partials = (
            torch.empty(num_chunks, columns, device=self.device, dtype=torch.float64)
            for columns in (self.features.num_stats, max(*WIDTHS, width or 0))
        )
        self.directions: Directions | None = None
        self._here = None if self.device.type == "cuda" else stream_of(self.device)  # there is no other
        self.captured: list[list[Tensor | None]] = []  # tables that CUDA graphs read
        self._operands: dict[str, list[Tensor]] = {}
        self._accumulate, self._apply = np.zeros((), ACCUMULATE), np.zeros((), APPLY)
        for record in (self._accumulate, self._apply):
            record["state_dtype"] = STATE_DTYPES.get(self.state_dtype, 0)
            record["finished"] = self.finished.data_ptr()
        self._accumulate["partials"] = self.partials.data_ptr()
        self._apply["partials"] = self.hidden_partials.data_ptr()
        self._accumulate["stats"], self._apply["precision"] = self.stats.data_ptr(), self.precision
        self._accumulate["seed"] = seed
        #: Addresses of AccumulateParams and ApplyParams.
        self.addresses = self._accumulate.ctypes.data, self._apply.ctypes.data
        self.select(None)

    def treat_whole(
        self, matrices: Sequence[Matrix], iterations: int, rank: Tensor, parts: Mapping[int, int] | None = None
    ) -> None:
        """Orthogonalise the directions of those of the R tensors that may be, between :meth:`apply` and :meth:`write`.

        Args:
            matrices: of the R tensors.
            iterations: of Newton-Schulz; with 0 nothing is treated as a whole.
            rank: ``[R]`` float32, of the directions, written.
            parts: see :class:`Directions`.
        """
        if not iterations or not any(matrix.whole for matrix in matrices):
            return
        exact, native = self.precision == PRECISIONS.index("exact"), self.module.native_side(self.backend)
        dtype = torch.float32 if self.state_dtype == torch.float32 else torch.bfloat16
        self.directions = Directions(matrices, iterations, dtype, self.device, exact, native, parts)
        self.all_entries["direction"] = self.directions.addresses
        self.all_entries["matrix_rows"] = [
            0 if row in self.directions.parts else matrix.rows for row, matrix in enumerate(matrices)
        ]
        self.all_entries["turned"] = [matrix.turned for matrix in matrices]
        self._apply["newton_schulz"], self._apply["rank"] = iterations, rank.data_ptr()
        self.rank = rank
        self.select(None)

    def hold(self, row: int, mom: Tensor, rms: Tensor, scales: Tensor | None = None) -> None:
        """Give tensor ``row`` its accumulators."""
        dtypes: dict[str, tuple[torch.dtype, ...]] = {}
        decays = {"mom": len(self.features.mom_decays), "rms": len(self.features.rms_decays)}
        for name, tensor in (("mom", mom), ("rms", rms)):
            if self.state_dtype == torch.int8:
                dtypes[name] = (CODES[name].dtype,)
            else:
                dtypes[name] = (self.state_dtype,) if self.state_dtype in STATE_DTYPES else tuple(STATE_DTYPES)
            check_operand(f"{name}[{row}]", tensor, dtypes[name], decays[name] * self.sizes[row], self.device)
            self.all_entries[row][name] = tensor.data_ptr()
        self.keep_alive[row] = mom, rms
        if self.state_dtype != torch.int8:
            return
        count = sum(decays.values()) * blocks_of(self.sizes[row])
        if scales is None:
            raise ValueError(f"scales[{row}]: accumulators in 8 bits need {count} of them, got nothing")
        check_operand(f"scales[{row}]", scales, (torch.uint8,), count, self.device)
        self.all_entries[row]["scales"] = scales.data_ptr()
        self.keep_alive[row] = mom, rms, scales

    def select(self, rows: Sequence[int] | None) -> None:
        """Let the operations work on these tensors, in ascending order; None selects all that are not empty."""
        self.use(self.selection(rows))

    def selection(self, rows: Sequence[int] | None) -> Selection:
        """What :meth:`select` takes."""
        chosen = np.flatnonzero(self.all_entries["numel"]) if rows is None else np.array(rows, dtype=np.int64)
        chunks_of = self.chunks_of[chosen]
        first = np.concatenate([[0], np.cumsum(chunks_of)]).astype(np.int64)
        chunks = np.zeros(int(first[-1]), CHUNK)
        chunks["tensor"] = owner = np.repeat(np.arange(len(chosen)), chunks_of)
        chunks["begin"] = (np.arange(len(chunks)) - first[owner]) * self.module.chunk
        entries = self.all_entries[chosen]
        entries["first_chunk"] = first[:-1]
        batches = [] if self.directions is None else self.directions.batches_of(chosen.tolist())
        return Selection(chosen, entries, chunks, batches, self.device)

    def use(self, selection: Selection) -> None:
        """Let the operations work on these tensors."""
        self.selected = selection
        self.num_tensors, self.num_chunks = selection.num_tensors, selection.num_chunks
        self.rows, self.chunks, self.tensors = selection.rows, selection.chunks, selection.tensors
        self.grad_table = selection.grad_table
        if self.directions is not None:
            self.directions.batches = selection.batches
        self.grads: Sequence[Tensor] = []
        self._sent = False  # whether the device has seen the tables
        for record in (self._accumulate, self._apply):
            record["num_tensors"], record["num_chunks"] = self.num_tensors, self.num_chunks
            record["tensors"], record["chunks"] = self.tensors.address, self.chunks.address

    def set_tensors(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Check this step's gradients of the selected tensors, and the parameters, which may have moved, and point the
        plan to them."""
        check_length("params", len(params), self.num_tensors)
        check_length("grads", len(grads), self.num_tensors)
        entries = self.tensors.host
        for name, tensors in (("params", params), ("grads", grads)):
            for i, (tensor, numel) in enumerate(zip(tensors, entries["numel"].tolist(), strict=True)):
                check_operand(f"{name}[{i}]", tensor, tuple(DTYPES), numel, self.device)
        for name, tensors in (("param_dtype", params), ("grad_dtype", grads)):
            entries[name] = [DTYPES[tensor.dtype] for tensor in tensors]
        entries["param"] = list(map(Tensor.data_ptr, params))
        self.grad_table.host[:] = list(map(Tensor.data_ptr, grads))
        self._send(grads, True, True)

    def point(self, operands: Operands, grads: Sequence[Tensor]) -> None:
        """Point the plan to what ``operands`` saw: the selected parameters and these gradients, which are as those of
        the last call of :meth:`set_tensors`, but perhaps elsewhere."""
        self._send(grads, *operands.write(self.tensors.host_address, self.grad_table.host_address))

    def _send(self, grads: Sequence[Tensor], moved: bool, fresh: bool) -> None:
        """Let kernels see the tables of parameters, if they ``moved``, and of gradients, if they are ``fresh``."""
        self.grads = grads  # alive until the next step
        capturing = devices.is_capturing(self.device)  # what is captured has not run: later steps must not count on it
        if not self._sent or (moved and not self.tensors.on_host):
            self._accumulate["tensors"] = self._apply["tensors"] = self.tensors.send()
        if not self._sent or (fresh and not self.grad_table.on_host):
            self._accumulate["grads"] = self._apply["grads"] = self.grad_table.send()
        self._sent = not capturing
        if capturing:
            self.captured.append([table.copy for table in (self.tensors, self.grad_table, self.chunks, self.rows)])

    def _check_bound(self, operation: str) -> None:
        if not self.grads:
            raise RuntimeError("grads: not known yet; call Plan.set_tensors before accumulate and apply")
        if operation not in self._operands:
            raise RuntimeError(f"operands of {operation}: not known yet; call Plan.bind_{operation} before")

    def _rows(self, name: str, value: Tensor, columns: int | None) -> Tensor:
        shape = (self.num_rows,) if columns is None else (self.num_rows, columns)
        if value.dtype != torch.float32 or value.device != self.device or tuple(value.shape) != shape:
            raise ValueError(
                f"{name}: expected float32 of shape {shape} on {self.device}, "
                f"got {value.dtype} of shape {tuple(value.shape)} on {value.device}"
            )
        return value.contiguous()

    def place(self) -> tuple[int, int, int]:
        """Threads, device and stream of a call."""
        return (torch.get_num_threads(), *(self._here or stream_of(self.device)))

    def accumulate(
        self,
        clip_limit: Tensor,
        mom_decays: Sequence[float] = (),
        rms_decays: Sequence[float] = (),
        step: Tensor | None = None,
    ) -> Tensor:
        """Clip gradients, update ``mom`` and ``rms`` in place, and return the statistics ``[R, S]``.

        The next call writes into the same memory.

        Args:
            clip_limit: ``[R]`` float32, bound of the gradient elements.
            mom_decays, rms_decays: the feature set's own when not given.
            step: ``[]`` int64, steps so far; needed for a narrow state.
        """
        self.bind_accumulate(clip_limit, mom_decays, rms_decays)
        self.set_step(step)
        return self.run_accumulate()

    def run_accumulate(self) -> Tensor:
        """:meth:`accumulate` with the operands that were bound before."""
        self._check_bound("accumulate")
        self.module.accumulate(self.backend, self.index, self.addresses[0], *self.place())
        return self.stats

    def set_step(self, step: Tensor | None) -> None:
        """The number of steps so far, ``[]`` int64 on the device, by which a narrow state is rounded."""
        if self.state_dtype == torch.float32:
            return
        if step is None or step.dtype != torch.int64 or step.numel() != 1 or step.device != self.device:
            came = "nothing" if step is None else f"{step.dtype} of shape {tuple(step.shape)} on {step.device}"
            raise ValueError(f"step: a narrow state needs one int64 on {self.device} to be rounded by, got {came}")
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
        self, inputs: Mapping[str, Tensor], weights: Tensor, magnitude_rate: float, feature_clip: float | None
    ) -> Tensor:
        """Write the parameters and return the mean of the last hidden layer ``[R, width]``.

        The next call writes into the same memory.

        Args:
            inputs: float32, named as :data:`lopt.kernels.structs.APPLY_INPUTS`: ``clip_limit`` ``[R]``, as given to
                :meth:`accumulate`; ``scale``, ``shift`` ``[R, columns]``, the column maps; ``bias`` ``[R, width]``,
                the folded first-layer bias; ``step_size`` ``[R]``, ``lr * step_multiplier * multiplier``; ``keep``
                ``[R]``, what is left of the parameter after weight decay; ``gate`` ``[R]``, read by :meth:`write`.
            weights: ``[num_theta, size]`` from :func:`pack_mlp`.
        """
        self.bind_apply(inputs, weights, magnitude_rate, feature_clip)
        return self.run_apply()

    def run_apply(self) -> Tensor:
        """:meth:`apply` with the operands that were bound before."""
        self._check_bound("apply")
        self.module.apply(self.backend, self.index, self.hidden.shape[-1], self.addresses[1], *self.place())
        return self.hidden

    def write(self) -> None:
        """Directions of matrices that are treated as a whole, as :meth:`apply` wrote them -> parameters."""
        if not self.module.write(self.backend, self.addresses[1], False, *self.place()):
            self.write_large()

    def write_large(self, elsewhere: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """What :meth:`write` does with matrices that the kernels leave to torch.

        Args:
            elsewhere: orthogonalises ``directions.parts``, from ``gate`` and ``step_size``, ``[R]``.
        """
        assert self.directions is not None
        self.directions.orthogonalise(self._inputs["gate"], self.rank, self._inputs["step_size"])
        if elsewhere is not None:
            elsewhere(self._inputs["gate"], self._inputs["step_size"])
        self.module.write(self.backend, self.addresses[1], True, *self.place())

    def bind_apply(
        self, inputs: Mapping[str, Tensor], weights: Tensor, magnitude_rate: float, feature_clip: float | None
    ) -> None:
        """Check the operands of :meth:`apply` and keep them for :func:`step`."""
        width = inputs["bias"].shape[-1]
        size = size_of_weights(self.features.name, width, self.layers)
        if size == 0:
            raise ValueError(f"bias: kernels exist for MLP widths {WIDTHS}, got {width}; use impl='reference'")
        if weights.dtype != torch.float32 or weights.device != self.device or weights.shape[-1] != size:
            raise ValueError(
                f"weights: expected float32 [num_theta, {size}] on {self.device}, "
                f"got {weights.dtype} {tuple(weights.shape)} on {weights.device}"
            )
        index = self.all_entries["theta"]
        if int(index.max()) >= weights.reshape(-1, size).shape[0] or int(index.min()) < 0:
            raise ValueError(f"theta_index: out of range for {weights.reshape(-1, size).shape[0]} rows of weights")
        sizes = {"one": None, "columns": len(self.features.columns), "width": width}
        operands = {name: self._rows(name, inputs[name], sizes[kind]) for name, kind in APPLY_INPUTS.items()}
        operands["weights"] = weights.contiguous()
        if self.hidden.shape != (self.num_rows, width):
            self.hidden = self.stats.new_zeros(self.num_rows, width)
        for name, value in operands.items():
            self._apply[name] = value.data_ptr()
        self._apply["hidden"], self._apply["magnitude_rate"] = self.hidden.data_ptr(), magnitude_rate
        self._apply["feature_clip"] = np.inf if feature_clip is None else feature_clip
        self._operands["apply"], self._inputs = list(operands.values()), operands

    def sweep(self) -> tuple[Tensor, Tensor]:
        """:meth:`accumulate` and :meth:`apply` in one sweep, with the operands bound before; what both return.

        The operands of ``apply`` cannot depend on the statistics of the same sweep.
        """
        self._check_bound("accumulate")
        self._check_bound("apply")
        self.module.sweep(self.backend, self.index, self.hidden.shape[-1], *self.addresses, *self.place())
        return self.stats, self.hidden
