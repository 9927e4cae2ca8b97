"""Every family: seeds are tasks, configs rebuild them, losses are pure and can be vmapped, Adam gets somewhere."""

import json
import math
import zlib
from itertools import islice

import pytest
import torch

from lopt.meta.unroll import map_tensors
from lopt.tasks import NETWORK_FAMILIES, SAMPLED_FAMILIES, Task, measure, sample_task, task_from_config
from lopt.tasks.data import catalogue
from lopt.tasks.families import Family, with_batch_size
from lopt.tasks.sampled import SampledTask
from lopt.tasks.task import SPLITS, Batch, NoisyBatch

SEEDS = range(3)
ALL: tuple[Family, ...] = (*SAMPLED_FAMILIES, *NETWORK_FAMILIES)


def small(family: Family, seed: int) -> Task:
    """A sampled task with few rows and short texts; the quadratics of few dimensions."""
    while getattr(task := sample_task(seed, [family]), "dim", 0) > 300:
        seed += 1000
    return with_batch_size(task, 6, 10)


def double(task: Task, batch: object) -> Batch | NoisyBatch:
    """The minibatch, and the constants of the task, in float64."""
    for name in ("a", "constants", "masks"):
        if hasattr(task, name):
            task.__dict__[name] = map_tensors(torch.Tensor.double, getattr(task, name))
    return map_tensors(lambda part: part.double() if part.is_floating_point() else part, batch)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ALL)
def test_a_seed_is_a_task_and_its_config_rebuilds_it(family: Family) -> None:
    for seed in range(20):
        task = sample_task(seed, [family])
        assert task == sample_task(seed, [family])
        again = task_from_config(json.loads(json.dumps(task.config)))
        assert again == task
        assert again.name == task.name
    assert len({json.dumps(sample_task(seed, [family]).config) for seed in range(20)}) == 20
    task, again = small(family, 1), small(family, 1)
    for name, value in task.init(5).items():
        assert torch.equal(value, again.init(5)[name])
    for split in SPLITS:
        for first, second in zip(islice(task.batches(3, split), 2), again.batches(3, split), strict=False):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("family", ALL)
def test_minibatches_can_start_anywhere_and_differ(family: Family) -> None:
    task = small(family, 2)
    stream = list(islice(task.batches(4, "train"), 6))
    again = next(task.batches(4, "train", start=5))
    assert all(torch.equal(a, b) for a, b in zip(stream[5], again, strict=True))
    if any(part.numel() > 20 for part in again):
        assert any(not torch.equal(a, b) for a, b in zip(stream[4], stream[5], strict=True))


@pytest.mark.parametrize("family", ALL)
def test_sizes_and_floors_are_what_they_say(family: Family) -> None:
    for seed in SEEDS:
        task = small(family, seed)
        params = task.init(0)
        assert task.num_params == sum(value.numel() for value in params.values())
        assert all(value.dtype == torch.float32 for value in params.values())
        if task.loss_floor is not None:
            assert task.initial_loss(0) >= task.loss_floor


@pytest.mark.parametrize("family", ALL)
def test_vmap_over_parameters_and_minibatches_equals_the_loop(family: Family) -> None:
    """Three perturbed sets of parameters, on one minibatch and each on its own; losses and gradients to 1e-5.

    In float64, in which a kink or a saturated layer does not amplify the order of a sum.
    """
    for seed in SEEDS:
        task = small(family, seed)
        params = {name: value.double() for name, value in task.init(0).items()}
        batches = [double(task, batch) for batch in islice(task.batches(0, "train"), 3)]
        generator = torch.Generator().manual_seed(seed)
        stacked = {
            name: torch.stack([value + 0.01 * k * torch.randn(value.shape, generator=generator) for k in range(3)])
            for name, value in params.items()
        }
        together = type(batches[0])(*(torch.stack(parts) for parts in zip(*batches, strict=True)))
        function = torch.func.grad_and_value(task.loss)
        one_batch = torch.vmap(function, in_dims=(0, None))(stacked, batches[0])
        own_batch = torch.vmap(function, in_dims=(0, 0))(stacked, together)
        for row in range(3):
            single = {name: value[row] for name, value in stacked.items()}
            for (grads, losses), batch in ((one_batch, batches[0]), (own_batch, batches[row])):
                expected_grads, expected = function(single, batch)
                torch.testing.assert_close(losses[row], expected, rtol=1e-5, atol=1e-5)
                for name, grad in expected_grads.items():
                    scale = max(float(grad.abs().max()), 1.0)
                    torch.testing.assert_close(grads[name][row] / scale, grad / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ALL)
def test_loss_and_gradient_are_finite_and_adam_makes_progress(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tasks, in 30 steps; `lopt tasks check` does the same with thousands and, where needed, in 300."""
    monkeypatch.setattr(measure, "STEPS", (30,))
    checks = [measure.check(small(family, seed)) for seed in SEEDS]
    assert all(one.finite_loss and one.finite_gradient for one in checks)
    assert sum(one.progress for one in checks) >= 2


#: A seed, its name, CRC-32 of its initial parameters and of its first minibatch. Of tasks without orthogonal matrices,
#: whose last bits depend on the machine's linear algebra.
CHECKSUMS: dict[Family, tuple[int, str, int, int]] = {
    "mlp": (7, "mlp-index-2-31-24-36-16-16-25-6", 0x5F5B3F6C, 0xC4566C3A),
    "mlp_ae": (7, "mlp_ae-textures-2-85-37-115-72-32-93-linear-l2", 0xE3AA7198, 0x2F90FF34),
    "mlp_vae": (9, "mlp_vae-teacher-2-66-111-45-35-63", 0x37C8F168, 0x6856D1F8),
    "conv_pooling": (8, "conv_pooling-textures-6-21-25-14-17", 0x90C5AFC1, 0x3FD6A645),
    "conv_fc": (7, "conv_fc-templates-7-25-58-41-29-29", 0xD9A2E64D, 0xD675B871),
    "nvp": (7, "nvp-index-11-1x33-21", 0x7EE8CA50, 0xD0813987),
    "maf": (7, "maf-templates-0-1x25-57", 0x2ECE853C, 0xAB7157B4),
    "char_rnn_language_model": (7, "char_rnn_language_model-markov-3-vrnn-36", 0x339BB71C, 0x39973FDE),
    "word_rnn_language_model": (7, "word_rnn_language_model-markov-6-gru-112", 0x09D166CD, 0xE02B8376),
    "rnn_text_classification": (7, "rnn_text_classification-babble-1-vrnn-113-avg", 0x80C135E7, 0x3C7CF23D),
    "quadratic": (12, "quadratic-3-uniform-log-noise", 0x7DC32E2D, 0x48550101),
    "losg_tasks": (7, "losg-MinMaxWell-429", 0xB4424D4A, 0x4A7BD212),
    "transformer_language_model": (7, "transformer_language_model-markov-1-3x64", 0xBE8C0F01, 0x6B58DDEC),
    "vit": (8, "vit-templates-10-2x48-4x4", 0x9BC04046, 0x545E32FB),
    "token_perceptron": (7, "token_perceptron-markov-55-3-3x25-small", 0xE98A7526, 0x1ED4F07B),
    "token_transformer": (7, "token_transformer-brackets-18-11-3x14-small", 0x2D53FF92, 0x377FF74D),
    "text_transformer": (7, "text_transformer-babble-64-32-1x16-small", 0xCA4A6F83, 0xC8BBA6DD),
    "small_convolution": (7, "small_convolution-textures-0-5-7-fan-in", 0xD433459B, 0x1A0D0C69),
}


@pytest.mark.parametrize("family", CHECKSUMS)
def test_tasks_are_the_same_on_every_machine(family: Family) -> None:
    seed, name, *expected = CHECKSUMS[family]
    task = small(family, seed)
    parts = (task.init(0).values(), next(task.batches(0, "train")))
    assert task.name == name
    assert [zlib.crc32(b"".join(value.numpy().tobytes() for value in part)) for part in parts] == expected


def test_noise_belongs_to_the_minibatch() -> None:
    """The same minibatch gives the same loss twice, another one of a stream other noise."""
    for family in ("mlp_vae", "nvp", "maf"):
        task = small(family, 0)
        first, second = islice(task.batches(0, "train"), 2)
        params = task.init(0)
        assert float(task.loss(params, first)) == float(task.loss(params, first))
        assert not torch.equal(first.noise, second.noise)


def test_families_can_be_mixed_with_those_of_the_engine() -> None:
    names = {type(sample_task(seed, ["mixture", "mlp", "quadratic", "noisy_quadratic"])).__name__ for seed in range(60)}
    assert names == {"Perceptron", "MLP", "QuadraticForm", "Quadratic"}


def test_data_sets_are_chosen_from_the_given_ones() -> None:
    for seed in range(20):
        task = sample_task(seed, ["conv_fc"], ["iris", "digits"])
        assert isinstance(task, SampledTask)
        assert task.data.name == "digits"  # type: ignore[attr-defined]  # a convolution needs images
    with pytest.raises(ValueError, match=r"data: expected a data set with images, got \['iris'\]"):
        sample_task(0, ["conv_fc"], ["iris"])
    with pytest.raises(ValueError, match=r"families: expected some of .* got \['image'\]"):
        sample_task(0, ["image"])  # type: ignore[list-item]


def test_bad_configs_are_named() -> None:
    with pytest.raises(ValueError, match=r"config: expected the type to be one of .* got 'Conv'"):
        task_from_config({"type": "Conv"})
    with pytest.raises(ValueError, match=r"unknown fields \['width'\] of MLP"):
        task_from_config({"type": "MLP", "width": 3})
    with pytest.raises(ValueError, match="config: MLP cannot be made of"):
        task_from_config({"type": "MLP", "hidden": [3]})


def test_samplers_have_tasksets_distribution() -> None:
    """Shares of activations and initialisers, widths and batch sizes, over 2,000 tasks; four deviations."""
    tasks = [sample_task(seed, ["mlp"]) for seed in range(2000)]
    for weight, name in ((6 / 16, "relu"), (3 / 16, "tanh"), (1 / 16, "cos")):
        share = sum(task.activation == name for task in tasks) / 2000  # type: ignore[attr-defined]
        assert share == pytest.approx(weight, abs=4 * math.sqrt(weight * (1 - weight) / 2000))
    for weight, name in ((2 / 13, "he_normal"), (1 / 13, "orthogonal")):
        share = sum(task.initialiser.name == name for task in tasks) / 2000  # type: ignore[attr-defined]
        assert share == pytest.approx(weight, abs=4 * math.sqrt(weight * (1 - weight) / 2000))
    widths = [width for task in tasks for width in task.hidden]  # type: ignore[attr-defined]
    assert (min(widths), max(widths)) == (16, 128)
    middle = sum(width <= 45 for width in widths) / len(widths)  # the geometric mean of 16 and 128 is 45.25
    assert middle == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(widths)))
    sizes = [task.data.batch_size for task in tasks]  # type: ignore[attr-defined]
    assert min(sizes) >= 8
    assert max(sizes) <= 512
    augmented = sum(task.data.augmentation is not None for task in tasks if task.data.description.shape[1] > 1)  # type: ignore[attr-defined]
    images = sum(task.data.description.shape[1] > 1 for task in tasks)  # type: ignore[attr-defined]
    assert augmented / images == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / images))
    assert {task.data.name for task in tasks} <= set(catalogue.CORE)  # type: ignore[attr-defined]
