"""State of LearnedOptimizer: what is created, what a state dict must hold, and how it is taken up.

What belongs to a parameter is in ``state[p]``. What all parameters share is in every param group, as the same tensors,
which steps write in place: so groups can be removed, added and put in another order, and nothing is lost.
"""

import hashlib
import json
import numbers
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from lopt.distributed import Box, is_sharded, local_of, part_like, place_like
from lopt.roles import kinds_of_groups, of_each
from lopt.rule import RULES, AnySpec, Rule, Theta, losses, tensor_lstm
from lopt.rule.codes import CODES, blocks_of
from lopt.rule.matrices import Kind
from lopt.rule.published import step as published
from lopt.rule.rounding import coded, decoded
from lopt.rule.tensor_lstm import Globals, Rows

#: Names in a param group of the state that all tensors share: of every optimizer, and of every rule of others.
WAITING = ("pending_loss", "pending_valid", "nonfinite")
OF_RULES = (*published.SHARED, "valid_loss")
#: All names that such state may have.
SHARED = tuple({*Globals._fields, *WAITING, *OF_RULES, *(name for rule in RULES.values() for name in rule.shared)})

Groups = Sequence[dict[str, Any]]
Weights = Mapping[str, Tensor]


def sample(weights: Weights) -> Tensor:
    """A tensor with the device and the dtype of the tensor level."""
    return next(iter(weights.values()))


def checksum(theta: Theta[Any]) -> str:
    """16 hexadecimal digits that tell thetas apart: of the SHA-256 of the flat float32 values and the spec's JSON."""
    digest = hashlib.sha256(theta.flatten().float().cpu().numpy().tobytes())
    digest.update(json.dumps(theta.spec.to_json(), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def open_theta(theta: Any) -> tuple[Theta[Any], dict[str, str]]:
    """A theta, the path of its file or its shipped name; and what says in a state dict which one it is.

    Raises:
        TypeError: none of these.
    """
    if not isinstance(theta, (Theta, str, os.PathLike)):
        number = isinstance(theta, (numbers.Real, Tensor))
        rate = "; there is no learning rate: write LearnedOptimizer(params), or lr=... for a multiplier around 1"
        raise TypeError(f"theta: expected a Theta, a path or a name, got {theta!r}{rate if number else ''}")
    if isinstance(theta, Theta):
        return theta, {"theta": str(theta.provenance.get("method", "Theta")), "theta_checksum": checksum(theta)}
    name, loaded = os.path.basename(theta), Theta.load(theta)
    return loaded, {"theta": str(name), "theta_checksum": checksum(loaded)}


def init_globals(spec: AnySpec, weights: Weights) -> dict[str, Tensor]:
    """State that all tensors share, before the first step."""
    like = sample(weights)
    with torch.inference_mode(False), torch.no_grad():  # the first validation loss may come from inference mode
        if isinstance(spec, Rule):
            own = {**published.init_shared(spec, weights), "valid_loss": losses.init_loss(like)}
        else:
            own = tensor_lstm.init_globals(spec, weights)._asdict()
        return {
            **own,
            "pending_loss": like.new_zeros(2),  # sum and number (or weights) of the losses observed since the last step
            "pending_valid": like.new_zeros(2),  # those of validation losses that other ranks do not know yet
            # Number of gradient elements, and of tensors with such parameters.
            "nonfinite": torch.zeros(2, dtype=torch.int64, device=like.device),
        }


def shared_names(spec: AnySpec) -> tuple[str, ...]:
    """Names in a param group of the state that all tensors share."""
    own = (*OF_RULES, *spec.shared) if isinstance(spec, Rule) else Globals._fields
    return (*own, *WAITING)


def init_state(spec: AnySpec, weights: Weights, param: Tensor, dtype: torch.dtype, kind: Kind) -> dict[str, Any]:
    """State of a parameter tensor before its first step; accumulators in ``dtype``, which lie as the parameter does, on
    its device, the rest where the tensor level is. Of a rule of others everything is there."""
    if isinstance(spec, Rule):
        fresh = published.init_param(spec, weights, tuple(param.shape), kind)
        return {name: _placed(param, x.to(dtype)) if name in spec.per_param else x for name, x in fresh.items()}
    like, local = sample(weights), local_of(param)
    narrow = dtype == torch.int8
    mom, rms = (
        like.new_zeros(len(decays), *local.shape, dtype=CODES[name].dtype if narrow else dtype, device=local.device)
        for name, decays in (("mom", spec.mom_decays), ("rms", spec.rms_decays))
    )
    state: dict[str, Any] = {
        "mom": place_like(param, mom),
        "rms": place_like(param, rms),
        "lstm": {name: value[0] for name, value in tensor_lstm.init_rows(spec, weights, 1)._asdict().items()},
    }
    if narrow:
        count = len(spec.mom_decays) + len(spec.rms_decays)
        state["scales"] = mom.new_zeros(count, blocks_of(local.numel()), dtype=torch.uint8)
    if spec.stats == "lagged":
        state["stats"] = like.new_zeros(spec.features.num_stats)
    return state


def _placed(param: Tensor, whole: Tensor) -> Tensor:
    """``whole`` ``[K, *shape]``, lying as ``param`` does, in memory of its own: DTensors of views cannot be copied."""
    if not is_sharded(param):
        return whole
    return place_like(param, part_like(param, whole).clone(memory_format=torch.contiguous_format))


def holds_shared(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some group holds the shared state."""
    return any("pending_loss" in group for group in groups)


def share_state(groups: Groups, spec: AnySpec, weights: Weights) -> dict[str, Any]:
    """Let all groups hold the shared state, that of the first group that has it, else a new one; return the first."""
    first = groups[0]
    if "pending_loss" not in first:
        found = next((group for group in groups if "pending_loss" in group), None)
        names = () if found is None else shared_names(spec)
        first.update(init_globals(spec, weights) if found is None else {name: found[name] for name in names})
    held = first["pending_loss"]
    for group in groups[1:]:
        if group.get("pending_loss") is not held:
            group.update({name: first[name] for name in shared_names(spec)})
    return first


def check_state(
    state_dict: Mapping[str, Any],
    param_groups: Groups,
    spec: AnySpec,
    weights: Weights,
    part: Callable[[Tensor], Tensor],
) -> None:
    """Compare theta, names and shapes in a state dict with those of an optimizer; ``part``: see :func:`restore_state`.

    Raises:
        ValueError: the state belongs to other parameters, another optimizer, or another theta, or its groups disagree.
    """
    groups = state_dict["param_groups"]
    for i, (group, own) in enumerate(zip(groups, param_groups, strict=False)):
        _check_theta(f"param_groups[{i}]", group, param_groups[0])
        _check_roles(f"param_groups[{i}]", group, own)
    expected = {name: tuple(value.shape) for name, value in init_globals(spec, weights).items()}
    complete = [i for i, group in enumerate(groups) if any(name in group for name in expected)]
    del expected["pending_valid"]  # which older state dicts lack
    for i in complete:
        _check_shapes(f"param_groups[{i}]", groups[i], expected)
        for name in expected:
            if not _equal(groups[complete[0]][name], groups[i][name]):
                raise ValueError(
                    f"state_dict: param_groups[{complete[0]}] and param_groups[{i}] hold different {name!r}, "
                    "which all groups share; they come from different runs or steps, so load the state dict of one"
                )
    pairs = (
        pair
        for theirs, ours in zip(groups, param_groups, strict=False)
        for pair in zip(theirs["params"], zip(ours["params"], kinds_of_groups([ours]), strict=True), strict=False)
    )
    states = state_dict["state"]
    some = False
    for index, (param, kind) in pairs:
        state = states.get(index)
        if state:
            some = True
            _check_param(f"state[{index}]", state, spec, weights, param, part(param), kind)
    if some and not complete:
        _check_shapes("param_groups[0]", groups[0], expected)


def _check_param(
    place: str, state: Any, spec: AnySpec, weights: Weights, param: Tensor, part: Tensor, kind: Kind
) -> None:
    if isinstance(spec, Rule):
        fresh = published.init_param(spec, weights, tuple(param.shape), kind)
        _check_shapes(place, state, {name: tuple(value.shape) for name, value in fresh.items()})
        return
    rows = {name: tuple(value.shape[1:]) for name, value in tensor_lstm.init_rows(spec, weights, 1)._asdict().items()}
    stats = {"stats": (spec.features.num_stats,)} if spec.stats == "lagged" else {}
    num_mom, num_rms = len(spec.mom_decays), len(spec.rms_decays)
    own = {"mom": (num_mom, *param.shape), "rms": (num_rms, *param.shape), **stats}
    _check_shapes(place, {name: _shaped(param, state.get(name)) for name in own}, own, part)
    if state["mom"].dtype == torch.int8:
        _check_shapes(place, state, {"scales": (num_mom + num_rms, blocks_of(param.numel()))})
    _check_ranks(place, state, part)
    _check_shapes(f"{place}['lstm']", state.get("lstm"), rows)


def _check_theta(place: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if "theta_checksum" not in theirs:
        options = ", ".join(sorted(set(theirs) - {"params"}))
        raise ValueError(
            f"state_dict: {place} names no theta; it was written by another optimizer (its options are {options}), "
            "whose state means nothing here: start without it"
        )
    if theirs["theta_checksum"] != ours["theta_checksum"]:
        theta = theirs.get("theta")
        raise ValueError(
            f"state_dict: {place} was written with theta {theta!r} ({theirs['theta_checksum']}), this optimizer has "
            f"{ours['theta']!r} ({ours['theta_checksum']}); make it with the theta of the state, or start without it"
        )


def _check_roles(place: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    count = len(ours["params"])
    for name in ("role", "transposed"):
        value = theirs.get(name)
        if isinstance(value, list) and len(value) != count and not any(of_each(ours.get(name), count)):
            raise ValueError(
                f"state_dict: {place}[{name!r}] expected one value for each of {count} parameters, found {len(value)}; "
                "they were in other groups when it was saved: make the optimizer with the model, or with named "
                f"parameters, or give its groups their {name!r}"
            )


def _check_shapes(place: str, found: Any, expected: Mapping[str, tuple[int, ...]], param: Tensor | None = None) -> None:
    for name, shape in expected.items():
        value = found.get(name) if isinstance(found, Mapping) else None
        came = tuple(value.shape) if isinstance(value, Tensor) else "nothing"
        if came == shape:
            continue
        if param is not None and is_sharded(param) and came == (shape[0], *local_of(param).shape):
            raise ValueError(
                f"state_dict: {place}[{name!r}] expected shape {shape}, found {came}, which is the part of one rank "
                "alone; save what state_dict() returns, whose tensors know their place, or whole tensors "
                "(StateDictOptions(full_state_dict=True) of torch.distributed.checkpoint)"
            )
        raise ValueError(
            f"state_dict: {place}[{name!r}] expected shape {shape}, found {came}; it belongs to "
            "another parameter, another optimizer, or a theta of another architecture"
        )


def _check_ranks(place: str, state: Mapping[str, Any], param: Tensor) -> None:
    """Refuse a part that is no part of this rank's, or on ranks that do not meet here."""
    for name, value in state.items():
        if not is_sharded(value):
            continue
        ranks = sorted(value.device_mesh.mesh.flatten().tolist())
        ours = sorted(param.device_mesh.mesh.flatten().tolist()) if is_sharded(param) else ranks  # type: ignore[attr-defined]
        if ranks != ours or value.device_mesh.get_coordinate() is None:
            raise ValueError(
                f"state_dict: {place}[{name!r}] lies on ranks {ranks}, the parameter on {ours}; to take up what other "
                "ranks saved, save and load with torch.distributed.checkpoint (docs/guide-distributed.md)"
            )
        box, local = Box.of(value), local_of(value)
        if box.numel != local.numel() or (box.numel and box.size != tuple(local.shape)):
            raise ValueError(
                f"state_dict: {place}[{name!r}] expected a part of shape {box.size} on this rank, found "
                f"{tuple(local.shape)}; it is the part of another rank: every rank loads what it saved itself"
            )


def _shaped(param: Tensor, value: Any) -> Any:
    """Accumulators ``[K, numel]``, as older state dicts have them, in the shape ``[K, *shape]``."""
    old = isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == param.numel() and not is_sharded(value)
    return value.reshape(len(value), *param.shape) if old else value


def _equal(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    a, b = a.detach().cpu(), b.detach().cpu()
    return bool(((a == b) | ((a != a) & (b != b))).all())


def restore_state(
    source: Mapping[str, Any],
    param_groups: Groups,
    state: MutableMapping[Tensor, Any],
    spec: AnySpec,
    weights: Weights,
    dtype: torch.dtype,
    part: Callable[[Tensor], Tensor],
) -> None:
    """Take copies of the state in ``source``; torch would cast what is floating to the parameters' dtype.

    Args:
        source: a state dict that :func:`check_state` passed.
        param_groups, state: the optimizer's; written.
        weights: of theta, on the device and in the dtype of the state at tensor level; accumulators are on the device
            of their parameter.
        dtype: of the accumulators.
        part: a parameter as it is stepped, by which the state lies.
    """
    like = sample(weights)

    def copy(value: Any, floating: torch.dtype = like.dtype, device: torch.device = like.device) -> Any:
        if isinstance(value, dict):
            return {name: copy(item, device=device) for name, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        kept = floating if value.is_floating_point() else value.dtype
        order = torch.contiguous_format
        return value.detach().to(device=device, dtype=kept, copy=True, memory_format=order)

    found = next((group for group in source["param_groups"] if "pending_loss" in group), None)
    names = shared_names(spec)
    shared = {} if found is None else {name: copy(found[name]) for name in names if name in found}
    if shared:
        shared.setdefault("pending_valid", torch.zeros_like(shared["pending_loss"]))
    for group in param_groups:
        group.update(shared)

    ids = (index for group in source["param_groups"] for index in group["params"])
    params = (param for group in param_groups for param in group["params"])
    pairs = [(source["state"].get(index), param) for index, param in zip(ids, params, strict=True)]
    pairs = [(theirs, param) for theirs, param in pairs if theirs]
    if isinstance(spec, Rule):
        for theirs, param in pairs:
            kept = {name: x for name, x in theirs.items() if name not in spec.per_param}
            own = {name: part_like(part(param), theirs[name]) for name in spec.per_param}
            state[param] = copy(kept) | {name: place_like(part(param), copy(x, dtype)) for name, x in own.items()}
        return
    counts = _stack([theirs["lstm"]["updates"] for theirs, _ in pairs], like)
    begun = torch.stack(list(counts)).tolist() if pairs else []
    pairs = list(compress(pairs, begun))  # what never had a gradient begins when it gets one
    # Small tensors are stacked: a copy of each, one by one, takes longer than everything else.
    rows = {name: _stack([theirs["lstm"][name] for theirs, _ in pairs], like) for name in Rows._fields}
    for i, (theirs, param) in enumerate(pairs):
        new: dict[str, Any] = {}
        device = local_of(param).device
        wide = {name: _shaped(param, theirs[name]) for name in ("mom", "rms")}
        if theirs["mom"].dtype == torch.int8 and dtype == torch.int8:
            new = {name: copy(value, device=device) for name, value in (*wide.items(), ("scales", theirs["scales"]))}
        else:
            if theirs["mom"].dtype == torch.int8:
                wide = dict(zip(wide, decoded(wide["mom"], wide["rms"], theirs["scales"]), strict=True))
            if dtype == torch.int8:
                local = [copy(part_like(part(param), value), torch.float32, device) for value in wide.values()]
                both = torch.cat(local)
                new = dict(zip(("mom", "rms", "scales"), coded(both, len(wide["mom"])), strict=True))
            else:
                for name, value in wide.items():
                    new[name] = place_like(part(param), copy(part_like(part(param), value), dtype, device))
        new["lstm"] = {name: values[i] for name, values in rows.items()}
        for name, value in theirs.items():
            if name not in new and name != "scales":
                of_param = isinstance(value, Tensor) and is_sharded(part(param)) and value.shape == param.shape
                if of_param:
                    new[name] = place_like(part(param), copy(part_like(part(param), value[None]), device=device)[0])
                else:  # what belongs to the tensor level is where that is
                    new[name] = copy(value, device=like.device if name == "stats" else device)
        state[param] = new


def _stack(values: list[Tensor], like: Tensor) -> Sequence[Tensor]:
    if not values:
        return ()
    if any(value.dtype != like.dtype or value.device != like.device for value in values):
        values = [value.to(like) for value in values]
    with torch.no_grad():
        return torch.stack(values).unbind()
