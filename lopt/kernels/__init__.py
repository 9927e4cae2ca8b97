"""The compiled kernels: everything that imports ``lopt._C``. They know tensors and theta, and no optimizer."""

from lopt import _C
from lopt.kernels.extension import BACKENDS, WIDTHS, has_cuda, is_compiled, simd_selected
from lopt.kernels.plan import DTYPES, PRECISIONS, Plan, contiguous, feedback, fold_bias, pack_mlp, step
from lopt.kernels.structs import FEATURE_SET_INDEX
from lopt.kernels.tensor_level import SHARED, TensorLevel, apply_inputs

__all__ = [
    "BACKENDS",
    "DTYPES",
    "FEATURE_SET_INDEX",
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
    "pack_mlp",
    "simd_selected",
    "step",
]
