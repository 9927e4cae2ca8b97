"""Compare a text that is kept with the one that is made now."""

import re

NUMBER = re.compile(r"\d*\.?\d+")


def assert_same_but_for_rounding(now: str, kept: str) -> None:
    """The same words and numbers; a number may differ by a unit of its last decimal: libraries round differently."""
    assert NUMBER.sub("#", now) == NUMBER.sub("#", kept)
    for new, old in zip(NUMBER.findall(now), NUMBER.findall(kept), strict=True):
        places = len(old.partition(".")[2])
        assert new == old or (places and abs(float(new) - float(old)) < 1.1 * 10.0**-places), (new, old)
