"""lopt/rule/matrices.py: which tensors are matrices, their fan-in and natural size, and where in the model they are."""

import math

import pytest
import torch
from torch import nn

from lopt.kernels.structs import shape_records
from lopt.rule import PRESETS
from lopt.rule.constants import MAX_ASPECT
from lopt.rule.inputs import Shapes
from lopt.rule.matrices import Kind, Matrix, matrices_of, natural_sizes


def test_by_hand() -> None:
    """A perceptron with a convolution in front; a bias is no matrix."""
    shapes = [(16, 3, 3, 3), (16,), (100, 64), (100,), (), (10, 100), (10,)]
    nothing = Matrix(0, 0, 0, False, False, False, False)
    expected = [
        Matrix(16, 27, 27, True, False, False, True),
        nothing,
        Matrix(100, 64, 64, False, False, False, True),
        nothing,
        nothing,
        Matrix(10, 100, 100, False, True, False, True),
        nothing,
    ]
    assert matrices_of(shapes) == expected
    assert [matrix.aspect for matrix in expected] == [27 / 16, 1.0, 1.5625, 1.0, 1.0, 10.0, 1.0]


MODULES: list[nn.Module] = [
    nn.Linear(30, 7),
    nn.Conv1d(4, 8, 5),
    nn.Conv2d(6, 8, (2, 3)),
    nn.Conv3d(2, 3, 2),
    nn.Bilinear(3, 4, 5),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_fan_in_is_torchs(module: nn.Module) -> None:
    """Of convolutions too, and the natural size is what keeps the size of what passes."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    (matrix,) = matrices_of([tuple(weight.shape)])
    if isinstance(module, nn.Bilinear):  # both inputs
        assert matrix.fan_in == 12
        return
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(weight)
    assert matrix.fan_in == fan_in
    assert matrix.rows * matrix.columns == weight.numel()
    nn.init.kaiming_normal_(weight, nonlinearity="linear", generator=torch.Generator().manual_seed(0))
    spread = 4 / math.sqrt(2 * weight.numel())
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(matrix.natural, rel=spread)


def test_transposed_matrices_have_their_fan_in() -> None:
    given = matrices_of([(64, 16), (64, 16)], [Kind(fan_in=64), Kind()])
    assert [matrix.natural for matrix in given] == [1 / 8, 1 / 4]
    assert [(matrix.rows, matrix.columns) for matrix in given] == [(64, 16)] * 2


def test_natural_sizes_of_others_are_the_geometric_mean() -> None:
    sizes = natural_sizes(matrices_of([(5,), (7, 4), (), (3, 64), (2, 25)]))
    mean = (1 / 2 * 1 / 8 * 1 / 5) ** (1 / 3)
    assert sizes == pytest.approx([mean, 1 / 2, mean, 1 / 8, 1 / 5], rel=1e-14)
    assert natural_sizes(matrices_of([(5,), ()])) == [0.1, 0.1]
    assert natural_sizes([]) == []


def places(kinds: list[Kind] | None, *shapes: tuple[int, ...]) -> str:
    """``i``, ``o`` or ``-`` for each tensor; capital letters where it may be treated as a whole."""
    found = matrices_of(shapes, kinds)
    letters = ["i" if matrix.is_input else "o" if matrix.is_output else "-" for matrix in found]
    return "".join(
        x.upper() if m.whole and x != "-" else "+" if m.whole else x for x, m in zip(letters, found, strict=True)
    )


def test_places_tell_roles_that_nobody_said() -> None:
    square, bias = (4, 4), (4,)
    assert places(None, square, bias, square, square, bias) == "I-+O-"
    assert places(None, bias, square, bias) == "-I-"  # the only one: first and last
    assert places(None, bias, ()) == "--"
    assert places(None) == ""
    none, hidden = Kind(), Kind("hidden")
    assert places([Kind("input"), none, none], square, square, square) == "i+O"
    assert places([none, Kind("input"), none], square, square, square) == "+iO"
    assert places([none, Kind("output"), none], square, square, square) == "Io+"
    assert places([hidden, none, hidden], square, square, square) == "+++"
    assert places([hidden, none, none], square, square, square) == "++O"
    assert places([Kind("input"), Kind("input"), Kind("output")], square, square, square) == "iio"


def test_what_is_treated_as_a_whole() -> None:
    limit = int(MAX_ASPECT)
    for shape, whole in {
        (3, 3 * limit): True,
        (3, 3 * limit + 1): False,
        (3 * limit, 3): True,
        (3 * limit + 1, 3): False,
        (1, 2): False,
        (2, 1): False,
        (2, 2): True,
        (1, 2, 2): False,
        (2, 2, 2): True,
        (2, 3, limit, 1): False,  # [2, 3 * limit]
        (50_000, 768): False,
        (0, 4): False,
        (4, 0): False,
    }.items():
        (matrix,) = matrices_of([shape])
        assert matrix.whole == whole, shape
        assert math.isfinite(matrix.aspect)
        assert math.isfinite(matrix.natural)


def test_facts_of_some_tensors_are_those_of_the_model() -> None:
    """Natural sizes and roles of a part are not those of a model that is this part."""
    shapes = [(6, 5), (5,), (16, 4), (4, 16), (2, 3, 2, 2), (7,), (4, 100)]
    spec, like = PRESETS["spectral"], torch.zeros((), dtype=torch.float64)
    all_of_them = Shapes.of(spec, shapes, like)
    part = all_of_them.of_rows([1, 2, 6])
    alone = Shapes.of(spec, [shapes[i] for i in (1, 2, 6)], like)
    for name in ("numel", "log_dims", "is_scalar", "is_matrix", "aspect", "whole"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name
    for name in ("natural", "is_input", "is_output", "is_table"):
        assert torch.equal(getattr(part, name), getattr(all_of_them, name)[[1, 2, 6]]), name
    assert part.matrices == tuple(all_of_them.matrices[i] for i in (1, 2, 6))
    assert float(part.natural[0]) != float(alone.natural[0])
    assert (part.is_input.tolist(), alone.is_input.tolist()) == ([0.0] * 3, [0.0, 1.0, 0.0])


def test_the_kernels_are_told_the_same() -> None:
    shapes = [(6, 5), (5,), (16, 4), (4, 16), (2, 3, 2, 2), (), (4, 100)]
    kinds = [Kind(), Kind(), Kind("input"), Kind("hidden", 4), Kind(), Kind(), Kind()]
    facts, records = Shapes.of(PRESETS["spectral"], shapes, torch.zeros(()), kinds), shape_records(shapes, kinds)
    for name in ("numel", "is_input", "is_output", "is_table", "whole", "natural", "aspect", "is_matrix"):
        assert records[name].astype("float32").tolist() == getattr(facts, name).float().tolist(), name
    assert records["rows"].tolist() == [6, 0, 16, 4, 2, 0, 4]
