"""Which matrices read a model's input and which write its output, where the user or the model says so.

The direction of such a matrix is better left as it is: a row of an embedding is one token's, and has nothing to do with
the next. What nobody says, the learned gate judges by the place among the tensors.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lopt.rule.matrices import ROLES, Kind, Role

_INPUT = re.compile(r"(^|[._])(w[tp]e|\w*emb(ed(ding(s)?)?)?(s)?)([._]|$)")
_OUTPUT = re.compile(r"(^|[._])(\w*(?<!multi)(?<!multi_)head|classifier|unembed)(\.|$)")


def role_of_name(name: str) -> Role | None:
    """The role that a parameter's name tells: that of embeddings and heads.

    Example:
        >>> role_of_name("transformer.wte.weight"), role_of_name("lm_head.weight"), role_of_name("h.0.mlp.fc.weight")
        ('input', 'output', None)
    """
    return "output" if _OUTPUT.search(name) else "input" if _INPUT.search(name) else None


def roles_of_model(model: nn.Module) -> dict[str, Role | None]:
    """The role of every parameter of a model by its name.

    The weights of embeddings are input, also where the output shares them. Where there are embeddings, all other
    matrices are hidden, but for the linear layer that is named as a head, or the last one, where none is: that is
    output. Without embeddings nothing is known.

    Example:
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 50, bias=False))
        >>> roles_of_model(model)
        {'0.weight': 'input', '1.weight': 'hidden', '2.weight': 'output'}
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    linear = {f"{name}.weight": id(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    heads = [weight for name, weight in linear.items() if role_of_name(name) == "output"] or list(linear.values())[-1:]
    roles: dict[str, Role | None] = {}
    for name, param in model.named_parameters():
        if not tables:
            roles[name] = None
        elif id(param) in tables or (param.dim() >= 2 and role_of_name(name) == "input"):
            roles[name] = "input"
        else:
            roles[name] = "output" if id(param) in heads else "hidden"
    return roles


def of_each(value: Any, count: int) -> list[Any]:
    """An option of a group for each of its ``count`` parameters: a list as it is, else the same for all."""
    return value if isinstance(value, list) else [value] * count


def check_roles(group: Mapping[str, Any]) -> None:
    """Refuse what is neither ``role`` nor ``transposed`` of the group's parameters.

    Raises:
        ValueError: a value is none of those allowed, nor a list with one for each parameter.
    """
    count, allowed = len(group["params"]), {"role": (*ROLES, None), "transposed": (True, False)}
    for name, values in allowed.items():
        found = of_each(group[name], count)
        if len(found) != count:
            raise ValueError(f"{name}: expected one for each of the {count} parameters of the group, got {len(found)}")
        for value in found:
            if value not in values:
                raise ValueError(f"{name}: expected one of {values}, or a list of these, got {value!r}")


def keep_roles(theirs: Iterable[Mapping[str, Any]], ours: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups of a state dict, with what an optimizer's own groups say of their parameters: where these are in another
    order, or in other groups, than they were saved in, a list of the state dict belongs to others."""
    kept = []
    for found, own in zip(theirs, ours, strict=True):
        kept.append(dict(found))
        for name in ("role", "transposed"):
            if any(of_each(own.get(name), len(own["params"]))):
                kept[-1][name] = own[name]
    return kept


def kinds_of_groups(groups: Iterable[Mapping[str, Any]]) -> list[Kind]:
    """What the groups say of every parameter: ``role``, else its name; ``transposed`` of matrices ``[in, out]``."""
    kinds = []
    for group in groups:
        params = group["params"]
        names = group.get("param_names") or [""] * len(params)
        roles, transposed = (of_each(group.get(name), len(params)) for name in ("role", "transposed"))
        for param, name, given, turned in zip(params, names, roles, transposed, strict=True):
            fan_in = param.shape[0] if turned and param.dim() == 2 else None
            known = given or role_of_name(name) if param.dim() >= 2 else None
            kinds.append(Kind(known, fan_in))
    return kinds


def kind_in_groups(param: Any, groups: Iterable[Mapping[str, Any]]) -> Kind:
    """What the groups say of one parameter."""
    for group in groups:
        for other, kind in zip(group["params"], kinds_of_groups([group]), strict=True):
            if other is param:
                return kind
    return Kind()
