"""The compiled kernels: all that imports ``lopt._C`` or ``lopt._sim``. They know tensors and theta, no optimizer."""

from lopt.kernels.extension import (
    _C,
    BACKENDS,
    NOT_BUILT,
    WIDTHS,
    has_cuda,
    is_compiled,
    module_of,
    simd_selected,
    source_sha256,
)
from lopt.kernels.plan import DTYPES, PRECISIONS, Plan, contiguous, feedback, fold_bias, pack_mlp, step
from lopt.kernels.structs import FEATURE_SET_INDEX
from lopt.kernels.tensor_level import SHARED, TensorLevel, apply_inputs

__all__ = [
    "BACKENDS",
    "DTYPES",
    "FEATURE_SET_INDEX",
    "NOT_BUILT",
    "PRECISIONS",
    "SHARED",
    "WIDTHS",
    "_C",
    "Plan",
    "TensorLevel",
    "apply_inputs",
    "contiguous",
    "feedback",
    "fold_bias",
    "has_cuda",
    "is_compiled",
    "module_of",
    "pack_mlp",
    "simd_selected",
    "source_sha256",
    "step",
]
