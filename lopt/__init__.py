"""A hierarchical learned optimizer for PyTorch."""

import lopt.kernels.registration  # noqa: F401  torch.ops.lopt
from lopt.history import History
from lopt.optimizer import LearnedOptimizer
from lopt.rule import PRESETS, Theta, ThetaSpec

__version__ = "0.1.0"

__all__ = ["PRESETS", "History", "LearnedOptimizer", "Theta", "ThetaSpec", "__version__"]
