"""lopt/tasks/datasets.py: bytes written by the test come back as the numbers they are; broken bytes are refused."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lopt.tasks import datasets
from lopt.tasks.datasets import Dataset, Split, digits, idx_folder, load, read_idx

SPLITS = ("train", "inner_valid", "outer_valid", "test")


def idx_bytes(array: np.ndarray) -> bytes:
    """An IDX file, written from the format's description and not from the reader."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_folder(folder: Path, train: int = 36, test: int = 8, suffix: str = "") -> dict[str, np.ndarray]:
    """Four IDX files of random 5 x 3 images; labels run through 0, 1, 2."""
    random = np.random.RandomState(7)
    arrays = {}
    for prefix, rows in (("train", train), ("t10k", test)):
        arrays[f"{prefix}-images-idx3-ubyte"] = random.randint(0, 256, (rows, 5, 3))
        arrays[f"{prefix}-labels-idx1-ubyte"] = np.arange(rows) % 3
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        content = idx_bytes(array)
        (folder / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)
    return arrays


def rows_of(split: Split) -> list[tuple[float, ...]]:
    return [tuple(row) for row in split.inputs.flatten(1).tolist()]


# ---- IDX files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (5,), (2, 3), (3, 4, 5), (2, 1, 3, 2)])
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_bytes_come_back(tmp_path: Path, shape: tuple[int, ...], compressed: bool) -> None:
    array = np.random.RandomState(0).randint(0, 256, shape)
    path = tmp_path / "file"  # the content decides about compression, not the name
    path.write_bytes(gzip.compress(idx_bytes(array)) if compressed else idx_bytes(array))
    tensor = read_idx(path)
    assert tensor.dtype == torch.uint8
    assert tensor.shape == shape
    assert np.array_equal(tensor.numpy(), array)


GOOD = idx_bytes(np.arange(12).reshape(3, 4))
ZIPPED = gzip.compress(GOOD, mtime=0)  # the time would be in the names of tests, which processes must agree on


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file.*got nothing"),
        (b"\0", "not an IDX file.*got 00"),
        (b"\x89PNG....", "not an IDX file.*got 89 50 4e 47"),
        (b"\0\0\x0d" + GOOD[3:], "type 8.*got 13"),
        (GOOD[:-1], r"shape \[3, 4\] needs 24 bytes, the file has 23"),
        (GOOD + b"\0", "needs 24 bytes, the file has 25"),
        (GOOD[:7], "needs"),
        (ZIPPED[:-9], "broken gzip"),
        (ZIPPED[:12] + b"junk" + ZIPPED[16:], "broken gzip"),
    ],
)
def test_broken_idx_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        read_idx(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "raw"])
def test_idx_folder(tmp_path: Path, suffix: str, place: str) -> None:
    arrays = write_folder(tmp_path / place, suffix=suffix)
    data = idx_folder(tmp_path, "mine")
    assert (data.name, data.num_classes) == ("mine", 3)
    assert [len(getattr(data, split).targets) for split in SPLITS] == [30, 3, 3, 8]
    images = torch.from_numpy(arrays["t10k-images-idx3-ubyte"]) / 255
    assert torch.equal(data.test.inputs, images.to(torch.float32))
    assert torch.equal(data.test.targets, torch.from_numpy(arrays["t10k-labels-idx1-ubyte"]))
    # the three other splits are the training rows, each once, with their labels
    images = (torch.from_numpy(arrays["train-images-idx3-ubyte"]) / 255).to(torch.float32)
    labels = arrays["train-labels-idx1-ubyte"].tolist()
    expected = dict(zip(rows_of(Split(images, images)), labels, strict=True))
    found = {}
    for split in (data.train, data.inner_valid, data.outer_valid):
        found.update(zip(rows_of(split), split.targets.tolist(), strict=True))
    assert found == expected


def test_idx_folder_is_deterministic(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert_equal(idx_folder(tmp_path, "mine"), idx_folder(tmp_path, "mine"))


def test_missing_labels_are_named_with_the_remedy(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train-labels-idx1-ubyte\[.gz\] is not in .*apt-get install"
    ) as caught:
        load("fashion-mnist", tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_images_and_labels_must_match(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(7)))
    with pytest.raises(ValueError, match=r"t10k-images.*t10k-labels.*shapes \[8, 5, 3\] and \[7\]"):
        idx_folder(tmp_path, "mine")


def test_too_few_rows(tmp_path: Path) -> None:
    write_folder(tmp_path, train=11)
    with pytest.raises(ValueError, match="at least 12 training rows, got 11"):
        idx_folder(tmp_path, "mine")


# ---- digits ----------------------------------------------------------------------------------------------------------


def assert_equal(one: Dataset, other: Dataset) -> None:
    for split in SPLITS:
        for a, b in zip(getattr(one, split), getattr(other, split), strict=True):
            assert torch.equal(a, b)


def test_digits_splits_are_disjoint_and_complete() -> None:
    from sklearn.datasets import load_digits

    data = digits()
    assert [len(getattr(data, split).targets) for split in SPLITS] == [1079, 180, 179, 359]
    found = [
        (*row, target)
        for split in SPLITS
        for row, target in zip(
            (getattr(data, split).inputs.flatten(1) * 16).tolist(), getattr(data, split).targets.tolist(), strict=True
        )
    ]
    bunch = load_digits()
    expected = [(*row, target) for row, target in zip(bunch.data.tolist(), bunch.target.tolist(), strict=True)]
    assert len(set(expected)) == 1797  # no two images are alike, so equal lists mean disjoint splits
    assert sorted(found) == sorted(expected)


def test_digits_splits_are_the_same_everywhere() -> None:
    assert_equal(digits(), digits())
    data = digits()
    assert data.train.inputs.dtype == torch.float32
    assert data.train.targets.dtype == torch.int64
    assert 0.0 == data.train.inputs.min() < data.train.inputs.max() == 1.0
    # known values: they change if the permutation does
    assert data.train.targets[:12].tolist() == [8, 6, 5, 3, 0, 2, 9, 7, 7, 4, 0, 0]
    assert data.test.targets[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]


# ---- load ------------------------------------------------------------------------------------------------------------


def test_load_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "some")
    assert load().name == "digits"
    assert load("digits").name == "digits"
    assert load(folder=tmp_path / "some").name == "some"
    assert load("mnist", tmp_path / "some").name == "mnist"
    monkeypatch.setattr(datasets, "FASHION_MNIST_FOLDER", tmp_path / "some")
    assert load("fashion-mnist").source == f"IDX files in {tmp_path / 'some'}"


def test_load_says_how_to_get_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "FASHION_MNIST_FOLDER", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"fashion-mnist.*apt-get install dataset-fashion-mnist.*--data FOLDER"):
        load("fashion-mnist")
    with pytest.raises(FileNotFoundError, match=r"mnist.*--data FOLDER.*train-images-idx3-ubyte"):
        load("mnist")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load("mnist", tmp_path / "absent")
    with pytest.raises(ValueError, match="leave out --data"):
        load("digits", tmp_path)
    with pytest.raises(ValueError, match="digits, fashion-mnist, mnist, got 'cifar'"):
        load("cifar")  # type: ignore[arg-type]


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        digits()


def test_to_keeps_everything() -> None:
    data = digits()
    moved = data.to("meta")
    assert (moved.name, moved.source, moved.num_classes) == (data.name, data.source, 10)
    assert moved.outer_valid.inputs.device.type == "meta"
    assert moved.outer_valid.inputs.shape == data.outer_valid.inputs.shape
