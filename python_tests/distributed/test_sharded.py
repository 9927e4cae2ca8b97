"""Steps of sharded and replicated parameters on several ranks, compared with one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from torch import Tensor

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
    "sim",
    "averaged",
]
FOUR = ["fsdp", "without_matrices", "shared", "hybrid", "both"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[Any]]:
    results = {}
    for world, names in ((2, TWO), (4, FOUR)):
        folder: Path = tmp_path_factory.mktemp(f"ranks{world}")
        for name, values in on_ranks(world, "shard_cases", names, folder).items():
            results[world, name] = values
    return results


@pytest.mark.parametrize(("world", "name"), [(2, name) for name in TWO[:-1]] + [(4, name) for name in FOUR])
def test_ranks_do_what_one_process_does(found: Any, world: int, name: str) -> None:
    values = found[world, name]
    for value in values:
        assert not isinstance(value, str), value
    differences: dict[str, float] = values[0][0]
    print(name, world, max(differences.values()))
    assert max(differences.values()) <= 1e-6, differences
    states: list[dict[str, Tensor]] = [value[1] for value in values]
    for other in states[1:]:
        assert all(torch.equal(other[key], value) for key, value in states[0].items())
