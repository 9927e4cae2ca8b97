"""Where random numbers come from: a seed and the names of what they are for, never a global generator.

Every stream is a function of ``(seed, *path)``, so nothing depends on the order or the process in which it is
drawn. NumPy's PCG64 gives the same bits on every machine.
"""

import zlib

import numpy as np

#: A seed that a user may give is below this, so that every generator of NumPy and torch takes it.
SEEDS = 2**32


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
    words = [seed, 0, 0, 0]
    words += [zlib.crc32(name.encode()) if isinstance(name, str) else name for name in path]
    if min(words) >= 0 and max(words) < 2**32:  # what SeedSequence makes of them, in a third of the time
        sequence = np.random.SeedSequence(np.array(words, dtype=np.uint32))
    else:
        sequence = np.random.SeedSequence(seed, spawn_key=words[4:])
    return np.random.Generator(np.random.PCG64(sequence))


def derive(seed: int, *path: int | str) -> int:
    """A new seed, 63 bits, for what ``path`` names."""
    return int(generator(seed, *path).integers(2**63))


def minibatch_key(seed: int, split: str) -> int:
    """Key of the stream of minibatches of ``split``, for :func:`minibatch_rows`."""
    return derive(seed, "minibatches", split)


def minibatch_rows(key: int, step: int, batch: int, rows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Row numbers ``[batch]`` of minibatch ``step`` of a stream, uniform among ``rows``, with replacement.

    Row ``i`` is ``mix(key + (step batch + i + 1) gamma) >> 32``, times ``rows``, divided by ``2^32``: any minibatch can
    be had without those before it. The unroll engine computes the same (csrc/unroll/unroll.h).

    Source: G. Steele, D. Lea, C. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014 (SplitMix64).

    Example:
        >>> minibatch_rows(5, 3, 7, 10).tolist() == minibatch_rows(5, 0, 28, 10).tolist()[21:]
        True
    """
    counter = np.arange(step * batch + 1, (step + 1) * batch + 1, dtype=np.uint64)
    x = np.uint64(key) + counter * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (((x >> np.uint64(32)) * np.uint64(rows)) >> np.uint64(32)).astype(np.int64)
