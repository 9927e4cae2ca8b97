"""The door to the compiled modules: whether they are there, and which one serves a back end.

``lopt._C`` has the back ends ``cpu`` and ``cuda`` and the unroll engine, ``lopt._sim`` has ``sim``, which only tests
need. Without them lopt is imported all the same, and computes by lopt/rule/reference.py.
"""

import importlib
from functools import cache
from types import ModuleType

from lopt.rule.features import FEATURE_SETS
from lopt.rule.spec import ThetaSpec

BACKENDS = ("cpu", "cuda", "sim")
WIDTHS = (8, 16, 32)
FEATURE_SET_INDEX = {name: index for index, name in enumerate(FEATURE_SETS)}
OWN_INDEX = len(FEATURE_SET_INDEX)  # of sets that are not compiled in
_BUILD = "in its source folder run: {}pip install --no-build-isolation --no-deps -e ."

try:
    from lopt import _C as _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    NOT_BUILT = f"lopt was not built ({error}); {_BUILD.format('')}"
else:
    NOT_BUILT = ""


def module_of(backend: str) -> ModuleType:
    """The compiled module that has the kernels of a back end.

    Raises:
        ValueError: there is no such back end.
        RuntimeError: it is not part of this build; with what to do.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if NOT_BUILT:
        raise RuntimeError(f"backend {backend!r}: {NOT_BUILT}")
    if backend == "cuda" and not _C.has_cuda:
        raise RuntimeError(
            f"backend 'cuda': lopt was built without CUDA; rebuild with LOPT_CUDA=ON. Why: {_C.why_not_cuda}"
        )
    return _sim() if backend == "sim" else _C


@cache
def _sim() -> ModuleType:
    remedy = f"'sim' is for tests; {_BUILD.format('LOPT_SIM=ON ')}"
    try:
        module = importlib.import_module("lopt._sim")
    except ImportError as error:
        raise RuntimeError(f"backend 'sim': it was not built ({error}). {remedy}") from error
    if module.source_sha256 != _C.source_sha256:  # it would read the structs of other sources
        raise RuntimeError(f"backend 'sim': lopt._sim was built from other sources than lopt._C. {remedy}")
    return module


def has_cuda() -> bool:
    """Whether the library was built with nvcc; says nothing about a device."""
    return not NOT_BUILT and _C.has_cuda


def simd_selected() -> str:
    """Instruction set the CPU kernels use."""
    return "no kernels" if NOT_BUILT else _C.simd_selected()


def source_sha256() -> str:
    """SHA-256 of the compiled sources; empty where nothing was built."""
    return "" if NOT_BUILT else _C.source_sha256


def index_of(feature_set: str) -> int:
    """What the kernels know a feature set by."""
    return FEATURE_SET_INDEX.get(feature_set, OWN_INDEX)


def packed_weights(feature_set: str, width: int, layers: int = 2) -> int:
    """Floats in one packed row of MLP weights; 0 where no kernel is compiled in for this feature set and MLP."""
    return 0 if NOT_BUILT or layers != 2 else _C.packed_weights(index_of(feature_set), width)


def is_compiled(spec: ThetaSpec) -> bool:
    """Whether kernels are compiled in for this feature set and MLP."""
    return packed_weights(spec.feature_set, spec.mlp_width, spec.mlp_layers) > 0
