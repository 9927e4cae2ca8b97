"""Several ranks: losses of their own, who belongs together, what a step costs, errors."""

from typing import Any

import pytest
import torch
from on_ranks import on_ranks

from lopt.distributed.ranks import fingerprint

CASES = ["plain", "micro_batches", "uneven", "one_validates", "sometimes_told", "by_hand", "apart", "errors", "counted"]
CASES += ["partial_gradients", "changing_gradients", "nonfinite", "memory", "travelled"]
CASES += ["published", "published_by_hand"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    results = on_ranks(2, "rank_cases", CASES, tmp_path_factory.mktemp("ranks"))
    for name, values in results.items():
        assert not any(isinstance(value, str) for value in values), f"{name}: {values}"
    return results


def test_fingerprints_see_every_bit() -> None:
    tensors = [torch.randn(2_300_001), torch.randn(3).bfloat16(), torch.empty(0), torch.tensor(2)]
    device, found = torch.device("cpu"), set()
    found.add(int(fingerprint(tensors, device)))
    for tensor in (tensors[0], tensors[1]):
        for at in (0, len(tensor) // 2, len(tensor) - 1):
            tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)[at] ^= 1
            found.add(int(fingerprint(tensors, device)))
    found.add(int(fingerprint(tensors[::-1], device)))
    found.add(int(fingerprint([tensors[0][:-1], *tensors[1:]], device)))
    assert len(found) == 9
    assert int(fingerprint([tensor.clone() for tensor in tensors], device)) in found


@pytest.mark.parametrize("name", ["plain", "micro_batches", "uneven", "one_validates", "sometimes_told", "published"])
def test_replicas_stay_the_same_bit_for_bit(found: Any, name: str) -> None:
    first, second = found[name]
    assert all(torch.equal(second[key], value) for key, value in first.items())
    assert int(first["step"]) > 0
    assert float(first["train_loss"][2]) > 0
    assert float(first["valid_loss"][2]) > 0


@pytest.mark.parametrize("name", ["plain", "micro_batches", "published"])
def test_losses_of_ranks_are_those_of_one_process(found: Any, name: str) -> None:
    for key, value in found["published_by_hand" if name == "published" else "by_hand"][0].items():
        torch.testing.assert_close(found[name][0][f"module.{key}" if "." in key else key], value, rtol=2e-4, atol=2e-6)


def test_a_validation_loss_of_one_rank_reaches_all(found: Any) -> None:
    assert not torch.equal(found["one_validates"][0]["valid_loss"], found["plain"][0]["valid_loss"])


def test_ranks_that_train_models_of_their_own_stay_alone(found: Any) -> None:
    for same, said in found["apart"]:
        assert same
        assert len(said) == 1
        assert "process_group=None" in said[0]


def test_errors_say_what_to_do(found: Any) -> None:
    first, second = found["errors"]
    assert first["different"].startswith("ValueError: process_group: parameters or gradients differ between the ranks")
    assert first["group"] == (
        "TypeError: process_group: expected 'auto', None or a torch.distributed.ProcessGroup, got 'gloo'"
    )
    assert first["reference"].startswith("TypeError: params: impl='reference' steps whole tensors, got DTensors")
    assert first["published"].startswith("ValueError: impl='cpu': kernels of a rule of others step whole tensors, got")
    assert "this rank has 16 tensors, rank 1 of the process group has 15" in first["other tensors"]
    assert "this rank has 15 tensors, rank 0 of the process group has 16" in second["other tensors"]
    assert first["drift"].startswith("RuntimeError: parameters: not the same on ranks [1] as on rank 0")
    assert first["zero"].startswith("TypeError: ZeroRedundancyOptimizer: ")
    assert "sharded_state=True" in first["zero"]
    assert first["shared state"].startswith("ValueError: process_group: parameters or gradients differ")
    assert {name: text for name, text in first.items() if name != "other tensors"} == {
        name: text for name, text in second.items() if name != "other tensors"
    }


def test_a_step_is_one_sum_over_ranks(found: Any) -> None:
    """With lagged statistics it travels while the model computes, and losses go by themselves."""
    for current, lagged in found["counted"]:
        collectives, sizes, tensors = current
        assert collectives == len(sizes) == 10
        assert all(size <= 1000 * tensors and not behind for size, behind in sizes)
        collectives, sizes, _ = lagged
        assert collectives == len(sizes) == 20
        assert sizes[::2] == [(32, False)] * 10
        assert all(size <= 1000 * tensors and behind for size, behind in sizes[1::2])


def test_gradients_that_lie_in_another_way(found: Any) -> None:
    assert max(found["partial_gradients"]) < 1e-7


def test_changing_sets_of_gradients(found: Any) -> None:
    assert max(found["changing_gradients"]) < 1e-6


def test_a_gradient_that_is_not_finite_on_one_rank(found: Any) -> None:
    assert found["nonfinite"] == [(True, 1), (True, 1)]


def test_memory_is_what_the_docs_count(found: Any) -> None:
    """Twenty bytes for each parameter, half with bfloat16; an average four more; over two ranks half of all."""
    for (name, half, average), _ in found["memory"][0].items():
        of_ranks = [values[name, half, average] for values in found["memory"]]
        whole = (10 if half else 20) + (4 if average else 0)
        if name == "replicated":
            assert of_ranks == [whole, whole]
        else:
            assert sum(of_ranks) == pytest.approx(whole, rel=1e-3)  # the single number lies on both
            assert max(of_ranks) < 0.6 * whole


def test_matrices_go_to_one_rank_and_come_back(found: Any) -> None:
    sizes = [size for sent, _ in found["travelled"] for size in sent]
    elements = found["travelled"][0][1]
    assert sum(sizes) == 2 * 4 * elements
