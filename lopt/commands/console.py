"""Terminals and files that are not UTF-8: what they lack is shown in ASCII, instead of failing."""

import codecs
import io
from typing import TextIO

ASCII = {
    "→": "->",
    "±": "+-",
    "×": "x",
    "²": "^2",
    "…": "...",
    "“": '"',
    "”": '"',
    "’": "'",
    "–": "-",
    "—": "-",
    "•": "*",
}
#: Lines and corners of frames and bars.
ASCII |= dict.fromkeys("─━═╌╍┄┅╸╺╴╶", "-") | dict.fromkeys("│┃║╎╏┆┇", "|")
ASCII |= dict.fromkeys("╭╮╯╰┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇╈╞╡╪", "+")


def show_everywhere(stream: TextIO) -> None:
    """Let ``stream`` write ASCII for characters that its encoding lacks: its look-alike, or else a question mark.

    Example:
        >>> stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        >>> show_everywhere(stream)
        >>> _ = stream.write("64 → 10: 1.2 ± 0.1 \\u2603")
        >>> stream.flush()
        >>> stream.buffer.getvalue()
        b'64 -> 10: 1.2 +- 0.1 ?'
    """
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="lopt-ascii")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(ASCII.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error("lopt-ascii", _in_ascii)
