"""Losses of any training loop, from where they are computed or where backward begins."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lopt.integrations.unwrap import need


class LossWatch:
    """What :func:`watch_loss` returns: it watches until :meth:`remove`, or the end of a ``with`` block.

    Args:
        source, optimizer, scale: those of :func:`watch_loss`.
    """

    def __init__(self, source: Any, optimizer: Any, scale: float = 1.0) -> None:
        self._optimizer = need(optimizer, "watch_loss", "name the optimizer that minimises this loss")
        self._scale = scale
        self._total: Tensor | float = 0.0  # of the validation losses since the last step, times their rows
        self._rows = 0.0
        self._owner: Any = None
        self._handles = [
            self._optimizer.register_step_pre_hook(lambda *_: self._hand_over()),
            self._optimizer.register_state_dict_pre_hook(lambda *_: self._hand_over()),
        ]
        if isinstance(source, nn.Module):
            self._handles.append(source.register_forward_hook(self._forward, with_kwargs=True))
        elif callable(getattr(source, "backward", None)) and not isinstance(source, Tensor):
            self._owner, self._backward = source, source.backward
            self._replaced = {name: value for name, value in vars(source).items() if name == "backward"}
            source.backward = self._watched_backward
        else:
            self.remove()
            came = type(source).__name__
            raise TypeError(
                f"watch_loss: expected a module that returns a loss, an Accelerator or a Fabric, got {came}; "
                "a loss itself is given with observe(train_loss=...)"
            )

    def remove(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        if self._owner is not None:
            vars(self._owner).update(self._replaced)
            if not self._replaced:
                del self._owner.backward
        self._handles, self._owner = [], None

    def __enter__(self) -> "LossWatch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()

    def _watched_backward(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._optimizer.observe(train_loss=self._scaled(tensor))
        return self._backward(tensor, *args, **kwargs)

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        loss = loss_in(output, type(module).__name__)
        if loss is None:
            return
        if loss.requires_grad and module.training:
            self._optimizer.observe(train_loss=self._scaled(loss))
            return
        rows = next((x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 0), 1)
        self._total = self._total + self._scaled(loss).to(torch.promote_types(loss.dtype, torch.float32)) * rows
        self._rows += rows

    def _scaled(self, loss: Tensor) -> Tensor:
        loss = loss.detach()
        return loss if self._scale == 1.0 else loss * self._scale

    def _hand_over(self) -> None:
        """The mean of the validation losses so far, as one."""
        if self._rows:
            total, rows = self._total, self._rows
            self._total, self._rows = 0.0, 0.0
            self._optimizer.observe(valid_loss=total / rows)


def loss_in(output: Any, module: str) -> Tensor | None:
    """The loss that a module returned; None where it computed none.

    Raises:
        TypeError: it returned a tensor that is no loss, or a tuple with several that could be one.
    """
    if isinstance(output, Tensor):
        if output.numel() != 1:
            raise TypeError(
                f"watch_loss: {module} returned a tensor of shape {tuple(output.shape)}, expected a loss (one number); "
                "watch the loss module, or a model that computes its loss"
            )
        return output
    if isinstance(output, (tuple, list)):
        found = [x for x in output if isinstance(x, Tensor) and x.numel() == 1]
        if len(found) > 1:
            raise TypeError(
                f"watch_loss: {module} returned {len(found)} tensors of one element; which is the loss? "
                "Watch the loss module, or call observe"
            )
        return found[0] if found else None
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def watch_loss(source: Any, optimizer: Any, *, scale: float = 1.0) -> LossWatch:
    r"""Let a :class:`lopt.LearnedOptimizer` see every loss that ``source`` computes or sends backward.

    Of a *module*, a loss module or a model that returns its loss, a loss with a graph, in training mode, is a training
    loss: the next step sees the mean of those since the last one, each with the same weight. Any other loss is a
    validation loss. Their mean :math:`\sum_i n_i l_i / \sum_i n_i` over all calls until the next step or
    ``state_dict()`` is one validation loss, where :math:`n_i` is the size of the first dimension of the call's first
    tensor: rows, or tokens where they are flattened.

    An *Accelerator* or a *Fabric* tells what its ``backward`` is given, which is a training loss.

    Args:
        source: a ``torch.nn.Module`` that returns the loss, alone, in a tuple with other things, as ``output.loss`` or
            as ``output["loss"]``; or an Accelerator or Fabric. Calls of a model that compute no loss are not counted.
        optimizer: a LearnedOptimizer, or what a trainer wrapped around it. Where a loop has several, each has its own
            ``source``.
        scale: what a loss is multiplied by before it is told: the number of minibatches in a step, where a script
            divides by it before ``fabric.backward``. Accelerate divides by itself, afterwards.

    Returns:
        A handle with ``remove()``, which is a context manager, too.

    Raises:
        TypeError: ``source`` or ``optimizer`` is something else, or, in a call, what a module returned is no loss.

    Example:
        >>> from lopt import LearnedOptimizer
        >>> model, criterion = torch.nn.Linear(4, 1), torch.nn.MSELoss()
        >>> optimizer = LearnedOptimizer(model)
        >>> watch = watch_loss(criterion, optimizer)
        >>> criterion(model(torch.ones(8, 4)), torch.zeros(8, 1)).backward()
        >>> optimizer.step()  # has seen the loss
    """
    return LossWatch(source, optimizer, scale)
