"""InBackward: each tensor's step in the backward pass, as soon as its gradient is there.

With lagged statistics a tensor's step needs nothing of the other gradients of the same step, so none has to wait::

    first gradient   begin, advance   losses, statistics of the step before -> LSTM -> what apply is conditioned on
    each gradient    sweep            gradient -> accumulators, statistics; features -> small MLP -> parameter
    step()           finish           gradients that came by another way; what the next LSTM step sees of the MLP

Which tensors take part is settled with the first gradient: those that are trained. A tensor's own first step sees its
own statistics, so as long as one of them had none, all gradients wait for ``step()``, which is then the usual one.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from lopt.hooks import without_grad
from lopt.kernels import devices
from lopt.operands import allowed_dtypes, check_operands
from lopt.published import FactoredStepper
from lopt.rule import Rule
from lopt.rule.features import STATS
from lopt.steppers import KernelStepper
from lopt.warnings import called_from, warn

LearnedOptimizer = Any  # which is above this module
#: Steps that can be taken a tensor at a time.
InBackwardStepper = KernelStepper | FactoredStepper


def check_possible(optimizer: LearnedOptimizer) -> None:
    """Refuse what needs all gradients of a step before the first tensor's step.

    Raises:
        ValueError: says what, and what to do.
    """
    why = None
    spec = optimizer.theta.spec
    stats = getattr(spec, "stats", None)
    if isinstance(spec, Rule) and not spec.tensors_alone:
        why = f"rule {spec.name!r} steps all tensors at once; use step() alone"
    elif not isinstance(spec, Rule) and stats != "lagged":
        why = (
            f"theta has stats={stats!r}: the step of every tensor depends on the gradients of all tensors in the same "
            "step; use a theta with stats='lagged', or step() alone"
        )
    elif optimizer.implementation == "reference":
        why = "impl='reference' keeps every intermediate of all tensors; use the kernels, impl='auto'"
    elif optimizer.on_nonfinite != "ignore":
        why = f"on_nonfinite={optimizer.on_nonfinite!r} looks at all gradients before anything changes; use 'ignore'"
    elif optimizer._is_shared():
        why = (
            "gradients of several ranks meet only after the hooks in which it would step (DistributedDataParallel), or "
            "statistics do (fully_shard); use step() alone, or process_group=None where ranks train models of their own"
        )
    if why is not None:
        raise ValueError(f"step_in_backward: {why}")


def refuse_scaler() -> None:
    """Refuse to be stepped by ``GradScaler``.

    Raises:
        TypeError: it is what calls.
    """
    if called_from("grad_scaler.py"):
        raise TypeError(
            "GradScaler: it unscales gradients after backward, when step_in_backward() has used them; train in bfloat16"
            " without a scaler, or remove() the handle of step_in_backward()"
        )


class InBackward:
    """Steps the parameters of an optimizer in the backward pass; :meth:`remove` ends it."""

    def __init__(self, optimizer: LearnedOptimizer) -> None:
        self.optimizer = optimizer
        self._handles: dict[Tensor, Any] = {}
        self._lock = threading.RLock()  # the backward pass has a thread for each device
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._waiting = False  # gradients of this step wait for step()
        self._begun: InBackwardStepper | None = None
        self._stepper: InBackwardStepper | None = None  # of which the following is known
        self._rows: dict[int, int] = {}  # by id of the parameter
        self._names: list[str] = []  # of the rows
        self._first: list[int] = []  # rows of tensors without a step
        self._told = False
        self.watch()

    def watch(self) -> None:
        """Put hooks on the parameters that are trained and have none."""
        ours = weakref.ref(self)

        def arrived(param: Tensor) -> None:
            here = ours()
            if here is not None:
                here.take(param)

        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad and param not in self._handles:
                    self._handles[param] = param.register_post_accumulate_grad_hook(arrived)

    def remove(self) -> None:
        """From now on gradients wait for ``step()``, as usual.

        Raises:
            RuntimeError: between the backward pass and ``step()``.
        """
        self.check_complete()
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.optimizer._in_backward = None

    def check_complete(self) -> None:
        """Refuse what cannot be done in the middle of a step.

        Raises:
            RuntimeError: a backward pass began a step.
        """
        if self._begun is not None:
            raise RuntimeError("step_in_backward: a backward pass began a step; call step() first, which completes it")

    def forget(self) -> None:
        """The state was replaced: there is no step to be completed."""
        self._begun = self._stepper = None
        self._waiting = False

    # ---- In the backward pass ---------------------------------------------------------------------------------------

    @without_grad
    def take(self, param: Tensor) -> None:
        """The gradient of a parameter is there."""
        with self._lock:
            if self._waiting or param.numel() == 0:
                return
            if self._begun is None:
                self._begin()
            row = self._rows.get(id(param))
            if self._begun is not None and row is not None:
                self._sweep(self._begun, row, param)

    def _begin(self) -> None:
        optimizer = self.optimizer
        check_possible(optimizer)
        optimizer._averages.check()
        stepper = optimizer._ready()
        assert isinstance(stepper, InBackwardStepper)
        params = stepper.tensors.params
        if stepper is not self._stepper:
            self._stepper, self._rows = stepper, {id(param): row for row, param in enumerate(params)}
            groups = enumerate(optimizer.param_groups)
            places = [(f"param_groups[{k}]['params'][{i}]", p) for k, g in groups for i, p in enumerate(g["params"])]
            self._names = [place for place, param in places if id(param) in self._rows]
            self._first = self._without_step(stepper)
        some = [row for row, param in enumerate(params) if param.requires_grad or param.grad is not None]
        self._rest = dict.fromkeys(some)
        if self._rest.keys() & set(self._first):
            self._waiting = True
            return
        if devices.is_capturing(params[0].device):
            raise RuntimeError("step_in_backward: CUDA graphs cannot hold it; capture a step() after backward")
        groups, shared = optimizer.param_groups, optimizer._globals()
        options = optimizer._options.read(groups)
        optimizer._losses.use()
        if optimizer._losses.queued:
            optimizer._deliver()
        self._order(stepper)
        self._before = [] if isinstance(stepper, FactoredStepper) else [value.clone() for value in stepper.tensors.rows]
        self._swept: set[int] = set()
        stepper.begin(some, options, shared, optimizer.total_steps or 0)
        self._begun = stepper

    def _without_step(self, stepper: InBackwardStepper) -> list[int]:
        if isinstance(stepper, FactoredStepper):
            return [row for row, state in enumerate(stepper.tensors.states) if state is None]
        updates = stepper.tensors.rows.updates.tolist()
        return [row for row, state in enumerate(stepper.tensors.states) if state is None or updates[row] == 0]

    def _sweep(self, stepper: InBackwardStepper, row: int, param: Tensor) -> None:
        place, grad = self._names[row], param.grad
        if row in self._swept:
            raise RuntimeError(
                f"step_in_backward: {place} got a second gradient before step(). Each parameter gets one gradient in a "
                "step: call step() after every backward pass, also after one that failed; gradients cannot be "
                "accumulated over several passes, and checkpoint() needs use_reentrant=False"
            )
        if row not in self._rest:
            raise RuntimeError(f"step_in_backward: {place} was frozen when the first gradient of this step came")
        if grad is None:
            return
        allowed = allowed_dtypes(self.optimizer.implementation)
        check_operands(place, param, grad, stepper.tensors.places[row].device, allowed)
        self._order(stepper)
        if self.optimizer.param_groups[stepper.tensors.groups[row]].get("maximize"):
            grad = -grad
        stepper.sweep(row, grad)
        param.grad = None
        self._swept.add(row)

    def _order(self, stepper: InBackwardStepper) -> None:
        """What comes now comes after what this step did before, on whatever stream a gradient came."""
        for device in stepper.devices:
            if device.type == "cuda":
                stream, before = torch.cuda.current_stream(device), self._streams.get(device)
                if before is not None and before != stream:
                    stream.wait_stream(before)
                self._streams[device] = stream

    # ---- In step() --------------------------------------------------------------------------------------------------

    def check_step(self, loss: object) -> None:
        """Refuse what a step in the backward pass cannot follow any more.

        Raises:
            ValueError: a loss.
            TypeError: ``GradScaler`` calls.
        """
        refuse_scaler()
        if loss is not None:
            raise ValueError(
                "loss: the step begins in the backward pass, before this loss would be known; write "
                "observe(train_loss=loss) before loss.backward(), and step() without a loss"
            )

    def complete(self) -> bool:
        """Whether a backward pass began this step, which is then complete.

        Raises:
            RuntimeError: groups or states are not those with which it began; it is given up.
        """
        stepper, groups = self._begun, self.optimizer.param_groups
        if stepper is None:
            return False
        params, state = stepper.tensors.params, self.optimizer.state
        if not stepper.tensors.serve(groups, state):
            self.forget()
            raise RuntimeError(
                "step_in_backward: groups or states were changed between the backward pass and step(); the step cannot "
                "be completed. Change them after step()"
            )
        for row, param in enumerate(params):
            if param.grad is not None and row not in self._swept:
                self._sweep(stepper, row, param)
        self._order(stepper)
        stepper.finish()
        rested = [row for row in self._rest if row not in self._swept]
        if rested and not isinstance(
            stepper, FactoredStepper
        ):  # they counted for the others as in the step before, and are as they were
            for before, now in zip(self._before, stepper.tensors.rows, strict=True):
                now[rested] = before[rested]
            stepper.plan.stats[rested, STATS.index("nonfinite")] = 0.0
        swept = [params[row] for row in sorted(self._swept)]
        self.optimizer._averages.update(swept, swept, state, groups)
        self._begun = None
        self._free()
        self.watch()
        return True

    def _free(self) -> None:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                param.grad = None

    def waited(self) -> None:
        """The usual step was taken, of gradients that waited for it, or came by another way."""
        self._waiting = False
        self._free()
        if isinstance(self.optimizer._stepper, InBackwardStepper):
            self._order(self.optimizer._stepper)
        if self._first and self._stepper is not None and self._stepper is self.optimizer._stepper:
            self._first = self._without_step(self._stepper)
            params = self._stepper.tensors.params
            trained = [self._names[row] for row in self._first if params[row].requires_grad]
            if trained and not self._told:
                self._told = True
                warn(
                    f"step_in_backward: {len(trained)} parameters had no gradient yet, {trained[0]} first. Until all "
                    "had one, gradients wait for step(), and no memory is saved; freeze those that are not used, by "
                    "requires_grad_(False)"
                )
        self.watch()
