"""Steps of sharded and replicated parameters on several ranks, compared with one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from torch import Tensor

from lopt.rule.published import RULES

TWO = [
    "replicated",
    "fsdp",
    "without_matrices",
    "some_plain",
    "by_columns",
    "parallel",
    "lagged",
    "shared",
    "shared_and_averaged",
    "half_state",
    "offloaded",
    "sim",
]
OTHERS = ["rules", "averaged", "half_bits", "offload_loop", "away_from_the_mesh", "without_a_backend"]
FOUR = ["fsdp", "without_matrices", "shared", "hybrid", "both"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[Any]]:
    results = {}
    for world, names in ((2, TWO + OTHERS), (4, FOUR)):
        folder: Path = tmp_path_factory.mktemp(f"ranks{world}")
        for name, values in on_ranks(world, "shard_cases", names, folder).items():
            results[world, name] = values
    return results


@pytest.mark.parametrize(("world", "name"), [(2, name) for name in TWO] + [(4, name) for name in FOUR])
def test_ranks_do_what_one_process_does(found: Any, world: int, name: str) -> None:
    values = found[world, name]
    for value in values:
        assert not isinstance(value, str), value
    differences: dict[str, float] = values[0][0]
    print(name, world, max(differences.values()))
    bound = 2.0**-8 if name == "half_state" else 1e-6  # a sum that differs in the last bit rounds to another bfloat16
    assert max(differences.values()) <= bound, differences
    states: list[dict[str, Tensor]] = [value[1] for value in values]
    for other in states[1:]:
        assert all(torch.equal(other[key], value) for key, value in states[0].items())


def test_a_bfloat16_state_is_rounded_by_positions_in_whole_tensors(found: Any) -> None:
    for different in found[2, "half_bits"]:
        assert len(different) == 64
        assert not any(different.values()), different


def test_learned_optimizers_of_others(found: Any) -> None:
    for of_rules in found[2, "rules"]:
        assert not isinstance(of_rules, str), of_rules
        assert set(of_rules) == set(RULES)
        for name, (difference, moved) in of_rules.items():
            assert difference <= 1e-6, name
            assert moved > 1e-5, name


def test_averages_of_parts(found: Any) -> None:
    assert max(found[2, "averaged"]) < 1e-6


def test_cpu_offload(found: Any) -> None:
    """To the bit what it is without; the state is with the parameters, whatever the mesh says."""
    assert found[2, "offload_loop"] == [0.0, 0.0]
    assert found[2, "away_from_the_mesh"] == [(True, {"cpu"})] * 2


def test_a_group_without_a_backend_for_the_parameters_is_refused(found: Any) -> None:
    for message in found[2, "without_a_backend"]:
        assert "its backend 'cuda:nccl' has none for tensors on cpu" in message
        assert "init_process_group('cpu:gloo,cuda:nccl')" in message
