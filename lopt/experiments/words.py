"""Sentences and tables made of numbers. What is lost is said with the words of what is won."""

import math
from collections.abc import Mapping, Sequence

from lopt.evaluation.comparison import NO_WORSE

#: Columns of losses that are compared, and what they are called.
LOSSES = {"train_loss": "training", "test_loss": "test"}

#: How :func:`lopt.experiments.rows.best` chooses.
TUNED = "chosen by the final training loss or, for test losses, by the final validation loss"


def number(value: float) -> str:
    """Three figures, without a zero before the point, as in the other tables.

    Example:
        >>> number(0.12345), number(1234.5), number(0.00001234)
        ('.123', '1,234', '1.23e-05')
    """
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def change(ratio: float) -> str:
    """A ratio in words that go before "that of ...", "equal" being within 2%.

    Example:
        >>> change(0.9), change(1.25), change(3.0), change(1.01)
        ('10% lower than', '25% higher than', '3 times', 'equal (+1%) to')
    """
    if not math.isfinite(ratio):
        return f"not comparable ({ratio}) with"
    if 1 / NO_WORSE <= ratio <= NO_WORSE:
        return f"equal ({100 * (ratio - 1):+.0f}%) to"
    if not 0.5 <= ratio < 2:
        return f"{number(ratio)} times"
    return f"{100 * abs(ratio - 1):.0f}% {'lower' if ratio < 1 else 'higher'} than"


def tally(ratios: Mapping[str, float]) -> str:
    """How often a ratio is below, at and above one, and which are the extremes.

    Example:
        >>> tally({"a": 0.5, "b": 1.0, "c": 1.5})
        'lower in 1 of 3, equal within 2% in 1, higher in 1; from .5 (a) to 1.5 (c), geometric mean .909'
    """
    lower = sum(ratio < 1 / NO_WORSE for ratio in ratios.values())
    higher = sum(not ratio <= NO_WORSE for ratio in ratios.values())
    ends = [choose(ratios, key=lambda name: ratios[name]) for choose in (min, max)]
    mean = math.exp(math.fsum(math.log(ratio) for ratio in ratios.values()) / len(ratios))
    return (
        f"lower in {lower} of {len(ratios)}, equal within 2% in {len(ratios) - lower - higher}, higher in {higher}; "
        f"from {number(ratios[ends[0]])} ({ends[0]}) to {number(ratios[ends[1]])} ({ends[1]}), "
        f"geometric mean {number(mean)}"
    )


def bullets(sentences: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"* {sentence}" for sentence in sentences)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Example:
        >>> print(table(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" if line[0] != "---" else "|---" * len(line) + "|" for line in lines)
