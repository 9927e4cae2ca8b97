"""How files are written, tried and read: whole or not at all, readable by whom other files are, in UTF-8 everywhere."""

import gzip
import io
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

#: What np.load raises for files that were cut short or are something else.
_DAMAGE = (OSError, ValueError, EOFError, LookupError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error)

#: Colours of a figure in PNG: lines on white need no more, and the file is a quarter as large.
SHADES = 128

#: Bytes that must fit where something is to be written.
ROOM = 1 << 20


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block ends; after an error ``path`` is as it was.

    A crash at any moment leaves the old file or the new one. Permissions are those of any new file; folders are made.
    What is no regular file (``/dev/stdout``) is written as it is.

    Raises:
        OSError: with the path, whatever could not be done.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "new" / "text"
        >>> with replacing(path) as file:
        ...     _ = file.write(b"whole")
        >>> path.read_bytes(), [other.name for other in path.parent.iterdir()]
        (b'whole', ['text'])
    """
    target = Path(os.path.realpath(path))
    direct = target.exists() and not target.is_file() and not target.is_dir()
    partial = target if direct else target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        if not direct:
            target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            if not direct:
                os.fsync(file.fileno())
        if not direct:
            os.replace(partial, target)
    except BaseException as error:
        if not direct:
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole file, see :func:`replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def save_figure(path: str | os.PathLike[str], figure: Any, shades: int = SHADES) -> None:
    """Write a figure of matplotlib, see :func:`replacing`; in the format that the name ends in, or else PNG, of so many
    colours."""
    form = Path(path).suffix[1:] or "png"
    drawn = io.BytesIO()
    figure.savefig(drawn, format=form)
    with replacing(path) as file:
        file.write(fewer_colours(drawn.getvalue(), shades) if form == "png" else drawn.getvalue())


def fewer_colours(png: bytes, shades: int) -> bytes:
    """The picture with so many colours: each shade becomes the colour that most of its pixels have, so that lines keep
    theirs."""
    from PIL import Image  # matplotlib brings it

    with Image.open(io.BytesIO(png)) as image:
        whole, dpi = image.convert("RGB"), image.info["dpi"]
    flat = whole.quantize(shades, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    colours = np.asarray(whole, dtype=np.int64) @ (1 << 16, 1 << 8, 1)
    pairs, counts = np.unique(np.asarray(flat, dtype=np.int64) << 24 | colours, return_counts=True)
    palette = np.zeros(256, dtype=np.int64)
    for pair in pairs[np.argsort(counts, kind="stable")]:
        palette[pair >> 24] = pair & 0xFFFFFF
    flat.putpalette([int(colour) >> shift & 255 for colour in palette[:shades] for shift in (16, 8, 0)])
    written = io.BytesIO()
    flat.save(written, "PNG", optimize=True, dpi=dpi)
    return written.getvalue()


def unpacked(path: Path) -> Path:
    """The file that stands for ``path``: itself, or, where there is only that, ``path.gz``."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.exists() else path


def read_bytes(path: Path) -> bytes:
    """A whole file, or what ``gzip`` made of it, see :func:`unpacked`.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the packed one is damaged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "runs.csv"
        >>> _ = path.with_name("runs.csv.gz").write_bytes(gzip.compress(b"suite"))
        >>> read_bytes(path)
        b'suite'
    """
    found = unpacked(path)
    content = found.read_bytes()
    if found.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{found}: not packed by gzip, or damaged ({error}); copy or make it again") from error


def read_npz(path: Path) -> dict[str, Any]:
    """The arrays of a NumPy file by name; nothing is unpickled.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or something else.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a readable .npz file ({error}); copy or make it again") from error


def check_folder(name: str, path: Path) -> None:
    """Try whether files can be written into the folder ``path``, made or not; nothing is left there.

    Raises:
        ValueError: they cannot; the message begins with ``name``, that of the option.
    """
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{name}: expected a folder, got {str(path)!r}, where {str(there)!r} is a file; name another")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(ROOM))
            file.flush()
    except OSError as error:
        raise ValueError(
            f"{name}: cannot write into {str(path)!r} ({error.strerror}); name another folder, or make room"
        ) from error


def check_file(name: str, path: Path) -> None:
    """Try whether the file ``path`` can be written; nothing is changed.

    Raises:
        ValueError: it cannot; the message begins with ``name``, that of the option.
    """
    if path.is_dir():
        raise ValueError(f"{name}: expected a file, got the folder {str(path)!r}; name a file in it")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{name}: may not write to {str(path)!r}; name another file")
    if path.is_file() or not path.exists():
        check_folder(name, path.parent)
