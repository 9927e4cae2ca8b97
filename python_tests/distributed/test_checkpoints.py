"""Checkpoints of sharded and replicated parameters: saved by some number of ranks, taken up by the same or another."""

import re
from typing import Any

import pytest
from checkpoint_cases import Plan, collect

#: By number of ranks, in this order.
USUAL: Plan = {1: ["one"], 2: ["fsdp_rich", "one_to_two", "before_the_first_step", "errors"], 0: ["two_to_one"]}
SAME_MESH = ["fsdp_rich", "fsdp_plain", "fsdp_half", "ddp_rich", "shares_rich"]
MOVED = ["ddp_to_fsdp", "fsdp_to_ddp", "shares_to_fsdp", "other_order"]
MORE: Plan = {
    1: ["one"],
    2: [*SAME_MESH, *MOVED],
    4: ["two_to_four", "two_to_four_shares", "two_to_hybrid", "two_to_both", "two_to_four_half"],
    0: ["two_to_one", "two_to_one_plain"],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return collect(USUAL, tmp_path_factory)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return collect(MORE, tmp_path_factory)


def going_on_is_never_having_stopped(values: list[Any]) -> None:
    """On the same mesh, to the bit, in whatever way it was saved."""
    for value in values:
        assert not isinstance(value, str), value
        assert value
        for way, (at_once, later, total_steps) in value.items():
            assert (way, at_once, later, total_steps) == (way, [], [], 200)


def others_take_it_up(values: list[Any]) -> None:
    """All state is the same at once, and 20 steps later parameters are within 1e-6 of never having stopped."""
    for value in values:
        assert not isinstance(value, str), value
        assert value
        for at_once, far, total_steps in value:
            assert at_once == []
            assert far == {}
            assert total_steps == 200


@pytest.mark.parametrize(("world", "name"), [(1, "one"), (2, "fsdp_rich")])
def test_going_on_is_never_having_stopped(found: Any, world: int, name: str) -> None:
    going_on_is_never_having_stopped(found[world, name])


@pytest.mark.parametrize(("world", "name"), [(2, "one_to_two"), (0, "two_to_one")])
def test_other_ranks_take_it_up(found: Any, world: int, name: str) -> None:
    others_take_it_up(found[world, name])


@pytest.mark.distributed
@pytest.mark.parametrize("name", SAME_MESH)
def test_going_on_in_every_way(more: Any, name: str) -> None:
    going_on_is_never_having_stopped(more[2, name])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "name"), [(2, n) for n in MOVED] + [(world, n) for world in (4, 0) for n in MORE[world]]
)
def test_all_others_take_it_up(more: Any, world: int, name: str) -> None:
    others_take_it_up(more[world, name])


def test_saving_before_the_first_step_changes_nothing(found: Any) -> None:
    """There is a state for every parameter then, and it is as if there had been none."""
    for value in found[2, "before_the_first_step"]:
        assert value == [True, [], []], value


def test_a_state_of_other_ranks_is_refused(found: Any) -> None:
    """Nothing was changed, and the message says what, what was expected, and what to do."""
    for rank, value in enumerate(found[2, "errors"]):
        assert not isinstance(value, str), value
        assert value[1::2] == ["[]"] * 3
        part, mesh, other = value[::2]
        assert re.search(
            r"state\[0\]\['mom'\] expected shape \(\d, 31, 12\), found \(\d, 1[56], 12\), .* one rank", part
        )
        assert f"state[0]['mom'] lies on ranks [{rank}], the parameter on [0, 1]" in mesh
        assert re.search(r"state\[0\]\['mom'\] expected a part of shape .* on this rank, found .* another rank", other)
