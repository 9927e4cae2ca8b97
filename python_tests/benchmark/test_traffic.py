"""Bytes and operations per parameter, against counts by hand."""

import dataclasses

import pytest

from lopt.benchmark import traffic
from lopt.benchmark.variants import RULES
from lopt.rule import PRESETS


def test_paper_as_counted_by_hand() -> None:
    """12 floats read and 10 written, then 12 read and 1 written; 23 * 32 + 32 * 32 + 32 * 2 multiply-adds."""
    counted = traffic.learned("paper", PRESETS["paper"])
    assert (counted.accumulate, counted.apply, counted.step) == (88, 52, 140)
    assert (counted.single_sweep, counted.state, counted.held) == (92, 40, 48)
    assert counted.flops == 2 * 1824


def test_compact_as_counted_by_hand() -> None:
    """Five accumulators; 12 * 8 + 8 * 8 + 8 * 2 multiply-adds, and 12 for the skip."""
    counted = traffic.learned("compact", PRESETS["compact"])
    assert (counted.accumulate, counted.apply, counted.step) == (48, 32, 80)
    assert (counted.single_sweep, counted.state, counted.held) == (52, 20, 28)
    assert counted.flops == 2 * 188


@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_halves_parameters_and_gradients_only(preset: str) -> None:
    wide, narrow = (traffic.learned(preset, PRESETS[preset], size, size) for size in (4, 2))
    assert narrow.state == wide.state
    assert wide.held - narrow.held == 4
    assert wide.accumulate - narrow.accumulate == 4  # one parameter and one gradient read
    assert wide.apply - narrow.apply == 6  # the same, and one parameter written


@pytest.mark.parametrize("preset", PRESETS)
def test_a_bfloat16_state_is_half_of_the_state_wherever_it_moves(preset: str) -> None:
    wide, narrow = (traffic.learned(preset, PRESETS[preset], state_bytes=size) for size in (4, 2))
    saved = wide.state - narrow.state
    assert narrow.state == wide.state / 2
    assert wide.held - narrow.held == saved
    assert wide.accumulate - narrow.accumulate == 2 * saved
    assert wide.apply - narrow.apply == saved


def test_the_skip_and_the_width_count() -> None:
    plain = dataclasses.replace(PRESETS["compact"], linear_skip=False, mlp_width=16)
    assert traffic.learned("compact", plain).flops == 2 * (12 * 16 + 16 * 16 + 2 * 16)


def test_rules_of_others_as_counted_by_hand() -> None:
    """Four accumulators, read and written, then read; gradient and parameter three times, of VeLO accumulators too."""
    counted = [traffic.factored(name, rule) for name, rule in RULES.items()]
    assert [(one.accumulate, one.apply, one.step) for one in counted] == [(48, 28, 76), (64, 28, 92)]
    assert [(one.state, one.held, one.single_sweep) for one in counted] == [(16, 24, 44)] * 2
    assert [traffic.factored(name, rule, state_bytes=2).step for name, rule in RULES.items()] == [52, 60]
    assert [one.flops for one in counted] == [2 * (28 * 4 + 4 * 4 + 4 * 2), 2 * (30 * 4 + 4 * 4 + 4 * 2)]


def test_adamw() -> None:
    assert traffic.adamw().step == traffic.adamw().single_sweep == 28
    assert traffic.adamw().held == 16
    assert traffic.adamw(2, 2).step == 14
