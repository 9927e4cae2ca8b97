"""LearnedOptimizer: a ``torch.optim.Optimizer`` whose update rule is a small neural network.

One file, since torch wants one class: what a user touches, a third of it docstrings. Its parts stand beside it.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lopt.average import Averages
from lopt.distributed import Ranks, Shares, check_same, is_sharded, refuse_zero
from lopt.hooks import hook, without_grad
from lopt.implementations import check_arguments, choose_implementation, implementation_of_rule, run_eagerly
from lopt.in_backward import InBackward, check_possible
from lopt.kernels import devices
from lopt.losses import Loss, Losses
from lopt.operands import allowed_dtypes, as_loss, as_weight, check_gradients, check_params
from lopt.options import Options, check_group, check_total_steps, descending, describe
from lopt.published import FactoredStepper, RuleStepper, check_options, check_total_steps_of, stepper_of
from lopt.roles import keep_roles, kind_in_groups, roles_of_model
from lopt.rule import Rule, Theta
from lopt.scaling import holds_float16, unscaled
from lopt.state import SHARED, check_state, holds_shared, init_state, open_theta, restore_state, sample, share_state
from lopt.steppers import KernelStepper, ReferenceStepper
from lopt.tensors import Control, StackedTensors, Tensors
from lopt.warnings import warn

_NO_PARTS = (
    "state_dtype=torch.int8 has a scale for each 128 neighbouring parameters, which ranks with parts of a tensor would "
    "cut; use torch.bfloat16"
)

Stepper = ReferenceStepper | KernelStepper | RuleStepper | FactoredStepper


class LearnedOptimizer(Optimizer):
    r"""Trains parameters with the learned optimizer that ``theta`` describes.

    For every parameter tensor an LSTM sees statistics of gradient, accumulators and parameter, and the training and
    validation loss; for every parameter a small MLP sees its features and the LSTM's output, and writes

    .. math:: w \leftarrow (1 - s \cdot wd)\, w - s \cdot d \cdot e^{c m}

    with the MLP's outputs *direction* d and *magnitude* m, and the step s of the tensor, in which ``lr`` is a factor.
    Of hidden matrices, ``default`` brings the singular values of all these directions together towards one, as far as a
    learned gate of the tensor opens (:mod:`lopt.rule.orthogonal`).
    There is nothing to tune: ``lr`` is a multiplier that stays 1, and weight decay is there for those who want it.
    Except with ``paper`` and rules of others, nothing else moves what has no gradient: a tensor rests at once, a
    parameter after some 180 steps, or from the beginning. A tensor with a parameter that is NaN or infinite rests too,
    and no other notices.

    Args:
        params: a model; or parameters, named ones, or groups of them, as for any torch optimizer. A model's embeddings
            and head are known by their types, named ones by their names; of others a learned gate judges by their
            place. Groups may have their own ``lr``, ``weight_decay`` and ``maximize``; ``role``, ``"input"``
            (embeddings), ``"hidden"`` or ``"output"`` (heads), and ``transposed``, True where a matrix is stored
            ``[in, out]``, each for all parameters of the group or a list with one for each. Frozen parameters may be
            anything, until a step meets a gradient of theirs. Others and their gradients are float32, bfloat16 or
            float16, in any mixture; a float16 one that an update takes beyond its range is infinite, as with torch's
            optimizers.
        theta: a :class:`Theta`, the path of a theta file, or the name of shipped weights.
        total_steps: number of steps planned, an optional hint; a theta without horizon input ignores it. A state dict
            holds it, and loading one without an own ``total_steps`` restores it.
        lr: multiplier of the learned step. A group in which it is at most .05 in the first step (and above 0) was
            written for another optimizer: its multiplier is lr / (the highest lr of the group so far), which it keeps
            as ``peak_lr``, and a warning says so. Exceptions: a scheduler of torch's that started from more than .05,
            and an lr that is a tensor, which is taken as it is.
        weight_decay: decoupled decay, scaled by the learned step of the tensor as AdamW's is by its learning rate:
            customary values (.01 to .1) mean what they mean there.
        impl: ``"auto"`` picks ``"cuda"`` or ``"cpu"`` by the device of each parameter. ``"reference"`` is plain
            PyTorch, in float64 if the parameters are; ``"sim"`` runs the CUDA kernels on the CPU, for tests. An
            explicit choice never falls back to another.
        on_nonfinite: what to do about NaN and Inf in gradients. ``"ignore"`` (default): a NaN counts as zero, an Inf as
            the clip limit, both are counted in :attr:`nonfinite_gradients`. ``"skip"`` leaves out the step, ``"raise"``
            raises FloatingPointError before anything changes; both read a value back from the device.
        precision: of the small MLP on a GPU, where large matrices are orthogonalised in bfloat16.
            ``"high"`` (default) has the accuracy of float32; ``"fast"`` rounds
            features, weights and hidden units to 11 bits, as TF32 does. Elsewhere it has no effect.
        state_dtype: of the accumulators. ``torch.bfloat16`` halves their memory, ``torch.int8`` quarters it: codes of 8
            bits with a scale for each 128 parameters (:mod:`lopt.rule.codes`); not with sharded parameters. Both are
            rounded stochastically, so that slow accumulators do not stall, by bits that depend on step and position
            only: runs repeat bit for bit.
        maximize: climb instead of descending. Gradients are negated into new memory of their size, and so are losses if
            all groups maximize.
        average: keep an average of the iterates, in ``state[p]["average"]`` (:mod:`lopt.average`), for
            :meth:`averaged`: for runs that are not told their number of steps, and cannot shrink them towards an end.
        process_group: the ranks that train this model together. ``"auto"`` is the default group of
            ``torch.distributed``, if it is initialised by the first loss or step. Where ranks hold the same parameters
            (DistributedDataParallel), losses are averaged over them; where they hold parts (``fully_shard``,
            tensor parallelism), the statistics of tensors are summed, too. None: this rank is alone.
        sharded_state: of parameters that all ranks hold (DistributedDataParallel), each rank steps some rows and keeps
            their state alone, as stage 1 of ZeRO does; then ranks exchange the rows. State dicts are as with
            ``fully_shard``, which shards parameters and gradients, too.
        check_ranks: after every so many steps, compare over the ranks what must be the same on all, and raise
            RuntimeError if it is not; 0 for never.
        options: those of torch's other optimizers (``foreach``, ``betas``, ...) are accepted where they are None or
            False.

    Raises:
        ValueError, TypeError, RuntimeError: the operand, what was expected, what came, and what to do.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = LearnedOptimizer(model.parameters())
        >>> loss = model(torch.ones(8, 4)).square().mean()
        >>> loss.backward()
        >>> opt.step(loss=loss)
        >>> opt.implementation
        'cpu'

    Losses reach it through ``step(loss=...)``, ``step(closure)`` or :meth:`observe`; without any it works too.

    ``state[p]`` is ``{"mom": [K, *shape], "rms": [K', *shape], "lstm": {"h", "c", "feedback", "scale", "updates",
    "rank"}}`` (``mom`` and ``rms`` in ``state_dtype`` and where the parameter is, as DTensors where it is one; the rest
    in float32, the same on all ranks; with ``torch.int8`` also ``scales``, and ``rms`` is uint8), created in the first
    step. What all tensors share is in every param group, as the same tensors, with theta's name
    and checksum: groups may be removed, added and exchanged. State dicts resume bit for bit.

    Parameters may be on several devices (pipeline stages, ``device_map``): each is stepped where it is, by accumulators
    there; the tensor level is on the device of the first one, and small tables of numbers for each tensor travel.

    On CUDA a step is five launches, with lagged statistics four, and waits for nothing; where matrices are treated as
    wholes one more, and torch's products for each of their shapes. After one step outside, ``torch.cuda.graph`` can
    hold it; the weight of ``average`` is then a constant.
    A replay reads losses, gradients and ``lr`` anew where they are tensors, and takes
    numbers of Python as they were. The graph writes the optimizer's memory: no step with gradients of other parameters,
    and no ``load_state_dict``, between replays.

    ``torch.compile`` leaves a step as it is: in a compiled training step the graph ends before it and goes on after it.

    docs/porting.md says what becomes of a training script written for another optimizer. ``OneCycleLR`` and
    ``CyclicLR`` need ``cycle_momentum=False``, since there is no momentum to cycle.

    Source: arXiv:2009.11243.
    """

    def __init__(
        self,
        params: Iterable[Any] | torch.nn.Module,
        theta: Theta | str | os.PathLike[str] = "default",
        *,
        total_steps: int | None = None,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        impl: str = "auto",
        on_nonfinite: str = "ignore",
        precision: Literal["high", "fast"] = "high",
        state_dtype: torch.dtype = torch.float32,
        maximize: bool = False,
        average: bool = False,
        process_group: Any = "auto",
        sharded_state: bool = False,
        check_ranks: int = 0,
        **options: Any,
    ) -> None:
        refuse_zero()
        choices = {"impl": impl, "on_nonfinite": on_nonfinite, "precision": precision, "state_dtype": state_dtype}
        check_arguments(choices, total_steps, options)
        if isinstance(params, torch.nn.Module):
            roles = roles_of_model(params)
            params = [{"params": list(params.parameters()), "role": list(roles.values())}]
        self.theta, self._identity = open_theta(theta)
        self._total_steps, self._told = total_steps, total_steps is not None
        self.on_nonfinite = on_nonfinite
        self.precision = precision
        self.state_dtype = state_dtype
        self.impl = impl
        self._stepper: Stepper | None = None
        self._weights: dict[str, Tensor] = {}
        self._losses = Losses()
        self._options = Options()
        self._averages = Averages(average)
        self._ranks = Ranks(process_group)
        self._shares = Shares(self._ranks) if sharded_state else None
        self._check_ranks, self._until_check = check_ranks, check_ranks
        self._in_backward: InBackward | None = None
        self._probed = False
        if isinstance(self.theta.spec, Rule):
            check_options(self.theta.spec, state_dtype=state_dtype, sharded_state=sharded_state)
        if sharded_state and state_dtype == torch.int8:
            raise ValueError(f"sharded_state: {_NO_PARTS}")
        if sharded_state and impl == "reference":
            raise ValueError("sharded_state: impl='reference' keeps whole states; use impl='auto'")
        options = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "peak_lr": None}
        hook(type(self))
        super().__init__(params, {**options, "role": None, "transposed": False, "averaged_steps": 0})
        self.implementation = self._choose(self._first_param().device)
        run_eagerly(type(self))

    # ---- Parameters -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, at any time; the LSTM sees the new tensors from the next step on."""
        position = sum(len(group["params"]) for group in self.param_groups)
        if self._in_backward is not None:
            self._in_backward.check_complete()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, self._total_steps)
            by_rule = (
                isinstance(self.theta.spec, Rule) and self.impl == "auto"
            )  # which the reference steps where need be
            allowed = allowed_dtypes("reference" if by_rule else self.impl)
            check_params(group["params"], self._first_param(), allowed, position)
            self._check_devices(group["params"])
            if any(map(is_sharded, group["params"])):
                if self.state_dtype == torch.int8:
                    raise ValueError(f"params: got DTensors; {_NO_PARTS}")
                if self.impl == "reference" and not isinstance(self.theta.spec, Rule):
                    raise TypeError("params: impl='reference' steps whole tensors, got DTensors; use impl='auto'")
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        if group.get("theta_checksum") != self._identity["theta_checksum"]:
            for name in SHARED:  # of another optimizer, which this group came from
                group.pop(name, None)
        group.update(self._identity, total_steps=self._total_steps)
        if holds_shared(self.param_groups):
            self._globals()
        self._settle()
        self._stepper, self._options = None, Options()
        if self._in_backward is not None:
            self._in_backward.watch()

    def _first_param(self) -> Tensor:
        """The first parameter that is trained, whose device and precision are those of the tensor level."""
        params = [param for group in self.param_groups for param in group["params"]]
        if not params:
            raise ValueError("params: expected at least one parameter, got none")
        return cast(Tensor, next((param for param in params if param.requires_grad), params[0]))

    def _home(self) -> torch.device:
        """The device of the tensor level: that of the first parameter, and it stays there while others are."""
        held = next((group["pending_loss"].device for group in self.param_groups if "pending_loss" in group), None)
        params = (param for group in self.param_groups for param in group["params"])
        stays = held is not None and any(param.requires_grad and param.device == held for param in params)
        return held if held is not None and stays else self._first_param().device

    def _check_devices(self, params: Iterable[Tensor]) -> None:
        for device in {param.device for param in params if param.requires_grad} - {self._home()}:
            self._backend(device)

    def _backend(self, device: torch.device) -> str:
        """What computes steps of parameters on a device.

        Raises:
            ValueError: there are no kernels for it.
        """
        if isinstance(self.theta.spec, Rule):
            return self.impl  # what that means is found for all parameters at once
        return self.implementation if self._home() == device else self._choose(device)

    def _choose(self, device: torch.device) -> str:
        """What ``impl`` means for parameters on a device, of a rule of others for the parameters that there are."""
        spec = self.theta.spec
        if isinstance(spec, Rule):
            return implementation_of_rule(self.impl, spec, [p for group in self.param_groups for p in group["params"]])
        return choose_implementation(self.impl, device, spec, self.state_dtype)

    def _state_device(self, param: Tensor) -> torch.device:
        """Where the state of a parameter is, or will be."""
        held = self.state[param].get("mom") if param in self.state else None
        if held is not None:
            return cast(torch.device, held.device)
        if param.device != sample(self._theta_weights()).device:
            self._backend(param.device)
        return param.device

    # ---- State ------------------------------------------------------------------------------------------------------

    def _theta_weights(self) -> dict[str, Tensor]:
        """Theta where the tensor level is, float64 for float64 parameters and float32 otherwise."""
        if self._stepper is None:  # trainers move models after their optimizers were made
            home = self._home()
            dtype = torch.float64 if self._first_param().dtype == torch.float64 else torch.float32
            held = sample(self._weights) if self._weights else None
            if held is None or (held.device, held.dtype) != (home, dtype):
                made_for = getattr(self, "implementation", "reference")
                if made_for != "reference" and (made_for == "cuda") != (home.type == "cuda"):
                    self.implementation = self._choose(home)
                self._weights = self.theta.to(home, dtype).tensors
        return self._weights

    def _globals(self) -> dict[str, Any]:
        """param_groups[0], with the state in it that all tensors share, as in every other group."""
        return share_state(self.param_groups, self.theta.spec, self._theta_weights())

    @property
    def total_steps(self) -> int | None:
        """Number of steps planned, or None; a state dict holds it."""
        return self._total_steps

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        check_total_steps(value)
        inner = getattr(self, "optimizer", self)  # Fabric's wrappers are of this class, and have no attributes
        inner._total_steps, inner._told = value, value is not None
        for group in self.param_groups:
            group["total_steps"] = value

    @property
    def nonfinite_gradients(self) -> Tensor:
        """Number of NaN and Inf gradient elements met so far, a tensor on the device."""
        return cast(Tensor, self._globals()["nonfinite"][0])

    @property
    def nonfinite_parameters(self) -> Tensor:
        """Number of tensors with NaN or Inf among their parameters, in all steps together, a tensor on the device.

        Such a tensor rests for the step: nothing of it is written, and no other tensor notices.
        """
        return cast(Tensor, self._globals()["nonfinite"][1])

    def _accumulator_dtype(self, like: Tensor) -> torch.dtype:
        """``state_dtype``, and float64 in place of float32 for float64 parameters."""
        return like.dtype if self.state_dtype == torch.float32 else self.state_dtype

    def _ready(self) -> Stepper:
        """What makes the steps; made anew when parameters, groups or, by somebody's hands, the state changed.

        Raises:
            ValueError: theta needs the number of steps, and nobody said it.
        """
        if isinstance(self.theta.spec, Rule):
            check_total_steps_of(self.theta.spec, self._total_steps)
        if self._stepper is None or not self._stepper.tensors.serve(self.param_groups, self.state):
            self._settle()
            self._stepper = None
            self._check_capture()
            weights = self._theta_weights()
            dtype, rule = self._accumulator_dtype(sample(weights)), isinstance(self.theta.spec, Rule)
            kept: Any = (self.param_groups, self.state, self.theta.spec, weights, dtype, self._shares)
            if rule:
                self.implementation = self._choose(self._home())
                self._stepper = stepper_of(self.implementation, Tensors(*kept), self.theta)
                return self._stepper
            tensors = StackedTensors(*kept)
            if self.implementation == "reference":
                self._stepper = ReferenceStepper(tensors, self.theta)
            else:
                self._stepper = KernelStepper(self._backend, tensors, self.theta, self.precision, self._ranks)
                self._losses.level = self._stepper.level
                if self._stepper.exchange is not None:
                    self._stepper.exchange.deliver = self._deliver
        return self._stepper

    def _settle(self) -> None:
        """Complete the state of sharded parameters, a collective; otherwise there is nothing to do.

        Raises:
            RuntimeError: a backward pass began a step, which ``step()`` completes.
        """
        if self._in_backward is not None:
            self._in_backward.check_complete()
        if isinstance(self._stepper, KernelStepper):
            self._stepper.settle()

    def _check_capture(self) -> None:
        if devices.is_capturing(self._first_param().device):
            raise RuntimeError(
                "CUDA graph: these tensors had no step yet, and tables cannot be made during capture; "
                "take one step with gradients of the same parameters before"
            )

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        state: dict[str, Any] = super().__getstate__()
        kept = ["theta", "on_nonfinite", "precision", "state_dtype", "impl", "implementation"]
        kept += ["_identity", "_total_steps", "_told", "_losses", "_options", "_averages", "_ranks", "_shares"]
        kept += ["_check_ranks", "_until_check", "_probed"]
        return {**state, **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._stepper, self._weights = None, {}
        self.__dict__.setdefault("_in_backward", None)  # load_state_dict comes here too, and ends nothing
        hook(type(self))
        super().__setstate__(state)
        run_eagerly(type(self))

    def __repr__(self) -> str:
        head = f"{type(self).__name__} (theta={self._identity['theta']!r}, total_steps={self._total_steps}"
        hidden = {"params", "param_names", *SHARED, *self._identity, "total_steps"}
        return "\n".join([head, *describe(self.param_groups, hidden), ")"])

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer. With sharded parameters it is a collective: all ranks call it, each gets its part,
        and ``torch.distributed.checkpoint`` saves them.

        Once some parameter has a state, every trainable one is in it: those that had no gradient yet with the state
        that they will begin with, as ``torch.distributed.checkpoint`` expects.
        """
        self._settle()
        if self._ranks.group is not None and any(
            is_sharded(self._part(p)) for g in self.param_groups for p in g["params"]
        ):
            shared = self._globals()
            self._ranks.average_losses(shared)  # whichever rank's are saved, all get them
            self._losses.waiting = float(shared["pending_loss"][1]) > 0
        some = any("mom" in state for state in self.state.values())
        params = [param for group in self.param_groups for param in group["params"] if param.requires_grad]
        untouched = [param for param in params if some and not self.state.get(param)]
        self.state.update({param: self._initial(param) for param in untouched})
        try:
            return super().state_dict()
        finally:
            for param in untouched:
                del self.state[param]

    def _part(self, param: Tensor) -> Tensor:
        """A parameter as it is stepped."""
        return param if self._shares is None else self._shares.part(param)

    def _initial(self, param: Tensor) -> dict[str, Any]:
        """The state with which a parameter begins."""
        weights, part = self._theta_weights(), self._part(param)
        dtype, kind = self._accumulator_dtype(sample(weights)), kind_in_groups(param, self.param_groups)
        return {**init_state(self.theta.spec, weights, part, dtype, kind), **self._averages.initial(part)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; the state gets this optimizer's dtypes, whatever the dtype of the parameters.

        ``total_steps`` is taken from it, unless this optimizer was given its own: another one is kept, with a warning.

        Raises:
            ValueError: it was written by another optimizer, or with another theta; nothing was changed.
        """
        source: dict[str, Any] = {}

        def check(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:  # after all other pre-hooks
            check_state(state_dict, self.param_groups, self.theta.spec, self._theta_weights(), self._part)
            state_dict = {**state_dict, "param_groups": keep_roles(state_dict["param_groups"], self.param_groups)}
            source.update(state_dict)
            ours = {index for group in state_dict["param_groups"] for index in group["params"]}
            # torch would cast the state of each tensor to the parameter's dtype, and take its time for it.
            return {**state_dict, "state": {k: v for k, v in state_dict["state"].items() if k not in ours}}

        def restore(_: Optimizer) -> None:  # before all other post-hooks
            spec, weights = self.theta.spec, self._theta_weights()
            dtype = self._accumulator_dtype(sample(weights))
            restore_state(source, self.param_groups, self.state, spec, weights, dtype, self._part)
            self._take_up()

        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _take_up(self) -> None:
        """Follow what was loaded into the groups."""
        told = next((group["total_steps"] for group in self.param_groups if group.get("total_steps")), None)
        if self._told and told not in (None, self._total_steps):
            warn(
                f"total_steps: the state dict was written with {told}, this optimizer was made with "
                f"{self._total_steps}, which it keeps; leave total_steps out to go on as before"
            )
        elif not self._told:
            self._total_steps = told
        for group in self.param_groups:
            group.update(self._identity, total_steps=self._total_steps)
        self._stepper, self._options, self._probed = None, Options(), False
        if self._in_backward is not None:
            self._in_backward.forget()
        self._losses.follow(self._globals() if holds_shared(self.param_groups) else None)

    # ---- What it does ----------------------------------------------------------------------------------------------

    def controls(self) -> dict[Tensor, Control]:
        """What the last step did to every parameter tensor that took part; :class:`lopt.History` keeps it over a run.

        ``step_size`` is what AdamW's learning rate would be for the tensor in this step, NaN where it rested; ``gate``
        the share of its direction that was orthogonalised, None where it is not treated as a matrix; ``matrix`` what
        the tensor is to the model. Tensors on the device, copies; nothing is waited for. Empty before the first step
        and after :meth:`load_state_dict`.

        Example:
            >>> model = torch.nn.Linear(4, 2)
            >>> opt = LearnedOptimizer(model)
            >>> model(torch.ones(8, 4)).square().mean().backward()
            >>> opt.step()
            >>> 0 < float(opt.controls()[model.weight].step_size) < 0.1
            True
        """
        stepper = self._stepper
        if stepper is None:
            return {}
        tensors, found = stepper.tensors, {}
        for param, row, size, gate in zip(tensors.selected_params, tensors.selected, *stepper.decided, strict=True):
            matrix = stepper.matrices[row]
            found[param] = Control(size, gate if matrix.whole else None, matrix)
        return found

    # ---- Average ----------------------------------------------------------------------------------------------------

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which parameters are the averages of their iterates; afterwards they are as before, bit for bit.

        Raises:
            RuntimeError: the optimizer was made without ``average=True``, or a step is taken inside.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> opt = LearnedOptimizer(model, average=True)
            >>> with opt.averaged():
            ...     loss = model(torch.ones(8, 4)).square().mean()
        """
        return self._averages.in_place([p for group in self.param_groups for p in group["params"]], self.state)

    # ---- Losses -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(
        self,
        train_loss: float | Tensor | None = None,
        valid_loss: float | Tensor | None = None,
        *,
        weight: float | Tensor = 1.0,
    ) -> None:
        r"""Tell the optimizer a loss, from wherever it is known.

        The next step sees the mean :math:`\sum_i w_i l_i / \sum_i w_i` of the training losses observed since the last
        one, so micro-batches need no special care; they win over the loss of a closure or of ``step(loss=...)``. Losses
        of one optimizer must have one meaning: undo what a trainer did to the loss for gradient accumulation, and give
        the validation loss the reduction of the training loss (both a mean over rows, or both a sum over as many).

        A validation loss is one validation update at once; the paper gives one every 10 steps. Take 256 rows for it or
        more, and others each time: what is noise in it looks like overfitting. For ``compact`` one above the first
        counts as the first. It is compared with training losses, and does nothing without any.

        A non-finite loss counts as none given; that is decided on the device.

        On several ranks (``process_group``), give the losses of the rank: the step takes the mean over all, of training
        losses with the weights of all ranks. A validation loss may also come from some ranks alone; those that came
        since the last step count as one, their mean.

        Args:
            train_loss, valid_loss: numbers, or tensors of one element.
            weight: of ``train_loss`` among those of one step, such as the number of rows of a micro-batch.

        Raises:
            ValueError: a loss is not a scalar, or a weight is negative.
        """
        part = as_weight(weight, sample(self._theta_weights()))
        train, valid = self._loss("train_loss", train_loss), self._loss("valid_loss", valid_loss)
        self._losses.note(train, valid)
        self._losses.waiting |= train is not None
        self._write(train, valid, part)

    def _write(self, train: Loss, valid: Loss = None, weight: Loss = 1.0) -> None:
        shared, weights = self._globals(), self._theta_weights()
        if valid is not None and self._ranks.group is not None:
            self._losses.queue(shared, weights, valid)
            valid = None
        self._losses.write(self.implementation, self.theta, weights, shared, train, valid, weight)

    def _deliver(self) -> None:
        """Let the tensor level know validation losses that waited for those of other ranks."""
        shared = self._globals()
        total, count = shared["pending_valid"]
        self._losses.write(self.implementation, self.theta, self._theta_weights(), shared, None, total / count)
        shared["pending_valid"].zero_()
        self._losses.queued = False

    def _meet(self, stepper: Stepper, grads: list[Tensor], loss: Loss, told: bool) -> Loss:
        """What a step begins with where there are other ranks: losses of all in place of this one's.

        Returns:
            The loss that is still to be told.
        """
        shared, tensors = self._globals(), stepper.tensors
        if tensors.sharded and isinstance(stepper, KernelStepper):
            return loss  # it goes with the statistics
        if not self._ranks.met:
            same = [] if tensors.sharded else [*tensors.params, *grads]  # over the ranks
            self._ranks.meet(same, (), shared["pending_loss"].device)
        if self._ranks.group is not None and told:
            self._write(loss)
            loss = None
            self._ranks.average_losses(shared)
            self._losses.queued = True
        if self._losses.queued and (told or self._ranks.group is None):  # one rank's alone wait for those of the others
            self._deliver()
        return loss

    def _loss(self, name: str, loss: object) -> Loss:
        """A loss to minimise: a number, or a tensor on the device whose value is not looked at."""
        found = as_loss(name, loss, sample(self._theta_weights()))
        if found is None or not all(group.get("maximize") for group in self.param_groups):
            return found
        return -found

    @property
    def _step_supports_amp_scaling(self) -> bool:  # torch's name: what GradScaler does with gradients is up to it
        return holds_float16(self.param_groups)

    # ---- The step ---------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None, *, loss: float | Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any], *, loss: float | Tensor | None = None) -> Any: ...
    @without_grad
    def step(self, closure: Any = None, *, loss: float | Tensor | None = None) -> Any:
        """One update of all parameters that have a gradient.

        Args:
            closure: evaluates the model, calls backward, and returns the loss; its loss is used.
            loss: the training loss of this step, if there is no closure or it returns None. Losses that were observed
                since the last step win over it, and over the closure's.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError, TypeError: a gradient, a loss or an option cannot be used; nothing was changed.
        """
        if closure is not None and not callable(closure):
            came = type(closure).__name__
            raise TypeError(f"closure: expected a function or None, got {came}; give a loss as step(loss=...)")
        self._averages.check()
        if self._probed:
            self._probed = False
            self.state.clear()  # nothing has begun
        if self._in_backward is not None:
            self._in_backward.check_step(loss)
        scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))  # of GradScaler
        if found_inf is not None and bool(found_inf):
            return None
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
            if loss is not None and result is not None:
                raise ValueError("loss: given beside a closure that returns a loss, too; pass only one of them")
            loss = result if loss is None else loss
        if self._in_backward is None:
            self._update(loss, scale)
        elif not self._in_backward.complete():
            self._update(None)
            self._in_backward.waited()
        return result

    def _update(self, loss: Any, scale: Tensor | None = None) -> None:
        """One step, of the gradients that are there, ``scale`` times too large."""
        observed = None if self._losses.waiting else self._loss("loss", loss)
        stepper = self._ready()
        operands = stepper.tensors.operands
        grads, others, unchecked = operands.look()
        if unchecked:
            if stepper.tensors.moved():
                self._stepper = None
                stepper = self._ready()
                operands = stepper.tensors.operands
                grads, others, _ = operands.look()
            check_gradients(self.param_groups, self._state_device, allowed_dtypes(self.implementation))
            operands.accept()
        options = self._options.read(self.param_groups)
        if scale is not None:
            grads = unscaled(grads, scale)
        if grads and self.on_nonfinite != "ignore":
            home = stepper.tensors.home
            bad = torch.stack([torch.logical_not(torch.isfinite(grad)).sum().to(home) for grad in grads]).sum()
            if stepper.tensors.sharded:
                self._ranks.sum(bad)
            if int(bad) > 0:
                if self.on_nonfinite == "raise":
                    raise FloatingPointError(f"gradients hold {int(bad)} NaN or Inf elements; nothing was changed")
                self._globals()["nonfinite"][0] += bad
                return
        self._losses.note(observed)
        if not grads:
            self._write(observed)
            return
        if others or stepper.tensors.foreseen:
            self._check_capture()
            stepper.select()
            self._probed = self._is_probe(grads, stepper.tensors.sharded)
            if self._probed:
                for param in stepper.tensors.selected_params:
                    self.state[param] = self._initial(param)
                return
        told = observed is not None or self._losses.waiting
        self._losses.use()
        if self._ranks.group is not None or self._losses.queued:
            observed = self._meet(stepper, grads, observed, told)
        tensors, shared, steps = stepper.tensors, self._globals(), self.total_steps or 0
        if self._options.maximize:
            grads = descending(grads, tensors.selected_groups, self.param_groups)
            operands.replace(grads)
        if isinstance(stepper, KernelStepper):
            stepper.step(tensors.selected_params, grads, options, shared, steps, observed, scale is not None)
            self._finish(tensors)
            return
        with torch.autocast(tensors.home.type, enabled=False):  # in case the whole loop runs under autocast
            self._write(observed)
            stepper.step(tensors.selected_params, grads, options, shared, steps)
        self._finish(tensors)

    def _is_shared(self) -> bool:
        """Whether other ranks train these parameters, or hold parts of them."""
        params = (param for group in self.param_groups for param in group["params"])
        return self._ranks.group is not None or any(map(is_sharded, params))

    def step_in_backward(self) -> InBackward:
        """From now on step every parameter in the backward pass, as soon as its gradient is there, and free it.

        So only some gradients are in memory at a time. It needs a theta with ``stats="lagged"``, and is the usual step
        bit for bit (products of large matrices may round otherwise, where several of one shape are computed together),
        if every trained parameter gets one gradient in each step. ``step()`` stays in the loop, after ``backward()``:
        it completes the step. The loss must be known before::

            handle = optimizer.step_in_backward()
            for x, y in data:
                loss = loss_function(model(x), y)
                optimizer.observe(train_loss=loss)
                loss.backward()
                optimizer.step()

        As long as some trained parameter had no step yet, gradients wait for ``step()``. One that gets no gradient in
        a step stays as it is, and counts for the others as in the step before. Parameters are frozen and unfrozen
        between steps only. ``step()`` frees all gradients. Copies of the optimizer, and what is unpickled, step as
        usual, until this is called. Nothing can look at all gradients of a step: no clipping by norm, no accumulation
        over several passes, no ``GradScaler``, no DistributedDataParallel.

        Returns:
            A handle: ``handle.remove()`` brings back the usual step.

        Raises:
            ValueError: theta, or an option, needs all gradients of a step before it begins.

        Example:
            >>> from lopt import Theta
            >>> model = torch.nn.Linear(4, 1)
            >>> opt = LearnedOptimizer(model, Theta.init("compact").with_spec(stats="lagged"))
            >>> handle = opt.step_in_backward()
        """
        check_possible(self)
        if self._in_backward is None:
            self._in_backward = InBackward(self)
        return self._in_backward

    def _is_probe(self, grads: Sequence[Tensor], sharded: bool) -> bool:
        """Whether ``torch.distributed.checkpoint`` takes this step, to see what state there is: the first one, with
        nothing but zeros for gradients and with ``lr=0``. It must leave nothing behind."""
        rates = [group["lr"] for group in self.param_groups]
        if any((isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0 for lr in rates):
            return False
        if int(self._globals()["step"]) > 0:
            return False
        count = torch.stack([torch.count_nonzero(grad) for grad in grads]).sum()
        if sharded:  # ranks have other parts of them
            self._ranks.sum(count)
        return int(count) == 0

    def _finish(self, tensors: Tensors) -> None:
        """After a step: what was asked for beside it."""
        params = tensors.selected_params
        self._averages.update(params, tensors.parts(params), self.state, self.param_groups)
        self._compare_ranks()

    def _compare_ranks(self) -> None:
        if not self._check_ranks or self._ranks.group is None:
            return
        self._until_check -= 1
        if self._until_check == 0:
            self._until_check = self._check_ranks
            self._settle()
            check_same(self._ranks, self.param_groups, self.state)
