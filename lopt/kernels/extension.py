"""The door to the compiled module ``lopt._C``: whether it is there, what was built, and that Python agrees with it."""

from lopt.kernels.structs import ACCUMULATE, ADVANCE, APPLY, FEATURE_SET_INDEX, SHAPE, SPEC, check_sizes
from lopt.rule.features import FEATURE_SETS
from lopt.rule.spec import ThetaSpec

try:
    from lopt import _C
except ImportError as error:  # pragma: no cover
    raise ImportError(
        f"lopt was not built ({error}). In its source folder run: pip install --no-build-isolation --no-deps -e ."
    ) from error

BACKENDS = ("cpu", "cuda", "sim")
WIDTHS = (8, 16, 32)

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
        raise ImportError(f"lopt._C has feature set {_facts}, lopt/rule/features.py {_expected}: rebuild the extension")


check_sizes(
    _C.struct_sizes(),
    {
        "AccumulateParams": ACCUMULATE,
        "ApplyParams": APPLY,
        "Spec": SPEC,
        "TensorShape": SHAPE,
        "AdvanceParams": ADVANCE,
    },
)


def has_cuda() -> bool:
    """Whether the library was built with nvcc; says nothing about a device."""
    return _C.has_cuda


def simd_selected() -> str:
    """Instruction set the CPU kernels use."""
    return _C.simd_selected()


def is_compiled(spec: ThetaSpec) -> bool:
    """Whether kernels exist for this feature set and MLP width."""
    return _C.packed_weights(FEATURE_SET_INDEX[spec.feature_set], spec.mlp_width) > 0
