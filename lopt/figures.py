"""What all figures share: colours, and whether they can be drawn."""

#: Colours that stay apart for every kind of colour vision (Okabe and Ito), in order of use.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def require_matplotlib(otherwise: str = "") -> None:
    """Raise ModuleNotFoundError, with the remedy and what could be done ``otherwise``, when figures cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        remedy = "pip install 'lopt[plot]'" + (f", or {otherwise}" if otherwise else "")
        raise ModuleNotFoundError(f"plot: matplotlib is missing; {remedy}") from error
