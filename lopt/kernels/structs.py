"""The structs of csrc/api/structs.h as NumPy dtypes: how Python hands numbers and addresses to C++.

C++ has the one list of each struct's fields and tells names, formats and offsets; the dtypes here are built from it.
What both languages define, columns of feature sets and statistics and the layout of theta, is compared name by name.
Importing lopt fails where Python does not know a field, or has a column or a tensor of theta elsewhere.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from lopt.kernels.extension import _C, NOT_BUILT, index_of
from lopt.kernels.tables import check_tables
from lopt.rule.inputs import INPUT_SETS
from lopt.rule.matrices import Kind, matrices_of, natural_sizes
from lopt.rule.spec import PRESETS, ThetaSpec

REMEDY = "rebuild the extension: pip install --no-build-isolation --no-deps -e ."

Record = np.ndarray[tuple[()], np.dtype[np.void]]

#: What the tensor level writes and apply reads: one number for each tensor, or one per column or hidden unit, too.
APPLY_INPUTS: dict[str, Literal["one", "columns", "width"]] = {
    "clip_limit": "one",
    "scale": "columns",
    "shift": "columns",
    "bias": "width",
    "step_size": "one",
    "keep": "one",
    "gate": "one",
}
_INPUTS = " ".join(APPLY_INPUTS)

#: The fields that Python fills in, of every struct; their order and place are C++'s.
FILLED = {
    "TensorEntry": "param mom rms scales numel stride first_chunk theta direction matrix_rows turned row offset "
    "param_dtype grad_dtype",
    "Chunk": "tensor begin",
    "AccumulateParams": "tensors grads chunks num_tensors num_chunks clip_limit mom_decay rms_decay step seed "
    "state_dtype partials finished stats",
    "ApplyParams": f"tensors grads chunks num_tensors num_chunks {_INPUTS} weights magnitude_rate feature_clip "
    "precision state_dtype partials finished newton_schulz rank hidden",
    "Spec": "feature_set width mlp_layers lstm_width from_mlp lstm_to_mlp from_lstm linear_skip step_control "
    "tensor_inputs newton_schulz lagged horizon_input valid_advances_step train_loss_decay valid_loss_decay clip_decay "
    "step_multiplier magnitude_rate time_limit clip_multiplier feature_clip mom_decay rms_decay",
    "TensorShape": "numel log_dims is_scalar is_matrix rows is_input is_output is_table whole turned natural aspect",
    "AdvanceParams": "spec theta shapes rows num_tensors step train_loss valid_loss clip from_lstm pending_loss "
    "nonfinite h c feedback initial_scale updates rank stats lr decay total_steps hidden new_train new_valid "
    f"train_value valid_value {_INPUTS} to_lstm finished",
    "FactoredTensor": "param mom rms along across numel outer lines groups length inner along_is_row tile_lines "
    "tile_width first_tile num_tiles sums factors squares scales direction row adam matrices matrix_stride param_dtype "
    "grad_dtype",
    "Tile": "tensor line begin",
    "Piece": "tensor is_along begin",
    "FactoredParams": "tensors grads tiles pieces num_tensors num_tiles num_pieces rule width mom_decay rms_decay "
    "factored_decay magnitude_rate seed state_dtype step weights weight_stride step_size keep controls "
    "measures sums factors squares scales own_weights stats",
    "Problem": "num_layers kinds options outputs tokens places inputs loss batch shapes rows data targets",
    "Run": "problem theta state keys steps valid_every valid_batches loss_every averaged total_steps outer_losses "
    "train_losses",
}


def build_dtypes(structs: Mapping[str, Any]) -> dict[str, np.dtype[np.void]]:
    """The dtypes of ``_C.struct_fields()``.

    Raises:
        ImportError: a struct has a field that Python does not fill in, or lacks one that it does.
    """
    dtypes = {}
    for name, struct in structs.items():
        compiled, known = {field[0] for field in struct["fields"]}, set(FILLED.get(name, "").split())
        if compiled != known:
            raise ImportError(
                f"lopt._C: {name} has the fields {sorted(compiled - known)} that lopt/kernels/structs.py does not fill "
                f"in, and lacks {sorted(known - compiled)}; {REMEDY}"
            )
        names, formats, offsets, counts = zip(*struct["fields"], strict=True)
        dtypes[name] = np.dtype(
            {
                "names": names,
                "formats": [(form, count) if count else form for form, count in zip(formats, counts, strict=True)],
                "offsets": offsets,
                "itemsize": struct["size"],
            }
        )
    missing = set(FILLED) - set(dtypes)
    if missing:
        raise ImportError(f"lopt._C: no struct {sorted(missing)}; {REMEDY}")
    return dtypes


def check_same(what: str, compiled: Sequence[Any], expected: Sequence[Any]) -> None:
    """Raise ImportError, naming the first difference, where two lists differ."""
    if list(compiled) == list(expected):
        return
    pairs = zip([*compiled, *[None] * len(expected)], [*expected, *[None] * len(compiled)], strict=False)
    position, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise ImportError(f"{what}: at position {position} lopt._C has {theirs!r}, Python has {ours!r}; {REMEDY}")


def check_theta(spec: ThetaSpec, layout: Sequence[tuple[str, int, int]]) -> None:
    """Compare the names, order, offsets and sizes of theta's tensors."""
    counts = [math.prod(shape) for shape in spec.shapes().values()]
    offsets = accumulate(counts, initial=0)
    names = [name.replace(".", "_") for name in spec.shapes()]
    expected = list(zip(names, offsets, counts, strict=False))
    check_same("theta's tensors (name, offset, size)", [tuple(item) for item in layout if item[2]], expected)


_dtypes = dict.fromkeys(FILLED, np.dtype([])) if NOT_BUILT else build_dtypes(_C.struct_fields())
ENTRY, CHUNK = _dtypes["TensorEntry"], _dtypes["Chunk"]
ACCUMULATE, APPLY = _dtypes["AccumulateParams"], _dtypes["ApplyParams"]
SPEC, SHAPE, ADVANCE = _dtypes["Spec"], _dtypes["TensorShape"], _dtypes["AdvanceParams"]
FACTORED_TENSOR, TILE, PIECE = _dtypes["FactoredTensor"], _dtypes["Tile"], _dtypes["Piece"]
FACTORED = _dtypes["FactoredParams"]
PROBLEM, RUN = _dtypes["Problem"], _dtypes["Run"]


def spec_record(spec: ThetaSpec) -> Record:
    """The spec as csrc/rule/tensor_lstm.h reads it."""
    record = np.zeros((), SPEC)
    special = {
        "feature_set": index_of(spec.feature_set),
        "width": spec.mlp_width,
        "tensor_inputs": list(INPUT_SETS).index(spec.tensor_inputs),
        "lagged": spec.stats == "lagged",
        "feature_clip": np.inf if spec.feature_clip is None else spec.feature_clip,
    }
    for name in SPEC.names or ():
        if name in ("mom_decay", "rms_decay"):
            decays = getattr(spec, f"{name}s")
            record[name][: len(decays)] = decays
        else:
            record[name] = special[name] if name in special else getattr(spec, name)
    return record


def shape_records(
    shapes: Sequence[Sequence[int]], kinds: Sequence[Kind] | None = None
) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Facts about tensors of these shapes as csrc/rule/tensor_lstm.h reads them (:class:`lopt.rule.inputs.Shapes`)."""
    records = np.zeros(len(shapes), SHAPE)
    matrices = matrices_of(shapes, kinds)
    records["natural"] = natural_sizes(matrices)
    for name in ("rows", "is_input", "is_output", "is_table", "whole", "turned", "aspect"):
        records[name] = [getattr(matrix, name) for matrix in matrices]
    for record, shape in zip(records, shapes, strict=True):
        record["numel"] = math.prod(shape)
        record["log_dims"] = np.log(np.array([*shape[:4], 1, 1, 1, 1][:4], dtype=np.float32)) - np.float32(1.0)
        record["is_scalar"], record["is_matrix"] = len(shape) == 0, len(shape) >= 2
    return records


def check_contracts() -> None:
    """Everything that both languages define, compared; called when lopt is imported."""
    check_tables(_C.rule_tables())
    plain = dataclasses.replace(PRESETS["compact"], linear_skip=False, step_control=False, horizon_input=False)
    single = dataclasses.replace(plain, mlp_layers=1)
    for spec in (*PRESETS.values(), plain, single):
        check_theta(spec, _C.theta_layout(spec_record(spec).ctypes.data))


if not NOT_BUILT:
    check_contracts()
