"""The compiled kernels: all that imports ``lopt._C`` or ``lopt._sim``. They know tensors and theta, no optimizer."""

from lopt.kernels.extension import (
    _C,
    BACKENDS,
    FEATURE_SET_INDEX,
    NOT_BUILT,
    WIDTHS,
    has_cuda,
    is_compiled,
    module_of,
    simd_selected,
    source_sha256,
)
from lopt.kernels.factored import MEASURES, FactoredPlan, FactoredSelection, pack_factored, why_no_kernels
from lopt.kernels.gpus import check_gpu
from lopt.kernels.operands import DTYPES, contiguous, pack_mlp
from lopt.kernels.own import CannotCompile, described, own_backend
from lopt.kernels.places import Place, Places
from lopt.kernels.plan import PRECISIONS, Plan, Selection
from lopt.kernels.seen import Operands, Seen, is_number
from lopt.kernels.tensor_level import SHARED, Levels, TensorLevel, apply_inputs, flat_inputs, step

__all__ = [
    "BACKENDS",
    "DTYPES",
    "FEATURE_SET_INDEX",
    "MEASURES",
    "NOT_BUILT",
    "PRECISIONS",
    "SHARED",
    "WIDTHS",
    "_C",
    "CannotCompile",
    "FactoredPlan",
    "FactoredSelection",
    "Levels",
    "Operands",
    "Place",
    "Places",
    "Plan",
    "Seen",
    "Selection",
    "TensorLevel",
    "apply_inputs",
    "check_gpu",
    "contiguous",
    "described",
    "flat_inputs",
    "has_cuda",
    "is_compiled",
    "is_number",
    "module_of",
    "own_backend",
    "pack_factored",
    "pack_mlp",
    "simd_selected",
    "source_sha256",
    "step",
    "why_no_kernels",
]
