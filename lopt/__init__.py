"""A hierarchical learned optimizer for PyTorch."""

from typing import TYPE_CHECKING, Any

import lopt.kernels.registration  # noqa: F401  torch.ops.lopt
from lopt.history import History
from lopt.optimizer import LearnedOptimizer
from lopt.rule import PRESETS, Column, FeatureSet, Theta, ThetaSpec

if TYPE_CHECKING:
    from lopt.evaluation.evaluate import evaluate
    from lopt.meta.train import meta_train

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Column",
    "FeatureSet",
    "History",
    "LearnedOptimizer",
    "Theta",
    "ThetaSpec",
    "__version__",
    "evaluate",
    "meta_train",
]


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for: training with the optimizer needs none of it."""
    if name == "evaluate":
        from lopt.evaluation.evaluate import evaluate

        return evaluate
    if name == "meta_train":
        from lopt.meta.train import meta_train

        return meta_train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
