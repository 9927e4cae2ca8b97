"""Losses from the training loops of other libraries to a :class:`lopt.LearnedOptimizer`.

============================  ==========================================================
``TransformersCallback()``    for ``transformers.Trainer`` and its subclasses
``LightningCallback()``       for ``lightning.pytorch.Trainer``
``watch_loss(source, opt)``   for Accelerate, Fabric, and any loop with a loss module
============================  ==========================================================

A callback's module is imported when the callback is first asked for, with the library that it is for. What is handed
over is the loss of this process, whose mean over all processes the step takes: the mean over the minibatches of a step,
without the factors that a trainer multiplies it by. docs/porting.md has a table of what reaches the optimizer.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lopt.integrations.watch import LossWatch, watch_loss

if TYPE_CHECKING:
    from lopt.integrations.lightning import LightningCallback
    from lopt.integrations.transformers import TransformersCallback

__all__ = ["LightningCallback", "LossWatch", "TransformersCallback", "watch_loss"]

#: Of what is imported late: its module, and what to install for it.
_LATE = {
    "LightningCallback": ("lopt.integrations.lightning", "lightning"),
    "TransformersCallback": ("lopt.integrations.transformers", "transformers accelerate"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, packages = _LATE[name]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lopt"):
            raise
        needs = packages.replace(" ", " and ")
        message = f"lopt.integrations.{name} needs {needs} ({error}); run: pip install {packages}"
        raise ModuleNotFoundError(message, name=error.name) from error
