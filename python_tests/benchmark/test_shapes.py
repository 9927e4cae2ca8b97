"""Layouts, against what the models are known to hold."""

import math

import pytest

from lopt.benchmark import shapes


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"), [("vit-b16", 152, 86_567_656), ("gpt2-355m", 292, 354_823_168)]
)
def test_models_have_their_published_size(name: str, tensors: int, parameters: int) -> None:
    layout = shapes.model(name)
    assert layout.name == name
    assert len(layout.shapes) == tensors
    assert layout.parameters == parameters


@pytest.mark.parametrize("name", shapes.MODELS)
def test_scale_drops_blocks(name: str) -> None:
    blocks, build = shapes.MODELS[name]
    half, one = shapes.model(name, 0.5), shapes.model(name, 1e-6)
    assert half.shapes == tuple(build(blocks // 2))
    block = sum(math.prod(shape) for shape in build(2)) - sum(math.prod(shape) for shape in build(1))
    assert shapes.model(name).parameters - one.parameters == (blocks - 1) * block
    assert "1 of" in one.name


def test_even_cuts() -> None:
    layout = shapes.even(10_000, 10)
    assert layout.shapes == ((1000,),) * 10
    assert layout.name == "10 x 1,000"


def test_bad_layouts_are_named() -> None:
    with pytest.raises(ValueError, match="tensors: expected 1 to 10"):
        shapes.even(10, 11)
    with pytest.raises(ValueError, match=r"vit-b16, gpt2-355m, got 'bert'"):
        shapes.model("bert")
    with pytest.raises(ValueError, match="scale"):
        shapes.model("vit-b16", 0.0)
