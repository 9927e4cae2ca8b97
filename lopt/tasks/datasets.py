"""Real data sets as tensors in memory, each with four fixed splits.

``train`` gives gradients; ``inner_valid`` the validation loss an optimizer may see while it trains; on
``outer_valid`` choices (learning rates, meta-parameters) are made; ``test`` is only reported. The splits
belong to the data set and do not depend on a run's seed. Nothing is downloaded and nothing is unpickled;
missing data is an error that says how to get it.
"""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

DatasetName = Literal["digits", "fashion-mnist", "mnist"]

#: Where the Debian package dataset-fashion-mnist puts its files.
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")

#: Images and labels of the training and of the test rows of an MNIST-like data set; each file may end in .gz.
IDX_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_FOUR_FILES = f"its four IDX files ({', '.join(file for pair in IDX_FILES for file in pair)}; .gz or not)"

#: How to get each data set.
REMEDY: dict[str, str] = {
    "digits": "pip install scikit-learn, which carries it",
    "fashion-mnist": "apt-get install dataset-fashion-mnist, or pass --data FOLDER with " + _FOUR_FILES,
    "mnist": "pass --data FOLDER with " + _FOUR_FILES,
}


class Split(NamedTuple):
    """Rows of a data set: ``inputs`` [rows, ...] float32 and ``targets`` [rows] int64."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: str | torch.device) -> "Split":
        """The same rows on another device."""
        return Split(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Dataset:
    """A classification data set with its four splits; ``source`` says in words where it came from."""

    name: str
    source: str
    num_classes: int
    train: Split
    inner_valid: Split
    outer_valid: Split
    test: Split

    def to(self, device: str | torch.device) -> "Dataset":
        """The same data set on another device."""
        splits = (split.to(device) for split in (self.train, self.inner_valid, self.outer_valid, self.test))
        return Dataset(self.name, self.source, self.num_classes, *splits)


def load(name: DatasetName | None = None, folder: Path | None = None) -> Dataset:
    """The data set ``name``, or whatever IDX files lie in ``folder``.

    With a folder the name is only a label. Without one, digits comes from scikit-learn and Fashion-MNIST from
    the folder of its Debian package.

    Raises:
        FileNotFoundError, ModuleNotFoundError: the data is not here; the message says how to get it.
        ValueError: broken files, or a name that does not exist.

    Example:
        >>> load("digits").train.inputs.shape
        torch.Size([1079, 8, 8])
    """
    if name is not None and name not in REMEDY:
        raise ValueError(f"dataset: expected one of {', '.join(REMEDY)}, got {name!r}")
    if folder is not None:
        if name == "digits":
            raise ValueError("dataset: digits comes from scikit-learn, not from a folder; leave out --data")
        return idx_folder(folder, name or folder.resolve().name)
    if name in (None, "digits"):
        return digits()
    if name == "fashion-mnist" and FASHION_MNIST_FOLDER.is_dir():
        return idx_folder(FASHION_MNIST_FOLDER, name)
    raise FileNotFoundError(f"data set {name}: not found on this machine; {REMEDY[str(name)]}")


def digits() -> Dataset:
    """The 1797 handwritten digits of 8 x 8 pixels that scikit-learn carries, divided by 16.

    Splits: 60% train, 10% inner_valid, 10% outer_valid, 20% test, by one fixed permutation
    (``numpy.random.RandomState(0)``, whose stream NumPy has frozen), so that a split has the same rows
    everywhere.

    Source: E. Alpaydin and C. Kaynak, UCI machine learning repository, 1998.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"data set digits: scikit-learn is missing; {REMEDY['digits']}") from error
    bunch = load_digits()
    inputs = torch.from_numpy(bunch.images).to(torch.float32) / 16
    targets = torch.from_numpy(bunch.target).to(torch.int64)
    rows = len(targets)
    order = torch.from_numpy(np.random.RandomState(0).permutation(rows))
    ends = [rows * 20 // 100, rows * 30 // 100, rows * 40 // 100]
    test, inner_valid, outer_valid, train = (
        Split(inputs[index], targets[index]) for index in torch.tensor_split(order, ends)
    )
    return Dataset("digits", "scikit-learn load_digits", 10, train, inner_valid, outer_valid, test)


def idx_folder(folder: Path, name: str) -> Dataset:
    """MNIST, Fashion-MNIST or anything else in the same four IDX files, divided by 255.

    The files may lie in ``folder`` itself or in its ``raw`` subfolder, and may be compressed. The t10k files
    are the test split; of the training rows, in one fixed permutation, a twelfth (5000 of 60000) is
    inner_valid and another twelfth outer_valid.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or images and labels do not match.
    """
    (inputs, targets), test = (_idx_pair(folder, name, *files) for files in IDX_FILES)
    rows = len(targets)
    if rows < 12:
        raise ValueError(f"{folder}: expected at least 12 training rows, got {rows}; get the full files")
    order = torch.from_numpy(np.random.RandomState(0).permutation(rows))
    index = torch.tensor_split(order, [rows // 12, rows // 12 * 2])
    inner_valid, outer_valid, train = (Split(inputs[i], targets[i]) for i in index)
    num_classes = int(max(targets.max(), test.targets.max())) + 1
    return Dataset(name, f"IDX files in {folder}", num_classes, train, inner_valid, outer_valid, test)


def read_idx(path: Path) -> Tensor:
    """The unsigned bytes of one IDX file, compressed or not, as a uint8 tensor of the shape its header gives.

    Layout: two zero bytes, a type code (8 = unsigned byte), the number of dimensions, each dimension as a
    big-endian uint32, then the bytes in row-major order.

    Raises:
        ValueError: the file is not that; the message names it.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: broken gzip file ({error}); get it again") from error
    if content[:2] != b"\0\0" or len(content) < 4:
        begin = content[:4].hex(" ") or "nothing"
        raise ValueError(f"{path}: not an IDX file: expected two zero bytes first, got {begin}; get it again")
    code, rank = content[2], content[3]
    if code != 8:
        raise ValueError(f"{path}: expected IDX type 8 (unsigned bytes), got {code}; convert the file")
    header = 4 + 4 * rank
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4))
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise ValueError(
            f"{path}: shape {list(shape)} needs {expected} bytes, the file has {len(content)}; get it again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def _idx_pair(folder: Path, name: str, images_name: str, labels_name: str) -> Split:
    images, labels = read_idx(_find(folder, name, images_name)), read_idx(_find(folder, name, labels_name))
    if images.ndim < 2 or labels.ndim != 1 or not 0 < len(images) == len(labels):
        raise ValueError(
            f"{folder}: expected in {images_name} and {labels_name} as many images as labels, at least one; "
            f"got shapes {list(images.shape)} and {list(labels.shape)}; get them again"
        )
    return Split(images.to(torch.float32) / 255, labels.to(torch.int64))


def _find(folder: Path, name: str, file: str) -> Path:
    remedy = REMEDY.get(name, REMEDY["mnist"])
    if not folder.is_dir():
        raise FileNotFoundError(f"data set {name}: {folder} is not a folder; {remedy}")
    for path in (place / f"{file}{end}" for place in (folder, folder / "raw") for end in ("", ".gz")):
        if path.is_file():
            return path
    raise FileNotFoundError(f"data set {name}: {file}[.gz] is not in {folder}; {remedy}")
