"""Where random numbers come from: a seed and the names of what they are for, never a global generator.

Every stream is a function of ``(seed, *path)``, so nothing depends on the order or the process in which it is
drawn. NumPy's PCG64 gives the same bits on every machine.
"""

import zlib

import numpy as np


def generator(seed: int, *path: int | str) -> np.random.Generator:
    """The stream of random numbers called ``path`` under ``seed``.

    Raises:
        ValueError: a negative seed.

    Example:
        >>> bool(generator(0, "minibatches", 1).random() == generator(0, "minibatches", 1).random())
        True
    """
    if seed < 0:
        raise ValueError(f"seed: expected a non-negative integer, got {seed}")
    key = [zlib.crc32(name.encode()) if isinstance(name, str) else name for name in path]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def derive(seed: int, *path: int | str) -> int:
    """A new seed, 63 bits, for what ``path`` names."""
    return int(generator(seed, *path).integers(2**63))
