"""Formulas of columns: read from text, computed by torch, and written as C++.

A formula has the inputs ``grad``, ``param``, ``mom0``, ``rms0``, ... (the clipped gradient, the parameter, the updated
accumulators), columns before it by name, numbers, ``+ - * /``, ``ln``, ``exp``, ``abs``, ``rsqrt`` (``x ** -.5``),
``max`` and ``min``. Kernels compute ``ln`` and ``rsqrt`` of normal positive float32 numbers only, so their arguments
must have a least value: ``ln(rms0 + 1e-24)``, not ``ln(rms0)``.
"""

import ast
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: An operator or function with its arguments, ``("number", value)`` or ``("input", name)``; equal ones count as one.
Node = tuple[Any, ...]

SMALLEST = float(np.finfo(np.float32).tiny)
_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_FUNCTIONS = {"ln": 1, "exp": 1, "abs": 1, "rsqrt": 1, "max": 2, "min": 2}


def parse(formula: str, names: Mapping[str, Node]) -> Node:
    """The tree of a formula.

    Args:
        names: inputs and earlier columns.

    Raises:
        ValueError: it is not a formula, or has an argument that a kernel cannot compute; with what was found.
    """
    try:
        tree = ast.parse(formula.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"expected an expression, got {formula!r} ({error.msg})") from error
    return _node(tree, names)


def _node(tree: ast.expr, names: Mapping[str, Node]) -> Node:
    match tree:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _number(float(value))
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _node(operand, names)
            return _number(-inner[1]) if inner[0] == "number" else ("negative", inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _operation(_OPERATORS[type(op)], _node(left, names), _node(right, names))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if len(args) == _FUNCTIONS.get(name):
            node: Node = (name, *(_node(arg, names) for arg in args))
            if name in ("ln", "rsqrt") and not _least(node[1]) >= SMALLEST:
                raise ValueError(
                    f"{ast.unparse(tree)}: expected an argument that is never below {SMALLEST:.1e}, such as "
                    f"{name}(abs(param) + 1e-8) or {name}(rms0 + 1e-24)"
                )
            return node
    known = ", ".join([*names, *_FUNCTIONS])
    raise ValueError(f"{ast.unparse(tree)!r} is not known; a formula has numbers, + - * /, {known}")


def _number(value: float) -> Node:
    if not math.isfinite(value) or (value and not SMALLEST <= abs(value) <= float(np.finfo(np.float32).max)):
        raise ValueError(f"{value!r}: expected a normal float32 number")
    return ("number", value)


def _operation(operator: str, left: Node, right: Node) -> Node:
    if operator == "/" and right == ("number", 0.0):
        raise ValueError("a division by zero")
    if left[0] == right[0] == "number":
        return _number(_APPLY[operator](left[1], right[1]))
    return (operator, left, right)


def _least(node: Node) -> float:
    """A bound below the values of a node, ``-inf`` where none is known."""
    kind, *args = node
    if kind == "number":
        return float(args[0])
    if kind == "input":
        return 0.0 if args[0].startswith("rms") else -math.inf
    if kind in ("abs", "exp", "rsqrt"):
        return 0.0
    if kind == "*" and args[0] == args[1]:
        return 0.0
    if kind in ("+", "max", "min", "*", "/"):
        left, right = (_least(arg) for arg in args)
        if kind in ("+", "max", "min"):
            return {"+": left + right, "max": max(left, right), "min": min(left, right)}[kind]
        if kind == "/" and left >= 0.0 and args[1][0] == "number" and right > 0.0:
            return left / right
        if left >= 0.0 and right >= 0.0:
            return left * right if kind == "*" else 0.0
    return -math.inf


def inputs_of(node: Node) -> set[str]:
    """Names of the inputs that a node reads."""
    if node[0] == "input":
        return {node[1]}
    return set().union(*(inputs_of(arg) for arg in node[1:])) if node[0] != "number" else set()


# ---- By torch --------------------------------------------------------------------------------------------------------

_APPLY: dict[str, Any] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / y,
    "negative": lambda x: -x,
    "ln": torch.log,
    "exp": torch.exp,
    "abs": torch.abs,
    "rsqrt": torch.rsqrt,
    "max": lambda x, y: _bound(torch.maximum, x, y),
    "min": lambda x, y: _bound(torch.minimum, x, y),
}


def _bound(function: Any, x: Tensor | float, y: Tensor | float) -> Tensor:
    like = x if isinstance(x, Tensor) else y
    assert isinstance(like, Tensor)  # numbers are folded
    sides = [torch.as_tensor(side, dtype=like.dtype, device=like.device) for side in (x, y)]
    bounded: Tensor = function(*sides)
    return bounded


def evaluate(nodes: Sequence[Node], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Values of nodes, each subexpression computed once."""
    known: dict[Node, Any] = {}

    def value(node: Node) -> Any:
        if node[0] == "number":
            return node[1]
        if node[0] == "input":
            return inputs[node[1]]
        if node not in known:
            known[node] = _APPLY[node[0]](*(value(arg) for arg in node[1:]))
        return known[node]

    return [value(node) for node in nodes]


# ---- As C++ ----------------------------------------------------------------------------------------------------------


def literal(value: float) -> str:
    """A float32 constant of C++ with this value, rounded."""
    return f"{float(np.float32(value)).hex()}f"


class Writer:
    """Statements that compute nodes of type V (csrc/rule/features.h), each subexpression once.

    ``grad`` and ``param`` are variables, ``mom`` and ``rms`` arrays.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._known: dict[Node, str] = {}

    def value(self, node: Node) -> str:
        """Name of the variable that has the value of a node; a constant where it is a number."""
        if node[0] == "number":
            return literal(node[1])
        if node[0] == "input":
            return node[1] if node[1] in ("grad", "param") else f"{node[1][:3]}[{node[1][3:]}]"
        if node not in self._known:
            text = self._text(node)
            self._known[node] = name = f"t{len(self._known)}"
            self.lines.append(f"const V {name} = {text};")
        return self._known[node]

    def _text(self, node: Node) -> str:
        kind, *args = node
        if kind == "/" and args[1][0] == "number" and math.frexp(args[1][1])[0] in (0.5, -0.5):
            kind, args = "*", [args[0], ("number", 1.0 / args[1][1])]  # exact
        values = [self.value(arg) for arg in args]
        if kind in _OPERATORS.values():
            return f"{values[0]} {kind} {values[1]}"
        if kind in ("max", "min"):
            sides = [f"V{{}} + {x}" if arg[0] == "number" else x for arg, x in zip(args, values, strict=True)]
            return f"max_of({sides[0]}, {sides[1]})" if kind == "max" else f"-max_of(-({sides[0]}), -({sides[1]}))"
        return {"negative": "-{0}", "ln": "log_of({0})", "exp": "exp_of({0})", "abs": "abs_of({0})"}.get(
            kind, "rsqrt_of({0})"
        ).format(*values)
