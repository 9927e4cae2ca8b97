"""A hierarchical learned optimizer for PyTorch."""

from lopt.optimizer import LearnedOptimizer
from lopt.theta import PRESETS, Theta, ThetaSpec

__version__ = "0.1.0"

__all__ = ["PRESETS", "LearnedOptimizer", "Theta", "ThetaSpec", "__version__"]
